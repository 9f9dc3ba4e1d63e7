"""Several documents in a row: rows and trees of rows, packed, as the batch of one forward pass."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftwerk.data.columns import RowArrays
from graftwerk.data.dataset import Batch
from graftwerk.data.trees import MINIMUM, SortedRows, trees


class Document(NamedTuple):
    """What lies in one piece in a packed row: a row, or several that begin alike as a tree.

    Args:
        rows: in the order of their tokens.
        common: with how many tokens of the one before each begins.
        sizes: columns of the tree, and of a T5 those of the source.
    """

    rows: list[RowArrays]
    common: list[int]
    sizes: tuple[int, ...]


PackedRow = Sequence[Document]


def alone(rows: Sequence[RowArrays], prompt: int = 0) -> list[Document]:
    """Each row as a document of its own, with room for `prompt` virtual tokens, which stand before
    a T5's source."""
    return [Document([row], [0], (*row.sizes[:-1], row.sizes[-1] + prompt)) for row in rows]


def shared(rows: Sequence[RowArrays], size: int, minimum: int = MINIMUM) -> list[Document]:
    """Rows that begin with `minimum` tokens in common as trees of at most `size`."""
    ordered = SortedRows.of([row.tokens for row in rows])
    return [
        Document(
            [rows[number] for number in ordered.order[start:stop]],
            [0, *ordered.common[start + 1 : stop].tolist()],
            (ordered.tokens(start, stop),),
        )
        for start, stop in trees(ordered, size, minimum)
    ]


def first_fit_decreasing(
    documents: Sequence[Document], room: Sequence[int]
) -> list[list[Document]]:
    """Documents, the largest first, each into the first row that has room for all its sizes.

    At most 11/9 of the fewest rows, and 6/9 of one, where there is one size (Dosa 2007).
    """
    sizes = np.array([document.sizes for document in documents]).reshape(-1, len(room))
    free = np.tile(np.asarray(room), (len(documents), 1))
    rows: list[list[Document]] = []
    for number in np.argsort(-sizes[:, -1], kind="stable"):
        fits = (free[: len(rows) + 1] >= sizes[number]).all(1)
        row = int(fits.argmax())
        free[row] -= sizes[number]
        if row == len(rows):
            rows.append([])
        rows[row].append(documents[number])
    return rows


def pack(
    rows: Sequence[PackedRow],
    pad: int,
    multiples: Sequence[int],
    height: int = 1,
    family: str = "gpt",
    source_of: Callable[[int], int] | None = None,
    prompt: int = 0,
) -> Batch:
    """Packed rows of one family as a batch, padded on the right with token `pad`.

    Args:
        multiples: what the width of tokens, and that of a T5's source, is a multiple of.
        height: rows at least, of padding alone where there are fewer.
        source_of: gives the source of a row of data by its number, for the batch's `origins`.
        prompt: columns before each document that are left for virtual tokens (a T5's source).
    """
    ahead = 0 if family == "t5" else prompt
    shapes = [_shape(rows, size, multiple, height) for size, multiple in enumerate(multiples)]
    tokens, labelled = _Lines(shapes[0], pad), []
    for line, row in enumerate(rows):
        column = 0
        for document in row:
            labelled += tokens.put(document, line, column, ahead)
            column += document.sizes[0]
    documents = [document for row in rows for document in row]
    held = [row for document in documents for row in document.rows]
    batch = Batch(
        tokens=torch.from_numpy(tokens.tokens),
        positions=torch.from_numpy(tokens.positions),
        end=torch.from_numpy(tokens.end),
        label_positions=_joined(labelled),
        labels=_joined([row.labels[:, 1] for row in held]),
        weights=torch.ones(sum(len(row.labels) for row in held)),
        num_rows=len(held),
        num_tokens=sum(sum(document.sizes) - prompt for document in documents),
        row_tokens=sum(sum(row.sizes) for row in held),
    )
    batch.documents = _numbers(rows, 0, shapes[0])
    if family == "t5":
        sources = [[document.rows[0].source for document in row] for row in rows]
        batch.source = _filled(sources, pad, shapes[1], prompt)
        batch.source_documents = _numbers(rows, 1, shapes[1])
    if family == "bert":
        _add_spans(batch, rows, ahead)
    if source_of is not None:
        of_row = torch.tensor([source_of(row.number) for row in held], dtype=torch.int64)
        counts = torch.tensor([len(row.labels) for row in held], dtype=torch.int64)
        batch.origins = of_row.repeat(2) if family == "bert" else of_row.repeat_interleave(counts)
    return batch


