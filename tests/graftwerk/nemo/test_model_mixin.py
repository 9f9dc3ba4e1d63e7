"""AdapterModelPTMixin: adapters in the modules of a model, remembered by its configuration."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from graftwerk.nemo import AdapterModelPTMixin, LinearAdapter, ModelPT
from tests.graftwerk.nemo.modules import DIM, Adapted, Bare, HandsOn, Plain, disturb, linear, rows

# Each behaviour holds whether the mixin hands calls on to the modules, or the model does.
KINDS = pytest.mark.parametrize("kind", [Bare, HandsOn])


def build(kind: type[Bare], **settings: bool) -> Bare:
    """A model in evaluation mode; settings go to `cfg.adapters.global_cfg`."""
    torch.manual_seed(0)
    cfg = {"adapted": True}
    if settings:
        cfg |= {"adapters": {"global_cfg": settings}}
    return kind(OmegaConf.create(cfg)).eval()


def held(model: Bare) -> dict[str, list[str]]:
    """Adapters in the encoder and in the decoder."""
    return {
        name: list(getattr(getattr(model, name), "adapter_layer", {}))
        for name in ("encoder", "decoder")
    }


def modules_of(model: Bare) -> dict[str, str]:
    """Adapter -> module, as the configuration has it."""
    return dict(model.cfg.adapters.global_cfg.adapter_meta_cfg.modules)


def values(cfg) -> object:
    """A configuration as plain values."""
    return OmegaConf.to_container(cfg)


@KINDS
def test_a_plain_name_goes_to_the_default_module(kind):
    model = build(kind)
    model.add_adapter("a", linear())
    assert held(model) == {"encoder": ["a"], "decoder": []}
    assert modules_of(model) == {"a": ""}
    assert model.cfg.adapters.a.dim == 4
    assert model.cfg.adapters.a.enabled is True


@KINDS
@pytest.mark.parametrize("module", ["encoder", "decoder"])
def test_a_name_with_a_module_goes_to_that_module(kind, module):
    model = build(kind)
    model.add_adapter(f"{module}:a", linear())
    assert [name for name, adapters in held(model).items() if adapters] == [module]
    assert modules_of(model) == {"a": module}
    assert model.get_enabled_adapters() == ["a"]


@KINDS
@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_global_cfg_says_where_plain_names_go(kind, encoder, decoder):
    model = build(kind, encoder_adapter=encoder, decoder_adapter=decoder)
    model.add_adapter("a", linear())
    assert held(model) == {"encoder": ["a"] * encoder, "decoder": ["a"] * decoder}
    assert model.is_adapter_available() is (encoder or decoder)
    assert model.cfg.adapters.global_cfg.encoder_adapter is encoder


@KINDS
def test_the_modules_share_the_configuration_of_the_model(kind):
    model = build(kind)
    model.add_adapter("a", linear())
    for module in (model, model.encoder, model.decoder):
        assert module.adapter_cfg is model.cfg.adapters
    model.cfg.adapters.a.enabled = False
    assert model.encoder.get_enabled_adapters() == []


def test_update_adapter_cfg_hands_on_the_object_itself():
    model, cfg = build(Bare), OmegaConf.create({"a": {"enabled": False}})
    model.update_adapter_cfg(cfg)
    assert all(module.adapter_cfg is cfg for module in (model, model.encoder, model.decoder))


@KINDS
@pytest.mark.parametrize("again", ["a", "decoder:a"])
def test_a_duplicate_name_leaves_the_configuration_as_it_was(kind, again):
    model = build(kind)
    model.add_adapter("a", linear(dim=4))
    before = values(model.cfg)
    with pytest.raises(ValueError, match="exists already"):
        model.add_adapter(again, linear(dim=2))
    assert values(model.cfg) == before
    assert held(model) == {"encoder": ["a"], "decoder": []}


@KINDS
def test_a_model_that_takes_no_adapters_says_so(kind):
    model = kind(OmegaConf.create({"adapted": False}))
    with pytest.raises(ValueError, match="takes no adapters"):
        model.add_adapter("a", linear())
    assert "adapters" not in model.cfg


def test_the_models_own_check_speaks_on_every_question():
    model = HandsOn(OmegaConf.create({"adapted": False}))
    for ask in (model.get_enabled_adapters, model.is_adapter_available, model.set_enabled_adapters):
        with pytest.raises(ValueError, match="the encoder takes no adapters"):
            ask()


def test_an_adapter_that_cannot_be_made_leaves_no_trace():
    model = build(Bare)
    with pytest.raises(ValueError, match="dim"):
        model.add_adapter("a", linear(dim=-1))
    assert "adapters" not in model.cfg
    model.add_adapter("b", linear())
    before = values(model.cfg)
    with pytest.raises(ValueError, match="dim"):
        model.add_adapter("a", linear(dim=-1))
    assert values(model.cfg) == before
    assert held(model) == {"encoder": ["b"], "decoder": []}


def test_a_module_that_the_model_does_not_have_is_a_value_error():
    model = build(Bare)
    with pytest.raises(ValueError, match="encoder, decoder"):
        model.add_adapter("joint:a", linear())
    assert "adapters" not in model.cfg


@KINDS
@pytest.mark.parametrize("name", ["decoder:b:c", ":b:c"])
def test_a_name_may_hold_colons_behind_the_first(kind, name, tmp_path):
    model = build(kind)
    model.add_adapter(name, linear())
    home = "decoder" if name.startswith("decoder") else "encoder"
    assert held(model)[home] == ["b:c"]
    assert held(kind(model.cfg)) == held(model)
    model.save_adapters(tmp_path / "a.pt")
    fresh = build(kind)
    fresh.load_adapters(tmp_path / "a.pt")
    assert held(fresh) == held(model)


@KINDS
@pytest.mark.parametrize("name", ["global_cfg", "encoder:global_cfg"])
def test_the_reserved_name_is_a_value_error(kind, name):
    model = build(kind)
    with pytest.raises(ValueError, match="reserved"):
        model.add_adapter(name, linear())
    model.add_adapter("a", linear())
    with pytest.raises(ValueError, match="reserved"):
        model.set_enabled_adapters(name)


@KINDS
def test_enabling_before_any_adapter_is_an_attribute_error(kind):
    with pytest.raises(AttributeError, match="no adapter was added"):
        build(kind).set_enabled_adapters(enabled=True)


@KINDS
@pytest.mark.parametrize("name", ["b", "encoder:b", "decoder:a"])
def test_enabling_an_unknown_name_is_a_key_error(kind, name):
    model = build(kind)
    model.add_adapter("encoder:a", linear())
    with pytest.raises(KeyError, match="encoder:a"):
        model.set_enabled_adapters(name, enabled=False)
    assert model.get_enabled_adapters() == ["a"]


@KINDS
@pytest.mark.parametrize("name", ["b", "decoder:b"])
def test_plain_names_and_names_with_a_module_mean_the_same_adapter(kind, name):
    model = build(kind)
    model.add_adapter("encoder:a", linear())
    model.add_adapter("decoder:b", linear())
    assert model.get_adapter_module(name) is model.decoder.adapter_layer["b"]
    assert model.get_adapter_cfg(name) == model.cfg.adapters.b
    model.set_enabled_adapters(name, enabled=False)
    assert model.get_enabled_adapters() == ["a"]
    assert model.is_adapter_available()


@pytest.mark.parametrize("name", ["c", "encoder:b", "decoder:c"])
def test_a_name_in_the_wrong_module_has_neither_module_nor_configuration(name):
    model = build(Bare)
    model.add_adapter("decoder:b", linear())
    assert model.get_adapter_module(name) is None
    assert model.get_adapter_cfg(name) is None


@KINDS
def test_some_adapters_of_each_module_run_in_order(kind):
    model, x = build(kind), rows()
    before = model(x)
    for name in ("a", "encoder:b", "decoder:c", "decoder:d"):
        model.add_adapter(name, linear())
    model.set_enabled_adapters("a", enabled=False)
    model.set_enabled_adapters("d", enabled=False)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)
    assert (model.encoder.ran, model.decoder.ran) == (["b"], ["c"])
    assert model.get_enabled_adapters() == ["b", "c"]


@KINDS
def test_only_the_enabled_adapters_train(kind):
    model = build(kind, encoder_adapter=True, decoder_adapter=True)
    base = model.num_weights
    model.add_adapter("a", linear())
    model.add_adapter("decoder:b", linear(enabled=False))
    model.freeze()
    model.unfreeze_enabled_adapters()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("adapter_layer.a." in name for name in trained)
    assert model.num_weights == 2 * (2 * DIM * 4 + 2 * DIM) != base
    assert not model.encoder.bn.track_running_stats


@KINDS
def test_with_all_disabled_the_model_gives_its_old_outputs_after_training(kind):
    model, x = build(kind), rows()
    base = model(x)
    model.add_adapter("a", linear())
    model.add_adapter("decoder:b", linear())
    model.freeze()
    model.unfreeze_enabled_adapters()
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)
    for _ in range(5):
        model.train()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(model.eval()(x), base)
    model.set_enabled_adapters(enabled=False)
    assert torch.equal(model(x), base)


@KINDS
def test_set_up_adds_every_adapter_of_the_configuration_but_global_cfg(kind):
    model = build(kind)
    model.add_adapter("decoder:a", linear(dim=3))
    model.add_adapter("b", linear(dim=2))
    model.set_enabled_adapters("b", enabled=False)
    again = kind(model.cfg)
    assert held(again) == {"encoder": ["b"], "decoder": ["a"]}
    assert values(again.cfg.adapters) == values(model.cfg.adapters)
    assert again.get_enabled_adapters() == ["a"]
    with pytest.raises(ValueError, match="exists already"):  # the guard of set-up is off again
        again.add_adapter("a", linear())


def test_a_model_that_names_no_modules_hands_on_to_all_that_take_adapters():
    class Simple(ModelPT, AdapterModelPTMixin):
        def __init__(self):
            super().__init__({})
            self.blocks = nn.ModuleList([Adapted(), Adapted()])

    model = Simple()
    assert model.adapter_module_names == [""]
    assert model.default_adapter_module_name is None
    model.add_adapter("a", linear())
    model.add_adapter("blocks:b", linear())
    assert [list(block.adapter_layer) for block in model.blocks] == [["a", "b"]] * 2


def test_any_module_with_a_cfg_can_be_the_model():
    class NoModelPT(nn.Module, AdapterModelPTMixin):
        def __init__(self):
            super().__init__()
            self.cfg = OmegaConf.create({})
            self.inner = Adapted()

    model = NoModelPT()
    model.add_adapter("a", linear())
    assert model.get_enabled_adapters() == ["a"]


class WithPlainChildren(ModelPT, AdapterModelPTMixin):
    """A model whose modules were made without adapters in mind."""

    def __init__(self):
        path = f"{Plain.__module__}.{Plain.__qualname__}"
        super().__init__({"child": {"_target_": path}, "others": [{"target": path}]})
        self.child, self.nested = Plain(), nn.Sequential(Plain())


@pytest.mark.parametrize("update_config", [True, False])
def test_immediate_children_of_registered_classes_are_replaced(update_config, caplog):
    model = WithPlainChildren()
    weights = model.child.fc.weight
    with caplog.at_level("INFO"):
        model.replace_adapter_compatible_modules(update_config=update_config)
    assert type(model.child) is Adapted
    assert model.child.fc.weight is weights
    assert type(model.nested[0]) is Plain
    path = f"{Plain.__module__}.{'Adapted' if update_config else 'Plain'}"
    assert (model.cfg.child._target_, model.cfg.others[0].target) == (path, path)
    assert "child" in caplog.text
    model.add_adapter("a", linear())
    assert model.get_enabled_adapters() == ["a"]


def test_replacing_can_be_silent(caplog):
    with caplog.at_level("INFO"):
        WithPlainChildren().replace_adapter_compatible_modules(verbose=False)
    assert caplog.text == ""


def test_a_ready_module_is_remembered_by_its_own_description():
    model, adapter = build(Bare), LinearAdapter(DIM, 3, "gelu")
    model.add_adapter("a", adapter)
    assert model.encoder.adapter_layer["a"] is adapter
    again = Bare(model.cfg)
    assert again.get_adapter_module("a").as_config() == adapter.as_config()


def test_disturbed_adapters_change_the_output():
    model, x = build(Bare), rows()
    before = model(x)
    model.add_adapter("decoder:a", linear())
    disturb(model.decoder.adapter_layer)
    assert not torch.allclose(model(x), before)
