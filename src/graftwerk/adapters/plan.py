"""What a composition comes to in each slot of a model: made once, when it is set.

An *action* is what one slot does: it takes a `SlotCall` and gives the slot's new output. A part is
one; a block of a composition joins those of its children.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.adapters.composition import (
    Average,
    BatchSplit,
    Composition,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
    columns,
    names,
)
from graftwerk.adapters.fusion import Fusable, Fusion, fuse
from graftwerk.adapters.slots import Action, Slot, SlotCall
from graftwerk.adapters.texts import Texts
from graftwerk.errors import UserError


@dataclass(frozen=True)
class Plan:
    """A composition, resolved for one model.

    Args:
        actions: by the keys of slots; a slot without one does nothing.
        head: the action of the adapters' own heads, if they have any.
        width: copies of the batch that it needs; `widen_at` the layer before which they are made
            (-1: before the embeddings; None: never).
        virtual_tokens: columns that prompts put before every row.
        shift: by how much the positions of real tokens move back.
        whole_row: a part's value at a token depends on tokens behind it, so that what was computed
            for the beginning of a row does not hold once the row has grown.
        reads_texts: something asks which text of a packed row each token is of, or where in it.
        own_prompts: a prompt's columns differ from text to text, so that texts of a packed row
            cannot share them; each has room for its own.
        distances: what a T5's table of distances says of the active prefixes.
        unplaced: layers whose self-attention has no scores of distances.
    """

    composition: Composition | str | None = None
    skip_layers: tuple[int, ...] = ()
    actions: Mapping[str, Action] = field(default_factory=dict)
    head: Action | None = None
    width: int = 1
    widen_at: int | None = None
    virtual_tokens: int = 0
    shift: int = 0
    whole_row: bool = False
    reads_texts: bool = False
    own_prompts: bool = False
    distances: str = "none"
    unplaced: frozenset[int] = frozenset()


def unplaced_layers(active: Container[str], slots: Iterable[Slot]) -> frozenset[int]:
    """The layers of a T5 in which AdapterHub's library has no scores of distances.

    `active`: the keys of slots in which the adapter does something.

    It makes them in a stack's first layer, for the others too. From the layer on that has a prefix
    where the one before has none, or the other way round, it puts zeros in their place.
    """
    before: dict[str, bool] = {}
    lost: dict[str, list[int]] = {}
    for slot in slots:
        site = slot.site
        if site.name == "prefix":
            there = slot.key in active
            if site.stack in lost or there != before.setdefault(site.stack, there):
                lost.setdefault(site.stack, []).append(site.layer)
            before[site.stack] = there
    return frozenset(layer for layers in lost.values() for layer in layers)


@dataclass(frozen=True)
class Place:
    """Where in a model and in a composition an action is.

    Args:
        parts: what adapters have in the slot, by name; or their heads.
        slot: None for heads.
        columns: how many columns each adapter puts before a row.
        start: the column at which those of the composition begin.
        copies: of the batch, in what the action is given.
    """

    parts: Mapping[str, nn.Module]
    slot: Slot | None = None
    columns: Mapping[str, int] = field(default_factory=dict)
    start: int = 0
    copies: int = 1

    def of_children(self, composition: Composition) -> Iterator["Place"]:
        """The places of a block's children."""
        copies, start = self.copies, self.start
        if isinstance(composition, Parallel):
            copies = max(copies // len(composition), 1)
        for child in composition.children:
            yield replace(self, start=start, copies=copies)
            if isinstance(composition, Stack) and self.columns:
                start += columns(child, self.columns)


def resolve_slot(
    composition: Composition | str | None, slot: Slot, columns: Mapping[str, int], copies: int
) -> Action | None:
    """The action of a slot; `columns` and `copies` as in `Place`.

    Raises:
        UserError: for a block that has no meaning for a part in the slot, and a fusion that the
            model does not have.
    """
    parts = dict(slot.adapter_layer.items())
    for name in set(names(composition)) & parts.keys():
        _check_suited(composition, name, parts[name])
    return resolve(composition, Place(parts, slot, columns, copies=copies))


def resolve(composition: Composition | str | None, place: Place) -> Action | None:
    """The action that a composition comes to in a place; None where it does nothing."""
    if composition is None or isinstance(composition, str):
        part = None if composition is None else place.parts.get(composition)
        return part if part is None else partial(_from, part, place.start)
    if isinstance(composition, Fuse) and place.slot is not None:
        return _fusing(composition, place, place.slot)
    places = place.of_children(composition)
    pairs = zip(composition.children, places, strict=True)
    children = [resolve(child, inner) for child, inner in pairs]
    active = [child for child in children if child is not None]
    if not active:
        return None
    match composition:
        case Stack() | Fuse():  # heads are not fused: the last that is there answers
            if place.slot is not None and place.slot.site.name == "lm_input":
                active.reverse()  # what was done to the embeddings last is undone first
            return active[0] if len(active) == 1 else partial(_in_sequence, active)
        case Parallel():
            return partial(_in_parallel, children)
        case BatchSplit():
            return partial(_by_rows, composition, children, place.copies)
        case Split():
            return partial(_by_columns, composition, children)
        case Average():
            return partial(_averaged, composition.shares, children)
        case MultiTask():
            return partial(_by_task, composition, children)
    raise UserError(f"{composition}: no known block")


def _check_suited(composition: Composition | str | None, name: str, part: nn.Module) -> None:
    """Raises a UserError where the adapter `name` is in a block that its part has no use for."""
    if not isinstance(composition, Composition) or name not in set(names(composition)):
        return
    kind = type(composition).__name__
    reason = getattr(part, "unsuited", {}).get(kind)
    if isinstance(composition, Fuse) and not hasattr(part, "begin"):
        reason = reason or "AdapterFusion weighs what bottleneck adapters add; it has none there"
    if reason:
        raise UserError(f"{composition}: adapter {name!r} cannot be in {kind}: {reason}")
    for child in composition.children:
        _check_suited(child, name, part)


# ---- what the blocks do


def _from(part: nn.Module, start: int, call: SlotCall) -> Tensor:
    call.start = start
    return part(call)


def _in_sequence(children: Sequence[Action], call: SlotCall) -> Tensor:
    for child in children:
        call.output = child(call)
    return call.output


def _run(children: Sequence[Action | None], calls: Sequence[SlotCall]) -> None:
    for child, call in zip(children, calls, strict=True):
        if child is not None:
            call.output = child(call)


def _in_parallel(children: Sequence[Action | None], call: SlotCall) -> Tensor:
    calls = call.chunks(len(children))
    _run(children, calls)
    return call.gather(calls)


def _by_rows(
    block: BatchSplit, children: Sequence[Action | None], copies: int, call: SlotCall
) -> Tensor:
    count, flow = sum(block.batch_sizes), call.flow
    rows, device = flow.rows, call.output.device
    if rows is None:
        if call.output.shape[0] != copies * count:
            raise UserError(
                f"{block}: batch_sizes add up to {count}, the batch has "
                f"{call.output.shape[0] // copies} rows"
            )
        rows = torch.arange(count, device=device).repeat(copies)
        if copies == 1:
            calls = [call.rows_at(part) for part in rows.split(list(block.batch_sizes))]
            _run(children, calls)
            return call.gather(calls)
    # Some rows have left the batch, or there are copies of it: rows know their number.
    if len(rows) and int(rows.max()) >= count:
        raise UserError(
            f"{block}: batch_sizes add up to {count}, the batch has a row {int(rows.max()) + 1}"
        )
    sizes = torch.tensor(block.batch_sizes, device=device)
    stops = sizes.cumsum(0)
    choice = torch.bucketize(rows, stops, right=True)
    call.flow = replace(flow, rows=rows - (stops - sizes)[choice])  # as the child counts them
    output = _apart(children, call, choice)
    call.flow = flow
    return output


def _by_task(block: MultiTask, children: Sequence[Action | None], call: SlotCall) -> Tensor:
    tasks = call.flow.task_ids
    if tasks is None:
        raise UserError(f"{block}: give the batch's `task_ids`, one number from 0 for each row")
    return _apart(children, call, tasks)


def _apart(children: Sequence[Action | None], call: SlotCall, choice: Tensor) -> Tensor:
    """Each row through the child whose number `choice` [B] gives, and back into its place."""
    if len(choice) != call.output.shape[0]:
        raise UserError(f"{len(choice)} rows were numbered, the batch has {call.output.shape[0]}")
    if len(choice) and not 0 <= int(choice.min()) <= int(choice.max()) < len(children):
        raise UserError(f"rows are numbered 0 to {len(children) - 1}, not {choice.tolist()}")
    order = choice.argsort(stable=True)
    counts = choice.bincount(minlength=len(children)).tolist()
    calls = [call.rows_at(index) for index in order.split(counts)]
    pairs = [(c, one) for c, one in zip(children, calls, strict=True) if one.output.shape[0]]
    _run([child for child, _ in pairs], [one for _, one in pairs])
    return call.gather([one for _, one in pairs], order.argsort())


def _by_columns(block: Split, children: Sequence[Action | None], call: SlotCall) -> Tensor:
    if call.output.ndim == 2:  # a head's scores of rows, made of each one's first token
        first_child = children[0]
        return call.output if first_child is None else first_child(call)
    stops = list(accumulate(block.splits[:-1]))  # columns before the row are the first child's
    if call.flow.texts is not None:
        return _by_places(stops, children, call, call.flow.texts)
    first, length = call.flow.offset, call.output.shape[1]
    edges = [0, *(min(max(stop - first, 0), length) for stop in stops), length]
    kept = [(n, slice(edges[n], edges[n + 1])) for n in range(len(children))]
    kept = [(n, part) for n, part in kept if part.stop > part.start]
    calls = [call.columns_at(part) for _, part in kept]
    _run([children[n] for n, _ in kept], calls)
    return call.gather(calls, dim=1)


def _by_places(
    stops: Sequence[int], children: Sequence[Action | None], call: SlotCall, texts: Texts
) -> Tensor:
    """The same where rows hold several texts: each child on all columns, of which its own count."""
    piece, pieces = texts.cut(stops)
    calls = [replace(call, flow=replace(call.flow, texts=pieces)) for _ in children]
    _run(children, calls)
    return call.weigh(calls, [(piece == n)[..., None] for n in range(len(children))])


def _averaged(shares: Sequence[float], children: Sequence[Action | None], call: SlotCall) -> Tensor:
    calls = [replace(call) for _ in children]
    _run(children, calls)
    return call.weigh(calls, shares)


def _fusing(block: Fuse, place: Place, slot: Slot) -> Action | None:
    """The children that have parts here: what runs first, and the part that is weighed."""
    members: list[tuple[Action | None, Fusable]] = []
    for child in block.children:
        before, final = (
            (child.children[:-1], child.children[-1]) if isinstance(child, Stack) else ((), child)
        )
        assert isinstance(final, str)
        if final in slot.adapter_layer:
            part: Any = slot.adapter_layer[final]  # `_check_suited` knows that it is fusable
            members.append((resolve(Stack(*before), place) if before else None, part))
    if not members:
        return None
    if block.name not in slot.fusion_layer:
        raise UserError(
            f"{block}: there is no fusion {block.name!r}: add it with add_fusion, or load it"
        )
    fusion = slot.fusion_layer[block.name]
    assert isinstance(fusion, Fusion)
    return partial(fuse, fusion, members)
