"""A learning stage on two processes, by tensor, pipeline or data, against the same on one."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints import read_adapters
from graftwerk.checkpoints.resume import read_checkpoint
from graftwerk.data.jsonl import read_rows
from graftwerk.models import scoring
from graftwerk.parallel import vocabulary
from graftwerk.stages import eval as evaluation
from graftwerk.stages import learning
from tests.graftwerk.learning_stage import base, cfg, elsewhere, read_metrics, rows
from tests.graftwerk.ranks import on_processes
from tests.graftwerk.tiny_families import as_family, eval_cfg, save_tiny

__all__ = ["base", "cfg", "rows"]

# The network that makes a tied prefix is used by the layers of both stages.
SCHEMES = {
    "peft_scheme": "lora,prefix,ptuning,adapter,ia3",
    "lora_tuning": {"adapter_dim": 2, "target_modules": ["all"], "adapter_dropout": 0.1},
    "prefix_tuning": {
        "prefix_length": 2,
        "bottleneck_dim": 4,
        "weight_tying": True,
        "adapter_dropout": 0.1,
    },
    "p_tuning": {"virtual_tokens": 2, "embedding_dim": 8, "bottleneck_dim": 8},
    "adapter_tuning": {"adapter_dim": 4, "adapter_dropout": 0.1},
}
LAYOUTS = {
    "pipeline": {
        "pipeline_model_parallel_size": 2,
        "activations_checkpoint_granularity": "full",
    },
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "activations_checkpoint_granularity": "selective",
    },
    "data": {},
    "sharded": {"use_fsdp": True, "activations_checkpoint_granularity": "full"},
}
FIRST, ALL = 3, 5  # steps


def as_layout(cfg: DictConfig, layout: str) -> DictConfig:
    two = {"trainer": {"devices": 2}, "model": LAYOUTS[layout]}
    made = OmegaConf.merge(cfg, two)
    assert isinstance(made, DictConfig)
    return made


def up_to(cfg: DictConfig, steps: int) -> DictConfig:
    made = cfg.copy()
    made.trainer.max_steps = steps
    return made


def process(rank: int, count: int, port: int, runs: list[tuple[str, dict]]) -> None:
    """Stages, one after the other; those that learn hold few logits at a time, never gathered."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in given.items()}, MASTER_ADDR="127.0.0.1")
    for stage, config in runs:
        made = OmegaConf.create(config)
        if stage == "eval":
            assert evaluation.run(made) == 0
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "AT_ONCE", 200)
            patch.setattr(vocabulary, "_GatherWords", None)
            assert learning.run(stage, made) == 0
    dist.destroy_process_group()


