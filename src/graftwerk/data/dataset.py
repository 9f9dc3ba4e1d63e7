"""JSONL files as a data set of examples, and examples as the batch of one forward pass."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from graftwerk.data.encoding import Encoder, Example, Label, RowDropped, RowReport
from graftwerk.data.jsonl import Row, read_rows
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
            An index may occur several times, with different labels or the same.
        labels: [N] int64, what each of them has to predict.
        weights: [N] float32, what each of them counts.
        num_rows: rows that hold data; a filler has none.
        num_tokens: tokens that are not padding.
    """

    tokens: Tensor
    positions: Tensor | None
    end: Tensor | None
    label_positions: Tensor
    labels: Tensor
    weights: Tensor
    num_rows: int = -1
    num_tokens: int = -1

    def __post_init__(self) -> None:
        if self.num_rows < 0:
            self.num_rows = self.tokens.shape[0]
        if self.num_tokens < 0:
            self.num_tokens = self.tokens.numel()

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {k: function(v) for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where a GPU can fetch it while it computes."""
        return self._map(lambda tensor: tensor.pin_memory())


def collate(examples: Sequence[Example], pad: int = 0, multiple: int = 1) -> Batch:
    """Examples as one batch, padded on the right with token `pad`.

    The length is that of the longest example, rounded up to a multiple of `multiple`. `positions`
    and `end` are filled where any example has its own, and stay None otherwise. No examples make a
    filler: one row of padding without labels, for ranks that have run out of rows.
    """
    lengths = [len(example.tokens) for example in examples]
    rows, width = max(len(examples), 1), -(-max(lengths, default=1) // multiple) * multiple
    tokens = np.full((rows, width), pad, dtype=np.int64)
    positions = np.tile(np.arange(width), (rows, 1))
    end = positions + 1
    label_positions, labels, weights = [], [], []
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens[row, :length] = example.tokens
        end[row, :length] = length if example.end is None else example.end
        if example.positions is not None:
            positions[row, :length] = example.positions
        label_positions += [row * width + label.position for label in example.labels]
        labels += [label.token for label in example.labels]
        weights += [label.weight for label in example.labels]
    own_layout = any(
        example.end is not None or example.positions is not None for example in examples
    )
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions) if own_layout else None,
        end=torch.from_numpy(end) if own_layout else None,
        label_positions=torch.tensor(label_positions, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float32),
        num_rows=len(examples),
        num_tokens=sum(lengths),
    )


class AnswerDataset(Dataset[Example]):
    """The examples of some JSONL files, encoded once and held as flat arrays.

    A row costs four bytes a token and label, and worker processes share them: no Python object per
    token. `report` says what became of the rows.

    Args:
        files: JSONL files; each row has a `taskname` (not needed where there is one task) and the
            fields of that task's template.
        encoders: by task name. Rows of other tasks are dropped and counted.
        trainable: raise where no row is left, and name the reasons.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        encoders: Mapping[str, Encoder],
        trainable: bool = True,
    ) -> None:
        # Set, or the tokenizers library complains about worker processes started after it ran.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.report = RowReport()
        self._encoders = encoders
        token_parts, label_parts, token_counts, label_counts = [], [], [0], [0]
        for path in files:
            for example in self._examples(path):
                token_parts.append(np.array(example.tokens, dtype=np.int32))
                label_parts.append(np.array([label[:2] for label in example.labels], np.int32))
                token_counts.append(len(example.tokens))
                label_counts.append(len(example.labels))
        self._tokens = np.concatenate([np.empty(0, np.int32), *token_parts])
        self._labels = np.concatenate([np.empty((0, 2), np.int32), *label_parts])
        self._token_starts = np.cumsum(token_counts)
        self._label_starts = np.cumsum(label_counts)
        if trainable and not len(self):
            raise UserError(
                f"{', '.join(map(str, files)) or 'no files'}: nothing to train on: {self.report}"
            )

    def __len__(self) -> int:
        return len(self._token_starts) - 1

    def __getitem__(self, index: int) -> Example:
        tokens = self._tokens[self._token_starts[index] : self._token_starts[index + 1]]
        labels = self._labels[self._label_starts[index] : self._label_starts[index + 1]]
        return Example(tokens.tolist(), [Label(*label) for label in labels.tolist()])

    def _examples(self, path: str | os.PathLike[str]) -> Iterator[Example]:
        rows = self._sound_rows(path)
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            by_task: dict[str, list[tuple[int, Row]]] = {}
            for index, (task, row) in enumerate(chunk):
                by_task.setdefault(task, []).append((index, row))
            outcomes: dict[int, tuple[Example, bool] | RowDropped] = {}
            for task, members in by_task.items():
                encoded = self._encoders[task].encode_all([row for _, row in members])
                outcomes |= zip((index for index, _ in members), encoded, strict=True)
            for index in range(len(chunk)):
                outcome = outcomes[index]
                if isinstance(outcome, RowDropped):
                    self.report.dropped[str(outcome)] += 1
                else:
                    self.report.add(*outcome)
                    yield outcome[0]

    def _sound_rows(self, path: str | os.PathLike[str]) -> Iterator[tuple[str, Row]]:
        """Rows that have a task and its fields; the first that lacks one ends the run."""
        only = next(iter(self._encoders)) if len(self._encoders) == 1 else None
        empty = True
        for number, row in read_rows(path):
            empty = False
            self.report.rows += 1
            task = row.get("taskname", only)
            if task is None:
                raise UserError(
                    f"{path}, line {number}: no field 'taskname', and there are several tasks: "
                    f"{', '.join(self._encoders)}"
                )
            if task not in self._encoders:
                self.report.dropped[f"of task {task!r}, not in existing_tasks or new_tasks"] += 1
                continue
            try:
                self._encoders[task].template.render(row)
            except RowError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            yield task, row
        if empty:
            raise UserError(f"{path}: the file is empty; it must hold one JSON object a line")


def evaluation_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a test file, each with an `id`: its own, or its number in the file from 0."""
    return [{"id": str(index), **row} for index, (_, row) in enumerate(read_rows(path))]
