"""The sizes of a checkpoint's model, read from its configuration alone.

Sizes are checked before anything is queued; a checkpoint that does not exist yet, or whose
configuration cannot be read here, has none, and the job checks them.
"""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import tarfile


@dataclass(frozen=True)
class Shape:
    """What tensor and pipeline parallelism must divide; None where it is not known."""

    num_layers: int | None  # of the encoder, where there is a decoder too
    num_attention_heads: int | None
    num_query_groups: int | None
    ffn_hidden_size: int | None
    vocab_size: int | None = None
    decoder_num_layers: int | None = None


Names = dict[str, tuple[str, ...]]

# Hugging Face's names: of BERT, LLaMA and most others; of GPT-2 and GPT-J; of T5; of OPT.
HUGGING_FACE: Names = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "num_query_groups": ("num_key_value_heads",),
    "ffn_hidden_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "decoder_num_layers": ("num_decoder_layers",),
}
MEGATRON: Names = {name: (name,) for name in HUGGING_FACE}
MEMBER = "model_config.yaml"
LARGEST_CONFIG = 1 << 20  # bytes; what is larger is no configuration
MOST_BRACKETS = 500
READ_AT_MOST = 64 << 20  # bytes of an archive that is unpacked to find its configuration


def read_shape(path: str | Path) -> Shape | None:
    """The shape of a Hugging Face folder, of a folder of ours, or of a `.nemo`, packed or not.

    None for anything else, and for what cannot be read.
    """
    path = Path(path)
    try:
        if (path / "config.json").is_file():
            return _hugging_face(json.loads(_small(path / "config.json")))
        if path.is_dir():
            return _megatron(_yaml(_small(path / MEMBER)))
        return _megatron(_yaml(_member(path)))
    except (OSError, EOFError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _hugging_face(values: Any) -> Shape | None:
    if not isinstance(values, dict):
        return None
    sizes = _sizes(values, HUGGING_FACE)
    if sizes["ffn_hidden_size"] is None and _size(values, "n_embd"):  # GPT-2's and GPT-J's null
        sizes["ffn_hidden_size"] = 4 * values["n_embd"]
    if "num_heads" in values and "d_kv" in values:  # a T5's decoder is as deep if it says nothing
        sizes["decoder_num_layers"] = sizes["decoder_num_layers"] or sizes["num_layers"]
    return _shape(sizes)


def _megatron(values: Any) -> Shape | None:
    """NeMo's names, and ours. NeMo's T5 has those of encoder and decoder in mappings of their own.

    NeMo's older T5 has them side by side, once for both.
    """
    if not isinstance(values, dict):
        return None
    encoder, decoder = values.get("encoder"), values.get("decoder")
    inner = encoder if isinstance(encoder, dict) else {}
    sizes = _sizes({**values, **inner}, MEGATRON)
    if isinstance(decoder, dict):
        sizes["decoder_num_layers"] = _size(decoder, "num_layers") or sizes["num_layers"]
    elif "t5" in str(values.get("target", "")).lower() or values.get("architecture") == "t5":
        sizes["decoder_num_layers"] = sizes["decoder_num_layers"] or sizes["num_layers"]
    if sizes["ffn_hidden_size"] is None and _size(values, "hidden_size"):
        sizes["ffn_hidden_size"] = 4 * values["hidden_size"]
    return _shape(sizes)


def _shape(sizes: dict[str, int | None]) -> Shape:
    if sizes["num_query_groups"] is None:
        sizes["num_query_groups"] = sizes["num_attention_heads"]
    return Shape(**sizes)


def _sizes(values: Mapping[str, Any], names: Names) -> dict[str, int | None]:
    return {
        field: next((size for key in keys if (size := _size(values, key))), None)
        for field, keys in names.items()
    }


def _size(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    good = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if good else None


def _yaml(content: bytes) -> Any:
    """The values; the parser's time grows with the square of brackets that nothing closes."""
    if content.count(b"[") + content.count(b"{") > MOST_BRACKETS:
        raise ValueError("too many brackets for a configuration")
    return yaml.safe_load(content)


def _small(path: Path) -> bytes:
    with open(path, "rb") as file:
        return _bounded(file)


def _bounded(file: IO[bytes]) -> bytes:
    content = file.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise ValueError("too large for a configuration")
    return content


def _member(path: Path) -> bytes:
    """`model_config.yaml` out of a tar, or of the first part of a compressed one."""
    import gzip
    import tarfile
    import zlib

    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            if not packed:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    return _config(archive)
            begin = io.BufferedReader(_Beginning(gzip.GzipFile(fileobj=file)))
            with tarfile.open(fileobj=begin, mode="r|") as archive:
                return _config(archive)
        except (tarfile.TarError, zlib.error) as error:
            raise ValueError(str(error)) from None


def _config(archive: "tarfile.TarFile") -> bytes:
    for member in archive:
        if os.path.normpath(member.name) == MEMBER and member.isfile():
            reader = archive.extractfile(member)
            assert reader is not None, "a file has content"
            return _bounded(reader)
    raise ValueError(f"no {MEMBER}")


class _Beginning(io.RawIOBase):
    """The first `READ_AT_MOST` bytes of a stream: weights are not unpacked for a few sizes."""

    def __init__(self, source: IO[bytes] | Any) -> None:
        self.source, self.left = source, READ_AT_MOST

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(min(len(buffer), self.left))
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)
