"""Tensor- and pipeline-parallel shards of a checkpoint as one source of whole tensors."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graftwerk.checkpoints.nemo_tables import Split
from graftwerk.checkpoints.tensors import TensorSource
from graftwerk.errors import UserError

LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..+)")


class WholeTensors:
    """A `TensorSource` of shards: layers counted over all stages, tensors joined over all ranks.

    `module.` behind the first part of a name, which NeMo's half-precision wrapper puts there, is
    left out.

    Args:
        stages: for each pipeline stage its tensor-parallel ranks, in order. Numbers of layers are
            local to a stage. What several stages hold is taken from the first.
        where: names the checkpoint in errors.
        depth: layers of each stage; None: as many as the highest number in it says, which is right
            where every layer has tensors.

    Raises:
        UserError: where ranks of a stage do not hold the same names.
    """

    def __init__(
        self, stages: Sequence[Sequence[TensorSource]], where: str, depth: int | None = None
    ):
        self._stages, self._where = stages, where
        self.ranks = max(len(ranks) for ranks in stages)  # of tensor parallelism
        self._split: Callable[[str], Split | None] = lambda name: None
        self._places: dict[str, tuple[int, str]] = {}
        first: dict[str, int] = {}  # number of a stage's first layer, for each stack of layers
        for number, ranks in enumerate(stages):
            names = ranks[0].names
            for rank, source in enumerate(ranks):
                if source.names != names:
                    name = sorted(source.names ^ names)[0]
                    raise UserError(f"{where}: tensor-parallel ranks 0 and {rank} differ in {name}")
            counts: dict[str, int] = {}
            for name in names:
                whole = re.sub(r"^(\w+)\.module\.", r"\1.", name)
                if layer := LAYER.fullmatch(whole):
                    stack, index = layer[1], int(layer[2])
                    counts[stack] = max(counts.get(stack, 0), index + 1)
                    start = number * depth if depth else first.get(stack, 0)
                    whole = f"{stack}{start + index}{layer[3]}"
                self._places.setdefault(whole, (number, name))
            for stack, count in counts.items():
                first[stack] = first.get(stack, 0) + count
        self.layers = first

    def cut_by(self, split: Callable[[str], Split | None]) -> None:
        """Says how tensors are cut over ranks; before that they are read as rank 0 holds them."""
        self._split = split

    def __enter__(self) -> "WholeTensors":
        return self

    def __exit__(self, *error: object) -> None:
        for ranks in self._stages:
            for source in ranks:
                source.__exit__(*error)

    @property
    def names(self) -> set[str]:
        """All tensors, under names of the whole model."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of the whole tensor; nothing is read."""
        stage, local = self._places[name]
        split, ranks = self._split(name), self._stages[stage]
        shapes = [source.shape(local) for source in ranks]
        if split is None or len(ranks) == 1 or len(shapes[0]) <= split.dimension:
            return shapes[0]
        size = sum(shape[split.dimension] for shape in shapes if len(shape) > split.dimension)
        shape = shapes[0]
        return (*shape[: split.dimension], size, *shape[split.dimension + 1 :])

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; nothing is read."""
        stage, local = self._places[name]
        return self._stages[stage][0].dtype(local)

    def read(self, name: str) -> Tensor:
        """The whole tensor: a view where one rank holds it, else joined."""
        stage, local = self._places[name]
        split, ranks = self._split(name), self._stages[stage]
        if split is None or len(ranks) == 1:
            return ranks[0].read(local)
        shares = [source.read(local) for source in ranks]
        runs = [self._runs(name, share, split) for share in shares]
        ordered = [rank[run] for run in range(len(split.runs)) for rank in runs]
        try:
            return torch.cat(ordered, split.dimension)
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{self._where}: the shares of {name} do not fit: {error}") from None

    def release(self, name: str) -> None:
        """Lets go of a tensor's pages: what was read of it has been copied."""
        stage, local = self._places[name]
        for source in self._stages[stage]:
            source.release(local)

    def _runs(self, name: str, share: Tensor, split: Split) -> list[Tensor]:
        if len(split.runs) == 1 or share.ndim <= split.dimension:
            return [share] * len(split.runs)
        size, parts = share.shape[split.dimension], sum(split.runs)
        if size % parts:
            raise UserError(f"{self._where}: a share of {name} has {size} rows, for {parts} parts")
        return list(share.split([size // parts * n for n in split.runs], split.dimension))
