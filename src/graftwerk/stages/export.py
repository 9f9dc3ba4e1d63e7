"""The stage `export`: adapters in another library's form, or merged into their base."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig

from graftwerk.adapters import Stack
from graftwerk.adapters.merge import Merge
from graftwerk.checkpoints.adapter import load_from, read_adapters
from graftwerk.checkpoints.adapter_export import FORMS, export_adapters
from graftwerk.checkpoints.adapter_form import AdapterFile
from graftwerk.checkpoints.base import load_base, load_tokenizer
from graftwerk.checkpoints.base_path import base_of
from graftwerk.checkpoints.leftovers import remove_leftovers
from graftwerk.checkpoints.merge import held_type
from graftwerk.checkpoints.shards import check_space
from graftwerk.checkpoints.write import DTYPES, write_checkpoint
from graftwerk.checkpoints.write import FORMATS as MERGED
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5
from graftwerk.training.base import revision_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL = (*FORMS, *(form for form in MERGED if form not in FORMS))
# What a folder must hold to be replaced.
MARKS = ("adapter_config.yaml", "adapter_config.json", "model_config.yaml", "config.json")


@dataclass(frozen=True)
class Loaded:
    """A base with the adapters that are exported, none of them active yet."""

    model: GPT | T5 | BERT
    names: list[str]
    tokenizer: "PreTrainedTokenizerBase | None"


def run(cfg: DictConfig) -> int:
    """Runs the stage on a resolved config (`run`, `model`, and the keys of the stage itself).

    Raises:
        UserError: for input that a person can mend, and what the form cannot say, before anything
            is written.
    """
    check(cfg)
    path, dtype = Path(cfg.output_path), DTYPES[cfg.dtype]
    remove_leftovers(path.parent, (path.name,))
    base = base_of(cfg.model)
    loaded = load(cfg.model, base, dtype if cfg.merge else None, bool(cfg.merge))
    if cfg.merge:
        _merge(loaded, cfg.format, path, dtype, base)
    else:
        size = export_adapters(loaded.model, loaded.names, cfg.format, path, base, dtype)
        print(f"wrote {', '.join(loaded.names)} as {cfg.format}: {path} ({size:,} bytes)")
    return 0


def check(cfg: DictConfig) -> None:
    """Raises a UserError for what the configuration alone shows to be wrong."""
    for key, allowed in (("format", ALL), ("dtype", tuple(DTYPES))):
        if cfg.get(key) not in allowed:
            raise UserError(f"{key}={cfg.get(key)!r}: use one of {', '.join(allowed)}")
    if cfg.merge and cfg.format not in MERGED:
        raise UserError(
            f"format={cfg.format} holds adapters and no model: set merge=False, or format to one "
            f"of {', '.join(MERGED)}"
        )
    if not cfg.merge and cfg.format not in FORMS:
        raise UserError(
            f"format={cfg.format} holds a whole model: set merge=True, or format=peft, which is "
            f"how adapters go beside one"
        )
    adapters = cfg.model.adapters
    if adapters == "auto" or not adapters:
        raise UserError("model.adapters is empty: name at least one adapter's file or folder")
    names = [each.name for each in adapters]
    if len(set(names)) < len(names):
        raise UserError(f"model.adapters: the names must differ: {', '.join(names)}")
    if cfg.model.get("language_model_path") == "auto":
        raise UserError("model.language_model_path=auto: no learning stage says what it is")
    _check_place(Path(cfg.output_path), bool(cfg.overwrite))


def _check_place(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UserError(
            f"output_path={path} exists already: set overwrite=True to replace it, or choose "
            f"another path"
        )
    held = [path, *(each for each in path.iterdir() if each.is_dir())] if path.is_dir() else []
    if path.is_dir() and not any((folder / name).is_file() for folder in held for name in MARKS):
        raise UserError(
            f"output_path={path} is a folder that holds no adapter or checkpoint, which "
            f"overwrite=True does not replace: choose another path"
        )


def load(model_cfg: DictConfig, base: str, dtype: torch.dtype | None, tokenizer: bool) -> Loaded:
    """The base in the type of its files, or in `dtype` if that is wider, with the adapters.

    Raises:
        UserError: where files are missing or do not fit.
    """
    revision = revision_of(model_cfg)
    files = {each.name: (each.path, read_adapters(each.path)) for each in model_cfg.adapters}
    heads = {
        str(a.config["head"]) for _, f in files.values() for a in f.adapters if "head" in a.config
    }
    if len(heads) > 1:
        raise UserError(f"adapters with different heads have no base in common: {sorted(heads)}")
    wide, place = held_type(base, revision, dtype)
    model = load_base(base, wide, head=next(iter(heads), None), revision=revision)
    names = [n for name, (path, file) in files.items() for n in _add(model, name, path, file)]
    found = None
    if tokenizer and place is not None:
        found = load_tokenizer(place)
    return Loaded(model, names, found)


def _add(model: GPT | T5 | BERT, name: str, path: str, file: AdapterFile) -> list[str]:
    """Adds what a file holds under the name given, or under that and each one's own."""
    fitted = file.on(model)
    own = [adapter.name for adapter in fitted.adapters]
    names = {own[0]: name} if len(own) == 1 else {each: f"{name}-{each}" for each in own}
    return load_from(model, path, fitted, names)


def _merge(loaded: Loaded, form: str, path: Path, dtype: torch.dtype | None, base: str) -> None:
    loaded.model.set_active(Stack(*loaded.names))
    merge = Merge(loaded.model)
    parameters = [parameter for _, parameter in loaded.model.base_parameters()]
    check_space(path, sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters))
    if loaded.tokenizer is None:
        print(f"warning: {base} has no tokenizer, so what is written has none")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(loaded.model.config, merge.read, path, form, loaded.tokenizer, dtype)
    print(f"merged {', '.join(loaded.names)} into {base}: {path}")
