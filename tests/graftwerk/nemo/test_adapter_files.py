"""save_adapters and load_adapters."""

import os
import pickle
import sys
import types

import pytest
import torch
from omegaconf import OmegaConf

from graftwerk.errors import UserError
from graftwerk.nemo import LinearAdapter, LinearAdapterConfig
from tests.graftwerk.nemo.modules import DIM, Adapted, Bare, HandsOn, disturb, linear, rows

KINDS = pytest.mark.parametrize("kind", [Bare, HandsOn])


def build(kind: type[Bare] = Bare, *names: str, **settings: bool) -> Bare:
    """A model with adapters of random weights; the base is the same each time."""
    torch.manual_seed(0)
    model = kind(OmegaConf.create({"adapted": True, "adapters": {"global_cfg": settings}})).eval()
    for name in names:
        model.add_adapter(name, linear(norm_position="post" if name.endswith("b") else "pre"))
    for module in (model.encoder, model.decoder):
        if module.is_adapter_available():
            disturb(module.adapter_layer)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "adapters.pt"


@KINDS
@pytest.mark.parametrize("chosen", [None, "a", "decoder:b", ["a", "b"]])
def test_what_was_saved_is_loaded(kind, path, chosen):
    model = build(kind, "a", "decoder:b")
    model.save_adapters(path, chosen)
    wanted = {None: "ab", "a": "a", "decoder:b": "b"}.get(chosen if chosen != ["a", "b"] else None)
    fresh = build(kind)
    fresh.load_adapters(path)
    assert sorted(fresh.get_enabled_adapters()) == list(wanted)
    for name in "ab":
        if name not in wanted:
            model.set_enabled_adapters(name, enabled=False)
    assert torch.equal(fresh(rows()), model(rows()))


@KINDS
@pytest.mark.parametrize("name", ["b", "decoder:b"])
def test_one_of_several_is_loaded_by_its_whole_name(kind, path, name):
    build(kind, "a", "decoder:b").save_adapters(str(path))
    fresh = build(kind)
    fresh.load_adapters(str(path), name)
    assert fresh.get_enabled_adapters() == ["b"]
    assert not fresh.encoder.is_adapter_available()
    assert fresh.cfg.adapters.global_cfg.adapter_meta_cfg.modules.b == "decoder"


def test_a_name_that_begins_another_is_not_mistaken_for_it(path):
    model = build(Bare, "adapter_1", "adapter_10")
    model.save_adapters(path, "adapter_1")
    content = torch.load(path, weights_only=True)
    assert set(content) == {"adapter_1", "__cfg__"}
    assert all(key.startswith("adapter_1.") for key in content["adapter_1"][0])
    model.save_adapters(path)
    fresh = build()
    fresh.load_adapters(path, "adapter_1")
    assert fresh.get_enabled_adapters() == ["adapter_1"]
    ours, theirs = (m.get_adapter_module("adapter_1").state_dict() for m in (fresh, model))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_adapter_in_two_modules_is_saved_once_for_each(path):
    model = build(Bare, "a", encoder_adapter=True, decoder_adapter=True)
    model.save_adapters(path)
    assert len(torch.load(path, weights_only=True)["a"]) == 2
    fresh = build(Bare, encoder_adapter=True, decoder_adapter=True)
    fresh.load_adapters(path)
    assert torch.equal(fresh(rows()), model(rows()))


def test_the_file_is_read_under_weights_only_and_holds_plain_containers(path):
    build(Bare, "a", "decoder:b").save_adapters(path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"a", "decoder:b", "__cfg__"}
    assert type(content["__cfg__"]) is dict
    modules = content["__cfg__"]["global_cfg"]["adapter_meta_cfg"]["modules"]
    assert modules == {"a": "", "b": "decoder"}
    assert sorted(os.listdir(path.parent)) == ["adapters.pt"]


def test_the_file_keeps_whether_an_adapter_was_enabled(path):
    model = build(Bare, "a", "encoder:b")
    model.set_enabled_adapters("a", enabled=False)
    model.save_adapters(path)
    fresh = build()
    fresh.load_adapters(path)
    assert fresh.get_enabled_adapters() == ["b"]


