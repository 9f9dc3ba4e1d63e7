"""The first pass over a batch of prompts: the one thing that GPT and T5 do apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, KeyValueCache


@dataclass
class Prefill:
    """A batch whose prompts are read: `logits` [B, V] of each row's first new token.

    `read` are the tokens of each row that the decoder has in its cache: the prompts of a GPT, the
    start token of a T5, whose encoder has read the prompts.
    """

    logits: Tensor
    read: list[Sequence[int]]
    cache: KeyValueCache


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


def prefill(
    model: GPT | T5,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    numbers: Tensor | None = None,
    task_ids: Tensor | None = None,
) -> Prefill:
    """Reads the prompts, at least one token each; `numbers` and `task_ids` [B] are the rows'."""
    t5 = isinstance(model, T5)
    config = model.config
    cache = KeyValueCache(config.decoder_num_layers if t5 else config.num_layers)
    cache.rows = numbers
    if t5:
        return _prefill_t5(model, prompts, device, cache, task_ids)
    return _prefill_gpt(model, prompts, device, cache, task_ids)


def _prefill_gpt(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    cache: KeyValueCache,
    task_ids: Tensor | None,
) -> Prefill:
    """Prompts padded on the left, so that all rows go on in the same column."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    tokens = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts])
    index = torch.arange(width, device=device)
    padding = (width - lengths)[:, None]
    end = None
    if padding.any():  # a padding token sees itself alone, and nothing sees it
        forever = torch.iinfo(torch.int64).max
        end = torch.where(index >= padding, forever, index + 1)
    positions = (index - padding).clamp(min=0)
    last = torch.arange(1, len(prompts) + 1, device=device) * width - 1
    logits = model(tokens.to(device), positions, end, cache, select=last, task_ids=task_ids)
    return Prefill(logits, list(prompts), cache)


def _prefill_t5(
    model: T5,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    cache: KeyValueCache,
    task_ids: Tensor | None,
) -> Prefill:
    """Prompts padded on the right into the encoder, the start token into the decoder."""
    width = max(len(prompt) for prompt in prompts)
    source = torch.tensor([[*prompt] + [0] * (width - len(prompt)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    documents = None
    if int(lengths.min()) < width:
        documents = torch.where(torch.arange(width) < lengths[:, None], 0, -1).to(device)
    start = model.config.decoder_start_token_id
    tokens = torch.full((len(prompts), 1), start, device=device)
    encoder = {"source": source.to(device), "source_documents": documents}
    logits = model(tokens, cache=cache, task_ids=task_ids, **encoder)
    return Prefill(logits[:, -1], [[start]] * len(prompts), cache)
