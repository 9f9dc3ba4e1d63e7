"""Tiny bases, rows and a configuration for the documented Python surface."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from graftwerk.checkpoints import save_base
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.models import TransformerConfig, build_model
from tests.graftwerk.tiny_families import t5_shape

WORDS = [f"w{n}" for n in range(12)]


def write_rows(path: Path, count: int, seed: int) -> str:
    """Rows whose output is the input's first word."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for number in range(count):
            words = rng.sample(WORDS, rng.randint(2, 5))
            row = {"input": f"first of {' '.join(words)} ?", "output": words[0], "mark": number}
            file.write(json.dumps(row) + "\n")
    return str(path)


def write_base(family: str, path: Path) -> str:
    """A random `gpt` or `t5` of two layers in our own layout, every weight away from zero."""
    tokenizer = build_tokenizer("word", ["first of ?", " ".join(WORDS)])
    gpt = TransformerConfig(
        vocab_size=len(tokenizer),
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=48,
        max_position_embeddings=64,
    )
    model = build_model(gpt if family == "gpt" else t5_shape(len(tokenizer)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim < 2), 0.2, generator=generator)
    save_base(model, tokenizer, path)
    return str(path)


def small_config(base: str, folder: Path, steps: int = 4) -> dict[str, Any]:
    """A run of a few steps on rows in a folder."""
    return {
        "trainer": {"devices": 1, "accelerator": "cpu", "precision": 32, "max_steps": steps},
        "exp_manager": {
            "explicit_log_dir": str(folder / "log"),
            "name": "small",
            "create_tensorboard_logger": False,
        },
        "model": {
            "restore_from_path": base,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "peft": {
                "lora_tuning": {"adapter_dim": 4},
                "adapter_tuning": {"adapter_dim": 4},
                "p_tuning": {"virtual_tokens": 3, "embedding_dim": 8, "bottleneck_dim": 8},
            },
            "data": {
                "train_ds": {"file_names": [write_rows(folder / "train.jsonl", 16, 1)]},
                "validation_ds": {"file_names": [write_rows(folder / "val.jsonl", 4, 2)]},
                "test_ds": {
                    "file_names": [write_rows(folder / "test.jsonl", 5, 3)],
                    "tokens_to_generate": 3,
                },
            },
            "optim": {"name": "fused_adam", "lr": 0.02},
        },
    }
