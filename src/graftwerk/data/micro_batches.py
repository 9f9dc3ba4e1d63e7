"""How the rows of a step become the micro-batches of this rank: each padded alone, or packed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from graftwerk.adapters.masks import chances
from graftwerk.data.dataset import AnswerDataset, Batch, collate
from graftwerk.data.packing import PackedRow, alone, first_fit_decreasing, pack, shared
from graftwerk.data.sampler import Step
from graftwerk.data.trees import MINIMUM


@dataclass
class MicroBatches(Dataset[list[Batch]], ABC):
    """The micro-batches of a step, by the numbers of its rows.

    A step comes to lines of tokens, the same on all ranks: line i goes to rank i modulo their
    number. All ranks have as many micro-batches; where lines run out, some are fillers without
    labels.

    Args:
        rows: the data set.
        pad: the token that fills lines up.
        multiple: of what their length is a multiple.
        micro_batch_size: lines of one forward pass.
        rank, world_size: of the data-parallel group.
        seed: of what dropout draws from, a line's own wherever it lies; None: nothing.
        named: say which source each label is from.
    """

    rows: AnswerDataset
    pad: int
    multiple: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int | None = None
    named: bool = False

    def __getitem__(self, step: Step) -> list[Batch]:
        lines, size = self.lines(step.rows), self.micro_batch_size
        own, most = lines[self.rank :: self.world_size], -(-len(lines) // self.world_size)
        found = []
        for place in range(0, most, size):
            batch = self.batch(own[place : place + size])
            if self.seed is not None:
                places = range(place, place + len(batch.tokens))
                numbers = [step.first + self.rank + self.world_size * n for n in places]
                batch.chance = chances(self.seed, numbers)
            found.append(batch)
        return found

    @abstractmethod
    def lines(self, rows: Sequence[int]) -> Sequence[Any]:
        """What a step's rows come to, at most as many lines as rows."""

    @abstractmethod
    def batch(self, lines: Sequence[Any]) -> Batch:
        """Some lines as a batch; a filler where there are none."""


@dataclass
class PaddedBatches(MicroBatches):
    """Each row is a line of its own, as long as the longest of its micro-batch."""

    def lines(self, rows: Sequence[int]) -> Sequence[int]:
        return rows

    def batch(self, lines: Sequence[int]) -> Batch:
        examples = [self.rows[number] for number in lines]
        origins = [self.rows.source_of(number) for number in lines] if self.named else None
        return collate(examples, self.pad, self.multiple, self.rows.filler, origins)


@dataclass
class PackedBatches(MicroBatches):
    """Several rows lie in a line, which is as long as the longest of its micro-batch.

    Args:
        room: tokens of a line at most, and of a T5 those of the sources too.
        share: rows that begin alike, with `minimum` tokens or more, are one tree.
        static: every batch has the same shape, that of full lines.
        prompt: virtual tokens for which each row has room of its own; such rows are no trees.
    """

    room: tuple[int, ...] = ()
    share: bool = False
    minimum: int = MINIMUM
    static: bool = False
    family: str = "gpt"
    prompt: int = 0

    def lines(self, rows: Sequence[int]) -> Sequence[PackedRow]:
        held = [self.rows.arrays(number) for number in rows]
        if self.share:
            return first_fit_decreasing(shared(held, self.room[0], self.minimum), self.room)
        return first_fit_decreasing(alone(held, self.prompt), self.room)

    def batch(self, lines: Sequence[PackedRow]) -> Batch:
        multiples = self.room if self.static else [self.multiple] * len(self.room)
        height = self.micro_batch_size if self.static else 1
        source_of = self.rows.source_of if self.named else None
        return pack(lines, self.pad, multiples, height, self.family, source_of, self.prompt)
