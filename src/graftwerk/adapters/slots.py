"""Slots: the places of a model at which an adapter may read and change what flows through.

A layer is born with its slots, empty. An adapter is a set of *parts*, one for each slot that its
method matches; a part is a module `(SlotCall) -> output`. A slot knows no method and no model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.masks import Chance
from graftwerk.adapters.mixin import AdapterSlotMixin
from graftwerk.adapters.ranks import ALONE, Ranks
from graftwerk.adapters.texts import Texts

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


@dataclass
class Record:
    """What parts say of themselves in a pass: name -> layer -> place -> values.

    `gates`: [B] or [B, n], those of several parts at a place side by side; in packed rows of each
    column, [B, S] or [B, S, n]. `fusions`: the weight of each child, [B, S, children]. What a
    composition names twice has the rows of both calls.
    """

    fusions: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    _gates: dict[str, dict[int, dict[str, dict[nn.Module, Tensor]]]] = field(default_factory=dict)

    @property
    def gates(self) -> dict[str, dict[int, dict[str, Tensor]]]:
        return {
            name: {
                layer: {place: _side_by_side(noted) for place, noted in places.items()}
                for layer, places in layers.items()
            }
            for name, layers in self._gates.items()
        }

    def note_gate(self, part: nn.Module, name: str, layer: int, place: str, gate: Tensor) -> None:
        """Takes the gates [B, n], or [B, S, n], of an adapter's part."""
        noted = self._gates.setdefault(name, {}).setdefault(layer, {}).setdefault(place, {})
        _add_rows(noted, part, gate)

    def note_fusion(self, name: str, layer: int, place: str, weights: Tensor) -> None:
        """Takes the weights [B, S, children] of a fusion."""
        _add_rows(self.fusions.setdefault(name, {}).setdefault(layer, {}), place, weights)


def _add_rows(noted: dict[Any, Tensor], key: Any, values: Tensor) -> None:
    values = values.detach()
    noted[key] = torch.cat([noted[key], values]) if key in noted else values


def _side_by_side(noted: Mapping[nn.Module, Tensor]) -> Tensor:
    gates = torch.cat(list(noted.values()), -1)
    return gates.squeeze(-1) if gates.shape[-1] == 1 else gates


@dataclass(frozen=True, slots=True)
class Flow:
    """What all slots of one forward pass share.

    `actions`: what each slot does, by its key. `offset`: the number, among the row's tokens, of the
    first column (negative: columns of prompts). `rows` [B]: the rows' numbers in the batch that the
    composition means, where some have left it. `task_ids` [B]: each row's task. `record`: where
    parts note what they are asked to. `distances`: what a T5's table of distances says of prefixes
    (`methods.prefix.PrefixTuningConfig`), `unplaced`: layers whose self-attention has none. `row`:
    the ranks among which the row's columns are split. `chance`: what dropout draws from; None: from
    torch's random state. `texts`: those that lie in packed rows, where something active asks; None:
    a row is one.
    """

    actions: Mapping[str, "Action"] = field(default_factory=dict)
    offset: int = 0
    rows: Tensor | None = None
    task_ids: Tensor | None = None
    record: Record | None = None
    distances: str = "none"
    unplaced: frozenset[int] = frozenset()
    row: Ranks = ALONE
    chance: Chance | None = None
    texts: Texts | None = None

    def of(self, change: Callable[[Tensor | None], Tensor | None]) -> "Flow":
        """That of other rows, which `change` makes of these."""
        told = self.rows, self.task_ids, self.chance, self.texts
        if all(one is None for one in told):
            return self
        return replace(
            self,
            rows=change(self.rows),
            task_ids=change(self.task_ids),
            chance=None if self.chance is None else self.chance.of(change),
            texts=None if self.texts is None else self.texts.each(change),
        )


