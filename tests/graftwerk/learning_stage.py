"""A tiny base model, a small task, and the configuration of a stage that learns it."""

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints import save_base
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.models import GPT, TransformerConfig
from graftwerk.stages import learning
from graftwerk.training.module import LearningModule

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = [f"w{n}" for n in range(12)]
TEMPLATE = "context: {context} question: {question} answer: {answer}"


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Rows whose answer is the first word of the context."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            context = rng.sample(WORDS, rng.randint(2, 5))
            row = {"taskname": "first", "context": " ".join(context), "question": "first"}
            file.write(json.dumps({**row, "answer": context[0]}) + "\n")
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers in our own layout, with a word tokenizer."""
    path = tmp_path_factory.mktemp("base") / "model"
    texts = [TEMPLATE.replace("{", "").replace("}", ""), " ".join(WORDS), "first"]
    tokenizer = build_tokenizer("word", texts)
    shape = TransformerConfig(
        vocab_size=len(tokenizer),
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        max_position_embeddings=64,
    )
    model = GPT(shape)
    model.initialise(torch.Generator().manual_seed(0))
    save_base(model, tokenizer, path)
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of 22 training and 6 validation rows: 6 steps of 4 an epoch, the last of 2."""
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder / "train.jsonl", 22, 1), write_rows(folder / "val.jsonl", 6, 2)


@pytest.fixture
def cfg(base: Path, rows: tuple[Path, Path], tmp_path: Path) -> DictConfig:
    """An adapter stage of two epochs of 6 steps, validating twice an epoch."""
    return OmegaConf.create(
        {
            "run": {"name": "first", "results_dir": str(tmp_path)},
            "trainer": {
                "devices": 1,
                "num_nodes": 1,
                "accelerator": "cpu",
                "precision": 32,
                "logger": False,
                "enable_checkpointing": False,
                "max_epochs": 2,
                "max_steps": -1,
                "log_every_n_steps": 1,
                "val_check_interval": 0.5,
                "accumulate_grad_batches": 1,
                "gradient_clip_val": 1.0,
                "resume_from_checkpoint": None,
            },
            "exp_manager": {
                "explicit_log_dir": str(tmp_path / "results"),
                "exp_dir": None,
                "name": "first",
                "create_tensorboard_logger": False,
                "resume_if_exists": True,
                "resume_ignore_no_checkpoint": True,
                "create_checkpoint_callback": True,
                "checkpoint_callback_params": {
                    "monitor": "val_loss",
                    "save_top_k": 2,
                    "mode": "min",
                    "filename": "first--{val_loss:.3f}-{step}",
                    "save_best_model": False,
                },
            },
            "model": {
                "seed": 1234,
                "nemo_path": str(tmp_path / "results" / "adapter.nemo"),
                "encoder_seq_length": 64,
                "tensor_model_parallel_size": 1,
                "pipeline_model_parallel_size": 1,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "restore_path": None,
                "language_model_path": str(base),
                "existing_tasks": [],
                "new_tasks": ["first"],
                "task_templates": [{"taskname": "first", "prompt_template": TEMPLATE}],
                "adapter_tuning": {
                    "type": "parallel_adapter",
                    "adapter_dim": 4,
                    "adapter_dropout": 0.1,
                    "norm_position": "pre",
                    "norm_type": "mixedfusedlayernorm",
                    "column_init_method": "xavier",
                    "row_init_method": "zero",
                },
                "data": {
                    "train_ds": [str(rows[0])],
                    "validation_ds": [str(rows[1])],
                    "add_eos": True,
                    "shuffle": True,
                    "num_workers": 0,
                },
                "optim": {
                    "name": "fused_adam",
                    "lr": 0.01,
                    "weight_decay": 0.01,
                    "betas": [0.9, 0.98],
                    "sched": {"name": "CosineAnnealing", "warmup_steps": 2, "min_lr": 0.0},
                },
            },
        }
    )


def elsewhere(cfg: DictConfig, folder: Path) -> DictConfig:
    """The same stage with its results in another folder."""
    other = cfg.copy()
    other.run.results_dir = str(folder)
    other.exp_manager.explicit_log_dir = str(folder / "results")
    other.model.nemo_path = str(folder / "results" / "adapter.nemo")
    return other


def read_metrics(cfg: DictConfig) -> list[dict[str, str]]:
    """The rows of `metrics.csv`."""
    with open(Path(cfg.exp_manager.explicit_log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def environment(**more: str) -> dict[str, str]:
    """For processes of the package as it lies here, alone in the world unless `more` says other."""
    outside = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    own = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
    path = os.pathsep.join([str(ROOT / "src"), own.get("PYTHONPATH", "")])
    return {**own, "PYTHONPATH": path.rstrip(os.pathsep), **more}


class Killed(BaseException):
    """Stands for what ends a process."""


def run_killed(stage: str, cfg: DictConfig, step: int) -> None:
    """Runs a learning stage until `step` optimizer steps are done, then it dies."""
    whole = LearningModule.training_step

    def dying(self: LearningModule, *args: Any) -> None:
        if self.global_step == step:
            raise Killed
        whole(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearningModule, "training_step", dying)
        with pytest.raises(Killed):
            learning.run(stage, cfg)
