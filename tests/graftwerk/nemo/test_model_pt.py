"""ModelPT: a model with a configuration, saved and restored whole."""

import io
import tarfile

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError

from graftwerk.errors import UserError
from graftwerk.nemo import ModelPT, allow_target
from tests.graftwerk.nemo.modules import DIM, Bare, HandsOn, disturb, linear, rows

KINDS = pytest.mark.parametrize("kind", [Bare, HandsOn])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.nemo"


def with_adapters(kind: type[Bare] = Bare) -> Bare:
    model = kind(OmegaConf.create({"adapted": True}))
    model.add_adapter("a", linear(dim=2))
    model.add_adapter("decoder:b", linear(norm_position="post"))
    model.add_adapter("decoder:c", linear())
    model.set_enabled_adapters("c", enabled=False)
    disturb(model)
    return model.eval()


def rewrite(path, **members: bytes) -> None:
    """Replaces or adds members of a tar."""
    with tarfile.open(path) as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    with tarfile.open(path, "w") as tar:
        for name, data in (content | members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@KINDS
def test_a_model_with_adapters_is_restored_whole(kind, path):
    model = with_adapters(kind)
    model.save_to(path)
    restored = kind.restore_from(path).eval()
    assert restored.num_weights == model.num_weights
    assert restored.get_enabled_adapters() == ["a", "b"]
    assert OmegaConf.to_container(restored.cfg.adapters) == OmegaConf.to_container(
        model.cfg.adapters
    )
    assert torch.equal(restored(rows()), model(rows()))
    restored.set_enabled_adapters("decoder:c")
    model.set_enabled_adapters("decoder:c")
    assert torch.equal(restored(rows()), model(rows()))
    restored.set_enabled_adapters(enabled=False)
    model.set_enabled_adapters(enabled=False)
    assert torch.equal(restored(rows()), model(rows()))


def test_a_restored_model_takes_further_adapters_and_is_saved_again(path):
    with_adapters().save_to(path)
    model = Bare.restore_from(path).eval()
    model.add_adapter("d", linear())
    model.save_to(path)
    again = Bare.restore_from(path).eval()
    assert again.get_enabled_adapters() == ["a", "b", "d"]
    assert torch.equal(again(rows()), model(rows()))


def test_a_constructor_that_does_not_set_adapters_up_is_helped(path):
    class Forgetful(Bare):
        def setup_adapters(self):
            if hasattr(self, "ready"):
                super().setup_adapters()
            self.ready = True

    model = Forgetful({"adapted": True})
    model.add_adapter("a", linear())
    model.save_to(path)
    assert Forgetful.restore_from(path).get_enabled_adapters() == ["a"]


def test_the_file_is_a_tar_of_yaml_and_weights(path):
    with_adapters().save_to(path)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["./model_config.yaml", "./model_weights.ckpt"]
        settings = yaml.safe_load(tar.extractfile("./model_config.yaml"))
        state = torch.load(
            io.BytesIO(tar.extractfile("./model_weights.ckpt").read()), weights_only=True
        )
    assert settings["target"] == "tests.graftwerk.nemo.modules.Bare"
    assert settings["adapters"]["a"]["dim"] == 2
    assert "decoder.adapter_layer.b.module.0.weight" in state
    assert [p.name for p in path.parent.iterdir()] == ["model.nemo"]


def test_the_configuration_alone_can_be_had(path):
    with_adapters().save_to(path)
    cfg = Bare.restore_from(path, return_config=True)
    assert isinstance(cfg, DictConfig)
    assert cfg.adapters.a.dim == 2


@pytest.mark.parametrize("as_file", [True, False])
def test_another_configuration_can_take_the_files_place(path, tmp_path, as_file):
    with_adapters().save_to(path)
    cfg = Bare.restore_from(path, return_config=True)
    cfg.adapters.a.enabled = False
    if as_file:
        OmegaConf.save(cfg, tmp_path / "cfg.yaml")
    model = Bare.restore_from(path, override_config_path=tmp_path / "cfg.yaml" if as_file else cfg)
    assert model.get_enabled_adapters() == ["b"]


def test_without_strict_what_the_model_lacks_is_left_out(path):
    with_adapters().save_to(path)
    bare = OmegaConf.create({"adapted": True})
    with pytest.raises(UserError, match="do not fit") as error:
        Bare.restore_from(path, override_config_path=bare)
    assert "\n" not in str(error.value)
    assert not Bare.restore_from(path, bare, strict=False).is_adapter_available()


def test_on_model_pt_itself_the_file_names_the_class_which_must_be_allowed(path):
    @allow_target
    class Allowed(Bare):
        pass

    Allowed({"adapted": True}).save_to(path)
    assert type(ModelPT.restore_from(path)) is Allowed
    with_adapters().save_to(path)
    with pytest.raises(ValueError, match="allow_target"):
        ModelPT.restore_from(path)
    with_adapters().save_to(path)
    rewrite(path, **{"./model_config.yaml": b"target: torch.nn.Linear"})
    with pytest.raises(ValueError, match="no ModelPT"):
        ModelPT.restore_from(path)


def test_a_model_with_an_adapter_that_cannot_be_made_again_is_not_written(path):
    model = with_adapters()
    model.add_adapter("d", torch.nn.Linear(DIM, DIM))
    with pytest.raises(ValueError, match="'d'"):
        model.save_to(path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "link"])
def test_a_hostile_tar_is_refused(path, name):
    with_adapters().save_to(path)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        if name == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=name):
        Bare.restore_from(path)


def test_weights_that_would_run_code_are_refused(path, tmp_path, monkeypatch):
    class Boom:
        def __reduce__(self):
            return __import__("os").mkdir, ("unpickled",)

    monkeypatch.chdir(tmp_path)
    with_adapters().save_to(path)
    hostile = io.BytesIO()
    torch.save({"encoder.fc.weight": Boom()}, hostile)
    rewrite(path, **{"./model_weights.ckpt": hostile.getvalue()})
    with pytest.raises(UserError, match="model_weights"):
        Bare.restore_from(path)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"a: ${", b"\xff\xfe"])
def test_a_damaged_configuration_is_named_in_one_line(path, content):
    with_adapters().save_to(path)
    rewrite(path, **{"./model_config.yaml": content})
    with pytest.raises(UserError, match=r"model_config\.yaml") as error:
        Bare.restore_from(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(path):
    with pytest.raises(UserError, match=r"model\.nemo"):
        Bare.restore_from(path)


def test_the_configuration_is_a_copy_and_closed():
    given = OmegaConf.create({"adapted": True})
    model = Bare(given)
    model.add_adapter("a", linear())
    assert "adapters" not in given
    with pytest.raises(ConfigAttributeError):
        model.cfg.adaptd = False


def test_freezing_and_counting():
    model = Bare({"adapted": True})
    count = 2 * (DIM * DIM + DIM + 2 * DIM)
    assert model.num_weights == count
    model.freeze()
    assert model.num_weights == 0
    assert not model.training
    model.unfreeze()
    assert model.num_weights == count
    assert model.training


def test_lightning_trains_the_adapters_alone():
    from pytorch_lightning import Trainer

    class Trained(Bare):
        def training_step(self, batch):
            return self(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD([w for w in self.parameters() if w.requires_grad], lr=0.5)

    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Trained({"adapted": True}, trainer=trainer)
    assert model.trainer is trainer
    model.add_adapter("a", linear())
    model.freeze()
    model.unfreeze_enabled_adapters()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.fit(model, torch.utils.data.DataLoader(rows(8), batch_size=4))
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed
    assert all(key.startswith("encoder.adapter_layer.a.") for key in changed)
