"""Twenty steps on four processes, by every pair of axes, against one process."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from graftwerk.parallel.placement import Placement
from graftwerk.parallel.shares import layout_of
from graftwerk.stages import learning
from graftwerk.training.module import LearningModule
from tests.graftwerk.learning_stage import base, cfg, rows
from tests.graftwerk.stages.test_compositions import files, listed
from tests.graftwerk.stages.test_layouts import (
    assert_alike,
    at,
    columns,
    of_family,
    peft,
    process,
    run_on,
    weights,
)

__all__ = ["base", "cfg", "files", "peft", "rows"]

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
        "selective_tuning": {"tunable_base_param_names": ["*layernorm*"]},
    },
    "fused": {"peft_scheme": "lora,fusion", "composition": "Stack(Fuse(a, b), lora)"},
}
# Adam magnifies the smallest gradients, and with them the rounding of sums in another order.
OPTIMIZERS = {
    "adam": ({"lr": 1e-4}, 1e-5),
    "sgd": ({"name": "sgd", "lr": 1e-3, "momentum": 0.9}, 1e-6),
}


def hashes(module: LearningModule, trained: bool) -> dict[str, str]:
    """Of what a process holds: names, with the place among tensor-parallel ranks where split."""
    placement, found = module.placement, {}
    if isinstance(module.model, FSDPModule):
        module.model.reshard()  # what the last pass has left whole
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad == trained and placement.here(parameter):
            whole = layout_of(parameter).dim is None
            place = "" if whole else f" {placement.mesh.tensor.rank}"
            if isinstance(parameter, DTensor):  # a frozen base's share
                parameter, place = parameter.to_local(), f" of {placement.mesh.data.rank}"
            held = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
            found[name + place] = hashlib.sha256(held).hexdigest()
    return found


def watched(rank: int, count: int, port: int, runs: list[tuple[str, dict]]) -> None:
    """`process`, which also writes what each run held: frozen at its start, and all at its end."""
    before: dict[str, str] = {}
    modules: list[LearningModule] = []
    start, whole = LearningModule.on_train_start, Placement.make_whole

    def starting(self: LearningModule) -> None:
        modules[:] = [self]
        before.clear()
        before.update(hashes(self, trained=False))
        start(self)

    def ending(self: Placement) -> None:
        (module,) = modules
        after = {"before": dict(before), "after": hashes(module, trained=False)}
        folder = Path(module.trainer.default_root_dir)
        held = json.dumps({**after, "trained": hashes(module, trained=True)})
        (folder / f"held{rank}.json").write_text(held)
        whole(self)

    LearningModule.on_train_start, Placement.make_whole = starting, ending  # type: ignore
    process(rank, count, port, runs)


def assert_held_alike(folder: Path) -> None:
    """Copies are the same bits on all processes, and what is frozen has not moved."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("held*.json"))]
    assert len(ranks) == 4
    together: dict[str, set[str]] = {}
    for held in ranks:
        assert held["before"] == held["after"]
        for name, value in {**held["trained"], **held["after"]}.items():
            together.setdefault(name, set()).add(value)
    assert any(held["trained"] for held in ranks)
    assert {name for name, values in together.items() if len(values) > 1} == set()


@pytest.mark.parametrize(
    ("family", "methods", "optimizer"),
    [
        *[(family, "many", "adam") for family in ("gpt", "t5", "bert")],
        *[(family, "dora", "adam") for family in ("gpt", "t5", "bert")],
        ("gpt", "fused", "adam"),
        ("gpt", "many", "sgd"),
    ],
)
def test_four_processes_learn_what_one_learns(
    family: str, methods: str, optimizer: str, peft: DictConfig, files: dict, tmp_path: Path
):
    made = of_family(peft, family, tmp_path)
    if methods == "fused":
        made.model.peft.adapters = listed(files, "ab")
    optim, tolerance = OPTIMIZERS[optimizer]
    sizes = {"micro_batch_size": 1, "global_batch_size": 8}
    more = {"model": {**sizes, "peft": METHODS[methods], "optim": optim}}
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
    run_on(4, [("peft", config) for config in runs.values()], watched)
    assert learning.run("peft", alone) == 0
    for config in runs.values():
        assert_held_alike(Path(config.exp_manager.explicit_log_dir))
        torch.testing.assert_close(columns(config), columns(alone), rtol=tolerance, atol=tolerance)
        assert_alike(weights(config), weights(alone), tolerance)
