"""The documented calls on two processes, by tensor, by pipeline and by rows, against one."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from graftwerk.checkpoints import read_adapters
from graftwerk.errors import UserError
from graftwerk.nemo import (
    LoraPEFTConfig,
    MegatronGPTSFTModel,
    MegatronT5SFTModel,
    MegatronTrainerBuilder,
    PtuningPEFTConfig,
)
from tests.graftwerk.nemo.small import small_config, write_base
from tests.graftwerk.ranks import on_processes

MODELS = {"gpt": MegatronGPTSFTModel, "t5": MegatronT5SFTModel}
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {
        "pipeline_model_parallel_size": 2,
        "activations_checkpoint_granularity": "full",
    },
    "data": {},
}


def learn(family: str, config: dict[str, Any]) -> Any:
    """The page's order: restore, add, fit, predict; returns all answers of this process."""
    base = config["model"]["restore_from_path"]
    trainer = MegatronTrainerBuilder(config).create_trainer()
    kind = MODELS[family]
    cfg = kind.merge_cfg_with(base, config)
    model = kind.restore_from(base, model_cfg=cfg, trainer=trainer)
    model.add_adapter([LoraPEFTConfig(cfg), PtuningPEFTConfig(cfg)])
    trainer.fit(model)
    answers = {
        str(row["mark"]): answer
        for batch in trainer.predict(model) or []
        for row, answer in zip(batch["rows"], batch["answers"], strict=True)  # pyright: ignore
    }
    if model.laid_out:
        with pytest.raises(UserError, match="restore it anew"):
            model.add_adapter(LoraPEFTConfig(cfg))
    return answers


def process(rank: int, port: int, family: str, runs: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in given.items()}, MASTER_ADDR="127.0.0.1")
    for config in runs.values():
        log = Path(config["exp_manager"]["explicit_log_dir"])
        answers = learn(family, config)
        (log / f"answers{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def laid_out(base: str, folder: Path, name: str) -> dict[str, Any]:
    config = small_config(base, folder)
    config["model"] |= LAYOUTS.get(name, {})
    config["trainer"]["devices"] = 1 if name == "alone" else 2
    config["exp_manager"]["explicit_log_dir"] = str(folder / name)
    return config


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    (path,) = Path(config["exp_manager"]["explicit_log_dir"]).glob("checkpoints/*.nemo")
    return {f"{a.name} {k}": v for a in read_adapters(path).adapters for k, v in a.state.items()}


@pytest.mark.parametrize("family", ["gpt", pytest.param("t5", marks=pytest.mark.long)])
def test_two_processes_learn_and_answer_as_one(family: str, tmp_path: Path):
    base = write_base(family, tmp_path / "base")
    runs = {name: laid_out(base, tmp_path, name) for name in LAYOUTS}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_processes(2, process, port, family, runs)
    alone = laid_out(base, tmp_path, "alone")
    answers = learn(family, alone)
    assert len(answers) == 5
    for name, config in runs.items():
        for key, tensor in weights(config).items():
            torch.testing.assert_close(tensor, weights(alone)[key], rtol=1e-4, atol=1e-5)
        told = [
            json.loads((tmp_path / name / f"answers{rank}.json").read_text()) for rank in (0, 1)
        ]
        assert told[0] | told[1] == answers, name
        assert (len(told[0]) < 5) == (name == "data"), "by rows each has its share"
