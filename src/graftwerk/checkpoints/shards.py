"""Safetensors files written tensor by tensor, so that a model of any size needs little memory.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's
length, a JSON header padded with spaces, the tensors' bytes without holes. Types and sizes are only
known as tensors arrive, so room for the header is kept free and filled last.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from graftwerk.checkpoints.tensors import SAFETENSORS_DTYPES
from graftwerk.errors import UserError

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
INDEX = "model.safetensors.index.json"


def write_shards(
    folder: Path,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    shard_bytes: int,
    progress: Callable[[str], object] = lambda name: None,
) -> int:
    """Writes `model.safetensors`, or shards with an index, and returns the bytes of all tensors.

    Args:
        folder: exists, and is empty of such files.
        names, read: the tensors, asked for one at a time.
        shard_bytes: a new file is begun where the current one would grow beyond this.
        progress: is called with each name that is written.
    """
    names = list(names)
    shards: list[_Shard] = []
    try:
        for name in names:
            tensor = read(name).detach().cpu().contiguous()
            if not shards or not shards[-1].takes(tensor, shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(folder / f"shard-{len(shards)}.partial", names))
            shards[-1].add(name, tensor)
            progress(name)
    finally:
        if shards:
            shards[-1].close()
    total = sum(shard.size for shard in shards)
    if len(shards) == 1:
        shards[0].path.rename(folder / "model.safetensors")
        return total
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / file)
        places |= dict.fromkeys(shard.entries, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


class _Shard:
    """One file while it is written."""

    def __init__(self, path: Path, names: list[str]):
        self.path, self.size = path, 0
        self.entries: dict[str, dict[str, Any]] = {}
        # An entry's type, shape and offsets take less than 200 characters.
        self.room = -(-sum(len(json.dumps(name)) + 200 for name in names) // 8) * 8 + 64
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115  (open while tensors arrive)
        self.file.seek(8 + self.room)

    def takes(self, tensor: Tensor, shard_bytes: int) -> bool:
        fits = self.size + tensor.nbytes <= shard_bytes
        return fits and self.size % tensor.element_size() == 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor.reshape(-1).view(torch.uint8).numpy().tofile(self.file)
        self.entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }
        self.size += tensor.nbytes

    def close(self) -> None:
        if self.file.closed:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def check_space(path: Path, size: int) -> None:
    """Raises a UserError where the disk of a path to be written has less than `size` bytes free."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{path}: the disk has {free / 1e9:,.2f} GB free and {size / 1e9:,.2f} GB are to be "
            f"written: make room or choose another place"
        )


def bytes_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """The size of tensors of these shapes in one type."""
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
