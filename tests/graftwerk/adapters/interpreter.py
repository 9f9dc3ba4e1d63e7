"""A slow, obvious reading of compositions, to hold the engine against.

One copy of the batch and one row at a time, in a pass of its own; in each slot the composition is
walked anew from its root, and an adapter that looks at no other token does one token at a time.
Nothing here is shared with how a composition is resolved but its blocks, the adapters' parts, and
what a call holds.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from graftwerk.adapters import (
    Average,
    BatchSplit,
    Composition,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
)
from graftwerk.adapters.composition import names
from graftwerk.adapters.methods.prefix import Prefix
from graftwerk.adapters.methods.prompt import Prompt
from graftwerk.adapters.plan import Plan
from graftwerk.adapters.slots import Slot, SlotCall, slots_of

Tree = Composition | str


@dataclass
class Where:
    """The copy of the batch, the row of it and the row's task that a pass is of."""

    copy: int
    row: int
    task: int = 0
    columns: Mapping[str, int] = field(default_factory=dict)  # of each prompt


def interpreted(model, tree: Tree | None, rows: int, run, tasks=None, skip_layers=()) -> Tensor:
    """What `run(row)` gives for each row of each copy of the batch, one after the other."""
    plan, found = model._plan, []
    columns = {name: config.columns for name, config in model.adapters.items()}
    for n in range(copies(tree)):
        for row in range(rows):
            where = Where(n, row, 0 if tasks is None else int(tasks[row]), columns)
            model._plan = Plan(
                actions={
                    slot.key: partial(in_slot, slot, tree, where)
                    for slot in slots_of(model).values()
                    if slot.site.layer not in skip_layers
                },
                virtual_tokens=in_front(model, tree, where, "columns"),
                shift=in_front(model, tree, where, "shift"),
            )
            found.append(run(row))
    model._plan = plan
    return torch.cat(found)


def copies(tree: Tree | None) -> int:
    """How many copies of the batch there are."""
    if isinstance(tree, Parallel):
        return len(tree.children)
    return max(map(copies, tree.children)) if isinstance(tree, Stack) else 1


def chosen(tree: Tree, where: Where) -> tuple[Tree, Where] | None:
    """The child that has the row, of a block that gives whole rows to its children."""
    if isinstance(tree, Parallel):
        return tree.children[where.copy if len(tree) > 1 else 0], where
    if isinstance(tree, MultiTask):
        return tree.children[where.task], where
    if isinstance(tree, BatchSplit):
        row = where.row
        for child, size in zip(tree.children, tree.batch_sizes, strict=True):
            if row < size:
                return child, replace(where, row=row)
            row -= size
        raise AssertionError("no child has the row")
    return None


def in_front(model, tree: Tree | None, where: Where, what: str) -> int:
    """Virtual tokens (`columns`) of a row, or the `shift` of its positions."""
    if tree is None:
        return 0
    if isinstance(tree, str):
        return getattr(model.adapters[tree], what)
    picked = chosen(tree, where)
    if picked is not None:
        return in_front(model, *picked, what)
    numbers = [in_front(model, child, where, what) for child in tree.children]
    return sum(numbers) if isinstance(tree, Stack) else numbers[0]


@dataclass
class State:
    """What a slot holds for one row.

    `joined` says of each token whether it is the layer's next state already. `start` is the column
    of the next prompt.
    """

    call: SlotCall
    joined: list[bool]
    start: int = 0

    def cut(self, first: int, stop: int) -> "State":
        """Some of the row's tokens."""
        call, columns = self.call, slice(first, stop)
        flow = replace(call.flow, offset=call.flow.offset + first)
        made = replace(call, output=call.output[:, columns], flow=flow)
        for name in ("input", "residual", "positions", "before", "behind"):
            tensor = getattr(call, name)
            setattr(made, name, None if tensor is None else tensor[:, columns])
        return State(made, self.joined[columns], self.start)

    def after(self, output: Tensor, joined: list[bool]) -> "State":
        return State(replace(self.call, output=output), joined, self.start)

    def finished(self, tokens: list[bool]) -> Tensor:
        """The output, where these tokens are joined to the residual stream."""
        call = self.call
        found = [call.output[:, :0]]
        for t, wanted in enumerate(tokens):
            x = call.output[:, t : t + 1]
            if wanted and not self.joined[t]:
                assert call.residual is not None
                x = call.residual[:, t : t + 1] + x
                x = x if call.norm is None else call.norm(x)
            found.append(x)
        return torch.cat(found, 1)


def in_slot(slot: Slot, tree: Tree | None, where: Where, call: SlotCall) -> Tensor:
    """The slot's output for one row, [1, tokens, features]."""
    if tree is None:
        return call.output
    if slot.site.name == "lm_input":
        tree = backwards(tree)
    length = call.output.shape[1]
    done = walk(slot, tree, where, State(call, [False] * length))
    call.joined = call.residual is not None
    return done.finished([True] * length) if call.joined else done.call.output


def backwards(tree: Tree) -> Tree:
    """What was done first is undone last."""
    if isinstance(tree, str):
        return tree
    made = copy.copy(tree)
    children = tuple(backwards(child) for child in tree.children)
    object.__setattr__(made, "children", children[::-1] if isinstance(tree, Stack) else children)
    return made