def test_a_file_of_adapters_is_smaller_than_the_model(tmp_path):
    model = build(Bare, "a")
    model.save_adapters(tmp_path / "a.pt")
    model.save_to(tmp_path / "model.nemo")
    assert (tmp_path / "a.pt").stat().st_size < (tmp_path / "model.nemo").stat().st_size


@KINDS
def test_saving_without_any_adapter_is_an_attribute_error(kind, path):
    with pytest.raises(AttributeError, match="no adapter was added"):
        build(kind).save_adapters(path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["c", "encoder:c", "decoder:a", ["a", "c"]])
def test_saving_an_unknown_name_is_a_key_error_and_writes_nothing(path, name):
    model = build(Bare, "encoder:a")
    with pytest.raises(KeyError, match="encoder:a"):
        model.save_adapters(path, name)
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["c", "adapter", "encoder:b", "decoder:a", "global_cfg", ["a", "c"]]
)
def test_loading_a_name_that_the_file_does_not_have_is_a_key_error(path, name):
    build(Bare, "a", "decoder:b").save_adapters(path)
    fresh = build()
    with pytest.raises(KeyError):
        fresh.load_adapters(path, name)
    assert not fresh.is_adapter_available()


def test_loading_a_name_that_the_model_has_is_a_value_error(path):
    model = build(Bare, "a", "decoder:b")
    model.save_adapters(path)
    other = build(Bare, "decoder:b")
    with pytest.raises(ValueError, match="'b' already"):
        other.load_adapters(path)
    assert other.get_enabled_adapters() == ["b"]


@KINDS
def test_another_number_of_modules_is_a_value_error_and_adds_nothing(kind, path):
    both = {"encoder_adapter": True, "decoder_adapter": True}
    build(kind, "decoder:b", "a", **both).save_adapters(path)
    fresh = build(kind)
    with pytest.raises(ValueError, match=r"2 modules.*1 modules"):
        fresh.load_adapters(path)
    assert not fresh.is_adapter_available()
    assert [key for key in fresh.cfg.adapters if key != "global_cfg"] == []


def test_weights_that_do_not_fit_are_an_error_and_add_nothing(path):
    build(Bare, "a").save_adapters(path)
    content = torch.load(path, weights_only=True)
    content["__cfg__"]["a"]["dim"] = 2
    torch.save(content, path)
    fresh = build()
    with pytest.raises(RuntimeError, match="'a' does not fit") as error:
        fresh.load_adapters(path)
    assert "\n" not in str(error.value)
    assert not fresh.is_adapter_available()


def test_without_strict_a_missing_weight_keeps_its_value_of_birth(path):
    build(Bare, "a").save_adapters(path)
    content = torch.load(path, weights_only=True)
    del content["a"][0]["a.module.0.bias"]
    torch.save(content, path)
    fresh = build()
    with pytest.raises(RuntimeError, match="bias"):
        fresh.load_adapters(path)
    fresh.load_adapters(path, strict=False)
    assert torch.equal(fresh.get_adapter_module("a").module[0].bias, torch.zeros(DIM))


def test_map_location_is_where_the_files_tensors_go(path, monkeypatch):
    build(Bare, "a").save_adapters(path)
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k) or load(*a, **k))
    build().load_adapters(path, map_location="cpu")
    assert seen == [{"map_location": "cpu", "weights_only": True}]


def test_a_ready_module_that_does_not_describe_itself_is_refused(path):
    class Foreign(torch.nn.Linear):
        pass

    model = build()
    model.add_adapter("a", Foreign(DIM, DIM))
    with pytest.raises(ValueError, match="as_config"):
        model.save_adapters(path)
    assert not path.exists()


