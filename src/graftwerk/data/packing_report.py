"""What packing and sharing come to: tokens that are computed for a row, and how rows are shuffled.

Of the first steps of a run: what a step costs does not change with the epoch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from graftwerk.data.micro_batches import PackedBatches
from graftwerk.data.sampler import StepSampler

STEPS = 64


@dataclass(frozen=True)
class PackingReport:
    """Tokens that are computed for a row of training, and how mixed its steps are.

    Args:
        padded: where rows are padded, as many in a micro-batch; `packed`: where they are packed
            one by one; `shared`: as trees of those that begin alike.
        shares: whether they are.
        full: how much of the packed rows is tokens, virtual ones too.
        trees: of how many trees (groups of rows that stay together in shuffling) a step's rows are,
            on average; `trees_row_wise`: were they shuffled one by one.
    """

    padded: float
    packed: float
    shared: float
    shares: bool
    full: float
    trees: float
    trees_row_wise: float

    @classmethod
    def of(
        cls, batches: PackedBatches, sampler: StepSampler, tree_of_row: np.ndarray
    ) -> "PackingReport":
        """Of a run's first steps; `tree_of_row` [rows]: the number of each row's tree."""
        lengths, micro = batches.rows.lengths, batches.micro_batch_size
        steps, mixed = _first(sampler), _first(sampler.row_wise())
        rows = sum(map(len, steps))
        lines = [line for step in steps for line in batches.lines(step.tolist())]
        documents = [document for line in lines for document in line]
        filled = sum(sum(document.sizes) for document in documents)
        computed = filled - batches.prompt * len(documents)
        cuts = [step[n : n + micro] for step in mixed for n in range(0, len(step), micro)]
        padded = sum(int(lengths[cut].max(0).sum()) * len(cut) for cut in cuts)
        return cls(
            padded=padded / sum(map(len, mixed)),
            packed=int(lengths[np.concatenate(steps)].sum()) / rows,
            shared=computed / rows,
            shares=batches.share,
            full=filled / (sum(batches.room) * len(lines)),
            trees=_trees(steps, tree_of_row),
            trees_row_wise=_trees(mixed, tree_of_row),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for `summary.json`."""
        found = {k: round(v, 3) for k, v in asdict(self).items() if k != "shares"}
        return {"shares": self.shares, **found}

    def lines(self, size: int) -> list[str]:
        """For the log."""
        shared = f", {self.shared:.1f} as trees" if self.shares else ""
        found = [
            f"packing: rows of {size} tokens, {self.full:.0%} full; tokens computed for a row of "
            f"data: {self.padded:.1f} padded, {self.packed:.1f} packed{shared}"
        ]
        if self.shares:
            found.append(
                f"shuffling: rows of a tree stay together: those of a step are of {self.trees:.1f} "
                f"trees, shuffled one by one they would be of {self.trees_row_wise:.1f}"
            )
        return found


def _first(sampler: StepSampler) -> list[np.ndarray]:
    order, size = sampler.order(0)[: sampler.rows], sampler.step_rows
    return [order[n : n + size] for n in range(0, min(len(order), STEPS * size), size)]


def _trees(steps: Sequence[np.ndarray], tree_of_row: np.ndarray) -> float:
    return float(np.mean([len(np.unique(tree_of_row[step])) for step in steps]))