def walk(slot: Slot, tree: Tree, where: Where, state: State) -> State:
    """What one row is behind a composition."""
    if isinstance(tree, str):
        return leaf(slot, tree, state, where)
    picked = chosen(tree, where)
    if picked is not None:
        return walk(slot, *picked, state)
    if isinstance(tree, Stack):
        for child in tree.children:
            state = walk(slot, child, where, state)
        return state
    if isinstance(tree, Fuse):
        return fused(slot, tree, where, state)
    if isinstance(tree, Average):
        return averaged(slot, tree, where, state)
    assert isinstance(tree, Split)
    return in_runs(slot, tree, where, state)


def averaged(slot: Slot, tree: Average, where: Where, state: State) -> State:
    """Children weighed; at a token at which one has the next state, all have.

    Weights need not add up to 1, so a slot in which none of its adapters is stays as it is.
    """
    if not set(names(tree)) & set(slot.adapter_layer):
        return state
    weights = [1.0] * len(tree) if tree.weights is None else list(tree.weights)
    if tree.normalize_weights or tree.weights is None:
        weights = [weight / sum(weights) for weight in weights]
    made = [walk(slot, child, where, state) for child in tree.children]
    joined = [any(of_token) for of_token in zip(*(one.joined for one in made), strict=True)]
    outputs = [one.finished(joined) for one in made]
    total = sum(weight * one for weight, one in zip(weights, outputs, strict=True))
    assert isinstance(total, Tensor)
    return state.after(total, joined)


def in_runs(slot: Slot, tree: Split, where: Where, state: State) -> State:
    """Each child makes its run of the row's tokens; columns before the row are the first's."""
    length = state.call.output.shape[1]
    start, end, made = 0, -state.call.flow.offset, [state.cut(0, 0)]
    for number, (child, count) in enumerate(zip(tree.children, tree.splits, strict=True)):
        end += count
        stop = length if number + 1 == len(tree) else min(max(end, start), length)
        if stop > start:
            made.append(walk(slot, child, where, state.cut(start, stop)))
            start = stop
    joined = [token for one in made for token in one.joined]
    return state.after(torch.cat([one.call.output for one in made], 1), joined)


def leaf(slot: Slot, name: str, state: State, where: Where) -> State:
    """One adapter on one row, token by token where it sees no further."""
    if name not in slot.adapter_layer:  # it may have columns at another place
        return replace(state, start=state.start + where.columns.get(name, 0))
    part, call = slot.adapter_layer[name], state.call
    if isinstance(part, Prompt):
        vectors = part.vectors()
        stop = state.start + len(vectors)
        output = call.output.clone()
        if call.virtual:
            output[:, state.start : stop] = vectors
        return State(replace(call, output=output), state.joined, stop)
    if isinstance(part, Prefix):
        return state.after(part(replace(call)), state.joined)
    if getattr(part, "whole_row", False):
        return noting(state, part)
    tokens = [noting(state.cut(t, t + 1), part) for t in range(call.output.shape[1])]
    joined = [token for one in tokens for token in one.joined]
    return state.after(torch.cat([one.call.output for one in tokens], 1), joined)


def noting(state: State, part: Callable[[SlotCall], Tensor]) -> State:
    """Runs a part on all of a state's tokens; `joined` is what it says of them, if it does."""
    call = replace(state.call)
    call.joined = None  # pyright: ignore[reportAttributeAccessIssue]
    output = part(call)
    said = call.joined
    return state.after(output, state.joined if said is None else [said] * len(state.joined))


def fused(slot: Slot, tree: Fuse, where: Where, state: State) -> State:
    """AdapterFusion by its formula: Q of the last child, K and V what the children add."""
    stacks = [child if isinstance(child, Stack) else Stack(child) for child in tree.children]
    key = ",".join(str(child[-1]) for child in stacks)
    members = [child for child in stacks if child[-1] in slot.adapter_layer]
    if not members:
        return state
    parts = [slot.adapter_layer[str(child[-1])] for child in members]
    layer, call = slot.fusion_layer[key], state.call
    start = parts[-1].begin(call, layer.config.query_before_ln)
    updates = []
    for child, part in zip(members, parts, strict=True):
        before = State(replace(call, output=start.inner, bias=None), state.joined)
        for one in child.children[:-1]:
            before = walk(slot, one, where, before)
        alone = not set(child.children[:-1]) & set(slot.adapter_layer)
        inner = start.inner if alone else part.begin(before.call).inner
        updates.append(part.update(call, inner))
    query = through(layer.query, start.query)
    scores = [(query * through(layer.key, update)).sum(-1, keepdim=True) for update in updates]
    powers = [(score - max_of(scores)).exp() for score in scores]
    total = start.residual
    for power, update in zip(powers, updates, strict=True):
        total = total + power / sum(powers) * through(layer.value, update)
    return noting(state, lambda call: parts[-1].finish(call, total))


def max_of(scores: list[Tensor]) -> Tensor:
    return torch.stack(scores).amax(0)


def through(linear: nn.Module | None, x: Tensor) -> Tensor:
    return x if linear is None else linear(x)
