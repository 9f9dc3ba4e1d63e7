"""Rows that begin alike, as trees of tokens: found by sorting, cut to fit into packed rows.

In the order of their tokens, rows with a common beginning are neighbours, and what neighbours have
in common says all of the tree: row i adds to it what is behind its first `common[i]` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

TOKENS_AT_ONCE = 2**24  # that are copied to be sorted
MINIMUM = (
    16  # tokens in common that are worth a tree: fewer save little, and bind rows in shuffling
)


@dataclass(frozen=True)
class SortedRows:
    """Rows in the order of their tokens.

    Args:
        order: [n] the rows' numbers.
        common: [n] with how many tokens of the one before each row begins; 0 for the first.
        added: [n + 1] tokens that the rows before each add to the tree of all.
    """

    order: np.ndarray
    common: np.ndarray
    added: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "SortedRows":
        """Of rows of tokens, all of one type; no order but theirs decides between equal ones."""
        order = _sorted(rows)
        common, added = np.zeros(len(order), np.int64), np.zeros(len(order) + 1, np.int64)
        before = None
        for place, row in enumerate(map(rows.__getitem__, order)):
            common[place] = 0 if before is None else _alike(before, row)
            added[place + 1] = len(row) - common[place]
            before = row
        return cls(order, common, np.cumsum(added))

    def tokens(self, start: int, stop: int) -> int:
        """Tokens of the tree of the rows from place `start` to `stop`."""
        return int(self.added[stop] - self.added[start] + self.common[start])

    def cut(self, start: int, stop: int, floor: int) -> np.ndarray:
        """[runs + 1] where runs of rows begin of which neighbours have `floor` tokens in common;
        the last is `stop`. No rows have no run."""
        if start == stop:
            return np.array([stop])
        edges = start + 1 + np.flatnonzero(self.common[start + 1 : stop] < floor)
        return np.concatenate([[start], edges, [stop]])


def _sorted(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[n] the rows' numbers in the order of their tokens.

    Where all are more than should be copied, what begins with the same token is sorted apart.
    """

    def row(number: np.integer) -> np.ndarray:
        return rows[int(number)]

    found, waiting = [], [(np.arange(len(rows)), 0)]
    while waiting:
        numbers, depth = waiting.pop()
        if sum(len(row(n)) - depth for n in numbers) <= TOKENS_AT_ONCE or len(numbers) == 1:
            # Bytes are compared at once, and keep beginnings together in whatever order they are.
            keys = [row(n)[depth:].tobytes() for n in numbers]
            found.append(numbers[sorted(range(len(keys)), key=keys.__getitem__)])
            continue
        first = row(numbers[0])
        depth = min(_alike(first, row(n)) for n in numbers)  # all begin with so many alike
        next_tokens = (row(n)[depth] if len(row(n)) > depth else -1 for n in numbers)
        begins = np.fromiter(next_tokens, np.int64, len(numbers))
        order = np.argsort(begins, kind="stable")
        edges = np.flatnonzero(np.diff(begins[order], prepend=-2)).tolist()
        runs = [numbers[order[i:j]] for i, j in pairwise([*edges, len(numbers)])]
        if begins[order[0]] == -1:  # rows that end here come first, and are all the same
            found.append(runs.pop(0))
        waiting += [(run, depth) for run in reversed(runs)]
    return np.concatenate([np.arange(0), *found])


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two rows have in common from their beginning."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def trees(rows: SortedRows, size: int, minimum: int = MINIMUM) -> list[tuple[int, int]]:
    """The runs of rows that make a tree each, of at most `size` tokens; no row is longer.

    A tree that is larger is cut into as many as repeat the fewest tokens.
    """
    found: list[tuple[int, int]] = []
    for start, stop in pairwise(rows.cut(0, len(rows.order), minimum).tolist()):
        fits = rows.tokens(start, stop) <= size
        found += [(start, stop)] if fits else _fitting(rows, start, stop, size)
    return found


def _fitting(rows: SortedRows, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    # cost[i]: tokens repeated where the rows before place i are cut best and a tree begins there.
    cost = np.zeros(stop - start + 1, np.int64)
    begins, low = [start] * len(cost), start
    for end in range(start + 1, stop + 1):
        while rows.tokens(low, end) > size:
            low += 1
        best = low + int(cost[low - start : end - start].argmin())
        begins[end - start] = best
        cost[end - start] = cost[best - start] + (rows.common[end] if end < stop else 0)
    runs, end = [], stop
    while end > start:
        runs.append((begins[end - start], end))
        end = begins[end - start]
    return runs[::-1]


class Groups:
    """Rows of a data set in groups that stay together where it is shuffled.

    Args:
        rows: [n] the rows' numbers, group after group.
        starts: where each group begins.
    """

    def __init__(self, rows: np.ndarray, starts: Sequence[int] | np.ndarray) -> None:
        self.rows = rows
        self.starts = np.asarray(starts, np.int64)
        self.sizes = np.diff(self.starts, append=len(rows))

    @classmethod
    def of(cls, rows: SortedRows, size: int, minimum: int = MINIMUM) -> "Groups":
        """The trees that fit into a packed row of `size` tokens.

        One that does not is split at its root, so that what all rows begin with binds none.
        """
        found, waiting = [np.arange(0)], [(0, len(rows.order), minimum)]
        while waiting:
            edges = rows.cut(*waiting.pop())
            starts, stops = edges[:-1], edges[1:]
            large = rows.added[stops] - rows.added[starts] + rows.common[starts] > size
            found.append(starts[~large])
            for start, stop in zip(starts[large].tolist(), stops[large].tolist(), strict=True):
                root = int(rows.common[start + 1 : stop].min())
                waiting.append((start, stop, root + minimum))
        return cls(rows.order, np.sort(np.concatenate(found)))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def of_rows(self) -> np.ndarray:
        """[n] the number of each row's group."""
        found = np.empty(len(self.rows), np.int64)
        found[self.rows] = np.repeat(np.arange(len(self)), self.sizes)
        return found

    def shuffled(self, random: np.random.Generator) -> np.ndarray:
        """The rows with their groups in another order."""
        order = random.permutation(len(self))
        sizes = self.sizes[order]
        # Of each row its place before, by how far its group has moved.
        moved = self.starts[order] - (np.cumsum(sizes) - sizes)
        return self.rows[np.repeat(moved, sizes) + np.arange(len(self.rows))]
