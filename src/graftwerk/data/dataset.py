"""JSONL files as a data set of examples, and examples as the batch of one forward pass."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from graftwerk.data.encoding import (
    Encoded,
    Example,
    Label,
    RowDropped,
    RowEncoder,
    RowReport,
    RowUnlabelled,
)
from graftwerk.data.jsonl import Row, read_rows
from graftwerk.data.tasks import task_of
from graftwerk.data.templates import RowError
from graftwerk.errors import UserError

ROWS_AT_ONCE = 512  # enough for the tokenizer to use all cores, little enough to stay out of memory


@dataclass
class Batch:
    """The rows of one forward pass.

    Args:
        tokens: [B, S] int64, padded on the right.
        positions: [B, S] int64, or None for 0, 1, 2, ... in every row.
        end: [B, S] int64 or None: query i sees key j of its row iff j <= i < end[j]; None means
            plain causal rows, where padding on the right is seen by no real token. Padding has
            end[j] = j + 1.
        label_positions: [N] int64, indices into the flattened B * S: which hidden states predict.
            An index may occur several times, with different labels or the same. None: labels are
            for the model's output rows, in their order.
        labels: [N] int64, what each of them has to predict.
        weights: [N] float32, what each of them counts.
        source: [B, E] int64, what a T5's encoder reads, padded on the right.
        source_documents: [B, E] int64, 0 for tokens and -1 for padding; None where nothing is
            padded.
        documents: [B, S] int64, the same of a BERT's `tokens`. Of several documents in a row: the
            number in the row of the one that a token, of a T5's source too, is of.
        token_types: [B, S] int64, of a BERT that knows more than one.
        spans: [D, 2] int64, the row and the number in it of each document in which a BERT marks an
            answer, where rows hold several; labels are columns of the row then.
        chance: [B] int64, what dropout draws from for each row (`adapters.masks`).
        origins: [N] int64, which of the data set's sources each label is from; None where nobody
            asks.
        num_rows: rows that hold data; a filler has none.
        num_tokens: tokens that are not padding.
        row_tokens: those of its rows, a beginning that several share for each of them.
    """

    tokens: Tensor
    positions: Tensor | None
    end: Tensor | None
    label_positions: Tensor | None
    labels: Tensor
    weights: Tensor
    source: Tensor | None = None
    source_documents: Tensor | None = None
    documents: Tensor | None = None
    token_types: Tensor | None = None
    spans: Tensor | None = None
    chance: Tensor | None = None
    origins: Tensor | None = None
    num_rows: int = -1
    num_tokens: int = -1
    row_tokens: int = -1

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model's forward pass, by name."""
        given = {
            "tokens": self.tokens,
            "positions": self.positions,
            "end": self.end,
            "select": self.label_positions,
            "source": self.source,
            "source_documents": self.source_documents,
            "documents": self.documents,
            "token_types": self.token_types,
            "spans": self.spans,
            "chance": self.chance,
        }
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def __post_init__(self) -> None:
        if self.num_rows < 0:
            self.num_rows = self.tokens.shape[0]
        if self.num_tokens < 0:
            self.num_tokens = self.tokens.numel()
        if self.row_tokens < 0:
            self.row_tokens = self.num_tokens

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {k: function(v) for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where a GPU can fetch it while it computes."""
        return self._map(lambda tensor: tensor.pin_memory())


def collate(
    examples: Sequence[Example],
    pad: int = 0,
    multiple: int = 1,
    filler: Example | None = None,
    origins: Sequence[int] | None = None,
) -> Batch:
    """Examples of one family as one batch, padded on the right with token `pad`.

    The length is that of the longest example, rounded up to a multiple of `multiple`. Optional
    fields are filled where any example has its own, and stay None otherwise. No examples make a
    batch of the filler alone, whose labels weigh nothing (None: a GPT's, one token without labels),
    for ranks that have run out of rows. `origins` has the number of each
    example's source.
    """
    rows = examples or [filler or Example([pad])]
    tokens = _padded([row.tokens for row in rows], pad, multiple)
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        positions=None,
        end=None,
        label_positions=None,
        labels=torch.empty(0, dtype=torch.int64),
        weights=torch.empty(0),
        num_rows=len(examples),
        num_tokens=sum(len(row.tokens) + len(row.source or ()) for row in examples),
    )
    if rows[0].span is not None:
        _add_spans(batch, rows, weight=1.0 if examples else 0.0)
    else:
        _add_labels(batch, rows)
    if rows[0].source is not None:
        sources = [row.source or () for row in rows]
        batch.source = torch.from_numpy(_padded(sources, pad, multiple))
        batch.source_documents = _documents(sources, batch.source)
    if rows[0].token_types is not None:
        types = _padded([row.token_types or () for row in rows], 0, multiple)
        batch.token_types = torch.from_numpy(types)
    if origins is not None:
        of_row = torch.tensor(origins or [0], dtype=torch.int64)
        counts = torch.tensor([len(row.labels) for row in rows])
        spans = rows[0].span is not None  # a start for each row, then an end for each
        batch.origins = of_row.repeat(2) if spans else of_row.repeat_interleave(counts)
    return batch


def _padded(sequences: Sequence[Sequence[int]], pad: int, multiple: int) -> np.ndarray:
    """[B, S] of sequences, filled up on the right."""
    width = -(-max(map(len, sequences)) // multiple) * multiple
    filled = np.full((len(sequences), width), pad, dtype=np.int64)
    for row, sequence in zip(filled, sequences, strict=True):
        row[: len(sequence)] = sequence
    return filled


def _documents(sequences: Sequence[Sequence[int]], padded: Tensor) -> Tensor | None:
    """0 for tokens and -1 for padding; None where there is no padding."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    if int(lengths.min()) == padded.shape[1]:
        return None
    return -(torch.arange(padded.shape[1]) >= lengths[:, None]).long()


def _add_labels(batch: Batch, rows: Sequence[Example]) -> None:
    """Labels at the positions that predict them."""
    width = batch.tokens.shape[1]
    labels = [(row * width + x.position, x) for row, e in enumerate(rows) for x in e.labels]
    batch.label_positions = torch.tensor([index for index, _ in labels], dtype=torch.int64)
    batch.labels = torch.tensor([label.token for _, label in labels], dtype=torch.int64)
    batch.weights = torch.tensor([label.weight for _, label in labels], dtype=torch.float32)


def _add_spans(batch: Batch, rows: Sequence[Example], weight: float) -> None:
    """A start for each row, then an end for each row, as BERT's scores come."""
    spans = torch.tensor([row.span for row in rows], dtype=torch.int64)
    batch.labels = spans.T.flatten()
    batch.weights = torch.full((2 * len(rows),), weight)
    batch.documents = _documents([row.tokens for row in rows], batch.tokens)


class _Column:
    """Sequences of one field, laid flat; None where the first example has none of it."""

    def __init__(self, kind: Any, width: tuple[int, ...] = ()) -> None:
        self.kind = kind
        self.parts: list[np.ndarray] = [np.empty((0, *width), kind)]
        self.flat, self.starts = self.parts[0], np.zeros(1, np.int64)
        self.absent = False

    def add(self, values: Any) -> None:
        self.absent = values is None
        if values is not None:
            self.parts.append(np.asarray(values, self.kind).reshape(-1, *self.flat.shape[1:]))

    def close(self) -> None:
        self.starts = np.cumsum([len(part) for part in self.parts])
        self.flat = np.concatenate(self.parts)
        self.parts.clear()

    def __getitem__(self, index: int) -> Any:
        return None if self.absent else self.flat[self.starts[index] : self.starts[index + 1]]


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


class AnswerDataset(Dataset[Example]):
    """The examples of some JSONL files, encoded once and held as flat arrays.

    They cost four bytes a token and eight a label, and worker processes share them: no Python
    object per token. `report` says what became of the rows.

    Args:
        sources: JSONL files, or groups of them that are counted as one (`sizes`); each row has a
            `taskname` (not needed where there is one task) and the fields of that task's template.
        encoders: by task name. Rows of other tasks are dropped and counted.
        trainable: raise where no row is left, and name the reasons.
        drop_unlabelled: count rows in which nothing is to be learned; otherwise one is an error.
    """

    def __init__(
        self,
        sources: Sequence[str | os.PathLike[str] | Sequence[str]],
        encoders: Mapping[str, RowEncoder],
        trainable: bool = True,
        drop_unlabelled: bool = False,
    ) -> None:
        # Set, or the tokenizers library complains about worker processes started after it ran.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.report = RowReport()
        self._encoders = encoders
        self._drop_unlabelled = drop_unlabelled
        self.filler = next(iter(encoders.values())).filler
        self._tokens, self._labels = _Column(np.int32), _Column(np.int32, (2,))
        self._sources, self._types = _Column(np.int32), _Column(np.int8)
        self._spans = _Column(np.int32)
        self._columns = self._tokens, self._labels, self._sources, self._types, self._spans
        groups = [[s] if isinstance(s, str | os.PathLike) else list(s) for s in sources]
        self.sizes = [0] * len(groups)  # examples of each source
        for number, files in enumerate(groups):
            for example in (example for path in files for example in self._examples(path)):
                labels = [label[:2] for label in example.labels]
                kept = example.tokens, labels, example.source, example.token_types, example.span
                for column, values in zip(self._columns, kept, strict=True):
                    column.add(values)
                self.sizes[number] += 1
        for column in self._columns:
            column.close()
        self._ends = np.cumsum(self.sizes)
        if trainable and not len(self):
            names = [str(path) for files in groups for path in files]
            raise UserError(f"{', '.join(names) or 'no files'}: nothing to train on: {self.report}")

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Example:
        row = self.arrays(index)
        return Example(
            row.tokens.tolist(),
            [Label(*label) for label in row.labels.tolist()],
            source=None if row.source is None else row.source.tolist(),
            token_types=None if row.types is None else row.types.tolist(),
            span=None if row.span is None else tuple(row.span.tolist()),
        )

    def arrays(self, index: int) -> RowArrays:
        """What an example is made of, uncopied."""
        return RowArrays(index, *(column[index] for column in self._columns))

    def source_of(self, index: int) -> int:
        """Which source an example is from."""
        return int(np.searchsorted(self._ends, index, side="right"))

    @property
    def longest(self) -> int:
        """The most positions that an example needs, of a T5 by its source or its target."""
        return int(self.lengths.max(initial=0))

    @property
    def lengths(self) -> np.ndarray:
        """[rows, 1]: the tokens of each; [rows, 2]: and those of its source, which a T5 has."""
        columns = [column for column in (self._tokens, self._sources) if not column.absent]
        return np.stack([np.diff(column.starts) for column in columns], 1)

    def _examples(self, path: str | os.PathLike[str]) -> Iterator[Example]:
        rows = self._sound_rows(path)
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            by_task: dict[str, list[int]] = {}
            for index, (_, task, _) in enumerate(chunk):
                by_task.setdefault(task, []).append(index)
            outcomes: dict[int, Encoded | RowDropped] = {}
            for task, members in by_task.items():
                encoded = self._encode(path, task, [chunk[index] for index in members])
                outcomes |= zip(members, encoded, strict=True)
            for index, (number, _, _) in enumerate(chunk):
                outcome = outcomes[index]
                if isinstance(outcome, RowDropped):
                    self._drop(outcome, f"{path}, line {number}")
                else:
                    self.report.add(outcome)
                    yield from outcome.examples

    def _encode(
        self, path: str | os.PathLike[str], task: str, members: Sequence[tuple[int, str, Row]]
    ) -> list[Encoded | RowDropped]:
        encoder, rows = self._encoders[task], [row for _, _, row in members]
        try:
            return list(encoder.encode_all(rows))
        except RowError as error:
            for number, _, row in members:
                try:
                    list(encoder.encode_all([row]))
                except RowError as reason:
                    raise UserError(f"{path}, line {number}: {reason}") from None
            raise AssertionError("a row that is refused among others alone") from error

    def _drop(self, dropped: RowDropped, where: str) -> None:
        if isinstance(dropped, RowUnlabelled) and not self._drop_unlabelled:
            raise UserError(
                f"{where}: {dropped}: nothing is to be learned from the row; mend or remove it, or "
                f"set model.data.unlabelled: drop"
            )
        self.report.dropped[str(dropped)] += 1

    def _sound_rows(self, path: str | os.PathLike[str]) -> Iterator[tuple[int, str, Row]]:
        """(line, task, row) of rows that have all they need; the first that does not ends it."""
        empty = True
        for number, row in read_rows(path):
            empty = False
            self.report.rows += 1
            task = task_of(row, self._encoders)
            if task is None:
                raise UserError(
                    f"{path}, line {number}: no field 'taskname', and there are several tasks: "
                    f"{', '.join(self._encoders)}"
                )
            if task not in self._encoders:
                self.report.dropped[f"of task {task!r}, not in existing_tasks or new_tasks"] += 1
                continue
            try:
                self._encoders[task].check(row)
            except RowError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            yield number, task, row
        if empty:
            raise UserError(f"{path}: the file is empty; it must hold one JSON object a line")


def evaluation_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a test file, each with an `id`: its own, or its number in the file from 0."""
    return [{"id": str(index), **row} for index, (_, row) in enumerate(read_rows(path))]
