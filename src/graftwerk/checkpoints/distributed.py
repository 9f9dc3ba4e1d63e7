"""Megatron's distributed checkpoints: `torch_dist` and uncompressed `zarr`, whole tensors by layer.

Each tensor is cut into chunks, one for each rank that wrote; decoder layers are stacked in a tensor
with the layer first. Chunks stay mapped, and a layer is put together when it is read.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from graftwerk.checkpoints.archive import Files, Member
from graftwerk.checkpoints.torch_files import aligned, load_mapped, typed, unpickle
from graftwerk.errors import UserError

METADATA_LIMIT = 1 << 27  # bytes of a `.metadata`; that of a large model takes some megabytes
ARRAY_LIMIT = 1 << 20  # bytes of a `.zarray`
LAYER_LIMIT = 10_000
STACKED = re.compile(r"(.*\blayers)\.(?!\d)(.+)")  # a tensor of all layers has no layer's number

ZARR_DTYPES = {
    "bfloat16": torch.bfloat16,  # as Megatron names what zarr itself calls <V2
    "<V2": torch.bfloat16,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "|u1": torch.uint8,
    "<i4": torch.int32,
    "<i8": torch.int64,
}


@dataclass
class Chunk:
    """A box of a tensor, from `offsets` on; `load` gives it, mapped."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass
