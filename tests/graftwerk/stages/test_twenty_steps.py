"""Twenty steps on four processes, by every pair of axes, against one process."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.stages import learning
from tests.graftwerk.learning_stage import base, cfg, rows
from tests.graftwerk.stages.test_layouts import (
    assert_alike,
    at,
    columns,
    of_family,
    on_processes,
    peft,
    weights,
)

__all__ = ["base", "cfg", "peft", "rows"]

pytestmark = pytest.mark.long

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {
    "tensor-pipeline": {TENSOR: 2, PIPELINE: 2},
    "tensor-sequence-pipeline": {TENSOR: 2, PIPELINE: 2, "sequence_parallel": True},
    "tensor-data": {TENSOR: 2},
    "pipeline-data": {PIPELINE: 2},
    "sharded": {"use_fsdp": True},
}
METHODS = {
    "many": {},
    "dora": {
        "peft_scheme": "lora,selective",
        "lora_tuning": {"adapter_dim": 2, "target_modules": ["all"], "dora": True},
        "selective_tuning": {"tunable_base_param_names": ["layernorm"]},
    },
}


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("family", ["gpt", "t5", "bert"])
def test_four_processes_learn_what_one_learns(
    family: str, methods: str, peft: DictConfig, tmp_path: Path
):
    made = of_family(peft, family, tmp_path)
    more = {"model": {"micro_batch_size": 1, "global_batch_size": 8, "peft": METHODS[methods]}}
    whole = OmegaConf.merge(made, more)
    assert isinstance(whole, DictConfig)
    whole.trainer.max_steps = 20
    layouts = {k: v for k, v in LAYOUTS.items() if methods == "many" or k != "sharded"}
    if family == "bert":
        layouts = {k: v for k, v in layouts.items() if methods == "many" or "sequence" not in k}
    alone = at(whole, tmp_path / "alone")
    runs = {}
    for name, layout in layouts.items():
        four = {"trainer": {"devices": 4}, "model": layout}
        runs[name] = OmegaConf.merge(at(whole, tmp_path / name), four)
    on_processes(4, [("peft", config) for config in runs.values()])
    assert learning.run("peft", alone) == 0
    for config in runs.values():
        torch.testing.assert_close(columns(config), columns(alone), rtol=1e-4, atol=1e-5)
        assert_alike(weights(config), weights(alone), 1e-4)
