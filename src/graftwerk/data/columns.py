"""Encoded rows as flat arrays, uncopied: those of a process's own memory, or of mapped files."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

# What an example is made of, and how it is held. Of `labels` and `span` two numbers are one.
FIELDS = {
    "tokens": np.dtype(np.int32),
    "labels": np.dtype(np.int32),
    "source": np.dtype(np.int32),
    "types": np.dtype(np.int8),
    "span": np.dtype(np.int32),
}


class RowArrays(NamedTuple):
    """An example's number, and its fields as views of the data set's arrays.

    `labels` [n, 2]: position, token.
    """

    number: int
    tokens: np.ndarray
    labels: np.ndarray
    source: np.ndarray | None
    types: np.ndarray | None
    span: np.ndarray | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens it has, and of a T5 how many its source."""
        own = len(self.tokens)
        return (own,) if self.source is None else (own, len(self.source))


class Column(NamedTuple):
    """Sequences of one field, laid flat: sequence i is `flat[starts[i] : starts[i + 1]]`."""

    starts: np.ndarray
    flat: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray]) -> "Column":
        """Copies them; all are of one type."""
        starts = np.cumsum([0, *map(len, sequences)])
        return cls(starts, np.concatenate(sequences))


Chunk = Mapping[str, Column]  # some rows by field; a field that their family has none of is absent


class Columns:
    """The rows of chunks, one behind the other. All chunks have the same fields."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = [[chunk.get(name) for name in FIELDS] for chunk in chunks]
        counts = (len(fields[0].starts) - 1 for fields in self._chunks if fields[0] is not None)
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def arrays(self, number: int) -> RowArrays:
        """What a row is made of, uncopied."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        place = bisect_right(self._ends, number)
        row = number - (self._ends[place - 1] if place else 0)
        fields = [
            None if column is None else column.flat[column.starts[row] : column.starts[row + 1]]
            for column in self._chunks[place]
        ]
        tokens, labels, *more = fields
        assert tokens is not None
        assert labels is not None
        return RowArrays(number, tokens, labels.reshape(-1, 2), *more)

    @property
    def lengths(self) -> np.ndarray:
        """[rows, 1]: the tokens of each; [rows, 2]: and those of its source, which a T5 has."""
        names = list(FIELDS)
        own, source = names.index("tokens"), names.index("source")
        held = [own] if not self._chunks or self._chunks[0][source] is None else [own, source]
        lengths = np.empty((len(self), len(held)), np.int64)
        begin = 0
        for fields, end in zip(self._chunks, self._ends, strict=True):
            for place, number in enumerate(held):
                column = fields[number]
                assert column is not None
                lengths[begin:end, place] = np.diff(column.starts)
            begin = end
        return lengths


class TokensOf(Sequence[np.ndarray]):
    """The tokens of some rows, each a view that is made when it is asked for."""

    def __init__(self, columns: Columns, rows: range) -> None:
        self._columns, self._rows = columns, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self._columns.arrays(self._rows[place]).tokens