class Chunked:
    """A tensor in chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The box of this shape from `start` on: a view where one chunk holds it, else a copy."""
        pieces = self.pieces(start, shape)
        covered = sum(view.numel() for view, _ in pieces)
        if covered != math.prod(shape):
            raise ValueError(f"its chunks hold {covered} of {math.prod(shape)} numbers")
        if len(pieces) == 1:
            return aligned(pieces[0][0])
        result = torch.empty(tuple(shape), dtype=self.dtype)
        for view, place in pieces:
            _box(result, place, view.shape).copy_(view)
        return result

    def pieces(self, start: Sequence[int], shape: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
        """Views of the chunks within a box, each with its place in it."""
        pieces = []
        for chunk in self.chunks:
            lower = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            ends = zip(start, shape, chunk.offsets, chunk.sizes, strict=True)
            upper = [min(a + n, b + m) for a, n, b, m in ends]
            if all(a < b for a, b in zip(lower, upper, strict=True)):
                inside = [a - b for a, b in zip(lower, chunk.offsets, strict=True)]
                sizes = [b - a for a, b in zip(lower, upper, strict=True)]
                place = [a - b for a, b in zip(lower, start, strict=True)]
                pieces.append((_box(self._loaded(chunk), inside, sizes), place))
        return pieces

    def _loaded(self, chunk: Chunk) -> Tensor:
        tensor = chunk.load()
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != self.dtype:
            raise ValueError(f"a chunk is {list(tensor.shape)}, not {list(chunk.sizes)}")
        return tensor


def _box(tensor: Tensor, start: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dimension, (first, size) in enumerate(zip(start, sizes, strict=True)):
        tensor = tensor.narrow(dimension, first, size)
    return tensor


class DistributedSource:
    """The tensors of a distributed checkpoint, layers one by one; a `TensorSource`.

    Args:
        files: the tar or folder; closing the source closes it.
        folder: the checkpoint's name in it.

    Raises:
        UserError: where it is damaged or in a form that is not read.
    """

    def __init__(self, files: Files, folder: str):
        self._files, self._folder = files, folder
        self._tensors: dict[str, tuple[Chunked, int | None]] = {}
        try:
            found = self._torch_dist() if f"{folder}/.metadata" in files.members else self._zarr()
            for name, tensor in found:
                self._add(name, tensor)
        except UserError:
            files.close()
            raise
        except Exception as error:  # a damaged description raises many kinds
            files.close()
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> UserError:
        return UserError(
            f"{self._files.path}: the distributed checkpoint {self._folder} cannot be read: "
            f"{str(error).partition(chr(10))[0] or type(error).__name__}"
        )

    def _add(self, name: str, tensor: Chunked) -> None:
        whole = math.prod(tensor.shape)
        if not all(type(n) is int and n >= 0 for n in tensor.shape):
            raise ValueError(f"{name} has the shape {tensor.shape}")
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != whole:
            raise ValueError(f"the chunks of {name} are not the whole tensor")
        stacked = STACKED.fullmatch(name)
        if stacked is None:
            self._tensors[name] = tensor, None
            return
        if not tensor.shape or tensor.shape[0] > LAYER_LIMIT:
            raise ValueError(f"{name} of shape {list(tensor.shape)} stacks no layers")
        for layer in range(tensor.shape[0]):
            self._tensors[f"{stacked[1]}.{layer}.{stacked[2]}"] = tensor, layer

    def __enter__(self) -> "DistributedSource":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._files.close()

    @property
    def names(self) -> set[str]:
        """All tensors, one for each layer."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor; nothing is read."""
        tensor, layer = self._tensors[name]
        return tensor.shape if layer is None else tensor.shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; nothing is read."""
        return self._tensors[name][0].dtype

    def read(self, name: str) -> Tensor:
        """A view of the mapped file where one chunk holds it all; otherwise put together."""
        tensor, start, shape = self._place(name)
        try:
            return tensor.read(start, shape).view(self.shape(name))
        except UserError:
            raise
        except Exception as error:
            raise self._refusal(ValueError(f"{name}: {error}")) from None

    def release(self, name: str) -> None:
        """Lets go of a tensor's pages: what was read of it has been copied."""
        tensor, start, shape = self._place(name)
        for view, _ in tensor.pieces(start, shape):
            self._files.release(view)

    def _place(self, name: str) -> tuple[Chunked, list[int], tuple[int, ...]]:
        """The stack that holds a tensor, and its box in it."""
        tensor, layer = self._tensors[name]
        if layer is None:
            return tensor, [0] * len(tensor.shape), tensor.shape
        return tensor, [layer] + [0] * (len(tensor.shape) - 1), (1, *tensor.shape[1:])

    # torch_dist: `.metadata`, and in each `*.distcp` one torch file after the other.

    def _torch_dist(self) -> Iterator[tuple[str, Chunked]]:
        content = self._files.read(f"{self._folder}/.metadata", METADATA_LIMIT)
        metadata = unpickle(content, _metadata_names())
        places: dict[str, list[tuple[tuple[int, ...] | None, Any]]] = {}
        for index, place in metadata.storage_data.items():
            if getattr(place, "transform_descriptors", None):
                raise ValueError("its chunks are compressed")
            offsets = getattr(index, "offset", None)  # a field that is None is not written
            places.setdefault(index.fqn, []).append((offsets, place))
        for name, described in metadata.state_dict_metadata.items():
            if not hasattr(described, "chunks"):
                continue  # bytes: Transformer Engine's states
            sizes = {chunk.offsets: chunk.sizes for chunk in described.chunks}
            chunks = []
            for offsets, place in places.get(name, []):
                offsets = (0,) * len(described.size) if offsets is None else offsets
                chunks.append(Chunk(offsets, sizes[offsets], self._torch_chunk(place)))
            dtype = described.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} has no type")
            yield name, Chunked(described.size, dtype, chunks)

    def _torch_chunk(self, place: Any) -> Callable[[], Tensor]:
        file = f"{self._folder}/{place.relative_path}"
        offset, length = place.offset, place.length
        whole = self._files.members.get(file)
        if whole is None:
            raise ValueError(f"{place.relative_path} is missing")
        if not 0 <= offset <= offset + length <= whole.size:
            raise ValueError(f"{place.relative_path} is shorter than its chunks")
        part = f"{file} from {offset}"
        self._files.members[part] = Member(whole.path, whole.offset + offset, length)
        return lambda: load_mapped(self._files, part)

    # zarr, version 2 (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html): a folder for each
    # tensor with `.zarray`, which describes it, and a file of numbers for each chunk.

    def _zarr(self) -> Iterator[tuple[str, Chunked]]:
        start, end = f"{self._folder}/", "/.zarray"
        arrays = [n for n in self._files.members if n.startswith(start) and n.endswith(end)]
        if not arrays:
            raise ValueError("it has neither .metadata (torch_dist) nor .zarray files (zarr)")
        for array in arrays:
            described = json.loads(self._files.read(array, ARRAY_LIMIT))
            name = array[len(start) : -len(end)]
            yield name, self._zarr_array(array[: -len(".zarray")], name, described)

    def _zarr_array(self, place: str, name: str, described: dict[str, Any]) -> Chunked:
        for key, usual in (("zarr_format", 2), ("compressor", None), ("order", "C")):
            if described.get(key) != usual:
                raise ValueError(f"{name}: {key}={described.get(key)!r}; only {usual!r} is read")
        if described.get("filters"):
            raise ValueError(f"{name}: filters={described['filters']!r}; only null is read")
        dtype, shape = ZARR_DTYPES.get(described["dtype"]), tuple(described["shape"])
        if dtype is None:
            known = ", ".join(ZARR_DTYPES)
            raise ValueError(f"{name}: dtype={described['dtype']!r}; those that are read: {known}")
        sizes = tuple(described["chunks"])
        if len(sizes) != len(shape) or not all(type(n) is int and n > 0 for n in (*sizes, *shape)):
            raise ValueError(f"{name}: chunks {sizes} of a tensor {shape}")
        grid = [-(-n // size) for n, size in zip(shape, sizes, strict=True)]
        if math.prod(grid) > len(self._files.members):
            raise ValueError(f"{name}: chunks are missing")
        separator = described.get("dimension_separator", ".")
        chunks = []
        for position in product(*(range(n) for n in grid)):
            file = place + separator.join(str(n) for n in position or (0,))
            offsets = tuple(n * size for n, size in zip(position, sizes, strict=True))
            inside = tuple(min(m, n - o) for m, n, o in zip(sizes, shape, offsets, strict=True))
            chunks.append(Chunk(offsets, inside, self._zarr_chunk(file, sizes, inside, dtype)))
        return Chunked(shape, dtype, chunks)

    def _zarr_chunk(
        self, file: str, sizes: tuple[int, ...], inside: tuple[int, ...], dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        member, size = self._files.members.get(file), math.prod(sizes) * dtype.itemsize
        if member is None or member.size != size:
            found = "is missing" if member is None else f"has {member.size} bytes, not {size}"
            raise ValueError(f"the chunk {file} {found}")

        def load() -> Tensor:  # chunks at the edge are as large as the others
            return _box(typed(self._files.map(file), dtype).view(sizes), [0] * len(sizes), inside)

        return load


class _Record:
    """Stands for every class of a `.metadata`: it holds the fields and does nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):  # TensorProperties: the type comes first
            state = {"dtype": state[0]}
        self.__dict__.update(state)


def _metadata_names() -> dict[tuple[str, str], Any]:
    """What a `.metadata` may name: the dataclasses of `torch.distributed.checkpoint`, all inert."""

    class Record(_Record):  # one for each file: a pickle could alter a class
        pass

    checkpoint = "torch.distributed.checkpoint"
    classes = {
        f"{checkpoint}.metadata": (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        f"{checkpoint}.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "torch.distributed._shard.sharded_tensor.metadata": (
            "TensorProperties",
            "MEM_FORMAT_ENCODING",
        ),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    }
    names: dict[tuple[str, str], Any] = {
        (module, name): Record for module, members in classes.items() for name in members
    }
    names["torch", "Size"] = tuple
    dtypes = (
        "bfloat16",
        "float16",
        "float32",
        "float64",
        "uint8",
        "int8",
        "int32",
        "int64",
        "bool",
    )
    names.update({("torch", name): getattr(torch, name) for name in dtypes})
    return names
