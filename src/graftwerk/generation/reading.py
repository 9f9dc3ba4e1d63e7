"""What a model has read of the rows of a batch, and how it reads on: rows by themselves.

`generation.sharing` has the other way. Shapes: N rows that still run, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, KeyValueCache

AHEAD = 32  # tokens behind the prompts that a cache has room for from the start


class Reader(Protocol):
    """A batch whose prompts are read.

    `logits` [N, V] are those of each row's next token, `read` the tokens of each row that the
    decoder has met before the first of them: a GPT's prompts, a T5's start token.
    """

    logits: Tensor
    read: Sequence[Sequence[int]]

    def take(self, chosen: Tensor) -> None:
        """Reads the next token of each row, [N]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keeps these of the rows, ascending; those that are finished leave."""
        ...


def check(model: GPT | T5 | BERT, prompts: Sequence[Sequence[int]]) -> None:
    """Raises a UserError for a model that continues nothing and for prompts without room."""
    if isinstance(model, BERT):
        raise UserError("a BERT does not continue text: use a GPT or a T5")
    longest = model.longest  # 0: no limit
    behind = 1 if isinstance(model, GPT) else 0  # room for a token in the same positions
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty: give at least one token")
        if longest and len(prompt) + behind > longest:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and the model's positions end at "
                f"{longest}: shorten it"
            )


class Rows:
    """A row of the cache for each prompt.

    Args:
        numbers: [N] the rows' own, for a `BatchSplit`.
        task_ids: [N] each row's, for a `MultiTask`.
        most: tokens that will be taken.
    """

    def __init__(
        self,
        model: GPT | T5,
        prompts: Sequence[Sequence[int]],
        numbers: Tensor,
        task_ids: Tensor | None,
        most: int,
    ):
        self.model, self.task_ids, self.device = model, task_ids, numbers.device
        t5 = isinstance(model, T5)
        before = 1 if t5 else model.plan.virtual_tokens + max(map(len, prompts))
        layers = model.config.decoder_num_layers if t5 else model.config.num_layers
        self.cache = KeyValueCache(layers, before + min(most, AHEAD))
        self.cache.rows = numbers
        self.logits = self._read_sources(model, prompts) if t5 else self._read(model, prompts)
        start = [[model.config.decoder_start_token_id]] * len(prompts)
        self.read: Sequence[Sequence[int]] = start if t5 else prompts
        self.positions = torch.tensor([[len(tokens)] for tokens in self.read], device=self.device)

    def _read(self, model: GPT, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts padded on the left, so that all rows go on in the same column."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(lengths.max())
        tokens = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts])
        index = torch.arange(width, device=self.device)
        padding = (width - lengths)[:, None]
        end = None
        if padding.any():  # a padding token sees itself alone, and nothing sees it
            forever = torch.iinfo(torch.int64).max
            end = torch.where(index >= padding, forever, index + 1)
        positions = (index - padding).clamp(min=0)
        last = torch.arange(1, len(prompts) + 1, device=self.device) * width - 1
        more: dict[str, Any] = {"select": last, "task_ids": self.task_ids}
        return model(tokens.to(self.device), positions, end, self.cache, **more)

    def _read_sources(self, model: T5, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts padded on the right into the encoder, the start token into the decoder."""
        width = max(len(prompt) for prompt in prompts)
        source = torch.tensor([[*prompt] + [0] * (width - len(prompt)) for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        documents = None
        if int(lengths.min()) < width:
            documents = torch.where(torch.arange(width) < lengths[:, None], 0, -1).to(self.device)
        start = model.config.decoder_start_token_id
        tokens = torch.full((len(prompts), 1), start, device=self.device)
        encoder = {"source": source.to(self.device), "source_documents": documents}
        return model(tokens, cache=self.cache, task_ids=self.task_ids, **encoder)[:, -1]

    def take(self, chosen: Tensor) -> None:
        more: dict[str, Any] = {"cache": self.cache, "task_ids": self.task_ids}
        self.logits = self.model(chosen[:, None], self.positions, **more)[:, 0]
        self.positions = self.positions + 1

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.positions = self.positions[rows]
        self.task_ids = None if self.task_ids is None else self.task_ids[rows]


class WholeRow:
    """One row that is read from its beginning each time; arguments as of `Rows`."""

    def __init__(
        self,
        model: GPT | T5,
        prompts: Sequence[Sequence[int]],
        numbers: Tensor,
        task_ids: Tensor | None,
    ):
        self.model, self.numbers, self.task_ids = model, numbers, task_ids
        self.prompt = torch.tensor([list(prompts[0])], device=numbers.device)
        start = [] if isinstance(model, GPT) else [model.config.decoder_start_token_id]
        self.tokens = torch.tensor([start], dtype=torch.long, device=numbers.device)
        self.read: Sequence[Sequence[int]] = [start] if start else prompts
        self.logits = self._logits()

    def _logits(self) -> Tensor:
        model = self.model
        t5 = isinstance(model, T5)
        cache = KeyValueCache(model.config.decoder_num_layers if t5 else model.config.num_layers)
        cache.rows = self.numbers  # empty: it says which row of the batch this is
        more: dict[str, Any] = {"cache": cache, "task_ids": self.task_ids}
        if t5:
            return model(self.tokens, source=self.prompt, **more)[:, -1]
        return model(torch.cat([self.prompt, self.tokens], 1), **more)[:, -1]

    def take(self, chosen: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, chosen[:, None]], 1)
        self.logits = self._logits()

    def keep(self, rows: Tensor) -> None:
        """The one row stays while there is one."""