@dataclass(slots=True)
class SlotCall:
    """All that a part may read. Leading dimensions are [batch, sequence].

    `output`: what the sublayer made, to be changed. `input`: what went into the sublayer or the
    projection. `residual`: the residual stream before the sublayer's result is added. `norm`: the
    layer norm that follows the addition, in post-norm models. `dropout`: the one that the result
    still has to go through. `bias`: what `output` already includes of the sublayer's own: the bias
    of a projection, the vectors of positions. `positions`: [batch or 1, sequence]. `virtual`: how
    many of the first columns are virtual tokens, for prompts to fill; `start`: the part's first.
    `joined`: `output` is the layer's next state already, with nothing to be added; a mask [batch,
    sequence, 1] where that holds of some tokens only. `seen` [batch, 1 or sequence, rows] or None:
    which rows of a prefix there are, for a token. `before`, `behind`: how many tokens of its text
    stand before each token and behind it, [batch or 1, sequence]; padding is far from any.
    """

    output: Tensor
    flow: Flow = field(default_factory=Flow)
    input: Tensor | None = None
    residual: Tensor | None = None
    norm: nn.Module | None = None
    dropout: nn.Module | None = None
    bias: Tensor | None = None
    positions: Tensor | None = None
    virtual: int = 0
    start: int = 0
    joined: bool | Tensor = False
    seen: Tensor | None = None
    before: Tensor | None = None
    behind: Tensor | None = None

    def drop(self) -> None:
        """Takes `output` through the sublayer's dropout, unless that was done."""
        if self.dropout is not None:
            self.output, self.dropout = self.dropout(self.output, self.flow), None

    def join(self, where: bool | Tensor = True) -> None:
        """Adds `output` to the residual stream and normalises, unless that was done.

        `where`: at these tokens only, as in `joined`.
        """
        self.drop()
        if self.joined is True or where is False:
            return
        assert self.residual is not None
        x = self.residual + self.output
        x = x if self.norm is None else self.norm(x)
        if where is True and self.joined is False:
            self.output, self.joined = x, True
            return
        done, wanted = _mask(self.joined, x), _mask(where, x)
        self.output, self.joined = torch.where(wanted & ~done, x, self.output), done | wanted

    def rows_at(self, index: Tensor) -> "SlotCall":
        """The call of some of the batch's rows, by their numbers [n]."""
        batch = self.output.shape[0]
        index = index.to(self.output.device)

        def cut(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or (tensor.shape[0] == 1 and batch != 1):
                return tensor  # all rows share it
            return tensor[index]

        return self._cut(cut)

    def chunks(self, n: int) -> list["SlotCall"]:
        """The calls of `n` equal runs of batch rows."""
        size = self.output.shape[0] // n

        def cut(tensor: Tensor | None, run: int) -> Tensor | None:
            if tensor is None or tensor.shape[0] != n * size:
                return tensor  # all copies of the batch share it
            return tensor[run * size : (run + 1) * size]

        return [self._cut(lambda tensor, run=run: cut(tensor, run)) for run in range(n)]

    def _cut(self, cut: Callable[[Tensor | None], Tensor | None]) -> "SlotCall":
        output = cut(self.output)
        assert output is not None
        return replace(
            self,
            output=output,
            joined=self._joined_of(cut),
            flow=self.flow.of(cut),
            input=cut(self.input),
            residual=cut(self.residual),
            positions=cut(self.positions),
            seen=cut(self.seen),
            before=cut(self.before),
            behind=cut(self.behind),
        )

    def columns_at(self, part: slice) -> "SlotCall":
        """The call of some of each row's columns."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, part]

        return replace(
            self,
            output=self.output[:, part],
            joined=self._joined_of(cut),
            flow=replace(self.flow, offset=self.flow.offset + part.start),
            input=cut(self.input),
            residual=cut(self.residual),
            positions=cut(self.positions),
            virtual=min(max(self.virtual - part.start, 0), part.stop - part.start),
            before=cut(self.before),
            behind=cut(self.behind),
        )

    def _joined_of(self, cut: Callable[[Tensor | None], Tensor | None]) -> bool | Tensor:
        if isinstance(self.joined, bool):
            return self.joined
        mask = cut(self.joined)
        assert mask is not None
        return mask

    def weigh(self, calls: Sequence["SlotCall"], shares: Sequence[float | Tensor]) -> Tensor:
        """The sum of the outputs of calls that ran side by side, each times its share, which may
        be one for each token, [B, S, 1].

        Where one of them is the layer's next state, the others become it first.
        """
        self._drop_alike(calls)
        where: bool | Tensor = any(call.joined is True for call in calls)
        masks = [call.joined for call in calls if isinstance(call.joined, Tensor)]
        if masks and not where:
            where = torch.stack(masks).any(0)
        for call in calls:
            call.join(where)
        self.joined = where
        first, *others = (share * call.output for share, call in zip(shares, calls, strict=True))
        return sum(others, start=first)

    def _drop_alike(self, calls: Sequence["SlotCall"]) -> None:
        if any(call.dropout is None for call in calls):
            for call in calls:
                call.drop()
        self.dropout = calls[0].dropout

    def gather(
        self, calls: Sequence["SlotCall"], order: Tensor | None = None, dim: int = 0
    ) -> Tensor:
        """The outputs of calls that ran apart, one after the other, then in `order` if given."""
        self._drop_alike(calls)
        self.joined = calls[0].joined
        if any(call.joined is not self.joined for call in calls):
            masks = [_mask(call.joined, call.output) for call in calls]
            self.joined = _ordered(torch.cat(masks, dim), order)
        elif isinstance(self.joined, Tensor):
            self.joined = _ordered(self.joined, order)
        if dim == 0:
            _pad_prefixes(calls)
        if dim == 0 and any(call.seen is not None for call in calls):
            seen = [_seen(call) for call in calls]
            queries = max(one.shape[1] for one in seen)
            seen = torch.cat([one.expand(-1, queries, -1) for one in seen])
            self.seen = _ordered(seen, order)
        return _ordered(torch.cat([call.output for call in calls], dim), order)


Action = Callable[[SlotCall], Tensor]


def _mask(where: bool | Tensor, like: Tensor) -> Tensor:
    """`joined` as a mask, for an output such as this."""
    if isinstance(where, Tensor):
        return where
    return torch.full((*like.shape[:-1], 1), where, device=like.device)


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def _seen(call: SlotCall) -> Tensor:
    if call.seen is not None:
        return call.seen
    batch, length = call.output.shape[:2]
    return torch.ones(batch, 1, length, dtype=torch.bool, device=call.output.device)


def _pad_prefixes(calls: Sequence[SlotCall]) -> None:
    """Makes prefixes of different lengths equally long: what is put before them is not seen."""
    lengths = [call.output.shape[1] for call in calls if call.output.ndim == 3]
    if len(set(lengths)) < 2:
        return
    for call in calls:
        missing = max(lengths) - call.output.shape[1]
        call.seen = F.pad(_seen(call), (missing, 0), value=False)
        call.output = F.pad(call.output, (0, 0, missing, 0))


class Slot(AdapterSlotMixin, nn.Module):
    """One place in a model. Free of cost while nothing is active in it.

    `adapter_layer` holds the parts by adapter name, `fusion_layer` the fusions by theirs. `key`
    tells the slots of a model apart. What a slot does comes with each pass, as the `Flow` that the
    model makes of its composition, under the name that the slot `asks` for: its key, or within a
    compiled layer its place. `active` is what the model's own composition comes to.
    """

    adapter_layer: nn.ModuleDict

    def __init__(self, site: Site):
        super().__init__()
        self.site = site
        self.key = self.asks = f"{site.stack}.{site.layer}.{site.name}"
        self.adapter_layer = nn.ModuleDict()
        self.fusion_layer = nn.ModuleDict()
        self.active: Action | None = None

    def forward(
        self,
        output: Tensor,
        flow: Flow,
        input: Tensor | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        virtual: int = 0,
    ) -> Tensor:
        action = flow.actions.get(self.asks)
        if action is None:
            return output
        call = SlotCall(output, flow, input, bias=bias, positions=positions, virtual=virtual)
        return action(call)

    def extra_repr(self) -> str:
        return f"{self.site.name}, layer {self.site.layer}"


class JoinSlot(Slot):
    """A slot at the end of a sublayer: it joins the result to the residual stream as well."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        output: Tensor,
        flow: Flow,
        input: Tensor,
        residual: Tensor,
        dropout: nn.Module,
        norm: nn.Module | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """`norm(residual + dropout(output))`, with what is active in between."""
        action = flow.actions.get(self.asks)
        if action is None:
            x = residual + dropout(output, flow)
            return x if norm is None else norm(x)
        call = SlotCall(output, flow, input, residual, norm, dropout, bias, positions)
        call.output = action(call)
        call.join()
        return call.output


class LayerSlot(Slot):
    """A slot behind a layer, which says where each token stands in its text."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        output: Tensor,
        flow: Flow,
        positions: Tensor,
        neighbours: Callable[[int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """`neighbours`: of a number of columns, `before` and `behind` of a `SlotCall`."""
        action = flow.actions.get(self.asks)
        if action is None:
            return output
        before, behind = neighbours(output.shape[1])
        return action(SlotCall(output, flow, positions=positions, before=before, behind=behind))


class PrefixSlot(Slot):
    """A slot whose output are rows that come before keys and values."""

    def rows(self, like: Tensor, flow: Flow, input: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Rows [B, P, 2 kv] and which of them there are for whom ([B, 1 or S, P]; None: all); None
        for no prefix.

        `like` [B, 0, 2 kv]; `input` [B, S, h]: what goes into the attention.
        """
        action = flow.actions.get(self.asks)
        if action is None:
            return None
        call = SlotCall(like, flow, input)
        return action(call), call.seen


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