def run_on(
    count: int, runs: list[tuple[str, DictConfig]], each: Callable[..., None] = process
) -> None:
    """Several stages, of which each process runs one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plain = [(stage, OmegaConf.to_container(config)) for stage, config in runs]
    on_processes(count, each, count, port, plain)


def weights(cfg: DictConfig) -> dict[str, torch.Tensor]:
    adapters = read_adapters(cfg.model.nemo_path).adapters
    return {f"{a.name} {key}": value for a in adapters for key, value in a.state.items()}


def checkpoint(cfg: DictConfig) -> dict:
    return read_checkpoint(Path(cfg.exp_manager.explicit_log_dir) / "checkpoints" / "last.ckpt")


def assert_alike(one: dict, other: dict, tolerance: float = 1e-5) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        apart = torch.linalg.vector_norm(tensor - other[name])
        assert apart <= tolerance * torch.linalg.vector_norm(other[name]) + 1e-7, name


def columns(cfg: DictConfig) -> list[list[float]]:
    keys = ("train_loss", "grad_norm", "val_loss")
    return [[float(row[key]) for key in keys if row.get(key)] for row in read_metrics(cfg)]


@pytest.fixture
def peft(cfg: DictConfig) -> DictConfig:
    """Five methods at once, plain SGD-like steps that do not magnify the smallest gradients."""
    del cfg.model["adapter_tuning"]
    cfg.trainer.max_epochs, cfg.trainer.max_steps = -1, ALL
    cfg.trainer.num_sanity_val_steps = 1  # a pass without gradients comes first
    cfg.model.optim.sched = None
    cfg.model.optim.eps = 1e-3
    cfg.model.nemo_path = str(Path(cfg.run.results_dir) / "results" / "adapter")
    made = OmegaConf.merge(cfg, {"model": {"peft": SCHEMES}})
    assert isinstance(made, DictConfig)
    return made


def of_family(peft: DictConfig, family: str, folder: Path) -> DictConfig:
    if family == "gpt":
        return peft
    made = as_family(peft, save_tiny(family, folder / family), folder, ALL)
    del made.model["adapter_tuning"]
    made.model.global_batch_size, made.model.micro_batch_size = 4, 2
    return made


def at(cfg: DictConfig, folder: Path) -> DictConfig:
    made = elsewhere(cfg, folder)
    made.model.nemo_path = str(folder / "results" / "adapter")
    return made


def asked(learned: DictConfig, folder: Path) -> DictConfig:
    """An eval stage of what was learned, with results in a folder of its own."""
    folder.mkdir(exist_ok=True)
    return eval_cfg(learned, folder)


def told(cfg: DictConfig, name: str) -> list[dict]:
    folder = Path(cfg.exp_manager.explicit_log_dir) / name
    return [row for _, row in read_rows(folder / "predictions.jsonl")]


@pytest.mark.parametrize(
    ("family", "layouts", "resumed"),
    [
        ("gpt", ["pipeline", "tensor", "data", "sharded"], ["pipeline", "tensor", "sharded"]),
        ("t5", ["pipeline", "sequence", "sharded"], ["pipeline", "sequence"]),
    ],
    ids=["gpt", "t5"],
)
def test_every_layout_learns_what_one_process_learns(
    family: str, layouts: list[str], resumed: list[str], peft: DictConfig, tmp_path: Path
):
    """Training, validation, checkpoints and the file; and one process goes on from some of them."""
    whole = of_family(peft, family, tmp_path)
    alone = at(whole, tmp_path / "alone")
    runs = {name: as_layout(at(whole, tmp_path / name), name) for name in layouts}
    first = [("peft", up_to(config, FIRST)) for config in runs.values()]
    questions = []
    if family == "t5":
        questions = [
            ("eval", as_layout(asked(config, tmp_path / name), name))
            for name, config in runs.items()
        ]
    run_on(2, [*first, *questions])
    assert learning.run("peft", up_to(alone, FIRST)) == 0
    states = checkpoint(alone)
    for config in runs.values():
        torch.testing.assert_close(columns(config), columns(alone), rtol=2e-5, atol=1e-6)
        assert_alike(weights(config), weights(alone))
        found = checkpoint(config)
        assert_alike(found["state_dict"], states["state_dict"])
        moments = states["optimizer_states"][0]["state"]
        assert list(found["optimizer_states"][0]["state"]) == list(moments)
        for key, values in moments.items():
            assert_alike(found["optimizer_states"][0]["state"][key], values, 1e-4)
    if questions:
        alike = asked(alone, tmp_path / "alone")
        assert evaluation.run(alike) == 0
        for _, config in questions:
            for name in ("base", "mine"):
                assert told(config, name) == told(alike, name)
    assert learning.run("peft", alone) == 0
    for name in resumed:
        on = at(whole, tmp_path / name)  # the same folder, on one process
        assert learning.run("peft", on) == 0
        torch.testing.assert_close(columns(on), columns(alone), rtol=5e-5, atol=1e-6)
        assert_alike(weights(on), weights(alone), 5e-5)


@pytest.mark.long
def test_one_checkpoint_makes_the_same_bytes_under_any_layout(peft: DictConfig, tmp_path: Path):
    """Runs with all steps behind them, which only write their result."""
    alone = at(peft, tmp_path / "alone")
    assert learning.run("peft", alone) == 0
    runs = {name: as_layout(at(peft, tmp_path / name), name) for name in LAYOUTS}
    for config in runs.values():
        folder = Path(config.exp_manager.explicit_log_dir)
        shutil.copytree(
            Path(alone.exp_manager.explicit_log_dir) / "checkpoints", folder / "checkpoints"
        )
    run_on(2, [("peft", config) for config in runs.values()])
    written = contents(alone)
    assert written
    for name, config in runs.items():
        assert contents(config) == written, name


def contents(cfg: DictConfig) -> dict[str, bytes]:
    """The files of what a stage has written, by name."""
    result = Path(cfg.model.nemo_path)
    return {path.name: path.read_bytes() for path in result.iterdir()}
