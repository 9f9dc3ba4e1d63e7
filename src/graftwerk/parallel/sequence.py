"""Sequence parallelism: between sublayers each rank holds a run of a row's columns.

Norms, dropouts and the residual stream of a layer then cost each rank its share (Korthikanti et al.
2022, arXiv:2205.05198, section 4.2.2). A sublayer gathers the whole row where it begins and
scatters its sum where it ends: what one all-reduce sent, in two halves. Rows are padded to a
multiple of the ranks; nothing reads the padding. All of it are hooks: a layer sees shorter rows.
"""

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from graftwerk.adapters.fusion import Fusion
from graftwerk.adapters.part import Layout, Part
from graftwerk.adapters.ranks import ALONE, Ranks
from graftwerk.adapters.slots import Flow, JoinSlot, LayerSlot, Slot
from graftwerk.adapters.texts import Texts
from graftwerk.errors import UserError
from graftwerk.models.context import Context
from graftwerk.models.positions import FAR
from graftwerk.parallel.exchange import (
    join_row,
    own_columns,
    run_of,
    split_row,
    sum_backward,
    sum_forward,
)
from graftwerk.parallel.shares import layout_of, remember


class SequenceRow(Ranks):
    """The ranks among which the `row_length` columns of a row are split."""

    def __init__(self, group: dist.ProcessGroup, length: int):
        self.group, self.row_length = group, length
        self.start, self.size = run_of(group, length)

    def sum(self, x: Tensor) -> Tensor:
        return sum_forward(x, self.group)

    def joined(self, x: Tensor) -> Tensor:
        return sum_backward(x, self.group)

    def mean_of_rows(self, x: Tensor) -> Tensor:
        real = min(max(self.row_length - self.start, 0), self.size)  # the last ones may be padding
        return self.joined(self.sum(x[:, :real].sum(1)) / self.row_length)

    def columns(self, x: Tensor) -> Tensor:
        raise UserError(
            "a fusion's weights are not recorded with sequence_parallel=True, which spreads them "
            "over devices: set it to False"
        )


class SplitRow(ParallelStyle):
    """A stack of layers: a run of the row goes into the first, the whole row comes out."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()

        def enter(_: nn.Module, args: tuple) -> tuple:
            x, context, *rest = args
            assert isinstance(context, Context)
            flow = replace(context.flow, row=SequenceRow(group, x.shape[1]))
            return split_row(x, group), replace(context, flow=flow), *rest

        def leave(_: nn.Module, args: tuple, output: tuple[Tensor, Context]) -> tuple:
            x, context = output
            length = row_of(context.flow).row_length
            flow = replace(context.flow, row=ALONE)
            return join_row(x, group, length), replace(context, flow=flow)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class SplitJoin(ParallelStyle):
    """A slot between sublayers, told where its columns are."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        joins = isinstance(module, JoinSlot)

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x, flow, *rest = args
            assert isinstance(flow, Flow)
            if joins:
                kwargs = {**dict(zip(_JOIN, rest, strict=False)), **kwargs}
            else:
                kwargs = {**dict(zip(_LAYER, rest, strict=True)), **kwargs}
                kwargs["neighbours"] = _cut(kwargs["neighbours"], row_of(flow))
            kwargs["positions"] = own_columns(kwargs["positions"], group)
            flow = replace(flow, offset=flow.offset + row_of(flow).start, texts=_own(flow, group))
            return (x, flow), kwargs

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


# The arguments of the two kinds of slots between sublayers, behind the output and the flow.
_JOIN = ("input", "residual", "dropout", "norm", "bias", "positions")
_LAYER = ("positions", "neighbours")

Neighbours = Callable[[int], tuple[Tensor, Tensor]]


def row_of(flow: Flow) -> SequenceRow:
    """How a pass through layers splits its rows."""
    assert isinstance(flow.row, SequenceRow)
    return flow.row


def _cut(neighbours: Neighbours, row: SequenceRow) -> Neighbours:
    """Where the tokens of this rank's run stand in their texts; padding is far from any."""

    def here(columns: int) -> tuple[Tensor, Tensor]:
        before, behind = neighbours(row.row_length)
        return own_columns(before, row.group, FAR), own_columns(behind, row.group, FAR)

    return here


def _own(flow: Flow, group: dist.ProcessGroup) -> Texts | None:
    """The texts of this rank's run of columns."""
    texts = flow.texts
    return texts and texts.each(lambda x: own_columns(x, group, texts.beyond))


def between_sublayers(slot: nn.Module) -> bool:
    """Whether a slot sees a run of the row's columns."""
    return isinstance(slot, JoinSlot | LayerSlot)


def tell_part(part: nn.Module, slot: Slot, ranks: Ranks) -> None:
    """Makes a part, or a fusion, of such a slot one that sees a run of the columns only.

    It holds its parameters whole, and finds summands of their gradients.
    """
    for parameter in part.parameters():
        assert layout_of(parameter).dim is None, "what is split is inside of a sublayer"
        remember(parameter, Layout(partial_grad=True))
    if isinstance(part, Part):
        if part.whole_row and not isinstance(slot, LayerSlot):
            reason = (
                "its gate is a mean over its tokens, which sequence_parallel=True spreads over "
                "devices: set it to False"
            )
            vars(part)["unsuited"] = {
                **part.unsuited,
                "Split": reason,
            }  # this one's, not its class's
    elif isinstance(part, Fusion):
        part.ranks = ranks
