"""A torch file written tensor by tensor, so that a model of any size needs little memory.

`torch.save` wants all tensors at once. The form is its own (`torch/serialization.py`): a zip of
stored records, `data/<n>` for each storage and `data.pkl`, which says where each tensor lies.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
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

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor; it is contiguous in the file."""
        tensor = tensor.detach().cpu().contiguous()
        key = str(len(self._tensors))
        self._record(f"data/{key}", tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._tensors[name] = _Stored(key, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def alias(self, name: str, of: str) -> None:
        """Gives a written tensor a second name, as tied weights have."""
        self._tensors[name] = self._tensors[of]

    def close(self) -> None:
        """Writes what says where the tensors lie; without it the file is none."""
        description = io.BytesIO()
        _Pickler(description, protocol=2).dump(OrderedDict(self._tensors))
        self._record("data.pkl", description.getvalue())
        self._record("byteorder", b"little")
        self._record("version", b"3\n")
        self._zip.close()

    def abandon(self) -> None:
        """Lets go of a file that will not be whole, so that nothing is written to it later."""
        with suppress(OSError, ValueError):
            self._zip.close()

    def _record(self, leaf: str, content: Any) -> None:
        info = zipfile.ZipInfo(f"{ROOT}/{leaf}")
        info.file_size = memoryview(content).nbytes
        zip64 = info.file_size > zipfile.ZIP64_LIMIT // 2
        start = self._zip.fp.tell() + 30 + len(info.filename)  # type: ignore[union-attr]
        start += 4 + (ZIP64_FIELD if zip64 else 0)
        padding = -start % ALIGNMENT
        info.extra = struct.pack("<HH", PADDING, padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=zip64) as record:
            record.write(content)
        info.extra = b""  # zipfile would write it into the directory too


class _Stored:
    """A tensor that is written already; pickled as torch pickles a tensor."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...], stride: Any):
        self.key, self.dtype, self.shape, self.stride = key, dtype, shape, tuple(stride)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, (
            _Storage(self),
            0,
            self.shape,
            self.stride,
            False,
            OrderedDict(),
        )


class _Storage:
    """The storage of a written tensor; in a pickle a reference to a record."""

    def __init__(self, stored: _Stored):
        self.key, self.dtype = stored.key, stored.dtype
        self.count = torch.Size(stored.shape).numel()


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", CLASSES[obj.dtype], obj.key, "cpu", obj.count


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
