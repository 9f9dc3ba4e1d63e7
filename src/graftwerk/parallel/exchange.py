"""What tensor-parallel ranks send each other, with the gradients that belong to it.

Shapes: B batch, S columns of a row, h hidden size. Rows that are split over n ranks are padded to
a multiple of n, and each rank holds a run of ceil(S / n) columns.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

Group = dist.ProcessGroup
# torch's newer and older names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _SumBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


class _SumForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _EnterRow(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, length: int) -> Tensor:
        ctx.group = group
        return _gather(x, group)[:, :length]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], ctx.group), None, None


class _LeaveRow(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.group)[:, : ctx.length], None


class _SplitRow(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        return own_columns(x, group).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.group)[:, : ctx.length], None


class _JoinRow(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, length: int) -> Tensor:
        ctx.group = group
        return _gather(x, group)[:, :length]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return own_columns(grads[0], ctx.group), None, None


class _ScaleBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def sum_backward(x: Tensor, group: Group) -> Tensor:
    """`x`, which all ranks hold alike; backward the sum of the ranks' gradients."""
    return _SumBackward.apply(x, group)  # pyright: ignore[reportReturnType]


def sum_forward(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' tensors; backward each gets the gradient of the sum."""
    return _SumForward.apply(x, group)  # pyright: ignore[reportReturnType]


def enter_row(x: Tensor, group: Group, length: int) -> Tensor:
    """The whole row [B, S, h] of the ranks' runs of it, which each then uses in another way.

    Backward the sum of the ranks' gradients, cut into runs: one reduce-scatter.
    """
    return _EnterRow.apply(x, group, length)  # pyright: ignore[reportReturnType]


def leave_row(x: Tensor, group: Group) -> Tensor:
    """This rank's run of the sum of the ranks' rows [B, S, h]: one reduce-scatter."""
    return _LeaveRow.apply(x, group)  # pyright: ignore[reportReturnType]


def split_row(x: Tensor, group: Group) -> Tensor:
    """This rank's run of a row [B, S, h] that all hold alike; backward all runs of the gradient."""
    return _SplitRow.apply(x, group)  # pyright: ignore[reportReturnType]


def join_row(x: Tensor, group: Group, length: int) -> Tensor:
    """The whole row [B, S, h] of the ranks' runs of it, which all then use alike."""
    return _JoinRow.apply(x, group, length)  # pyright: ignore[reportReturnType]


def scale_backward(x: Tensor, factor: float) -> Tensor:
    """`x`; its gradient times a factor."""
    return _ScaleBackward.apply(x, factor)  # pyright: ignore[reportReturnType]


def run_of(group: Group, length: int) -> tuple[int, int]:
    """(start, size) of this rank's run of rows of `length` columns; padding counts."""
    size = -(-length // dist.get_world_size(group))
    return dist.get_rank(group) * size, size


def own_columns(x: Tensor, group: Group, padding: int = 0) -> Tensor:
    """This rank's run of the columns of [B, S, ...]; `padding` where it reaches behind the row."""
    start, size = run_of(group, x.shape[1])
    own = x[:, start : start + size]
    missing = size - own.shape[1]
    return own if not missing else F.pad(own, (0, 0) * (x.ndim - 2) + (0, missing), value=padding)


def _sum(x: Tensor, group: Group) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    if not x.is_meta:  # of a layer that lies elsewhere
        dist.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, group: Group) -> Tensor:
    """Runs [B, s, ...] to rows [B, n s, ...]."""
    run = x.transpose(0, 1).contiguous()  # columns first, as ranks follow each other
    whole = run.new_empty(dist.get_world_size(group) * run.shape[0], *run.shape[1:])
    _all_gather(whole, run, group=group)
    return whole.transpose(0, 1)


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Summands [B, S, ...] to this rank's run [B, s, ...] of their sum."""
    ranks, (_, size) = dist.get_world_size(group), run_of(group, x.shape[1])
    missing = ranks * size - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    rows = x.transpose(0, 1).contiguous()
    own = rows.new_empty(size, *rows.shape[1:])
    _scatter_sum(own, rows, group=group)
    return own.transpose(0, 1)
