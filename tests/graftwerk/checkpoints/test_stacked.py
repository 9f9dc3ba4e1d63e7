"""Adapters of many small tensors: what their files hold beside the numbers, and what comes back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwerk.adapterhub import UniPELTConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints import load_adapters, save_adapter
from graftwerk.checkpoints.adapterhub_config import method_of
from graftwerk.checkpoints.stacked import stacked, unstacked
from graftwerk.errors import UserError
from graftwerk.models import build_model
from tests.graftwerk.tiny import shake
from tests.graftwerk.tiny_families import t5_shape


def deep_t5() -> AdapterModel:
    shape = t5_shape(31)
    changes = {"num_layers": 12, "decoder_num_layers": 12, "hidden_size": 16, "kv_channels": 8}
    model = build_model(type(shape)(**{**vars(shape), **changes}))
    model.add_adapter("a", method_of(UniPELTConfig().to_dict(), model))
    return model


@pytest.mark.parametrize("file", ["a.nemo", "a"])
def test_a_gated_union_on_a_deep_t5_is_within_64_kb_of_its_numbers(file, tmp_path: Path):
    model = deep_t5()
    for _, _, part in model.parts("a"):
        shake(part)
    state = model.adapter_state("a")
    assert len(state) > 500
    size = save_adapter(model, "a", tmp_path / file)
    assert size <= 4 * sum(value.numel() for value in state.values()) + 65536
    assert load_adapters(model, tmp_path / file, "b") == ["b"]
    again = model.adapter_state("b")
    assert list(again) == list(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_only_layers_in_a_row_of_one_shape_and_type_are_stacked():
    state = {f"x.layers.{n}.w": torch.full((2,), float(n)) for n in range(300) if n != 7}
    state["x.layers.20.w"] = torch.ones(3)
    state["x.layers.30.w"] = torch.ones(2, dtype=torch.float16)
    state["words"] = torch.zeros(4)
    state |= {f"other.layers.{n}.w": torch.zeros(1) for n in range(2)}  # of another adapter
    made = stacked(state)
    spans = ("0-6", "8-19", "20", "21-29", "30", "31-299")
    assert set(made) == {"words", "other.layers.0-1.w", *(f"x.layers.{span}.w" for span in spans)}
    back = unstacked(Path("f"), made)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    few = dict(list(state.items())[:200])
    assert stacked(few) == few


def test_a_stack_of_another_height_is_refused(tmp_path: Path):
    model = deep_t5()
    save_adapter(model, "a", tmp_path / "a")
    file = tmp_path / "a" / "adapter.safetensors"
    state = load_file(file)
    key = next(key for key in state if ".0-11." in key)
    for other in (state[key][:3], torch.tensor(1.0)):
        save_file({**state, key: other.contiguous()}, file)
        with pytest.raises(UserError, match="one row a layer"):
            load_adapters(model, tmp_path / "a", "b")
