"""Slots: the places of a model at which an adapter may read and change what flows through.

A layer is born with its slots, empty. An adapter is a set of *parts*, one for each slot that its
method matches; a part is a module `(SlotCall) -> output`. A slot knows no method and no model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from graftwerk.adapters.mixin import AdapterSlotMixin

Split = Literal["replicated", "column", "row"]


@dataclass(frozen=True)
class Rows:
    """Which rows of a projection, the sublayer's module `linear`, make a slot's output.

    The tensor is seen as `shape` (runs, blocks, rows); of each run the blocks from `start` to
    `stop`. A share of a split projection holds its share of them under the same numbers.
    """

    linear: str
    shape: tuple[int, int, int] = (1, 1, -1)
    start: int = 0
    stop: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """A view [runs, blocks, rows, ...] of a weight [all rows, in] or a bias [all rows]."""
        return tensor.unflatten(0, self.shape)[:, self.start : self.stop]


@dataclass(frozen=True)
class Site:
    """Where a slot is and what passes there.

    `name` is the place within a layer (`qkv`, `mlp_output`, ...), `layer` the global number of the
    layer from 0 (-1: the embeddings). `split` says what tensor parallelism does to the slot:
    `column`: outputs are split over ranks; `row`: inputs are split and the output is a partial sum;
    `replicated`: every rank sees the whole. `blocks`: the outputs are this many runs of features
    (gate and up: 2), each of which is split apart. `stack` is `encoder` or `decoder`. `rows` are
    those that make the output, where a projection does; `feeds` is the projection of which the
    output is the input. Both name modules of the sublayer that owns the slot.
    """

    name: str
    layer: int
    in_features: int
    out_features: int
    split: Split = "replicated"
    blocks: int = 1
    stack: str = "decoder"
    rows: Rows | None = None
    feeds: str | None = None


@dataclass(slots=True)
class SlotCall:
    """All that a part may read. Leading dimensions are [batch, sequence].

    `output`: what the sublayer made, to be changed. `input`: what went into the sublayer or the
    projection. `residual`: the residual stream before the sublayer's result is added. `norm`: the
    layer norm that follows the addition, in post-norm models. `bias`: the bias that `output`
    already includes. `positions`: [batch or 1, sequence]. `virtual`: how many of the first columns
    are virtual tokens, for a prompt to fill.
    """

    output: Tensor
    input: Tensor | None = None
    residual: Tensor | None = None
    norm: nn.Module | None = None
    bias: Tensor | None = None
    positions: Tensor | None = None
    virtual: int = 0

    def chunks(self, n: int) -> list["SlotCall"]:
        """The calls of `n` equal runs of batch rows."""

        def cut(tensor: Tensor | None) -> list[Tensor | None]:
            if tensor is None or tensor.shape[0] == 1 < self.output.shape[0]:
                return [tensor] * n
            return list(tensor.chunk(n))

        parts = (cut(self.output), cut(self.input), cut(self.residual), cut(self.positions))
        return [
            replace(self, output=output, input=input, residual=residual, positions=positions)
            for output, input, residual, positions in zip(*parts, strict=True)
        ]


class Slot(AdapterSlotMixin, nn.Module):
    """One place in a model. Free of cost while nothing is active in it.

    `adapter_layer` holds the parts by adapter name. `active` is what the model's composition comes
    to at this slot: it is resolved when the composition is set, never in a forward pass.
    """

    adapter_layer: nn.ModuleDict

    def __init__(self, site: Site):
        super().__init__()
        self.site = site
        self.adapter_layer = nn.ModuleDict()
        self.active: Callable[[SlotCall], Tensor] | None = None

    def forward(
        self,
        output: Tensor,
        input: Tensor | None = None,
        residual: Tensor | None = None,
        norm: nn.Module | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        virtual: int = 0,
    ) -> Tensor:
        if self.active is None:
            return output
        return self.active(SlotCall(output, input, residual, norm, bias, positions, virtual))

    def extra_repr(self) -> str:
        return f"{self.site.name}, layer {self.site.layer}"


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every slot of a model by its path, in the order of the forward pass."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Slot)}


def widen(tensor: Tensor | None, n: int) -> Tensor | None:
    """The batch repeated `n` times, copy after copy; a tensor that all rows share stays as it is.

    For masks and positions, whose first dimension is 1 where the rows share them.
    """
    if tensor is None or tensor.shape[0] == 1:
        return tensor
    return torch.cat([tensor] * n)
