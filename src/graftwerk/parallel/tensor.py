"""Tensor parallelism: each rank holds a share of every projection's features.

A sublayer sees its whole input and splits its first projection by output features, its second by
input features; the second's partial sums meet in one all-reduce forward, the input's gradients in
one backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Adapter parts join in by the
layouts that they declare and add no collective to either pass. Within a sublayer all tensors are
plain local shards; a parameter remembers its `Layout` so that files can hold the whole.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn import functional as F

from graftwerk.adapters.part import Layout, Part
from graftwerk.adapters.slots import Slot, slots_of
from graftwerk.errors import UserError
from graftwerk.models import GPT

_LAYOUT = "tensor_parallel_layout"  # the attribute of a parameter that remembers its Layout


class _SumBackward(torch.autograd.Function):
    """Identity forward; backward the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumForward(torch.autograd.Function):
    """The sum of the ranks' tensors forward; identity backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


class RowSplitLinear(nn.Module):
    """A rank's summand of a linear layer [out, in / ranks]; the bias waits for the sum."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class SplitSublayer(ParallelStyle):
    """Splits one sublayer, given the names of its two projections and of the slot that ends it.

    `blocks`: the first projection's rows are this many runs, each split apart (gate and up).
    """

    def __init__(self, column: str, row: str, output: str, blocks: int = 1):
        self.column, self.row, self.output, self.blocks = column, row, output, blocks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        column, row = getattr(module, self.column), getattr(module, self.row)
        for name, parameter in list(column.named_parameters(recurse=False)):
            setattr(column, name, shard(parameter, Layout(dim=0, blocks=self.blocks), group))
        weight = shard(row.weight, Layout(dim=1), group)
        setattr(module, self.row, RowSplitLinear(weight, row.bias))

        def enter(_: nn.Module, args: tuple) -> tuple:
            return _SumBackward.apply(args[0], group), *args[1:]

        def leave(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = _SumForward.apply(output, group)  # pyright: ignore[reportAssignmentType]
            bias = getattr(module, self.row).bias
            return output if bias is None else output + bias

        module.register_forward_pre_hook(enter)
        getattr(module, self.output).register_forward_hook(leave)
        return module


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Splits a model and the adapters that it holds over a one-dimensional mesh, in place.

    Raises:
        UserError: where heads, groups or features do not divide by the ranks.
    """
    config, ranks = model.config, mesh.size()
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(config, key) % ranks:
            raise UserError(
                f"model.tensor_model_parallel_size={ranks} does not divide the base's "
                f"{key}={getattr(config, key)}"
            )
    gated = 2 if config.gated else 1
    plan: dict[str, ParallelStyle] = {
        "decoder.layers.*.self_attention": SplitSublayer("linear_qkv", "linear_proj", "output"),
        "decoder.layers.*.mlp": SplitSublayer("linear_fc1", "linear_fc2", "fc2", gated),
    }
    parallelize_module(model, mesh, plan)
    shares: dict[nn.Parameter, nn.Parameter] = {}  # one for each, where parts share parameters
    for slot in slots_of(model).values():
        for part in slot.adapter_layer.values():
            assert isinstance(part, Part)
            _split_part(part, slot, mesh.get_group(), shares)


def _split_part(
    part: Part,
    slot: Slot,
    group: dist.ProcessGroup,
    shares: dict[nn.Parameter, nn.Parameter],
) -> None:
    for name, layout in part.layouts(slot.site).items():
        owner, _, leaf = name.rpartition(".")
        module = part.get_submodule(owner)
        whole = getattr(module, leaf)
        if whole not in shares:
            shares[whole] = shard(whole, layout, group)
        setattr(module, leaf, shares[whole])


def shard(parameter: nn.Parameter, layout: Layout, group: dist.ProcessGroup) -> nn.Parameter:
    """This rank's share of a whole parameter, contiguous, remembering its layout."""
    local = share_of(parameter.detach(), layout, group).contiguous()
    share = nn.Parameter(local, requires_grad=parameter.requires_grad)
    setattr(share, _LAYOUT, layout)
    return share


def share_of(tensor: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of a whole tensor: a view where the dimension is one block."""
    if layout.dim is None:
        return tensor
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if layout.blocks == 1:
        return tensor.chunk(ranks, layout.dim)[rank]
    blocks = tensor.unflatten(layout.dim, (layout.blocks, -1))
    return blocks.chunk(ranks, layout.dim + 1)[rank].flatten(layout.dim, layout.dim + 1)


def gather(tensor: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """The whole tensor of the ranks' shares: the inverse of `shard`."""
    if layout.dim is None:
        return tensor
    shares = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, tensor.contiguous(), group=group)
    blocks = [share.unflatten(layout.dim, (layout.blocks, -1)) for share in shares]
    return torch.cat(blocks, layout.dim + 1).flatten(layout.dim, layout.dim + 1)


def layout_of(parameter: nn.Parameter) -> Layout:
    """How a parameter lies over the ranks."""
    return getattr(parameter, _LAYOUT, Layout())


def sum_partial_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Adds up, in one bucket, the gradients of whole parameters of which each rank has a summand.

    Call once a step, after the last backward pass and before clipping.
    """
    grads = list(_partial_gradients(parameters))
    if not grads:
        return
    bucket = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(bucket, group=group)
    for grad, summed in zip(grads, bucket.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def _partial_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    for parameter in parameters:
        if layout_of(parameter).partial_grad and parameter.grad is not None:
            yield parameter.grad
