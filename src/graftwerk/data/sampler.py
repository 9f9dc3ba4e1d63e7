"""Which rows each step trains on: shuffled by seed and epoch, resumable."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from graftwerk.data.trees import Groups


class Step(NamedTuple):
    """The numbers of a step's rows; the first row is the `first` in the order of training, counted
    over all epochs."""

    rows: list[int]
    first: int


def shuffled(random: np.random.Generator, rows: int, groups: Groups | None) -> np.ndarray:
    """Row numbers in another order, those of a group on end."""
    return random.permutation(rows) if groups is None else groups.shuffled(random)


class Mixture:
    """Several sources in given shares: the same numbers for the same seed, epoch by epoch.

    An epoch has as many rows as all sources together, of each its share, evenly strewn: of any
    number of rows on end each source has its share, give or take a few. A source that gives fewer
    rows than it has goes on with the others in the next epoch; one that gives more begins again,
    in another order.

    Args:
        sizes: rows of each source; they are numbered through.
        weights: shares, relative to each other.
        groups: of each source's rows, numbered from 0, that shuffling keeps together.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        groups: Sequence[Groups] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.groups = groups
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self.counts = largest_remainders(shares, sum(sizes))

    def order(self, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
        """The row numbers of an epoch."""
        starts = np.cumsum([0, *self.sizes])
        parts, places = [], []
        for source, count in enumerate(self.counts):
            if count:
                rows = self._stream(source, epoch * count, count, seed, shuffle)
                parts.append(starts[source] + rows)
                places.append((np.arange(count) + 0.5) / count)
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def _stream(self, source: int, start: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
        """`count` rows of a source from `start` on, of the endless run of passes through it."""
        size = self.sizes[source]
        first, skipped = divmod(start, size)
        passes = range(first, -(-(start + count) // size))
        if not shuffle:
            rows = [np.arange(size)] * len(passes)
        else:
            groups = None if self.groups is None else self.groups[source]
            rows = [
                shuffled(np.random.default_rng((seed, n, source)), size, groups) for n in passes
            ]
        return np.concatenate(rows)[skipped : skipped + count]


def largest_remainders(shares: np.ndarray, total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share of it."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts.tolist()


class StepSampler(Sampler[Step]):
    """The rows of each optimizer step, over all ranks.

    The order of an epoch is a function of `seed` and the epoch's number alone, so any layout sees
    the same global batches: a resumed run of another number of ranks goes on exactly where the
    first stopped. Each iteration is one epoch, or what is left of it after `set_consumed`.

    Args:
        rows: the number of rows of the data set.
        step_rows: rows of one step over all ranks.
        shuffle: a new order each epoch; otherwise the order of the files.
        drop_last: leave out an epoch's last step where it has fewer rows.
        mixture: draws an epoch's rows from several sources; None: each row once.
        groups: rows that shuffling keeps together, where there is no mixture; None: none.
    """

    def __init__(
        self,
        rows: int,
        step_rows: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        mixture: Mixture | None = None,
        groups: Groups | None = None,
    ) -> None:
        self.mixture = mixture
        self.groups = groups
        self.rows = rows - rows % step_rows if drop_last else rows
        self.all_rows = rows
        self.step_rows = step_rows
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._start = 0

    def row_wise(self) -> "StepSampler":
        """One that shuffles row by row, and is as this one otherwise."""
        other = copy(self)
        other.groups = None
        if self.mixture is not None:
            other.mixture = copy(self.mixture)
            other.mixture.groups = None
        return other

    def __len__(self) -> int:
        """Steps of a whole epoch, whatever part of the present one is already consumed."""
        return -(-self.rows // self.step_rows)

    @property
    def group_count(self) -> int:
        """The groups that shuffling moves as one; 0: it moves rows."""
        parts = [self.groups] if self.mixture is None else self.mixture.groups or []
        return sum(len(part) for part in parts if part is not None) if self.shuffle else 0

    def set_consumed(self, samples: int) -> None:
        """Go on after `samples` rows, counted over all epochs and ranks."""
        self.epoch, self._start = divmod(samples, self.rows) if self.rows else (0, 0)

    def samples_after(self, steps: int) -> int:
        """Rows that `steps` steps from the very start train on, over all ranks."""
        epochs, rest = divmod(steps, len(self))
        return epochs * self.rows + min(rest * self.step_rows, self.rows)

    def order(self, epoch: int) -> np.ndarray:
        """The row numbers of an epoch in the order that they are trained on."""
        if self.mixture is not None:
            return self.mixture.order(epoch, self.seed, self.shuffle)
        if not self.shuffle:
            return np.arange(self.all_rows)
        return shuffled(np.random.default_rng((self.seed, epoch)), self.all_rows, self.groups)

    def __iter__(self) -> Iterator[Step]:
        order = self.order(self.epoch)[: self.rows]
        for start in range(self._start, self.rows, self.step_rows):
            rows = order[start : start + self.step_rows].tolist()
            yield Step(rows, self.epoch * self.rows + start)
        self.epoch, self._start = self.epoch + 1, 0
