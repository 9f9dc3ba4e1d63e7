"""Base models in any layout that we know, told apart by what the folder holds."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from safetensors.torch import save_file

from graftwerk.checkpoints import huggingface
from graftwerk.checkpoints.tensors import Source, TensorReader, fill
from graftwerk.errors import UserError
from graftwerk.models import GPT, TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_CONFIG = "model_config.yaml"


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path, looked for with and without a `results` folder before its name.

    The published launcher's documentation has both.

    Raises:
        UserError: where there is neither.
    """
    path = Path(path)
    parent = path.parent.parent if path.parent.name == "results" else path.parent / "results"
    other = parent / path.name
    for candidate in (path, other):
        if candidate.exists():
            return candidate
    raise UserError(
        f"model.language_model_path={path}: no checkpoint there, nor at {other}: "
        f"give a folder in Hugging Face layout, or one that the stage `training` made"
    )


def load_base(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> GPT:
    """Reads a base model; the result is in eval mode.

    The model is built on the meta device and its tensors are read one at a time.

    Raises:
        UserError: where the checkpoint is missing, of an unknown architecture, or does not fit.
    """
    folder = find_checkpoint(path)
    if (folder / "config.json").is_file():
        config, table, ignore = huggingface.read_config(folder)
    elif (folder / OWN_CONFIG).is_file():
        config = TransformerConfig.from_dict(_read_yaml(folder / OWN_CONFIG))
        table, ignore = None, lambda name: False
    else:
        raise UserError(
            f"{folder} is no checkpoint that can be read: a folder with `config.json` "
            f"(Hugging Face) or `{OWN_CONFIG}` (ours) and safetensors is needed"
        )
    with torch.device("meta"):
        model = GPT(config)
    with TensorReader(folder) as reader:
        if table is None:
            table = {name: Source((name,)) for name, _ in model.named_parameters()}
        elif reader.names.isdisjoint({n for source in table.values() for n in source.names}):
            table = _without_root(table)
        fill(model, table, reader, folder, dtype, device, ignore)
    return model.eval()


def _without_root(table: dict[str, Source]) -> dict[str, Source]:
    """The table for a file of the bare model, whose names lack `transformer.` or `model.`."""
    return {
        ours: Source(tuple(name.partition(".")[2] for name in source.names), source.build)
        for ours, source in table.items()
    }


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold keys and values")
    return values


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies in a checkpoint's folder. Runs no code from it.

    Raises:
        UserError: where there is none.
    """
    from transformers import AutoTokenizer

    folder = find_checkpoint(path)
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no tokenizer can be read there: {error}") from None


def save_base(model: GPT, tokenizer: "PreTrainedTokenizerBase | None", path: str | Path) -> None:
    """Writes a model in our own layout: beside the path first, renamed when it is whole."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        config = {"format": "graftwerk", **model.config.to_dict()}
        (partial / OWN_CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        replace_path(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_path(new: Path, path: Path) -> None:
    """Moves a whole file or folder to its place; what was there goes only when the new one is."""
    if not path.is_dir():
        os.replace(new, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)
