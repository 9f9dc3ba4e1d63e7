"""Greedy decoding: batched, left-padded, with a key-value cache."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from graftwerk.errors import UserError
from graftwerk.models import GPT, KeyValueCache


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Iterable[int] = (),
    batch_size: int = 32,
    stop: Callable[[list[int]], bool] | None = None,
    progress: Callable[[int], object] = lambda finished: None,
) -> list[list[int]]:
    """Continues each prompt by the likeliest token at a time, in the prompts' order.

    Prompts of similar length share a batch; a row that is finished leaves it.

    Args:
        model: in eval mode, with whatever adapters are active (no `Parallel`).
        prompts: token ids, at least one each.
        max_new_tokens: the most tokens to add; the model's positions may end a row before that.
        eos_ids: tokens that end a row; they are not part of the result.
        batch_size: rows at a time.
        stop: says of the tokens added so far whether the row is finished.
        progress: is called with the number of rows that a batch finished.

    Raises:
        UserError: for an empty prompt and for one that fills all the model's positions.
    """
    longest = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty: give at least one token")
        if len(prompt) >= longest:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and the model's positions end at "
                f"{longest}: shorten it"
            )
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for rows in batches:
        decode = _Batch(model, [prompts[row] for row in rows], frozenset(eos_ids), stop)
        for row, added in zip(rows, decode.run(max_new_tokens), strict=True):
            results[row] = added
        progress(len(rows))
    return results


class _Batch:
    """One batch while it is decoded. `alive` maps the rows that still run to their numbers."""

    def __init__(
        self,
        model: GPT,
        prompts: list[Sequence[int]],
        eos_ids: frozenset[int],
        stop: Callable[[list[int]], bool] | None,
    ):
        self.model, self.eos_ids, self.stop = model, eos_ids, stop
        self.device = next(model.parameters()).device
        self.cache = KeyValueCache(model.config.num_layers)
        self.added: list[list[int]] = [[] for _ in prompts]
        self.alive = list(range(len(prompts)))
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.prompts = prompts

    def run(self, max_new_tokens: int) -> list[list[int]]:
        logits = self._prefill()
        for step in range(max_new_tokens):
            chosen = logits.argmax(-1)
            tokens = self._take(chosen, last=step + 1 == max_new_tokens)
            if tokens is None:
                break
            positions = self.lengths[:, None]
            self.lengths = self.lengths + 1
            logits = self.model(tokens[:, None], positions=positions, cache=self.cache)[:, 0]
        return self.added

    def _prefill(self) -> Tensor:
        """Reads the prompts, padded on the left, and returns the logits behind them [B, V]."""
        width = int(self.lengths.max())
        tokens = torch.zeros(len(self.prompts), width, dtype=torch.long)
        for row, prompt in zip(tokens, self.prompts, strict=True):
            row[width - len(prompt) :] = torch.tensor(prompt)
        index = torch.arange(width, device=self.device)
        padding = (width - self.lengths)[:, None]
        end = None
        if padding.any():  # a padding token sees itself alone, and nothing sees it
            forever = torch.iinfo(torch.int64).max
            end = torch.where(index >= padding, forever, index + 1)
        positions = (index - padding).clamp(min=0)
        last = torch.arange(1, len(self.prompts) + 1, device=self.device) * width - 1
        return self.model(tokens.to(self.device), positions, end, self.cache, select=last)

    def _take(self, chosen: Tensor, last: bool) -> Tensor | None:
        """Notes the chosen tokens [B] and returns those of the rows that go on, if any do."""
        longest = self.model.config.max_position_embeddings
        going: list[int] = []
        for place, (row, token) in enumerate(zip(self.alive, chosen.tolist(), strict=True)):
            if token in self.eos_ids:
                continue
            self.added[row].append(token)
            full = len(self.prompts[row]) + len(self.added[row]) > longest
            if not last and not full and not (self.stop and self.stop(self.added[row])):
                going.append(place)
        if not going:
            return None
        if len(going) < len(self.alive):
            keep = torch.tensor(going, device=self.device)
            self.cache.keep(keep)
            self.lengths, chosen = self.lengths[keep], chosen[keep]
            self.alive = [self.alive[place] for place in going]
        return chosen
