"""What AdapterHub's library does not write of a fusion, or writes for nothing."""

import torch
from safetensors.torch import load_file, save_file

from graftwerk.adapters import BnConfig, Fuse, FusionConfig
from graftwerk.checkpoints.adapterhub import (
    load_adapterhub_fusion,
    save_adapterhub_fusion,
)
from tests.graftwerk.adapters.test_prompts import make, run


def fused(config: FusionConfig):
    model = make("gpt2", a=BnConfig(), b=BnConfig())
    model.add_fusion(("a", "b"), config)
    return model


def test_a_fusions_temperature_is_in_no_file_and_is_read_as_that_behind_training(tmp_path):
    model = fused(FusionConfig(temperature=True))
    save_adapterhub_fusion(model, "a,b", tmp_path, safetensors=True)
    (weights,) = tmp_path.glob("*.safetensors")
    assert not any("temperature" in name for name in load_file(weights))
    model.delete_fusion("a,b")
    load_adapterhub_fusion(model, tmp_path)
    state = model.fusion_state("a,b")
    assert {v.item() for k, v in state.items() if k.endswith("temperature")} == {1.0}


@torch.no_grad()
def test_the_matrix_that_a_fusion_without_matrices_never_uses_is_passed_over(tmp_path):
    model = fused(FusionConfig(query=False, key=False, value=False, regularization=False))
    model.set_active(Fuse("a", "b"))
    before = run(model)
    save_adapterhub_fusion(model, "a,b", tmp_path, safetensors=True)
    (weights,) = tmp_path.glob("*.safetensors")
    for layer in range(3):
        name = f"transformer.h.{layer}.output_adapters.adapter_fusion_layer.a,b.dense.weight"
        save_file(load_file(weights) | {name: torch.ones(1, 32)}, weights)
    model.delete_fusion("a,b")
    load_adapterhub_fusion(model, tmp_path)
    model.set_active(Fuse("a", "b"))
    assert torch.equal(run(model), before)
