"""Tensors of files, one at a time, and their way into a model on the meta device."""

import difflib
import json
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graftwerk.checkpoints.layout import Entry, Table
from graftwerk.errors import UserError
from graftwerk.parallel.tensor import layout_of, share_of

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
READERS = 2  # threads that read and convert; each holds one parameter at a time
LARGEST_HEADER = 100 << 20  # bytes; the limit of the safetensors format


class TensorSource(Protocol):
    """The tensors of a checkpoint's files, whatever the files are. A context manager."""

    @property
    def names(self) -> set[str]:
        """All tensors that the files hold."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor: a view of the mapped file where that can be. It is not to be changed."""
        ...

    def release(self, name: str) -> None:
        """Lets go of a tensor's pages: what was read of it has been copied."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...


class SafeTensors:
    """The tensors of some safetensors files, mapped into memory.

    Raises:
        UserError: where a file is missing or damaged, or holds a type that no model has.
    """

    def __init__(self, files: Sequence[Path]):
        self._entries: dict[str, tuple[Mapped, Header]] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt"):  # checks the header and the file's length
                    headers = read_header(path)
                mapped = Mapped(path)
            except (SafetensorError, OSError, ValueError, struct.error) as error:
                raise UserError(f"{path} cannot be read: {error}") from None
            self._entries |= {name: (mapped, header) for name, header in headers.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._entries.clear()  # a file stays mapped as long as a tensor lies in it

    @property
    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        kind = self._entries[name][1].kind
        if kind not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise UserError(f"the tensor {name} is of type {kind}; those that are read: {known}")
        return SAFETENSORS_DTYPES[kind]

    def read(self, name: str) -> Tensor:
        mapped, header = self._entries[name]
        return mapped.tensor(header.start, header.end, self.dtype(name)).view(header.shape)

    def release(self, name: str) -> None:
        mapped, header = self._entries[name]
        mapped.release(header.start, header.end)


class Mapped:
    """A file's bytes as memory that nothing writes back; pages are read when they are touched."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def tensor(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """The bytes from `start` to `end` as a vector: a view, or a copy where they lie askew."""
        found = self.bytes[start:end]
        return (found if start % dtype.itemsize == 0 else found.clone()).view(dtype)

    def release(self, start: int, end: int) -> None:
        """Lets go of whole pages between `start` and `end`; a later touch reads them again."""
        start, end = (
            -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
            end // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)


class Header(NamedTuple):
    """What a safetensors file says of a tensor; `start` and `end` count from the file's start."""

    shape: tuple[int, ...]
    kind: str
    start: int
    end: int


def read_header(path: Path) -> dict[str, Header]:
    """What a safetensors file holds, from its first bytes alone."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    first = 8 + length
    return {
        name: Header(
            tuple(entry["shape"]),
            entry["dtype"],
            first + entry["data_offsets"][0],
            first + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def weight_files(folder: Path, single: str) -> list[Path]:
    """The file `single` of a folder, or the shards that `<single>.index.json` lists; else none.

    Raises:
        UserError: naming every shard that is missing.
    """
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return [folder / single] if (folder / single).is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read: {type(error).__name__}: {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: {name!r} is no file beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: weight files are missing: {', '.join(missing)}")
    return [folder / name for name in names]


def read_parameter(entry: Entry, source: TensorSource) -> Tensor:
    """One whole parameter of ours, in the file's type."""
    parts = entry.reshape.parts([source.read(name) for name in entry.names])
    return entry.reshape.join(parts)


def check_names(
    table: Table, source: TensorSource, path: Path, ignored: Callable[[str], bool]
) -> None:
    """Raises a UserError that names every missing and unknown tensor, with the nearest name."""
    used = {name for entry in table.values() for name in entry.names}
    have = source.names
    unknown = {name for name in have - used if not ignored(name)}
    mistakes = []
    for name in _in_ranges(used - have):
        near = difflib.get_close_matches(name, _in_ranges(unknown), 1)
        mistakes.append(f"missing {name}" + (f" (there is {near[0]})" if near else ""))
    mistakes += [f"unknown {name}" for name in _in_ranges(unknown)]
    refuse(path, mistakes)


def _in_ranges(names: Iterable[str]) -> list[str]:
    """Names that differ in their first number alone as one: `layers.[0-3,7].mlp.weight`."""
    groups: dict[tuple[str, str], list[int]] = {}
    single = []
    for name in names:
        match = re.search(r"(?<=\.)\d{1,9}(?=\.)", name)
        if match is None:
            single.append(name)
        else:
            ends = name[: match.start()], name[match.end() :]
            groups.setdefault(ends, []).append(int(match.group()))
    for (start, end), numbers in groups.items():
        ranges = []
        for number in sorted(numbers):
            if ranges and ranges[-1][1] == number - 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
        inner = texts[0] if len(numbers) == 1 else f"[{','.join(texts)}]"
        single.append(f"{start}{inner}{end}")
    return sorted(single)


def fill(
    model: nn.Module,
    table: Table,
    source: TensorSource,
    path: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    ignored: Callable[[str], bool] = lambda name: False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Puts file tensors in place of a meta-device model's parameters, one at a time.

    A parameter that is split over the ranks of `group` takes its share alone. Parameters without an
    entry in the table are left on the meta device.

    Raises:
        UserError: naming every missing, unknown and wrongly shaped tensor in one message.
    """
    check_names(table, source, path, ignored)

    def load(name: str, parameter: nn.Parameter) -> str | None:
        """Fills one parameter, or says why it cannot be."""
        entry, layout = table[name], layout_of(parameter)
        found = " + ".join(entry.names)
        numbers = [file_name for file_name in entry.names if not source.shape(file_name)]
        if numbers:
            return f"{numbers[0]} is a single number, not of {list(parameter.shape)}"
        try:
            parts = entry.reshape.parts([source.read(file_name) for file_name in entry.names])
            if group is not None:
                layout = replace(layout, blocks=1) if len(parts) > 1 else layout
                parts = [share_of(part, layout, group) for part in parts]
            tensor = entry.reshape.join(parts, dtype, device)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"{found}: {str(error).partition(chr(10))[0]}"
        if tensor.shape != parameter.shape:
            return f"{found} gives {list(tensor.shape)}, not {list(parameter.shape)}"
        put(model, name, tensor)
        if all(_apart(tensor, part) for part in parts):
            del parts
            for file_name in entry.names:
                source.release(file_name)
        return None

    wanted = [(name, p) for name, p in model.named_parameters() if name in table]
    with ThreadPoolExecutor(READERS) as pool:  # pages are read, and converted, side by side
        outcomes = pool.map(load, *zip(*wanted, strict=True))
        refuse(path, [outcome for outcome in outcomes if outcome is not None])


def _apart(tensor: Tensor, other: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces the parameter of this name; the new one keeps the old one's layout."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = nn.Parameter(tensor)
    vars(parameter).update(vars(getattr(module, leaf)))
    setattr(module, leaf, parameter)


def refuse(path: Path, mistakes: Sequence[str]) -> None:
    """Raises a UserError if there are mistakes."""
    if mistakes:
        raise UserError(f"{path}: the weights do not fit: {'; '.join(mistakes)}")
