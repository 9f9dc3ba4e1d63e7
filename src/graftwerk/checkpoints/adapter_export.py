"""Adapters of a model written in any of the forms; all of them, or nothing."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.adapter import save_adapters
from graftwerk.checkpoints.adapterhub import About, save_adapterhub
from graftwerk.checkpoints.base import replace_path
from graftwerk.checkpoints.peft import save_peft
from graftwerk.checkpoints.peft_modules import config_of
from graftwerk.checkpoints.rewording import cast_parts, nemo_words, say_as_adapterhub
from graftwerk.errors import UserError

FORMS = ("graftwerk", "adapterhub", "peft", "nemo")


def export_adapters(
    model: AdapterModel,
    names: Sequence[str],
    form: str,
    path: Path,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Writes adapters and returns the bytes on disk; the model's are changed to what was written.

    One adapter is a file or folder at `path`. Several are one file of ours or NeMo's; of AdapterHub
    and peft, which have a folder for each, `path` holds those.

    Args:
        form: one of `FORMS`.
        base: the path or name of the base, for those who read it.
        dtype: of the written weights; None: as they are.

    Raises:
        UserError: for what the form cannot say, by name; nothing is written.
    """
    for name in names:
        cast_parts(model, name, dtype)
    writers: dict[str, Callable[[Path], None]] = {
        "graftwerk": lambda place: _ours(model, names, place, base),
        "nemo": lambda place: _nemo(model, names, place, base),
        "adapterhub": lambda place: _each(names, place, _adapterhub(model, base)),
        "peft": lambda place: _each(names, place, lambda n, p: save_peft(model, n, p, base)),
    }
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as folder:
        made = Path(folder) / path.name
        writers[form](made)
        return _move(made, path)


def _each(names: Sequence[str], place: Path, write: Callable[[str, Path], Any]) -> None:
    for name in names:
        write(name, place if len(names) == 1 else place / name)


def _ours(model: AdapterModel, names: Sequence[str], place: Path, base: str | None) -> None:
    if place.suffix == ".nemo":
        raise UserError(f"{place.name}: a path that ends in .nemo is of NeMo's form, not of ours")
    save_adapters(model, names, place, _extra(base))


def _nemo(model: AdapterModel, names: Sequence[str], place: Path, base: str | None) -> None:
    if place.suffix != ".nemo":
        raise UserError(f"{place.name}: an adapter in NeMo's form is a file that ends in .nemo")
    cross = config_of(model).architecture == "t5"
    for name in names:
        model.adapters[name] = nemo_words(model.adapters[name], cross)
    save_adapters(model, names, place, _extra(base), strict=True)


def _extra(base: str | None) -> dict[str, Any]:
    return {} if base is None else {"base": base}


def _adapterhub(model: AdapterModel, base: str | None) -> Callable[[str, Path], None]:
    def write(name: str, place: Path) -> None:
        if model.head_of(name) is not None:
            raise UserError(
                f"adapter {name!r} has a head, which AdapterHub keeps in another file: export it "
                f"from Python (graftwerk.adapterhub)"
            )
        say_as_adapterhub(model, name)
        save_adapterhub(model, name, place, About(model_name=base), safetensors=True)

    return write


def _move(made: Path, path: Path) -> int:
    """Puts a whole file or folder into its place; returns its bytes."""
    files = made.rglob("*") if made.is_dir() else [made]
    size = sum(file.stat().st_size for file in files if file.is_file())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.move(made, partial)
        replace_path(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(True)
    return size