class _Lines:
    """The arrays of packed rows, [B, S] each: tokens, where they stand, and who sees them."""

    def __init__(self, shape: tuple[int, int], pad: int) -> None:
        self.tokens = np.full(shape, pad, np.int64)
        self.positions = np.zeros(shape, np.int64)  # of padding too: a table of them may be short
        self.end = np.tile(np.arange(1, shape[1] + 1), (shape[0], 1))

    def put(self, document: Document, line: int, column: int, ahead: int) -> list[np.ndarray]:
        """Writes a tree from a column on, depth first: each row adds what is behind the beginning
        that it shares. Returns the flat indices of each row's labels.

        `ahead` columns are left before it, at negative positions.
        """
        tokens, positions, end = self.tokens[line], self.positions[line], self.end[line]
        positions[column : column + ahead] = np.arange(-ahead, 0)
        end[column : column + ahead] = column + document.sizes[0]
        column += ahead
        # Where the last row's tokens are, by their depth; what goes on from there reads them too.
        path = np.empty(max(len(row.tokens) for row in document.rows), np.int64)
        labelled = []
        for row, common in zip(document.rows, document.common, strict=True):
            depth = np.arange(common, len(row.tokens))
            stop = column + len(depth)
            tokens[column:stop] = row.tokens[common:]
            positions[column:stop] = depth
            end[path[:common]] = end[column:stop] = stop
            path[common : len(row.tokens)] = depth + (column - common)
            labelled.append(path[row.labels[:, 0]] + line * len(tokens))
            column = stop
        return labelled


def _add_spans(batch: Batch, rows: Sequence[PackedRow], ahead: int) -> None:
    """A start for each document, then an end for each, in columns of its packed row.

    `ahead` columns of each document are before its tokens.
    """
    places, spans, types = [], [], []
    for line, row in enumerate(rows):
        column = 0
        for number, document in enumerate(row):
            span = document.rows[0].span
            assert span is not None, "a BERT's rows mark an answer"
            places.append((line, number))
            spans.append(span + column + ahead)
            column += document.sizes[0]
        types.append([document.rows[0].types for document in row])
    batch.end = batch.label_positions = None
    batch.spans = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    batch.labels = torch.tensor(np.array(spans), dtype=torch.int64).reshape(-1, 2).T.flatten()
    batch.weights = torch.ones(len(batch.labels))
    if any(part is not None for row in types for part in row):
        shape = batch.tokens.shape[0], batch.tokens.shape[1]
        batch.token_types = _filled(types, 0, shape, ahead)


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    joined = np.concatenate([np.empty(0, np.int64), *parts])
    return torch.from_numpy(joined.astype(np.int64, copy=False))


def _shape(rows: Sequence[PackedRow], size: int, multiple: int, height: int) -> tuple[int, int]:
    widest = max((sum(document.sizes[size] for document in row) for row in rows), default=1)
    return max(len(rows), height), -(-widest // multiple) * multiple


def _numbers(rows: Sequence[PackedRow], size: int, shape: tuple[int, int]) -> Tensor:
    """Which document of its row each token is of; -1 for padding."""
    lengths = [[document.sizes[size] for document in row] for row in rows]
    return _filled([[np.repeat(np.arange(len(row)), row)] for row in lengths], -1, shape)


def _filled(
    rows: Sequence[Sequence[np.ndarray | None]],
    fill: int,
    shape: tuple[int, int],
    ahead: int = 0,
) -> Tensor:
    """Sequences side by side in rows, each behind `ahead` columns, filled up on the right."""
    filled, before = np.full(shape, fill, np.int64), np.full(ahead, fill, np.int64)
    for line, row in zip(filled, rows, strict=False):
        parts = [part for sequence in row for part in (before, sequence)]
        joined = np.concatenate([np.empty(0, np.int64), *parts])  # type: ignore[list-item]
        line[: len(joined)] = joined
    return torch.from_numpy(filled)
