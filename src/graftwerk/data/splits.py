"""How a source in one piece is cut into train, val and test."""

import random
from collections.abc import Mapping

from graftwerk.errors import UserError

SPLITS = ("train", "val", "test")
DEFAULT = {"train": 0.8, "val": 0.1, "test": 0.1}


def split_sizes(split: Mapping[str, int | float] | None, total: int, of: str) -> dict[str, int]:
    """How many of `total` things go to train, val and test.

    Args:
        split: counts (whole numbers) or fractions of `total` that sum to at most 1; one that is
            absent is 0. None takes `DEFAULT`.
        of: what is counted, for the error: `paragraphs`, `rows`.
    """
    given = dict(DEFAULT if split is None else split)
    for key, value in given.items():
        if key not in SPLITS:
            raise UserError(f"data_prep.split: unknown key {key!r}; allowed: {', '.join(SPLITS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UserError(f"data_prep.split.{key}: {value!r} is no count and no fraction")
    asked = {name: given.get(name, 0) for name in SPLITS}
    if any(isinstance(value, float) for value in asked.values()):
        whole = [name for name, value in asked.items() if isinstance(value, int) and value > 0]
        if whole:
            raise UserError(
                f"data_prep.split: {asked} mixes counts and fractions; write all as one of them"
            )
        if sum(asked.values()) > 1 + 1e-9:
            raise UserError(f"data_prep.split: the fractions {asked} sum to more than 1")
        asked = {name: round(value * total) for name, value in asked.items()}
        # Rounding may ask for one more than there is; the training set gives it up.
        asked["train"] -= max(sum(asked.values()) - total, 0)
    if sum(asked.values()) > total:
        raise UserError(
            f"data_prep.split asks for {' + '.join(map(str, asked.values()))} {of}, but the source "
            f"has {total}"
        )
    return {name: int(value) for name, value in asked.items()}


def assign_splits(sizes: Mapping[str, int], total: int, seed: int) -> list[str | None]:
    """For each of `total` things its split, or None where it is left out; the same for a seed."""
    names: list[str | None] = [name for name in SPLITS for _ in range(sizes[name])]
    names += [None] * (total - len(names))
    random.Random(seed).shuffle(names)
    return names
