"""What a composition comes to in each slot of a model: made once, when it is set.

An *action* is what one slot does: it takes a `SlotCall` and gives the slot's new output. A part is
one; a block of a composition joins those of its children.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
    names,
)
from graftwerk.adapters.fusion import Fusable, Fusion, fuse
from graftwerk.adapters.slots import Action, Slot, SlotCall
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
        distances: what a T5's table of distances says of the active prefixes.
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
    distances: str = "none"


def resolve_slot(
    composition: Composition | str | None, slot: Slot, starts: Mapping[str, int]
) -> Action | None:
    """The action of a slot. `starts`: the columns of a row at which adapters' prompts begin.

    Raises:
        UserError: for a block that has no meaning for a part in the slot, and a fusion that the
            model does not have.
    """
    parts = dict(slot.adapter_layer.items())
    leaves: dict[str, Action] = {
        name: partial(_from, part, starts[name]) if name in starts else part.__call__
        for name, part in parts.items()
    }
    for name in set(names(composition)) & parts.keys():
        _check_suited(composition, name, parts[name])
    return resolve(composition, leaves, slot)


def resolve(
    composition: Composition | str | None, leaves: Mapping[str, Action], slot: Slot | None = None
) -> Action | None:
    """The action that a composition makes of those of its adapters; None where it does nothing."""
    if composition is None or isinstance(composition, str):
        return None if composition is None else leaves.get(composition)
    if isinstance(composition, Fuse) and slot is not None:
        return _fusing(composition, leaves, slot)
    children = [resolve(child, leaves, slot) for child in composition.children]
    active = [child for child in children if child is not None]
    if not active:
        return None
    match composition:
        case Stack() | Fuse():  # heads are not fused: the last that is there answers
            if slot is not None and slot.site.name == "lm_input":
                active.reverse()  # what was done to the embeddings last is undone first
            return active[0] if len(active) == 1 else partial(_in_sequence, active)
        case Parallel():
            return partial(_in_parallel, children)
        case BatchSplit():
            return partial(_by_rows, composition, children)
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


def _by_rows(block: BatchSplit, children: Sequence[Action | None], call: SlotCall) -> Tensor:
    sizes, rows = block.batch_sizes, call.flow.rows
    if rows is not None:  # some rows have left the batch: those that stay know their number
        bounds = torch.tensor(sizes, device=rows.device).cumsum(0)
        return _apart(children, call, torch.bucketize(rows, bounds, right=True))
    if call.output.shape[0] != sum(sizes):
        raise UserError(
            f"{block}: batch_sizes add up to {sum(sizes)}, the batch has "
            f"{call.output.shape[0]} rows"
        )
    calls = [call.rows_at(part) for part in torch.arange(sum(sizes)).split(list(sizes))]
    _run(children, calls)
    return call.gather(calls)


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
    first, length = call.flow.offset, call.output.shape[1]
    bounds, end = [], 0
    for count in block.splits[:-1]:  # in tokens of the row; columns before it are the first child's
        end += count
        bounds.append(min(max(end - first, 0), length))
    edges = [0, *bounds, length]
    kept = [(n, slice(edges[n], edges[n + 1])) for n in range(len(children))]
    kept = [(n, part) for n, part in kept if part.stop > part.start]
    calls = [call.columns_at(part) for _, part in kept]
    _run([children[n] for n, _ in kept], calls)
    return call.gather(calls, dim=1)


def _averaged(shares: Sequence[float], children: Sequence[Action | None], call: SlotCall) -> Tensor:
    calls = [replace(call) for _ in children]
    _run(children, calls)
    call.agree(calls)
    return sum(
        (s * one.output for s, one in zip(shares, calls, strict=True)), start=torch.zeros(())
    )


def _fusing(block: Fuse, leaves: Mapping[str, Action], slot: Slot) -> Action | None:
    """The children that have parts here: what runs first, and the part that is weighed."""
    members: list[tuple[Action | None, Fusable]] = []
    for child in block.children:
        before, final = (
            (child.children[:-1], child.children[-1]) if isinstance(child, Stack) else ((), child)
        )
        assert isinstance(final, str)
        if final in slot.adapter_layer:
            part: Any = slot.adapter_layer[final]  # `_check_suited` knows that it is fusable
            members.append((resolve(Stack(*before), leaves, slot) if before else None, part))
    if not members:
        return None
    if block.name not in slot.fusion_layer:
        raise UserError(
            f"{block}: there is no fusion {block.name!r}: add it with add_fusion, or load it"
        )
    fusion = slot.fusion_layer[block.name]
    assert isinstance(fusion, Fusion)
    return partial(fuse, fusion, members)
