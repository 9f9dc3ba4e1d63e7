"""The documentation's example, and the page that shows it."""

import re
from pathlib import Path

import pytest
import torch

from graftwerk.nemo import adapter_mixins, adapter_modules

PAGE = Path(__file__).resolve().parents[3] / "docs" / "nemo_mixins.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


class MyModule(torch.nn.Module, adapter_mixins.AdapterModuleMixin):
    """The documentation's module, with the constructor and the argument that it leaves out."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.layers(x)
        if self.is_adapter_available():
            output = self.forward_enabled_adapters(output)
        return output


def test_the_documented_example_works():
    dim = 6
    module = MyModule(dim)
    input_data = torch.randn(4, dim)
    before = module(input_data)
    module.add_adapter("first_adapter", cfg=adapter_modules.LinearAdapter(in_features=dim, dim=5))
    assert module.is_adapter_available()
    assert module.get_enabled_adapters() == ["first_adapter"]
    module.set_enabled_adapters(name="first_adapter", enabled=True)
    for param in module.parameters():
        param.requires_grad = False
    module.unfreeze_enabled_adapters()
    outputs_with_adapter = module(input_data)
    assert torch.equal(outputs_with_adapter, before)
    (outputs_with_adapter - 1).square().mean().backward()
    with_gradient = {name for name, param in module.named_parameters() if param.grad is not None}
    adapter = {name for name, _ in module.named_parameters() if name.startswith("adapter_layer.")}
    assert with_gradient == adapter
    assert module.adapter_layer["first_adapter"].module[-1].weight.grad.abs().sum() > 0


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(block: str) -> dict:
    names: dict = {"__name__": "__main__"}
    exec(compile(block, PAGE.name, "exec"), names)
    return names


@pytest.mark.usefixtures("in_a_folder")
def test_the_pages_module_learns_and_gives_its_old_outputs_when_disabled(capsys):
    torch.manual_seed(0)
    names = run(BLOCKS[0])
    assert capsys.readouterr().out == "True\n['first_adapter']\n"
    module, x = names["module"], names["input_data"]
    first = torch.nn.functional.mse_loss(module.layers.train()(x), names["target"])
    assert names["loss"] < first
    module.layers.eval()
    assert torch.equal(module(x), module.layers(x))
    module.set_enabled_adapters()
    assert not torch.allclose(module(x), module.layers(x))


@pytest.mark.usefixtures("in_a_folder")
def test_the_pages_model_is_saved_and_restored(capsys):
    names = run(BLOCKS[1])
    assert capsys.readouterr().out == "['b'] 48\n"
    model, other, restored = names["model"], names["other"], names["restored"]
    assert other.get_enabled_adapters() == restored.get_enabled_adapters() == ["b"]
    assert other.get_adapter_module("a") is None
    x = torch.randn(3, 8)
    assert torch.equal(restored(x), model(x))


def test_the_pages_own_class_is_allowed():
    names = run(BLOCKS[2])
    module = MyModule(6)
    module.add_adapter("a", {"_target_": "__main__.MyAdapter", "in_features": 6, "dim": 2})
    assert type(module.get_adapter_module("a")) is names["MyAdapter"]
    assert len(BLOCKS) == 3, "a block of the page that no test runs"
