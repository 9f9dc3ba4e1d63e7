"""AdapterModuleMixin: adapters in one module."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from graftwerk.adapters.mixin import AdapterSlotMixin
from graftwerk.adapters.slots import SlotCall
from graftwerk.nemo import AdapterModuleMixin, LinearAdapter, LinearAdapterConfig, allow_target
from graftwerk.nemo.adapter_mixin_strategies import AbstractAdapterStrategy
from tests.graftwerk.nemo.modules import DIM, Adapted, disturb, linear, rows


@allow_target
class Normed(LinearAdapter):
    """A LinearAdapter with a batch norm of its own."""

    def __init__(self, in_features: int, dim: int):
        super().__init__(in_features, dim)
        self.bn = nn.BatchNorm1d(in_features)

    def forward(self, x):
        return super().forward(self.bn(x))


NORMED = {"_target_": "tests.graftwerk.nemo.test_mixins.Normed", "in_features": DIM, "dim": 3}


@pytest.fixture
def module() -> Adapted:
    return Adapted()


@pytest.mark.parametrize(
    "cfg",
    [
        linear(),
        OmegaConf.create(linear()),
        LinearAdapterConfig(DIM, 4),
        OmegaConf.structured(LinearAdapterConfig(DIM, 4)),
        LinearAdapter(in_features=DIM, dim=4),
        {
            **{k: v for k, v in linear().items() if k != "_target_"},
            "__target__": linear()["_target_"],
        },
    ],
    ids=["dict", "DictConfig", "dataclass", "structured", "ready module", "__target__"],
)
def test_every_form_of_configuration_makes_the_adapter(module, cfg):
    module.add_adapter("a", cfg)
    adapter = module.get_adapter_module("a")
    assert isinstance(adapter, LinearAdapter)
    assert (adapter.in_features, adapter.dim) == (DIM, 4)
    kept = module.get_adapter_cfg("a")
    assert kept["_target_"] == linear()["_target_"]
    assert (kept.in_features, kept.dim, kept.enabled) == (DIM, 4, True)
    assert "__target__" not in kept


def test_nothing_is_there_before_the_first_adapter(module):
    assert not module.is_adapter_available()
    assert module.get_enabled_adapters() == []
    assert module.get_adapter_module("a") is None
    assert module.get_adapter_cfg("a") is None
    assert module.get_accepted_adapter_types() == set()
    assert not hasattr(module, "adapter_layer")


def test_a_ready_module_is_used_as_it_is(module):
    adapter = LinearAdapter(DIM, 4)
    module.add_adapter("a", adapter)
    assert module.adapter_layer["a"] is adapter


def test_the_state_has_the_documented_names(module):
    module.add_adapter("a", linear())
    assert isinstance(module.adapter_layer, nn.ModuleDict)
    assert isinstance(module.adapter_cfg, DictConfig)
    assert module.adapter_name == "a"


def test_the_configuration_that_was_given_is_not_changed(module):
    cfg = OmegaConf.create(linear(enabled=False))
    before = OmegaConf.to_container(cfg)
    module.add_adapter("a", cfg)
    module.set_enabled_adapters("a")
    assert OmegaConf.to_container(cfg) == before


def test_an_adapter_is_enabled_unless_its_configuration_says_otherwise(module):
    module.add_adapter("a", linear())
    module.add_adapter("b", linear(enabled=False))
    assert module.get_enabled_adapters() == ["a"]
    assert [module.get_adapter_cfg(name).enabled for name in "ab"] == [True, False]


def test_keyword_arguments_win_over_the_configuration(module):
    module.add_adapter("a", linear(dim=4), dim=2)
    assert module.get_adapter_module("a").dim == 2


def test_interpolations_are_resolved(module):
    whole = OmegaConf.create({"width": 3, "adapter": linear()})
    whole.adapter.dim = "${width}"
    module.add_adapter("a", whole.adapter)
    assert module.get_adapter_module("a").dim == 3


def test_a_new_adapter_is_in_the_mode_of_its_module(module):
    module.eval()
    module.add_adapter("a", linear(dropout=0.5))
    assert not module.get_adapter_module("a").training


def test_a_new_adapter_is_where_the_weights_of_its_module_are():
    module = Adapted().to("meta")
    module.add_adapter("a", linear())
    assert {weight.device.type for weight in module.adapter_layer.parameters()} == {"meta"}


def test_a_duplicate_name_is_a_value_error(module):
    module.add_adapter("a", linear(dim=4))
    first = module.get_adapter_module("a")
    with pytest.raises(ValueError, match="exists already"):
        module.add_adapter("encoder:a", linear(dim=2))
    assert module.get_adapter_module("a") is first
    assert module.get_adapter_cfg("a").dim == 4


@pytest.mark.parametrize("name", ["global_cfg", "encoder:global_cfg", "", "a.b", "keys", "train"])
def test_a_name_that_cannot_be_used_is_a_value_error(module, name):
    with pytest.raises(ValueError, match="name"):
        module.add_adapter(name, linear())
    assert not module.is_adapter_available()


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"in_features": DIM, "dim": 4}, "_target_"),
        (5, "LinearAdapterConfig"),
        (LinearAdapterConfig, "LinearAdapterConfig"),
        (linear(width=3), "width"),
        ({"_target_": linear()["_target_"], "dim": 3}, "in_features"),
        (linear(dim="???"), "dim"),
        (OmegaConf.create(linear(dim="???")), "dim"),
        (linear(dim=object()), "dim is of type object"),
        ({**linear(), "__target__": "torch.nn.ReLU"}, "differ"),
        ({"_target_": "graftwerk.adapters.strategies.ResidualAddAdapterStrategy"}, "Module"),
    ],
)
def test_a_wrong_configuration_is_a_value_error_that_names_it(module, cfg, said):
    with pytest.raises(ValueError, match=said) as error:
        module.add_adapter("a", cfg)
    assert "\n" not in str(error.value)
    assert not module.is_adapter_available()


@pytest.mark.parametrize("name", ["a", "encoder:a"])
def test_adapters_are_found_by_plain_name_and_with_a_module(module, name):
    module.add_adapter("encoder:a", linear())
    assert module.get_adapter_module(name) is module.adapter_layer["a"]
    assert module.get_adapter_cfg(name) == module.adapter_cfg["a"]
    module.set_enabled_adapters(name, enabled=False)
    assert module.get_enabled_adapters() == []


@pytest.mark.parametrize("name", ["b", "encoder:b"])
def test_an_unknown_name_has_no_module_and_no_configuration(module, name):
    module.add_adapter("a", linear())
    assert module.get_adapter_module(name) is None
    assert module.get_adapter_cfg(name) is None


def test_adapters_are_available_when_all_are_disabled(module):
    module.add_adapter("a", linear())
    module.set_enabled_adapters(enabled=False)
    assert module.is_adapter_available()
    assert module.get_enabled_adapters() == []


def test_enabled_names_come_in_the_order_of_addition(module):
    for name in "cab":
        module.add_adapter(name, linear())
    module.set_enabled_adapters(enabled=False)
    for name in "bc":
        module.set_enabled_adapters(name)
    assert module.get_enabled_adapters() == ["c", "b"]


def test_no_name_means_all(module):
    for name in "ab":
        module.add_adapter(name, linear(enabled=False))
    module.set_enabled_adapters(enabled=True)
    assert module.get_enabled_adapters() == ["a", "b"]


def test_enabling_without_any_adapter_is_a_value_error(module):
    with pytest.raises(ValueError, match="no adapter"):
        module.set_enabled_adapters(enabled=True)


def test_enabling_the_reserved_name_is_a_value_error(module):
    module.add_adapter("a", linear())
    with pytest.raises(ValueError, match="reserved"):
        module.set_enabled_adapters("global_cfg")


def test_enabling_an_unknown_name_is_a_key_error(module):
    module.add_adapter("a", linear())
    with pytest.raises(KeyError, match="'b'"):
        module.set_enabled_adapters("b")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a", ("", "a")), ("encoder:a", ("encoder", "a")), ("a:b:c", ("a", "b:c"))],
)
def test_names_are_split_at_the_first_colon(module, name, parts):
    assert module.resolve_adapter_module_name_(name) == parts


def test_the_module_of_a_plain_name_is_looked_up_in_the_configuration(module):
    modules = {"a": "encoder"}
    module.adapter_cfg = OmegaConf.create(
        {"global_cfg": {"adapter_meta_cfg": {"modules": modules}}}
    )
    assert module.resolve_adapter_module_name_("a") == ("encoder", "a")
    assert module.resolve_adapter_module_name_("b") == ("", "b")


def test_accepted_types_are_given_as_classes_or_allowed_paths(module):
    module.set_accepted_adapter_types([nn.Linear, linear()["_target_"]])
    assert module.get_accepted_adapter_types() == {nn.Linear, LinearAdapter}


@pytest.mark.parametrize("kind", [int, AbstractAdapterStrategy, 5, "torch.nn", "os.system"])
def test_an_accepted_type_that_is_no_module_class_is_a_value_error(module, kind):
    with pytest.raises(ValueError):
        module.set_accepted_adapter_types([kind])


@pytest.mark.parametrize("cfg", [linear(), LinearAdapter(DIM, 4)])
def test_a_type_that_is_not_accepted_is_a_value_error(module, cfg):
    module.set_accepted_adapter_types([nn.Linear])
    with pytest.raises(ValueError, match=r"LinearAdapter.*Linear"):
        module.add_adapter("a", cfg)
    assert not module.is_adapter_available()


def test_a_subclass_of_an_accepted_type_is_accepted(module):
    module.set_accepted_adapter_types([LinearAdapter])
    module.add_adapter("a", NORMED)
    assert module.get_enabled_adapters() == ["a"]


def test_adapters_of_types_that_are_no_longer_accepted_are_not_enabled(module):
    module.add_adapter("a", linear())
    module.add_adapter("b", NORMED)
    module.set_accepted_adapter_types([Normed])
    assert module.get_enabled_adapters() == ["b"]


def test_a_configuration_can_be_checked_against_types_of_the_caller(module):
    module.check_supported_adapter_type_(OmegaConf.create(linear()), [LinearAdapter])
    with pytest.raises(ValueError, match="accepted"):
        module.check_supported_adapter_type_(OmegaConf.create(linear()), [nn.Conv1d])


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("count", [1, 3])
def test_at_birth_adapters_change_nothing_and_run_in_order(module, position, count):
    x = rows()
    before = module(x)
    names = ["c", "a", "b"][:count]
    for name in names:
        module.add_adapter(name, linear(norm_position=position))
    torch.testing.assert_close(module(x), before, atol=1e-6, rtol=0)
    assert module.ran == names


def test_each_adapter_gets_what_the_one_before_gave(module):
    module.add_adapter("a", linear())
    module.add_adapter("b", linear())
    disturb(module.adapter_layer)
    a, b = module.adapter_layer.values()
    x = rows()
    after_a = x + a(x)
    torch.testing.assert_close(module.forward_enabled_adapters(x), after_a + b(after_a))
    module.set_enabled_adapters("a", False)
    torch.testing.assert_close(module.forward_enabled_adapters(x), x + b(x))


def test_an_adapter_without_a_strategy_is_an_attribute_error(module):
    module.add_adapter("a", linear())
    del module.adapter_layer["a"].adapter_strategy
    with pytest.raises(AttributeError, match="'a' has no adapter_strategy"):
        module(rows())


def test_a_strategy_can_be_replaced(module):
    class Multiply(AbstractAdapterStrategy):
        def forward(self, input, adapter, *, module):
            return input * adapter(input)

    module.add_adapter("a", linear())
    module.adapter_layer["a"].adapter_strategy = Multiply()
    assert torch.equal(module(rows()), torch.zeros(len(rows()), DIM))


def test_the_step_of_one_adapter_can_be_overridden():
    class Halved(Adapted):
        def forward_single_enabled_adapter_(
            self, input, adapter_module, *, adapter_name, adapter_strategy
        ):
            self.seen = (adapter_module, adapter_name, adapter_strategy)
            return input / 2

    module = Halved()
    module.add_adapter("a", linear())
    x = rows()
    assert torch.equal(module.forward_enabled_adapters(x), x / 2)
    adapter = module.adapter_layer["a"]
    assert module.seen == (adapter, "a", adapter.adapter_strategy)


def test_unfreezing_trains_the_enabled_adapters_alone(module):
    module.add_adapter("a", linear())
    module.add_adapter("b", linear(enabled=False))
    module.requires_grad_(False).eval()
    module.unfreeze_enabled_adapters()
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    own = {f"adapter_layer.a.{name}" for name, _ in module.adapter_layer["a"].named_parameters()}
    assert trained == own
    assert module.adapter_layer["a"].training
    assert not module.adapter_layer["b"].training


def test_unfreezing_stops_batch_norms_but_those_of_enabled_adapters(module):
    module.add_adapter("a", NORMED)
    module.add_adapter("b", {**NORMED, "enabled": False})
    module.train()
    module.unfreeze_enabled_adapters()
    a, b = module.adapter_layer["a"].bn, module.adapter_layer["b"].bn
    for stopped in (module.bn, b):
        assert not stopped.training
        assert not stopped.track_running_stats
        assert not stopped.weight.requires_grad
        assert not stopped.bias.requires_grad
    assert a.training
    assert a.track_running_stats
    assert a.weight.requires_grad


def test_batch_norms_can_be_left_alone(module):
    module.add_adapter("a", linear())
    module.unfreeze_enabled_adapters(freeze_batchnorm=False)
    assert module.bn.training
    assert module.bn.track_running_stats
    assert module.bn.weight.requires_grad


def test_a_batch_norm_without_weights_is_stopped_too(module):
    module.bn = nn.BatchNorm1d(DIM, affine=False)
    module.add_adapter("a", linear())
    module.unfreeze_enabled_adapters()
    assert not module.bn.track_running_stats


def test_an_adapter_chooses_what_of_it_is_trained(module):
    @allow_target
    class NormAlone(LinearAdapter):
        def adapter_unfreeze(self):
            self.module[0].requires_grad_(True)

    module.add_adapter("a", NormAlone(DIM, 4))
    module.requires_grad_(False)
    module.unfreeze_enabled_adapters()
    trained = [name for name, weight in module.named_parameters() if weight.requires_grad]
    assert trained == ["adapter_layer.a.module.0.weight", "adapter_layer.a.module.0.bias"]


def test_unfreezing_reaches_modules_within():
    outer = nn.Module()
    outer.__class__ = type("Outer", (nn.Module, AdapterModuleMixin), {})
    outer.inner = Adapted()
    outer.inner.add_adapter("a", linear())
    outer.requires_grad_(False)
    outer.unfreeze_enabled_adapters()
    assert all(weight.requires_grad for weight in outer.inner.adapter_layer.parameters())
    assert not outer.inner.fc.weight.requires_grad


@pytest.mark.parametrize("mode", ["as unfreezing left it", "train() called again"])
def test_with_all_disabled_the_outputs_are_the_bases_even_after_training(module, mode):
    x = rows()
    module.train()(rows(50))  # so that the averages are not those of birth
    base = module.eval()(x)
    module.add_adapter("a", linear())
    module.add_adapter("b", NORMED)
    module.requires_grad_(False)
    module.unfreeze_enabled_adapters()
    if mode == "train() called again":
        module.train()
    optimizer = torch.optim.SGD([w for w in module.parameters() if w.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(module.eval()(x), base)
    module.set_enabled_adapters(enabled=False)
    assert torch.equal(module(x), base)


class Place(AdapterSlotMixin, nn.Module):
    """What an engine's slot is."""

    def __init__(self):
        super().__init__()
        self.adapter_layer = nn.ModuleDict()
        self.active = None

    def forward(self, x):
        return x if self.active is None else self.active(SlotCall(x))


