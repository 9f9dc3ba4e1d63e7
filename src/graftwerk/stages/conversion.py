"""The stage `conversion`: a checkpoint of any format into another one, tensor by tensor."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from graftwerk.checkpoints import hub
from graftwerk.checkpoints.base import (
    Checkpoint,
    load_tokenizer,
    open_checkpoint,
    replace_path,
)
from graftwerk.checkpoints.inspect import Report, faults, inspect, shapes_of, show
from graftwerk.checkpoints.leftovers import remove_leftovers
from graftwerk.checkpoints.shards import check_space
from graftwerk.checkpoints.tensors import read_parameter, refuse
from graftwerk.checkpoints.write import DTYPES, FORMATS, write_checkpoint
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "model.checkpoint_folder"
# What a folder must hold to be replaced: a checkpoint of some format.
CONFIGS = ("config.json", "model_config.yaml")
# What training sets for itself is no part of a model's form.
TRAINING = {"init_method_std", "hidden_dropout", "attention_dropout", "embedding_dropout"}
SPARE = 1.02  # of the tensors' bytes: headers, configuration and tokenizer


def run(cfg: DictConfig) -> int:
    """Runs the stage on a resolved config (`run`, `model`).

    Raises:
        UserError: for input that a person can mend, before anything is written.
    """
    model, start = cfg.model, time.monotonic()
    check(model)
    path, target = source_of(model), Path(model.output_path)
    with open_checkpoint(path, model.get("revision")) as source:
        check_source(source, model, target)
        tokenizer = tokenizer_of(source, model)
        check_space(target, int(SPARE * size_of(source, DTYPES[model.dtype])))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, (target.name,))
        fresh = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with progress_bar(target.name, len(source.table)) as advance:
                write(source, model, fresh, tokenizer, advance)
            report = verified(fresh, source)
            replace_path(fresh, target)
        finally:
            shutil.rmtree(fresh) if fresh.is_dir() else fresh.unlink(missing_ok=True)
    report.path = str(target)
    print(f"converted {source.path} ({source.format}, {source.variant}) to")
    show(report)
    print(f"in {time.monotonic() - start:,.1f} s")
    return 0


# ---- checks


def check(model: DictConfig) -> None:
    """Raises a UserError for what the configuration alone shows to be wrong."""
    for key, allowed in (("target", FORMATS), ("dtype", tuple(DTYPES))):
        if model.get(key) not in allowed:
            raise UserError(f"model.{key}={model.get(key)!r}: use one of {', '.join(allowed)}")
    target = Path(model.output_path)
    if not os.path.lexists(target):
        return
    if not model.overwrite:
        raise UserError(
            f"model.output_path={target} exists already: set model.overwrite=True to replace it, "
            f"or choose another path"
        )
    if target.is_dir() and not any((target / name).is_file() for name in CONFIGS):
        raise UserError(
            f"model.output_path={target} is a folder that holds no checkpoint, which "
            f"overwrite=True does not replace: choose another path"
        )


def source_of(model: DictConfig) -> str:
    """The checkpoint to convert: a path that is there, or a name of the Hub."""
    path = str(model.checkpoint_folder)
    if not Path(path).exists() and not hub.is_hub_name(path):
        raise UserError(f"{KEY}={path} does not exist, and is no name of the Hub such as org/name")
    return path


def check_source(source: Checkpoint, model: DictConfig, target: Path) -> None:
    """Raises a UserError where the checkpoint is not what was asked for, or not whole."""
    kind, wanted = source.config.architecture, model.get("model_type")
    if wanted is not None and kind != wanted:
        group = {"gpt": "gpt3", "t5": "t5"}.get(kind)
        advice = f"use conversion={group}/..." if group else "set model.model_type=null"
        raise UserError(f"{KEY}={source.path} is a {kind} model, not {wanted}: {advice}")
    inside = source.path.resolve() in (target.resolve(), *target.resolve().parents)
    if inside or target.resolve() in source.path.resolve().parents:
        raise UserError(f"model.output_path={target} lies in {KEY}={source.path}, or holds it")
    refuse(source.path, faults(source))


def tokenizer_of(source: Checkpoint, model: DictConfig) -> "PreTrainedTokenizerBase | None":
    """The tokenizer that goes along: `model.tokenizer`, else the checkpoint's own, if any."""
    place = model.get("tokenizer") or source.tokenizer
    if place is None:
        print(f"warning: {source.path} has no tokenizer, so what is written has none", flush=True)
        return None
    tokenizer = load_tokenizer(place)
    if len(tokenizer) > source.config.vocab_size:
        raise UserError(
            f"the tokenizer of {place} has {len(tokenizer)} tokens, more than the {KEY}="
            f"{source.path} model's vocabulary of {source.config.vocab_size}: set model.tokenizer "
            f"to the model's own"
        )
    return tokenizer


def size_of(source: Checkpoint, dtype: torch.dtype | None) -> int:
    """Bytes of all parameters in a type; None: in that of the checkpoint's files."""
    shapes = shapes_of(source.config)
    return sum(
        torch.Size(shapes[name]).numel() * (dtype or source.source.dtype(entry.names[0])).itemsize
        for name, entry in source.table.items()
        if name in shapes
    )


# ---- writing


def write(
    source: Checkpoint,
    model: DictConfig,
    path: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    advance: Callable[[], object],
) -> None:
    """Writes the checkpoint in the asked format at `path`; one parameter is in memory at a time."""
    seen: set[str] = set()

    def read(name: str) -> Tensor:
        if name not in seen:
            seen.add(name)
            advance()
        return read_parameter(source.table[name], source.source)

    wanted = model.get("architecture") or "auto"
    write_checkpoint(
        source.config,
        read,
        path,
        model.target,
        tokenizer,
        DTYPES[model.dtype],
        None if wanted == "auto" else wanted,
        bool(model.get("mcore_gpt", True)),
    )


def verified(path: Path, source: Checkpoint) -> Report:
    """What was written, read back: form, names and sizes of all parameters are the source's.

    Raises:
        RuntimeError: where they are not; nothing has taken its place yet.
    """
    report = inspect(path)
    with open_checkpoint(path) as written:
        ours, theirs = source.config.to_dict(), written.config.to_dict()
    differing = [key for key in ours.keys() - TRAINING if ours[key] != theirs[key]]
    if report.faults or differing:
        raise RuntimeError(
            f"what was written does not read back whole: {report.faults[:3]} {differing}"
        )
    return report


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[], Any]]:
    """A bar on a terminal, a line elsewhere; yields what to call for each parameter."""
    if not sys.stdout.isatty():
        print(f"writing {name}: {total} parameters", flush=True)
        yield lambda: None
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
