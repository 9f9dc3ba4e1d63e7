"""LoReFT with a base: files of ours hold its rows alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from graftwerk.adapters.methods.reft import ReftConfig, ReftUnit, with_base
from graftwerk.checkpoints import load_adapter, read_adapters, save_adapter
from graftwerk.checkpoints.reft_rows import rotation
from graftwerk.errors import UserError
from graftwerk.models import GPT
from tests.graftwerk.tiny import GPT2, shake, tokens

METHOD = ReftConfig(r=2, suffix_positions=2, orthogonal_base=True, dropout=0.0)
SHAPE = replace(GPT2, hidden_size=64, kv_channels=16, num_layers=4)


def model_with(name: str | None) -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    shake(model)
    model.eval()
    if name:
        model.add_adapter(name, METHOD)
        shake(model.get_submodule("decoder"), 1)
        model.set_active(name)
    return model


@pytest.mark.parametrize("file", ["a.nemo", "a"])
def test_a_file_has_the_rows_and_computes_and_trains_the_same(file, tmp_path: Path):
    model = model_with("a")
    trained = sum(p.numel() for _, _, part in model.parts("a") for p in part.parameters())
    size = save_adapter(model, "a", tmp_path / file)
    assert size <= 4 * trained + 65536
    fresh = model_with(None)
    fresh.load_state_dict(
        {k: v for k, v in model.state_dict().items() if ".adapter_layer." not in k}
    )
    fresh.set_active(load_adapter(fresh, tmp_path / file))
    again = load_adapter(fresh, tmp_path / file, "b")
    own, other = fresh.adapter_state("a"), fresh.adapter_state(again)
    assert all(torch.equal(own[key], other[key]) for key in own), "a base comes from no chance"
    assert fresh.adapters["a"] == METHOD
    losses, norms = [], []
    for each in (model, fresh):
        each.freeze_base()
        loss = each(tokens()).square().mean()
        loss.backward()
        sources = [p for n, p in each.named_parameters() if "a.units.0.learned_source" in n]
        norms.append(torch.stack([p.grad.norm() for p in sources]))
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(norms[1], norms[0], atol=1e-6, rtol=1e-4)
    assert sum(p.numel() for _, _, part in fresh.parts("a") for p in part.parameters()) == trained


def test_rows_are_those_that_torch_makes_of_the_reflections():
    unit = ReftUnit(12, replace(METHOD, r=3))
    with torch.no_grad():
        unit.projection.parametrizations.weight.original.normal_()
    state = {k.rpartition(".")[2]: v for k, v in unit.projection.state_dict().items()}
    torch.testing.assert_close(rotation(state["original"], state["base"]), unit.rotation())


@pytest.mark.parametrize("diagonal", [(-1.0, 1.0, -1.0), (-1.0, 0.9, 1.0), (0.5, -1.0, -2.0)])
def test_a_base_is_made_of_rows_that_weight_decay_has_brought_to_zero_too(diagonal):
    original, base = torch.randn(3, 12), torch.linalg.qr(torch.randn(12, 12))[0]
    original.diagonal().copy_(torch.tensor(diagonal))
    rows = rotation(original, base)
    made, completed = with_base(rows)
    torch.testing.assert_close(completed @ completed.T, torch.eye(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation(made, completed), rows, atol=1e-5, rtol=0)


def test_a_folder_that_still_holds_bases_loads_to_the_bit(tmp_path: Path):
    model = model_with("a")
    save_adapter(model, "a", tmp_path / "a")
    state = {k: v.clone().contiguous() for k, v in model.adapter_state("a").items()}
    save_file(state, tmp_path / "a" / "adapter.safetensors")
    load_adapter(model, tmp_path / "a", "b")
    assert all(torch.equal(model.adapter_state("b")[key], value) for key, value in state.items())


def test_rows_of_another_length_make_no_base(tmp_path: Path):
    model = model_with("a")
    save_adapter(model, "a", tmp_path / "a")
    file = tmp_path / "a" / "adapter.safetensors"
    long = {
        key: torch.zeros(1, 1 << 20) if key.endswith("units.0.projection.weight") else value
        for key, value in load_file(file).items()
    }
    save_file(long, file)
    with pytest.raises(UserError, match="the weights do not fit"):
        load_adapter(model, tmp_path / "a", "b")
    settings = yaml.safe_load((tmp_path / "a" / "adapter_config.yaml").read_text())
    assert settings["trainable_parameters"] == 4 * 2 * (2 * 2 * 64 + 2)
    assert (
        max(t.numel() for t in read_adapters(tmp_path / "a").adapters[0].state.values()) == 1 << 20
    )
