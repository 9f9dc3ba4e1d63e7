"""Tensors from PyTorch's own files, mapped: `pytorch_model.bin`, its shards, `model_weights.ckpt`.

`TorchFiles(paths)` is the `TensorSource` of one `.bin` or several shards, `TorchSource(files,
names)` that of members of a tar or a folder. Such a file is a zip of raw storages and a small
pickle that says where each tensor lies. The pickle is read through an allow-list of inert names:
nothing but tensors and plain containers ever comes out of it.
"""

import io
import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftwerk.checkpoints.archive import BoundedReads, Files, open_files
from graftwerk.errors import UserError

PICKLE_LIMIT = 1 << 26  # bytes; a thousand tensors take some 100 kB
DIRECTORY_LIMIT = 1 << 23  # bytes of a zip's table of contents

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}


class Allowed(NamedTuple):
    """A name that a pickle may use, in place of the thing that it names."""

    value: Any


def unpickle(
    content: bytes,
    allowed: dict[tuple[str, str], Any],
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Reads a pickle in which only the names of `allowed` stand for anything.

    Args:
        content: the pickle.
        allowed: (module, name) -> what the pickle gets for it.
        persistent_load: what resolves references to things outside the pickle.

    Raises:
        pickle.UnpicklingError: for any other name. A damaged pickle raises many kinds.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is no tensor")
            return allowed[module, name]

        def persistent_load(self, pid: Any) -> Any:
            if persistent_load is None:
                raise pickle.UnpicklingError("it refers to things outside of it")
            return persistent_load(pid)

    # The unpickler's memo grows to any number that a PUT names: four bytes could take gigabytes.
    for opcode, argument, _ in pickletools.genops(content):
        places = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if places and not 0 <= (argument or 0) <= len(content):
            raise pickle.UnpicklingError(f"its memo has no place {argument}")
    return Unpickler(io.BytesIO(content)).load()


class TorchSource:
    """A `TensorSource` of torch files that lie in a tar or a folder; a context manager.

    Closing it closes `files`. `others` are the names of what is no tensor in them.

    Raises:
        UserError: where a file is damaged or holds more than tensors and containers.
    """

    def __init__(self, files: Files, names: Iterable[str]):
        self._files = files
        self._tensors: dict[str, Tensor] = {}
        self.others: set[str] = set()
        try:
            for name in names:
                self._add(name, load_mapped(files, name))
        except BaseException:
            files.close()
            raise

    def _add(self, file: str, content: Any) -> None:
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise UserError(f"{self._files.path}: {file} must hold tensors by name")
        for key, value in content.items():
            if not isinstance(value, Tensor):
                self.others.add(key)
            elif key in self._tensors:
                raise UserError(f"{self._files.path}: the tensor {key} is in two files")
            else:
                self._tensors[key] = value

    def __enter__(self) -> "TorchSource":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._files.close()

    @property
    def names(self) -> set[str]:
        """All tensors that the files hold."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor; nothing is read."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; nothing is read."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return aligned(self._tensors[name])

    def release(self, name: str) -> None:
        """Lets go of a tensor's pages: what was read of it has been copied."""
        self._files.release(self._tensors[name])


class TorchFiles(TorchSource):
    """The tensors of one `.bin` file, or of all shards of a checkpoint.

    Raises:
        UserError: where a file is missing or damaged, or holds more than tensors.
    """

    def __init__(self, paths: Sequence[Path]):
        super().__init__(open_files(paths), [path.name for path in paths])


def load_mapped(files: Files, name: str) -> Any:
    """What `torch.save` wrote into a member; tensors are views of the mapped file.

    Raises:
        UserError: where the file is damaged or holds more than tensors and containers.
    """
    with files.open(name) as window:
        start = window.read(4)
    try:
        if start == b"PK\x03\x04":
            return _load_zip(files, name)
        # Before torch 1.6: one stream without a table of contents, so it is read whole.
        with files.open(name) as window, warnings.catch_warnings(action="ignore"):
            return torch.load(io.BufferedReader(window), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # each reader raises its own kinds for a damaged file
        where = files.path if files.path.name == name else f"{files.path}: {name}"
        text = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{where} cannot be read: {text}") from None


def _load_zip(files: Files, name: str) -> Any:
    """Reads the pickle of a torch zip file; storages are ranges of the mapped member."""
    content = files.map(name)
    with files.open(name) as window:
        reader = BoundedReads(window, DIRECTORY_LIMIT)
        with zipfile.ZipFile(reader) as archive:  # type: ignore[arg-type]
            records = {info.filename: info for info in archive.infolist()}
        roots = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it is no file that torch wrote")
        (root,) = roots

        def record(leaf: str) -> Tensor:
            return _stored(content, window, records[root + leaf])

        if root + "byteorder" in records and bytes(record("byteorder").tolist()) != b"little":
            raise ValueError("its numbers are not little-endian")
        described = record("data.pkl")
        if len(described) > PICKLE_LIMIT:
            raise ValueError(f"its description has {len(described)} bytes")

        def storage(pid: Any) -> Tensor:
            kind, dtype, key, _, count = pid
            if kind != "storage" or not isinstance(dtype, Allowed):
                raise pickle.UnpicklingError("it refers to things that are no storage")
            raw = record(f"data/{key}")
            size = count * dtype.value.itemsize
            if not 0 <= size <= len(raw):
                raise ValueError(f"storage {key} has {len(raw)} bytes, not {size}")
            return typed(raw[:size], dtype.value)

        return unpickle(described.numpy().tobytes(), _tensor_names(), storage)


def _stored(content: Tensor, window: io.RawIOBase, info: zipfile.ZipInfo) -> Tensor:
    """The bytes of a record, which lie in the zip as they are (section 4.3.7 of APPNOTE.TXT)."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"its record {info.filename} is compressed")
    window.seek(info.header_offset)
    header = window.read(30) or b""
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"its record {info.filename} is not where it should be")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if not 0 <= start <= start + info.file_size <= len(content):
        raise ValueError(f"its record {info.filename} reaches past the end")
    return content[start : start + info.file_size]


def typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers, without a copy, even where they do not lie on a multiple of their size."""
    start = raw.storage_offset()
    storage = raw.untyped_storage()[start : start + len(raw)]
    return torch.empty(0, dtype=dtype).set_(storage, 0, (len(raw) // dtype.itemsize,))  # type: ignore


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not lie on a multiple of its numbers' size.

    Kernels may count on that; copying does not.
    """
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _tensor_names() -> dict[tuple[str, str], Any]:
    """What a file of tensors may name. Made anew for each file: a pickle could alter functions."""

    def rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        # A stride of 0 would make a huge tensor of a few bytes: as many numbers as are stored.
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        numbers = (offset, *size, *stride)
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"a tensor of shape {size} and strides {stride}")
        if math.prod(size) > len(storage) or (math.prod(size) and reach >= len(storage)):
            raise ValueError(f"a tensor of shape {size} in a storage of {len(storage)} numbers")
        return storage.as_strided(size, stride, offset)

    def parameter(data: Tensor, *_: Any) -> Tensor:
        return data

    def encode(text: str, encoding: str) -> bytes:  # how protocol 2 writes bytes
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
        return text.encode("latin1")

    names: dict[tuple[str, str], Any] = {
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch", "Size"): tuple,
        ("_io", "BytesIO"): io.BytesIO,  # Transformer Engine's `_extra_state`
        ("torch.storage", "UntypedStorage"): Allowed(torch.uint8),
    }
    names.update({("torch", name): Allowed(dtype) for name, dtype in STORAGES.items()})
    return names
