"""What loading costs in anonymous memory, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftwerk.checkpoints.huggingface import write_folder
from graftwerk.models import TransformerConfig, build_model
from tests.conftest import ROOT

LIMIT = 1.15  # times the parameters in the chosen type


def write_llama(path: Path, layers: int) -> None:
    """A LLaMA of 27 MB of float32 a layer and 33 MB of embeddings."""
    config = TransformerConfig(
        vocab_size=16_000,
        num_layers=layers,
        hidden_size=512,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=3_840,
        max_position_embeddings=128,
        normalization="rmsnorm",
        position_embedding_type="rope",
        activation="swiglu",
        bias=False,
        qkv_bias=False,
        layernorm_epsilon=1e-6,
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(config).named_parameters()}
    write_folder(config, lambda name: torch.full(shapes[name], 0.01), path)


@pytest.mark.parametrize(
    ("layers", "dtype"),
    [
        (8, "bfloat16"),
        (8, "float32"),
        pytest.param(48, "bfloat16", marks=pytest.mark.long),  # 1.3 GB of float32
        pytest.param(48, "float32", marks=pytest.mark.long),
        pytest.param(90, "float16", marks=pytest.mark.long),  # 1.2 GB of float16
    ],
)
def test_loading_holds_little_more_than_the_parameters(layers: int, dtype: str, tmp_path: Path):
    write_llama(tmp_path / "model", layers)
    command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), str(tmp_path / "model")]
    command += ["--measure", "ours", "--dtype", dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(output.splitlines()[-1])
    assert figures["anonymous"] <= LIMIT * figures["parameters"]
    # Pages of the file that have been copied are let go: nothing is held twice.
    assert figures["resident"] <= 1.3 * figures["parameters"]
