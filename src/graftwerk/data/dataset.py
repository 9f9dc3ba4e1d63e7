"""JSONL files as a data set of examples, and examples as the batch of one forward pass."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from graftwerk.data.columns import Columns, RowArrays, TokensOf
from graftwerk.data.encoding import Example, Label, RowEncoder, RowReport
from graftwerk.data.jsonl import read_rows
from graftwerk.data.token_cache import TokenCache
from graftwerk.data.tokenized import Encoding
from graftwerk.errors import UserError


@dataclass
class Batch:
    """The rows of one forward pass.

    Args:
        tokens: [B, S] int64, padded on the right.
        positions: [B, S] int64, or None for 0, 1, 2, ... in every row. Negative: columns for the
            virtual tokens of a text in a packed row.
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


class AnswerDataset(Dataset[Example]):
    """The examples of some JSONL files, held as flat arrays, in memory or mapped from a cache.

    They cost four bytes a token and eight a label, and worker processes share them: no Python
    object per token. `report` says what became of the rows.

    Args:
        sources: JSONL files, or groups of them that are counted as one (`sizes`); each row has a
            `taskname` (not needed where there is one task) and the fields of that task's template.
        encoders: by task name. Rows of other tasks are dropped and counted.
        trainable: raise where no row is left, and name the reasons.
        drop_unlabelled: count rows in which nothing is to be learned; otherwise one is an error.
        cache: keeps each file's examples; None: they are encoded into memory.
    """

    def __init__(
        self,
        sources: Sequence[str | os.PathLike[str] | Sequence[str]],
        encoders: Mapping[str, RowEncoder],
        trainable: bool = True,
        drop_unlabelled: bool = False,
        cache: TokenCache | None = None,
    ) -> None:
        # Set, or the tokenizers library complains about worker processes started after it ran.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        encoding, cache = Encoding(encoders, drop_unlabelled), cache or TokenCache(None)
        self.report, self.filler = RowReport(), encoding.filler
        groups = [[s] if isinstance(s, str | os.PathLike) else list(s) for s in sources]
        self.sizes: list[int] = []  # examples of each source
        chunks = []
        for files in groups:
            before = self.report.examples
            for path in files:
                encoded = cache.read(encoding, path)
                self.report.join(encoded.report)
                chunks += encoded.chunks
            self.sizes.append(self.report.examples - before)
        self._columns = Columns(chunks)
        self._ends = np.cumsum(self.sizes)
        if trainable and not len(self):
            names = [str(path) for files in groups for path in files]
            raise UserError(f"{', '.join(names) or 'no files'}: nothing to train on: {self.report}")

    def __len__(self) -> int:
        return len(self._columns)

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
        return self._columns.arrays(index)

    def tokens(self, start: int, stop: int) -> Sequence[np.ndarray]:
        """The tokens of the examples from `start` to `stop`, each looked up when asked for."""
        return TokensOf(self._columns, range(start, stop))

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
        return self._columns.lengths


def evaluation_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a test file, each with an `id`: its own, or its number in the file from 0."""
    return [{"id": str(index), **row} for index, (_, row) in enumerate(read_rows(path))]
