"""Decoding: batched, with a key-value cache; a row's result does not depend on its batch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftwerk.generation.prefill import check, prefill
from graftwerk.generation.sampling import Sampling, uniforms_of
from graftwerk.models import BERT, GPT, T5

Stop = Callable[[list[int]], bool]
Progress = Callable[[int], object]


@dataclass
class Continuation:
    """What a prompt is continued by. `logprobs` is empty unless `compute_logprob` asks for it.

    A log-probability is the model's own, natural: of its softmax before any option changes it.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def generate(
    model: GPT | T5 | BERT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Iterable[int] = (),
    batch_size: int = 32,
    stop: Stop | None = None,
    progress: Progress = lambda finished: None,
) -> list[list[int]]:
    """Continues each prompt by the likeliest token at a time; as `complete` does, tokens alone."""
    sampling = Sampling(tokens_to_generate=max_new_tokens)
    rows = complete(model, prompts, sampling, eos_ids, batch_size, stop, progress)
    return [row.tokens for row in rows]


@torch.inference_mode()
def complete(
    model: GPT | T5 | BERT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Iterable[int] = (),
    batch_size: int = 32,
    stop: Stop | None = None,
    progress: Progress = lambda finished: None,
    numbers: Sequence[int] | None = None,
) -> list[Continuation]:
    """Continues each prompt, in the prompts' order.

    Prompts of similar length share a batch; a row that is finished leaves it.

    Args:
        model: in eval mode, with whatever adapters are active (no `Parallel`).
        prompts: token ids, at least one each; of a T5, the encoder's input.
        sampling: how tokens are chosen, and how many; the model's positions may end a row before
            `tokens_to_generate`. Its `end_strings` are text: `stop` looks for them.
        eos_ids: tokens that end a row; they are not part of the result.
        batch_size: rows at a time.
        stop: says of the tokens added so far whether the row is finished.
        progress: is called with the number of rows that a batch finished.
        numbers: one a prompt; with the seed it says what chance makes of the row. None: the
            prompt's place.

    Raises:
        UserError: for a BERT, an empty prompt, and one that fills all the model's positions.
    """
    check(model, prompts)
    assert not isinstance(model, BERT)
    numbers = range(len(prompts)) if numbers is None else numbers
    eos_ids = frozenset(eos_ids)
    results = [Continuation() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Batch(model, [prompts[row] for row in rows], sampling, eos_ids, stop)
        batch.run([results[row] for row in rows], [numbers[row] for row in rows])
        progress(len(rows))
    return results


class _Batch:
    """A batch while it is decoded. Tensors and lists have an entry for each row that still runs."""

    def __init__(
        self,
        model: GPT | T5,
        prompts: list[Sequence[int]],
        sampling: Sampling,
        eos_ids: frozenset[int],
        stop: Stop | None,
    ):
        self.model, self.sampling, self.eos_ids, self.stop = model, sampling, eos_ids, stop
        self.device = next(model.parameters()).device
        first = prefill(model, prompts, self.device)
        self.logits, self.cache = first.logits, first.cache
        lengths = [len(tokens) for tokens in first.read]
        self.lengths = torch.tensor(lengths, device=self.device)
        # How many tokens a row may get: the last needs no position of its own.
        longest, most = model.longest, sampling.tokens_to_generate
        self.rooms = [min(most, longest - n + 1) if longest else most for n in lengths]
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros_like(self.logits, dtype=torch.bool)
            for row, tokens in zip(self.seen, first.read, strict=True):
                row[torch.tensor(tokens, device=self.device)] = True
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)

    def run(self, results: list[Continuation], numbers: list[int]) -> None:
        """Fills the rows' results; `numbers` are theirs, for chance."""
        uniforms = None
        if not self.sampling.greedy:
            uniforms = uniforms_of(self.sampling.seed, numbers, max(self.rooms)).to(self.device)
        for step in range(max(self.rooms)):
            chosen = self._choose(step, None if uniforms is None else uniforms[:, step])
            going = self._note(results, chosen)
            if not going:
                return
            if len(going) < len(results):
                results = [results[place] for place in going]
                keep = torch.tensor(going, device=self.device)
                chosen = chosen[keep]
                uniforms = None if uniforms is None else uniforms[keep]
                self._keep(keep)
            if self.seen is not None:
                self.seen.scatter_(1, chosen[:, None], True)
            positions = self.lengths[:, None]
            self.lengths = self.lengths + 1
            self.logits = self.model(chosen[:, None], positions, cache=self.cache)[:, 0]

    def _choose(self, step: int, uniforms: Tensor | None) -> Tensor:
        """The next token of each row [B]."""
        logits = self.logits.float()
        if step < self.sampling.min_tokens_to_generate:
            logits = logits.index_fill(-1, self.eos, -torch.inf)
        return self.sampling.choose(logits, self.seen, uniforms)

    def _note(self, results: list[Continuation], chosen: Tensor) -> list[int]:
        """Adds the chosen tokens [B] to the results and returns the places of rows that go on."""
        logprobs: list[float] | None = None
        if self.sampling.compute_logprob:
            own = self.logits.float().log_softmax(-1)
            logprobs = own.gather(-1, chosen[:, None])[:, 0].tolist()
        going: list[int] = []
        for place, (row, token) in enumerate(zip(results, chosen.tolist(), strict=True)):
            if token in self.eos_ids:
                continue
            row.tokens.append(token)
            if logprobs is not None:
                row.logprobs.append(logprobs[place])
            full = len(row.tokens) == self.rooms[place]
            if not full and not (self.stop and self.stop(row.tokens)):
                going.append(place)
        return going

    def _keep(self, rows: Tensor) -> None:
        """Keeps these rows; those that are finished leave."""
        self.cache.keep(rows)
        self.lengths = self.lengths[rows]
        self.rooms = [self.rooms[place] for place in rows.tolist()]
        self.seen = None if self.seen is None else self.seen[rows]