def test_a_file_of_nemo_with_its_pickled_configuration_is_read(path):
    model = build(Bare, "a", "decoder:b")
    model.save_adapters(path)
    content = torch.load(path, weights_only=True)
    cfg = OmegaConf.create({"model": {"size": 3, "adapters": content["__cfg__"]}})
    theirs = "nemo.collections.common.parts.adapter_modules.LinearAdapter"
    cfg.model.adapters.a._target_ = theirs
    torch.save({**content, "__cfg__": cfg.model.adapters}, path)
    fresh = build()
    fresh.load_adapters(path)
    assert isinstance(fresh.get_adapter_module("a"), LinearAdapter)
    assert torch.equal(fresh(rows()), model(rows()))


def test_a_file_of_nemo_whose_settings_were_a_dataclass_is_read(path, monkeypatch):
    model = build(Bare, "a")
    model.save_adapters(path)
    content = torch.load(path, weights_only=True)
    cfg = OmegaConf.create({"a": OmegaConf.structured(LinearAdapterConfig(DIM, 4))})
    theirs = "nemo.collections.common.parts.adapter_modules"
    stand_in = types.ModuleType(theirs)
    stand_in.LinearAdapterConfig = LinearAdapterConfig
    for part in ("nemo", "nemo.collections", "nemo.collections.common", theirs.rpartition(".")[0]):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, theirs, stand_in)
    monkeypatch.setattr(LinearAdapterConfig, "__module__", theirs)
    torch.save({**content, "__cfg__": cfg}, path)
    monkeypatch.undo()
    assert theirs.encode() in path.read_bytes()
    fresh = build()
    fresh.load_adapters(path)
    assert torch.equal(fresh(rows()), model(rows()))


class Boom:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("place", ["__cfg__", "a", "inside"])
def test_a_file_that_would_run_code_is_refused(path, monkeypatch, tmp_path, place):
    monkeypatch.chdir(tmp_path)
    build(Bare, "a").save_adapters(path)
    content = torch.load(path, weights_only=True)
    if place == "inside":
        cfg = OmegaConf.create({"a": {"dim": 3}}, flags={"allow_objects": True})
        cfg.a.boom = Boom()
        content["__cfg__"] = cfg
    else:
        content[place] = Boom()
    torch.save(content, path)
    fresh = build()
    with pytest.raises(UserError, match=r"adapters\.pt") as error:
        fresh.load_adapters(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()
    assert not fresh.is_adapter_available()


def test_a_plain_pickle_is_refused(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Boom()))
    with pytest.raises(UserError, match="save_adapters"):
        build().load_adapters(path)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"__cfg__": None},
        {"__cfg__": {"a": {"dim": "${oc.env:HOME}"}}},
        {"__cfg__": {"a": {5: 3}}},
        {"__cfg__": {"a": {"dim": torch.zeros(1)}}},
        {"a": torch.zeros(1)},
        {"a": [{"w": 5}]},
        {5: []},
    ],
)
def test_a_damaged_file_is_named_in_one_line(path, change):
    build(Bare, "a").save_adapters(path)
    content = torch.load(path, weights_only=True) | change
    torch.save(content, path)
    fresh = build()
    with pytest.raises(UserError, match=r"adapters\.pt") as error:
        fresh.load_adapters(path)
    assert "\n" not in str(error.value)
    assert not fresh.is_adapter_available()


def test_a_target_in_a_file_must_be_on_the_list(path):
    build(Bare, "a").save_adapters(path)
    content = torch.load(path, weights_only=True)
    content["__cfg__"]["a"]["_target_"] = "os.system"
    torch.save(content, path)
    fresh = build()
    with pytest.raises(ValueError, match="allow_target"):
        fresh.load_adapters(path)
    assert not fresh.is_adapter_available()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pt"):
        build().load_adapters(tmp_path / "nothing.pt")


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    model = build(Bare, "a")
    model.save_adapters(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_adapters(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["adapters.pt"]


def test_adapters_fit_a_module_of_another_name(path):
    model = build(Bare, "a")
    model.save_adapters(path)
    state = torch.load(path, weights_only=True)["a"][0]
    other = Adapted()
    other.add_adapter("x", linear())
    other.adapter_layer["x"].load_state_dict({k.removeprefix("a."): v for k, v in state.items()})
    assert torch.equal(
        other.adapter_layer["x"].module[1].weight, model.get_adapter_module("a").module[1].weight
    )
