"""The sizes of a checkpoint's model, read from its configuration alone.

Sizes are checked before anything is queued; a checkpoint that does not exist yet, or whose
configuration cannot be read here, has none, and the job checks them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Shape:
    """What tensor and pipeline parallelism must divide; None where it is not known."""

    num_layers: int | None
    num_attention_heads: int | None
    num_query_groups: int | None
    ffn_hidden_size: int | None
    vocab_size: int | None = None


# Hugging Face's names, of LLaMA and its like, of GPT-2, of T5.
HUGGING_FACE = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "num_query_groups": ("num_key_value_heads",),
    "ffn_hidden_size": ("intermediate_size", "n_inner", "d_ff"),
    "vocab_size": ("vocab_size",),
}
MEMBER = "model_config.yaml"


def read_shape(path: str | Path) -> Shape | None:
    """The shape of a Hugging Face folder, a folder of ours or a `.nemo` file; None for others."""
    path = Path(path)
    try:
        if (path / "config.json").is_file():
            values = json.loads((path / "config.json").read_text(encoding="utf-8"))
            names: dict[str, tuple[str, ...]] = HUGGING_FACE
        elif (path / MEMBER).is_file():
            values = _yaml((path / MEMBER).read_bytes())
            names = {name: (name,) for name in HUGGING_FACE}
        elif path.is_file():
            values = _yaml(_member(path))
            names = {name: (name,) for name in HUGGING_FACE}
        else:
            return None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    sizes = {field: _first(values, keys) for field, keys in names.items()}
    if sizes["num_query_groups"] is None:
        sizes["num_query_groups"] = sizes["num_attention_heads"]
    return Shape(**sizes)


def _yaml(text: bytes) -> Any:
    return yaml.safe_load(text)


def _member(path: Path) -> bytes:
    """`model_config.yaml` out of a plain tar; nothing where it is none."""
    import tarfile

    try:
        with tarfile.open(path, "r:") as archive:  # never a whole compressed one for a few sizes
            for member in archive:
                if member.name.removeprefix("./") == MEMBER:
                    reader = archive.extractfile(member)
                    return reader.read() if reader is not None else b""
    except tarfile.TarError:
        return b""
    return b""


def _first(values: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    found = (values.get(key) for key in keys)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
