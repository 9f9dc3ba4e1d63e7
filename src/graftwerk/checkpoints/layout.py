"""Tables: where each of our parameters lies in an outside format, for reading and for writing.

A table has an `Entry` for each parameter of ours: the tensors of the file that make it up and the
reshape between them. A reshape works on views as long as it can, so that a rank reads only the
share of a mapped file that it keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Reshape:
    """Between the tensors of a file and one of ours. This one takes one tensor as it is.

    `join(parts(tensors))` is ours. Parts are views that split over ranks alike: the share of ours
    is the join of the parts' shares. `split` is the way back.
    """

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The file's tensors as views in our orientation."""
        return list(tensors)

    def join(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Tensor:
        """Parts, or a rank's shares of them, to ours: a view of the file where that can be.

        Parts are written straight to their places in the new type; no other copy is made.

        Raises:
            ValueError: where parts do not fit each other.
        """
        (tensor,) = parts
        return tensor.to(device=device, dtype=dtype).contiguous()

    def split(self, ours: Tensor) -> list[Tensor]:
        """Ours to the tensors of the file."""
        return [ours]


class Transposed(Reshape):
    """The file holds [in, out], as GPT-2's Conv1D does; vectors stay as they are."""

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.t() if tensor.ndim > 1 else tensor for tensor in tensors]

    def split(self, ours: Tensor) -> list[Tensor]:
        return self.parts([ours])


class Stacked(Reshape):
    """Ours is several tensors of the file one after the other: gate, then up."""

    def __init__(self, count: int = 2):
        self.count = count

    def join(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Tensor:
        together = _as_they_lie(parts)
        if together is not None:
            return together.to(device=device, dtype=dtype)
        rows = [len(part) for part in parts]
        ours = _empty(parts[0], (sum(rows), *parts[0].shape[1:]), dtype, device)
        return _put(parts, ours.split(rows), ours)

    def split(self, ours: Tensor) -> list[Tensor]:
        return list(ours.chunk(self.count))


class Heads(Reshape):
    """Runs of whole heads in the file, woven group by group in ours (Megatron's order).

    Args:
        per_group: heads of each run in one group: (q, 1, 1) for queries, keys and values, (1, 1)
            for keys and values.
        groups, head_size: of the whole model.
        concatenated: the runs are one tensor of the file, not one each.
        transposed: the file holds [in, out].
    """

    def __init__(
        self,
        per_group: tuple[int, ...],
        groups: int,
        head_size: int,
        concatenated: bool = False,
        transposed: bool = False,
    ):
        self.per_group, self.groups, self.head_size = per_group, groups, head_size
        self.concatenated, self.transposed = concatenated, transposed

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.transposed:
            tensors = [tensor.t() if tensor.ndim > 1 else tensor for tensor in tensors]
        if self.concatenated:
            (tensor,) = tensors
            return list(tensor.split([n * self.groups * self.head_size for n in self.per_group]))
        return list(tensors)

    def join(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Tensor:
        sizes = [n * self.head_size for n in self.per_group]
        blocks = [part.unflatten(0, (-1, n)) for part, n in zip(parts, sizes, strict=True)]
        groups = len(blocks[0])
        ours = _empty(parts[0], (groups * sum(sizes), *parts[0].shape[1:]), dtype, device)
        return _put(blocks, ours.unflatten(0, (groups, -1)).split(sizes, 1), ours)

    def split(self, ours: Tensor) -> list[Tensor]:
        sizes = [n * self.head_size for n in self.per_group]
        blocks = ours.unflatten(0, (self.groups, sum(sizes))).split(sizes, 1)
        runs = [block.flatten(0, 1) for block in blocks]
        if self.concatenated:
            runs = [torch.cat(runs)]
        return [run.t() if self.transposed and run.ndim > 1 else run for run in runs]


class Rows(Reshape):
    """Ours is the first `count` rows; the file has `padded`, the others zero."""

    def __init__(self, count: int, padded: int):
        self.count, self.padded = count, padded

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor[: self.count]]

    def split(self, ours: Tensor) -> list[Tensor]:
        more = ours.new_zeros(self.padded - self.count, *ours.shape[1:])
        return [torch.cat([ours, more])] if len(more) else [ours]


def _empty(
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=device or like.device)


def _put(parts: Sequence[Tensor], places: Sequence[Tensor], ours: Tensor) -> Tensor:
    """Writes each part to its place, a view of ours."""
    for part, place in zip(parts, places, strict=True):
        if part.shape != place.shape:  # never stretched
            raise ValueError(f"sizes {list(part.shape)} and {list(place.shape)} do not fit")
        place.copy_(part)
    return ours


def _as_they_lie(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that follow each other in one mapped file as one view; None where they do not."""
    first, whole = parts[0], sum(len(part) for part in parts)
    place = first.storage_offset()
    for part in parts:
        alike = part.dtype == first.dtype and part.shape[1:] == first.shape[1:]
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (alike and same and part.is_contiguous() and part.storage_offset() == place):
            return None
        place += part.numel()
    return first.as_strided((whole, *first.shape[1:]), first.stride())


AS_IS = Reshape()


@dataclass(frozen=True)
class Entry:
    """One parameter of ours: the file's tensors and the reshape between."""

    names: tuple[str, ...]
    reshape: Reshape = field(default=AS_IS)


Table = dict[str, Entry]
