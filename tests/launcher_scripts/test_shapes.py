"""Sizes of checkpoints, read without torch."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from launcher_scripts import shapes
from launcher_scripts.shapes import Shape, read_shape

SIZES = "num_layers: 2\nnum_attention_heads: 4\nffn_hidden_size: 64\nvocab_size: 99\n"


def folder(path: Path, name: str, text: str) -> Path:
    path.mkdir()
    (path / name).write_text(text)
    return path


def archive(path: Path, text: str, mode: str = "w", before: bytes = b"") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in (("./weights.ckpt", before), ("./model_config.yaml", text.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "vocab_size": 99,
            },
            Shape(2, 4, 2, 64, 99),
        ),
        ({"n_layer": 12, "n_head": 12, "n_embd": 48, "n_inner": None}, Shape(12, 12, 12, 192)),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}, Shape(2, 4, 4, 64)),
        (
            {"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "num_decoder_layers": 3},
            Shape(2, 4, 4, 64, None, 3),
        ),
        ({"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64}, Shape(2, 4, 4, 64, None, 2)),
    ],
    ids=["llama", "gpt2", "opt", "t5", "t5 of equal depth"],
)
def test_a_hugging_face_folder_has_the_sizes_of_its_config(tmp_path, config, shape):
    assert read_shape(folder(tmp_path / "f", "config.json", json.dumps(config))) == shape


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (SIZES, Shape(2, 4, 4, 64, 99)),
        (SIZES + "num_query_groups: null\n", Shape(2, 4, 4, 64, 99)),
        (SIZES + "num_query_groups: 2\n", Shape(2, 4, 2, 64, 99)),
        ("num_layers: 2\nnum_attention_heads: 4\nhidden_size: 16\n", Shape(2, 4, 4, 64)),
        (SIZES + "target: a.MegatronT5Model\n", Shape(2, 4, 4, 64, 99, 2)),
        (SIZES + "architecture: t5\ndecoder_num_layers: 3\n", Shape(2, 4, 4, 64, 99, 3)),
        (
            "encoder: {num_layers: 2, num_attention_heads: 4, ffn_hidden_size: 64}\n"
            "decoder: {num_layers: 3, num_attention_heads: 4, ffn_hidden_size: 64}\n",
            Shape(2, 4, 4, 64, None, 3),
        ),
    ],
    ids=["gpt", "null groups", "groups", "no ffn", "old t5", "our t5", "new t5"],
)
def test_packed_and_unpacked_nemo_files_have_the_sizes_of_their_yaml(tmp_path, text, shape):
    assert read_shape(folder(tmp_path / "f", "model_config.yaml", text)) == shape
    assert read_shape(archive(tmp_path / "a.nemo", text)) == shape
    assert read_shape(archive(tmp_path / "b.nemo", text, "w:gz")) == shape


def test_a_compressed_file_is_not_unpacked_to_its_end(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.nemo", SIZES, "w:gz", before=bytes(200_000))
    assert read_shape(path) == Shape(2, 4, 4, 64, 99)
    monkeypatch.setattr(shapes, "READ_AT_MOST", 100_000)
    assert read_shape(path) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"no tar", b"\x1f\x8b", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03no deflate"],
)
def test_what_is_no_archive_has_no_shape(tmp_path, content):
    (tmp_path / "a.nemo").write_bytes(content)
    assert read_shape(tmp_path / "a.nemo") is None


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "[" * 5000, "x: " + "y" * (1 << 20)])
def test_a_configuration_that_cannot_be_read_has_no_shape(tmp_path, text):
    assert read_shape(folder(tmp_path / "f", "model_config.yaml", text)) is None
    assert read_shape(archive(tmp_path / "a.nemo", text)) is None
    assert read_shape(folder(tmp_path / "g", "config.json", text)) is None


def test_nothing_has_no_shape(tmp_path):
    assert read_shape(tmp_path / "nowhere") is None
    assert read_shape(tmp_path) is None
