"""A torch file written tensor by tensor, so that a model of any size needs little memory.

`torch.save` wants all tensors at once. The form is its own (`torch/serialization.py`): a zip of
stored records, `data/<n>` for each storage and `data.pkl`, which says where each tensor lies. A
record costs some 200 bytes: many small tensors can be views of one storage.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from graftwerk.checkpoints.torch_files import STORAGES

ALIGNMENT = 64  # of storages, from the start of the zip
PADDING = 0x4246  # the id of torch's padding field: FB
ZIP64_FIELD = 20  # bytes that zipfile adds to the header of a large record
ROOT = "model_weights"
CLASSES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items() if name[:7] != "Untyped"}


class TorchWriter:
    """Writes a dict of tensors into a file from its current position on.

    `torch.load` reads it under `weights_only=True`; nothing of it is held but the last tensor.
    """

    def __init__(self, file: BinaryIO):
        self._zip = zipfile.ZipFile(_FromHere(file), "w")  # type: ignore[arg-type]
        self._tensors: dict[str, _Stored] = {}
        self._storages = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor; it is contiguous in the file."""
        self.add_all({name: tensor})

    def add_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors behind each other, those of one type as views of one storage."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
            own = {name: each for name, each in tensors.items() if each.dtype == dtype}
            count = sum(each.numel() for each in own.values())
            storage = _Storage(str(self._storages), dtype, count)
            self._storages += 1
            bits = (_bytes(each) for each in own.values())
            self._record(f"data/{storage.key}", bits, count * dtype.itemsize)
            offset = 0
            for name, each in own.items():
                self._tensors[name] = _Stored(storage, offset, tuple(each.shape))
                offset += each.numel()

    def alias(self, name: str, of: str) -> None:
        """Gives a written tensor a second name, as tied weights have."""
        self._tensors[name] = self._tensors[of]

    def close(self) -> None:
        """Writes what says where the tensors lie; without it the file is none."""
        description = io.BytesIO()
        _Pickler(description, protocol=2).dump(OrderedDict(self._tensors))
        small = pickletools.optimize(description.getvalue())  # without places that none refers to
        for leaf, content in (("data.pkl", small), ("byteorder", b"little"), ("version", b"3\n")):
            self._record(leaf, [content], len(content))
        self._zip.close()

    def abandon(self) -> None:
        """Lets go of a file that will not be whole, so that nothing is written to it later."""
        with suppress(OSError, ValueError):
            self._zip.close()

    def _record(self, leaf: str, content: Iterable[Any], size: int) -> None:
        info = zipfile.ZipInfo(f"{ROOT}/{leaf}")
        info.file_size = size
        zip64 = info.file_size > zipfile.ZIP64_LIMIT // 2
        start = self._zip.fp.tell() + 30 + len(info.filename)  # type: ignore[union-attr]
        start += 4 + (ZIP64_FIELD if zip64 else 0)
        padding = -start % ALIGNMENT
        info.extra = struct.pack("<HH", PADDING, padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=zip64) as record:
            for piece in content:
                record.write(piece)
        info.extra = b""  # zipfile would write it into the directory too


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Storage:
    """The storage of written tensors; in a pickle a reference to a record, `pid`."""

    def __init__(self, key: str, dtype: torch.dtype, count: int):
        self.key = key
        self.pid = ("storage", CLASSES[dtype], key, "cpu", count)


class _Stored:
    """A tensor that is written already; pickled as torch pickles a tensor."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...]):
        self.storage, self.offset, self.shape = storage, offset, shape
        self.stride = torch.empty(shape, device="meta").stride()

    def __reduce__(self) -> tuple[Any, ...]:
        place = (self.storage, self.offset, self.shape, self.stride)
        return _rebuild_tensor_v2, (*place, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _Storage) else None


class _FromHere:
    """A file whose position 0 is where it stood: a zip counts from its own start."""

    def __init__(self, file: BinaryIO):
        self._file, self._start = file, file.tell()

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + self._start if whence == 0 else offset, whence)

    def write(self, content: Any) -> int:
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()
