"""Hugging Face's layout: `config.json` beside weights, under the names of `transformers`."""

import json
import os
import shutil
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.checkpoints.base import SHARD_BYTES, Checkpoint, cast, has_tokenizer, replace_path
from graftwerk.checkpoints.families import FAMILIES, Family, Raw
from graftwerk.checkpoints.layout import Entry, Table
from graftwerk.checkpoints.shards import write_shards
from graftwerk.checkpoints.tensors import SafeTensors, TensorSource, weight_files
from graftwerk.checkpoints.torch_files import TorchFiles
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder in Hugging Face layout.

    Raises:
        UserError: for an architecture or an option of it that is not known, and damaged files.
    """
    path = folder / "config.json"
    values, family = read_config(path)
    files = weight_files(folder, SAFETENSORS)
    safe = bool(files)
    files = files or weight_files(folder, PICKLED)
    if not files:
        raise UserError(
            f"{folder}: there are no weights: '{SAFETENSORS}' or '{PICKLED}', whole or in shards, "
            f"is missing"
        )
    source: TensorSource = SafeTensors(files) if safe else TorchFiles(files)
    try:
        config = to_config(family, values, path, source.names)
        config = _tie(config, family, source)
        table = family.table(config)
        if family.root and not any(name.startswith(f"{family.root}.") for name in source.names):
            table = _without_root(table, family.root)
    except BaseException:
        source.__exit__(None, None, None)
        raise
    return Checkpoint(
        path=folder,
        format="huggingface",
        variant=family.model_type,
        config=config,
        table=table,
        source=source,
        ignored=family.ignored,
        files=files,
        tokenizer=folder if has_tokenizer(folder) else None,
    )


def read_config(path: Path) -> tuple[dict[str, Any], Family]:
    """A `config.json` and the family that it names."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{path}: model_type {kind!r} is not known; those that are: {known}")
    if values.get("quantization_config"):
        raise UserError(f"{path}: quantized weights are not supported: use the original ones")
    return values, FAMILIES[kind]


def to_config(
    family: Family, values: dict[str, Any], path: Path, tensors: Set[str]
) -> TransformerConfig:
    """Our config of a `config.json`; `tensors` are the names that the weight files hold."""
    try:
        return family.to_config(Raw(values, path, tensors))
    except (TypeError, ValueError, ArithmeticError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: a value of it cannot be used: {type(error).__name__}: {error}"
        ) from None


def _tie(config: TransformerConfig, family: Family, source: TensorSource) -> TransformerConfig:
    """T5's files may hold the output weights whether or not they are the embeddings'."""
    if config.architecture != "t5" or config.share_embeddings_and_output_weights:
        return config
    table = family.table(config)
    names = [
        table[f"{ours}.weight"].names[0] for ours in ("output_layer", "embedding.word_embeddings")
    ]
    if not set(names) <= source.names:
        return config
    output, words = (source.read(name) for name in names)
    same = output.shape == words.shape and torch.equal(output, words)
    return replace(config, share_embeddings_and_output_weights=same)


def _without_root(table: Table, root: str) -> Table:
    """The table for files of the bare model, whose names lack the root."""
    return {
        ours: Entry(tuple(name.removeprefix(f"{root}.") for name in entry.names), entry.reshape)
        for ours, entry in table.items()
    }


def family_of(config: TransformerConfig, model_type: str | None = None) -> Family:
    """The family that can say all of a config: the named one, or the first that can.

    Raises:
        UserError: where none can, naming what stands in the way.
    """
    if model_type is not None and model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"Hugging Face model_type {model_type!r} is not known: one of {known}")
    plain = _without_dropout(config)
    candidates = list(FAMILIES.values()) if model_type is None else [FAMILIES[model_type]]
    nearest: tuple[int, str, str] | None = None
    for family in candidates:
        differing = _cannot_say(family, plain)
        if not differing:
            return family
        if nearest is None or len(differing) < nearest[0]:
            nearest = (len(differing), family.model_type, ", ".join(differing))
    assert nearest is not None
    raise UserError(
        f"the model cannot be written as Hugging Face's {nearest[1]}, the nearest of "
        f"{', '.join(f.model_type for f in candidates)}: it cannot say {nearest[2]}"
    )


def _cannot_say(family: Family, config: TransformerConfig) -> list[str]:
    """The fields of a config that are lost on the way to a family's `config.json` and back."""
    if config.head not in family.classes:
        return [f"head={config.head}"]
    path = Path(f"{family.model_type}'s config.json")
    try:
        raw = {**family.from_config(config), "architectures": [family.classes[config.head]]}
        names = {name for entry in family.table(config).values() for name in entry.names}
        back = family.to_config(Raw(raw, path, names)).to_dict()
    except (UserError, StopIteration, KeyError, ZeroDivisionError) as error:
        return [str(error)]
    return [f"{key}={value}" for key, value in config.to_dict().items() if back[key] != value]


def _without_dropout(config: TransformerConfig) -> TransformerConfig:
    """What training set for itself is no part of a model's form."""
    zero = dict.fromkeys(("hidden_dropout", "attention_dropout", "embedding_dropout"), 0.0)
    return replace(config, init_method_std=0.02, **zero)


def write_folder(
    config: TransformerConfig,
    read: Callable[[str], Tensor],
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], object] = lambda name: None,
) -> str:
    """Writes a model as `transformers` reads it, and returns its `model_type`.

    Written beside the path first, tensor by tensor, and renamed when it is whole.

    Args:
        read: one whole parameter of ours by name.
        model_type: the family; None: the first that can say all of the config.
        dtype: of the written weights; None: as read.

    Raises:
        UserError: where no family can hold the model.
    """
    family, path = family_of(config, model_type), Path(path)
    table = family.table(_without_dropout(config))
    homes = {name: ours for ours, entry in table.items() for name in entry.names}
    held: dict[str, dict[str, Tensor]] = {}  # of one parameter at a time: q, k and v of one
    written: set[torch.dtype] = set()

    def read_theirs(name: str) -> Tensor:
        ours = homes[name]
        if ours not in held:
            held.clear()
            entry = table[ours]
            held[ours] = dict(zip(entry.names, entry.reshape.split(read(ours)), strict=True))
        tensor = cast(held[ours][name], dtype)
        written.add(tensor.dtype)
        return tensor

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_shards(partial, homes, read_theirs, SHARD_BYTES, progress)
        values = {
            "architectures": [family.classes[config.head]],
            "model_type": family.model_type,
            **_token_ids(tokenizer),
            **family.from_config(config),  # last: RoBERTa's positions hang on its padding token
        }
        if len(written) == 1:
            values["torch_dtype"] = str(written.pop()).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        replace_path(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return family.model_type


def _token_ids(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
    """The ids of special tokens that generation reads off a `config.json`."""
    if tokenizer is None:
        return {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(tokenizer, name)) is not None}
