"""Which classes a configuration may name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from graftwerk.nemo import AdapterModelPTMixin, LinearAdapter, ModelPT, allow_target
from graftwerk.nemo.adapter_mixins import instantiate
from tests.graftwerk.nemo.modules import DIM, Adapted, Bare, linear

SRC = Path(__file__).resolve().parents[3] / "src"


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "builtins.eval", "torch.load", "nothing", "", 5, None]
)
def test_a_class_that_is_not_on_the_list_is_refused_by_name(path):
    module = Adapted()
    with pytest.raises(ValueError, match="allow_target") as error:
        module.add_adapter("a", {"_target_": path})
    assert repr(path) in str(error.value)
    assert not module.is_adapter_available()


def test_a_refused_class_is_not_imported():
    with pytest.raises(ValueError, match="not imported"):
        Adapted().add_adapter("a", {"_target_": "antigravity.Adapter"})
    assert "antigravity" not in sys.modules


def test_a_refused_class_within_a_configuration_is_found_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(LinearAdapter, "__init__", lambda *_, **__: pytest.fail("it was made"))
    with pytest.raises(ValueError, match=r"os\.system"):
        Adapted().add_adapter(
            "a", linear(adapter_strategy={"_target_": "os.system", "command": "true"})
        )


def test_a_model_that_refuses_a_class_has_the_configuration_it_had():
    model = Bare({"adapted": True})
    with pytest.raises(ValueError, match="allow_target"):
        model.add_adapter("a", {"_target_": "os.system"})
    assert "adapters" not in model.cfg


def test_allowing_a_class_lets_configurations_name_it():
    class Mine(nn.Linear):
        pass

    path = f"{Mine.__module__}.{Mine.__qualname__}"
    with pytest.raises(ValueError, match="allow_target"):
        instantiate({"_target_": path, "in_features": 2, "out_features": 3})
    assert allow_target(Mine) is Mine
    made = instantiate({"_target_": path, "in_features": 2, "out_features": 3})
    assert type(made) is Mine


def test_an_allowed_path_is_imported_when_it_is_first_named(tmp_path, monkeypatch):
    text = "class Box:\n    def __init__(self, size):\n        self.size = size\n"
    (tmp_path / "theirs_to_allow.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    allow_target("theirs_to_allow.Box")
    assert "theirs_to_allow" not in sys.modules
    assert instantiate({"_target_": "theirs_to_allow.Box", "size": 3}).size == 3


@pytest.mark.parametrize("wrong", [5, "Box", "a..B", "a.b; import os", nn.ReLU()])
def test_only_classes_and_their_paths_can_be_allowed(wrong):
    with pytest.raises(ValueError, match="allow_target"):
        allow_target(wrong)


def test_an_allowed_path_must_lead_to_a_class():
    allow_target("os.path.join")
    with pytest.raises(ValueError, match="no such class"):
        instantiate({"_target_": "os.path.join"})


@pytest.mark.parametrize(
    ("path", "cls"),
    [
        ("torch.nn.GELU", nn.GELU),
        ("torch.nn.modules.activation.Tanh", nn.Tanh),
        ("torch.nn.Identity", nn.Identity),
        ("nemo.collections.common.parts.adapter_modules.LinearAdapter", LinearAdapter),
        ("graftwerk.nemo.adapter_modules.LinearAdapter", LinearAdapter),
    ],
)
def test_ours_and_the_activations_are_on_the_list_at_birth(path, cls):
    arguments = {"in_features": DIM, "dim": 2} if cls is LinearAdapter else {}
    assert type(instantiate({"_target_": path, **arguments})) is cls


def test_the_package_is_light_until_a_name_is_asked_for():
    script = "import sys, graftwerk.nemo; assert 'pytorch_lightning' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(SRC)}, check=True
    )


def test_modules_of_the_package_need_no_import_of_their_own():
    script = (
        "import graftwerk.nemo as nemo; "
        "assert nemo.adapter_mixins.AdapterModuleMixin is nemo.AdapterModuleMixin; "
        "assert nemo.adapter_modules.AdapterModuleUtil is nemo.AdapterModuleUtil; "
        "strategies = nemo.adapter_mixin_strategies; "
        "assert strategies.AbstractAdapterStrategy is nemo.AbstractAdapterStrategy"
    )
    subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(SRC)}, check=True
    )


def test_the_package_offers_the_names_of_its_surface():
    assert issubclass(Bare, ModelPT)
    assert issubclass(Bare, AdapterModelPTMixin)
    import graftwerk.nemo

    for name in graftwerk.nemo.__all__:
        assert getattr(graftwerk.nemo, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = graftwerk.nemo.nothing
