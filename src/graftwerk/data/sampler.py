"""Which rows each step trains on: shuffled by seed and epoch, sliced over ranks, resumable."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class MicroBatches(list[list[int]]):
    """Row numbers, one list for each forward pass; the first row is the `first` in the order of
    training, counted over all epochs and ranks."""

    first: int = 0


class Mixture:
    """Several sources in given shares: the same numbers for the same seed, epoch by epoch.

    An epoch has as many rows as all sources together, of each its share, evenly strewn: of any
    number of rows on end each source has its share, give or take a few. A source that gives fewer
    rows than it has goes on with the others in the next epoch; one that gives more begins again,
    in another order.

    Args:
        sizes: rows of each source; they are numbered through.
        weights: shares, relative to each other.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        self.sizes = list(sizes)
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
            rows = [np.random.default_rng((seed, n, source)).permutation(size) for n in passes]
        return np.concatenate(rows)[skipped : skipped + count]


def largest_remainders(shares: np.ndarray, total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share of it."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts.tolist()


class StepSampler(Sampler[MicroBatches]):
    """For each optimizer step the rows of this rank, cut into micro-batches.

    The order of an epoch is a function of `seed` and the epoch's number alone, so any layout sees
    the same global batches: a resumed run of another number of ranks goes on exactly where the
    first stopped. Each iteration is one epoch, or what is left of it after `set_consumed`. In a
    step all ranks have the same number of micro-batches; where rows run out, some are empty.

    Args:
        rows: the number of rows of the data set.
        step_rows: rows of one step over all ranks.
        micro_batch_size: rows of one forward pass.
        rank, world_size: of the data-parallel group.
        shuffle: a new order each epoch; otherwise the order of the files.
        drop_last: leave out an epoch's last step where it has fewer rows.
        mixture: draws an epoch's rows from several sources; None: each row once.
    """

    def __init__(
        self,
        rows: int,
        step_rows: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        self.mixture = mixture
        self.rows = rows - rows % step_rows if drop_last else rows
        self.all_rows = rows
        self.step_rows = step_rows
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._start = 0

    def __len__(self) -> int:
        """Steps of a whole epoch, whatever part of the present one is already consumed."""
        return -(-self.rows // self.step_rows)

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
        return np.random.default_rng((self.seed, epoch)).permutation(self.all_rows)

    def __iter__(self) -> Iterator[MicroBatches]:
        order = self.order(self.epoch)[: self.rows]
        for start in range(self._start, self.rows, self.step_rows):
            yield self._share(order[start : start + self.step_rows], self.epoch * self.rows + start)
        self.epoch, self._start = self.epoch + 1, 0

    def _share(self, step: np.ndarray, first: int) -> MicroBatches:
        # Even shares: they differ by one row at most, and only in an epoch's last step.
        bounds = [len(step) * rank // self.world_size for rank in range(self.world_size + 1)]
        share = step[bounds[self.rank] : bounds[self.rank + 1]].tolist()
        largest = -(-len(step) // self.world_size)
        size = self.micro_batch_size
        made = MicroBatches(share[n : n + size] for n in range(0, largest, size))
        made.first = first + bounds[self.rank]
        return made
