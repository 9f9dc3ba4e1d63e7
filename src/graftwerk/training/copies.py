"""Several adapters on one batch: what a `Parallel` makes of labels, losses and gradients.

Each child of a `Parallel` answers its own copy of the batch. The loss is the sum over copies, so
each adapter gets the gradient that it would have alone.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from graftwerk.adapters.composition import Composition, branches, fusions, last, names

_OWNER = re.compile(r"(?:^|\.)(?:adapter_layer|fusion_layer)\.([^.]+)\.")


def for_copies(values: Tensor, copies: int, spans: bool) -> Tensor:
    """What belongs to the labels [N] of a batch, for all its copies: [copies N].

    In the order of the model's rows: copy after copy. With `spans` the labels are the starts of all
    rows, then their ends, and so are the rows of all copies.
    """
    runs = values.view(2 if spans else 1, 1, -1)
    return runs.expand(-1, copies, -1).reshape(-1)


def by_copy(losses: Tensor, copies: int, spans: bool) -> Tensor:
    """The losses [copies N] of labels that `for_copies` gave, [copies, N]."""
    runs = losses.view(2 if spans else 1, copies, -1)
    return runs.transpose(0, 1).reshape(copies, -1)


def names_of_copies(composition: Composition | str | None) -> list[str]:
    """What the copies of a batch are called: by the last adapter of each; none where it is one."""
    each = branches(composition)
    if len(each) == 1:
        return []
    words = [last(branch) for branch in each if branch is not None]
    return [f"{word}_{n}" if words.count(word) > 1 else word for n, word in enumerate(words, 1)]


def owner_of(parameter: str) -> str | None:
    """The adapter or fusion that a parameter belongs to, by the parameter's name."""
    found = _OWNER.search(parameter)
    return found[1] if found else None


def by_owner(composition: Composition | str | None, trained: Iterable[str]) -> list[list[str]]:
    """Names of trained parameters, those together that learn from the same copies of the batch.

    Their gradients are clipped together, as they would be if nothing else was trained.
    """
    each = branches(composition)
    if len(each) == 1:
        return [list(trained)]
    members = [{*names(one), *(fuse.name for fuse in fusions(one))} for one in each]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in trained:
        owner = owner_of(name)
        seen = tuple(n for n, own in enumerate(members) if owner in own)
        groups.setdefault(seen, []).append(name)
    return list(groups.values())