def test_the_mixin_costs_a_slot_without_adapters_nothing():
    slot, x = Place(), rows()
    assert slot(x) is x
    assert not slot.is_adapter_available()
    assert set(vars(slot)) == {*vars(nn.Module()), "active"}
    assert type(AdapterSlotMixin) is type  # isinstance stays the quick one


def test_a_slot_answers_for_what_the_model_put_there():
    slot = Place()
    slot.adapter_layer["a"] = nn.Linear(DIM, DIM)
    assert isinstance(slot, AdapterModuleMixin)
    assert slot.is_adapter_available()
    assert slot.get_adapter_module("encoder:a") is slot.adapter_layer["a"]
    assert slot.get_enabled_adapters() == []
    x = rows()
    assert slot.forward_enabled_adapters(SlotCall(x)) is x
    slot.active, slot.active_names = lambda call: 2 * call.output, ("b", "a")
    assert slot.get_enabled_adapters() == ["a"]
    assert torch.equal(slot.forward_enabled_adapters(SlotCall(x)), 2 * x)
    slot.requires_grad_(False)
    slot.unfreeze_enabled_adapters()
    assert slot.adapter_layer["a"].weight.requires_grad


def test_a_slot_is_changed_at_the_model():
    with pytest.raises(ValueError, match="add 'a' to the model"):
        Place().add_adapter("a", linear())
    with pytest.raises(ValueError, match="at the model"):
        Place().set_enabled_adapters("a")


def test_the_core_imports_nothing_of_the_face():
    for name in ("mixin", "strategies", "targets", "access"):
        source = Path("src/graftwerk/adapters", f"{name}.py")
        source = Path(__file__).resolve().parents[3] / source
        assert "from graftwerk.nemo" not in source.read_text()
