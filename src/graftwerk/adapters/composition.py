"""Compositions: which adapters are active, and how their parts join in a slot.

A composition is a small immutable tree whose leaves are adapter names. `Stack` applies its children
one after the other. `Parallel` runs its children side by side on copies of the batch: the model
repeats the batch once, child after child, before the first layer that holds one of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from graftwerk.adapters.slots import SlotCall
from graftwerk.errors import UserError


@dataclass(frozen=True, init=False)
class Composition:
    """A node of the tree. Children are names or compositions."""

    children: tuple["Composition | str", ...]

    def __init__(self, *children: "Composition | str"):
        if not children:
            raise UserError(f"{type(self).__name__}() needs at least one adapter")
        object.__setattr__(self, "children", children)

    def __repr__(self) -> str:
        inner = ", ".join(
            f'"{child}"' if isinstance(child, str) else repr(child) for child in self.children
        )
        return f"{type(self).__name__}({inner})"


class Stack(Composition):
    """Children applied in order, each on what the one before left in the slot."""


class Parallel(Composition):
    """Children side by side: child `i` sees the i-th copy of the batch."""

    def __init__(self, *children: Composition | str):
        super().__init__(*children)
        if any(width(child) > 1 for child in children):
            raise UserError(f"{self!r}: Parallel cannot hold another Parallel")


def names(composition: Composition | str | None) -> Iterator[str]:
    """The adapter names in a composition, from left to right."""
    if isinstance(composition, str):
        yield composition
    elif composition is not None:
        for child in composition.children:
            yield from names(child)


def width(composition: Composition | str | None) -> int:
    """How many copies of the batch a composition needs."""
    if composition is None or isinstance(composition, str):
        return 1
    if isinstance(composition, Parallel):
        return len(composition.children)
    widths = {width(child) for child in composition.children} - {1}
    if len(widths) > 1:
        raise UserError(f"{composition!r}: the Parallel blocks of a Stack must be of one width")
    return widths.pop() if widths else 1


def widening(composition: Composition | str | None) -> set[str]:
    """The adapters below a `Parallel`: the batch must be wide where one of them has a part."""
    if composition is None or isinstance(composition, str):
        return set()
    if isinstance(composition, Parallel):
        return set(names(composition))
    return set().union(*(widening(child) for child in composition.children))


@dataclass(frozen=True)
class Prompts:
    """Where prompts lie among a row's virtual tokens: `total` of them, `starts` by adapter."""

    total: int
    starts: dict[str, int]


def place_prompts(
    composition: Composition | str | None, lengths: Mapping[str, int], start: int = 0
) -> Prompts:
    """Prompts of a `Stack` one after the other, those of a `Parallel` at the same place.

    Raises:
        UserError: where children of a `Parallel` have prompts of different lengths.
    """
    if composition is None:
        return Prompts(0, {})
    if isinstance(composition, str):
        length = lengths[composition]
        return Prompts(length, {composition: start} if length else {})
    starts: dict[str, int] = {}
    totals = []
    for child in composition.children:
        offset = start + (0 if isinstance(composition, Parallel) else sum(totals))
        placed = place_prompts(child, lengths, offset)
        starts |= placed.starts
        totals.append(placed.total)
    if not isinstance(composition, Parallel):
        return Prompts(sum(totals), starts)
    if len(set(totals)) > 1:
        raise UserError(
            f"{composition!r}: its children put {totals} virtual tokens before a row; side by side "
            f"they must be as many"
        )
    return Prompts(totals[0], starts)


def resolve(
    composition: Composition | str | None, parts: Mapping[str, nn.Module]
) -> Callable[[SlotCall], Tensor] | None:
    """What a slot with these parts does under a composition; None where it does nothing."""
    if composition is None:
        return None
    if isinstance(composition, str):
        part = parts.get(composition)
        return None if part is None else part.__call__  # bound: a module would become a child
    children = [resolve(child, parts) for child in composition.children]
    active = [child for child in children if child is not None]
    if not active:
        return None
    if isinstance(composition, Parallel):
        return partial(_in_parallel, children)
    return active[0] if len(active) == 1 else partial(_in_sequence, active)


def _in_sequence(children: list[Callable[[SlotCall], Tensor]], call: SlotCall) -> Tensor:
    for child in children:
        call.output = child(call)
    return call.output


def _in_parallel(children: list[Callable[[SlotCall], Tensor] | None], call: SlotCall) -> Tensor:
    runs = zip(children, call.chunks(len(children)), strict=True)
    return torch.cat([run.output if child is None else child(run) for child, run in runs])
