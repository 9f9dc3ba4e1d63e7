"""Shares of parameters: how each is cut over ranks, put together again, reduced and measured.

A parameter remembers its `Layout`; one without is held whole by every rank.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwerk.adapters.part import Layout

_LAYOUT = "tensor_parallel_layout"  # the attribute of a parameter that remembers its Layout


def layout_of(parameter: Tensor) -> Layout:
    """How a parameter lies over the ranks."""
    return getattr(parameter, _LAYOUT, Layout())


def remember(parameter: nn.Parameter, layout: Layout) -> nn.Parameter:
    """Notes how a parameter lies over the ranks."""
    setattr(parameter, _LAYOUT, layout)
    return parameter


def shard(parameter: nn.Parameter, layout: Layout, group: dist.ProcessGroup) -> nn.Parameter:
    """This rank's share of a whole parameter, contiguous, remembering its layout."""
    local = share_of(parameter.detach(), layout, group).contiguous()
    return remember(nn.Parameter(local, requires_grad=parameter.requires_grad), layout)


def share_of(tensor: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of a whole tensor: a view where the dimension is one block."""
    if layout.dim is None:
        return tensor
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if layout.blocks == 1:
        return tensor.tensor_split(ranks, layout.dim)[rank]
    blocks = tensor.unflatten(layout.dim, (layout.blocks, -1))
    return blocks.chunk(ranks, layout.dim + 1)[rank].flatten(layout.dim, layout.dim + 1)


def share_range(size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """(start, stop) of this rank's share of a dimension whose shares may differ by one."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    each, more = divmod(size, ranks)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def gather(tensor: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """The whole tensor of the ranks' shares, without a gradient: the inverse of `shard`.

    All ranks ask at once.
    """
    tensor = tensor.detach()
    if layout.dim is None:
        return tensor
    if tensor.is_meta:  # of a layer that lies elsewhere
        return torch.empty(_whole_shape(tensor, layout, group), dtype=tensor.dtype, device="meta")
    dim, ranks = layout.dim, dist.get_world_size(group)
    if layout.size:
        return _gather_uneven(tensor, dim, layout.size, group)
    shares = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(shares, tensor.contiguous(), group=group)
    blocks = [share.unflatten(dim, (layout.blocks, -1)) for share in shares]
    return torch.cat(blocks, dim + 1).flatten(dim, dim + 1)


def _gather_uneven(tensor: Tensor, dim: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """Shares that may differ by one travel padded."""
    each, more = divmod(size, dist.get_world_size(group))
    share = tensor.movedim(dim, 0)
    padded = share.new_zeros(each + bool(more), *share.shape[1:])
    padded[: len(share)] = share
    shares = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, padded, group=group)
    cut = [found[: each + (rank < more)] for rank, found in enumerate(shares)]
    return torch.cat(cut).movedim(0, dim)


def whole_shape(tensor: Tensor, group: dist.ProcessGroup) -> torch.Size:
    """The shape of the parameter of which this one may be a share."""
    return _whole_shape(tensor, layout_of(tensor), group)


def _whole_shape(tensor: Tensor, layout: Layout, group: dist.ProcessGroup) -> torch.Size:
    shape = list(tensor.shape)
    if layout.dim is not None:
        shape[layout.dim] = layout.size or shape[layout.dim] * dist.get_world_size(group)
    return torch.Size(shape)


def sum_partial_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Adds up, in one bucket, the gradients of whole parameters of which each rank has a summand.

    Call once a step, after the last backward pass and before clipping. A trained parameter that
    has no gradient here may have one elsewhere: it counts as zero.
    """
    partial = [
        parameter
        for parameter in dict.fromkeys(parameters)
        if layout_of(parameter).partial_grad and parameter.requires_grad
    ]
    if not partial:
        return
    for parameter in partial:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in partial if parameter.grad is not None]
    bucket = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(bucket, group=group)
    for grad, summed in zip(grads, bucket.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def norm_squared(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> Tensor:
    """The squared length of the whole of all gradients, a scalar, the same on all ranks.

    Of split parameters the shares of all ranks count, of whole ones one rank's. Call it after
    `sum_partial_gradients`, with at least one gradient.
    """
    whole, split = [], []
    for parameter in dict.fromkeys(parameters):
        if parameter.grad is not None:
            square = torch.linalg.vector_norm(parameter.grad).square()
            (whole if layout_of(parameter).dim is None else split).append(square)
    zero = torch.zeros_like((whole or split)[0])
    shares = torch.stack([zero, *split]).sum()
    dist.all_reduce(shares, group=group)
    return torch.stack([shares, *whole]).sum()
