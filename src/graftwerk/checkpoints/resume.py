"""What a stopped run goes on from: one file of plain values and tensors, never the base.

A file is a zip archive that torch writes: trained weights under global names, optimizer, schedule,
progress of the loops and the state of callbacks. It is written beside and renamed, so a killed run
leaves a whole file or none; the archive's checksums tell what a disk has damaged since, and the
newest but one is kept for that. Random states are no part of it: they follow from seed, step and
rank.
"""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from graftwerk.errors import UserError, storing

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class DamagedCheckpoint(Exception):
    """A checkpoint file that cannot be read; the message says what is wrong with it."""


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes beside `path`, onto the disk, and renames; a `last.ckpt` becomes `previous.ckpt`.

    The folder's own folder is not made anew: it may have been on a disk that is no longer there.

    Raises:
        StorageError: where the disk is full, read-only or gone; what was there stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with storing(path):
        path.parent.mkdir(exist_ok=True)
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.is_dir():  # whatever put it there: it is in the way
                path.rename(_free(path))
            elif path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, after its checksums; no code in it is run.

    Raises:
        DamagedCheckpoint: where it is cut short, altered, or no checkpoint at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise DamagedCheckpoint(f"checksum of {broken} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedCheckpoint:
        raise
    except Exception as error:  # a damaged archive makes zipfile and torch trip over anything
        words = str(error).partition("\n")[0]
        raise DamagedCheckpoint(words or type(error).__name__) from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= set(checkpoint):
        raise DamagedCheckpoint("it is no checkpoint of a training run")
    return checkpoint


def newest_checkpoint(
    folder: Path, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a folder that can be read, and its content; None in an empty one.

    Newest: `*last.ckpt` before the others, then by time. `warn` gets a line for each damaged one.

    Raises:
        UserError: where there are some and all are damaged.
    """
    files = sorted(
        (path for path in folder.glob("*.ckpt") if not path.name.startswith(".")),
        key=lambda path: (path.name.endswith(LAST), path.lstat().st_mtime),
        reverse=True,
    )
    for path in files:
        try:
            return path, read_checkpoint(path)
        except DamagedCheckpoint as error:
            warn(f"{path} is damaged ({error}): looking for the one before it")
    if files:
        raise UserError(
            f"{folder}: none of its {len(files)} checkpoints can be read: remove the folder to "
            f"start anew"
        )
    return None


def put_aside(folder: Path) -> Path | None:
    """Renames a folder that holds checkpoints to `<name>-<n>`; returns the new path, if any."""
    if not folder.is_dir() or not any(folder.glob("*.ckpt")):
        return None
    return folder.rename(_free(folder))


def _free(path: Path) -> Path:
    """`<name>-<n>` beside a path, that is not there yet."""
    number = 1
    while (aside := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return aside


class CheckpointFiles(CheckpointIO):
    """Lightning's way to the functions of this file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        # A run killed between removing and recording it may ask twice.
        path = Path(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
