"""Decoding: batched, with a key-value cache; a row's result does not depend on its batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import torch
from torch import Tensor

from graftwerk.adapters.composition import Split, below, branches
from graftwerk.generation.reading import Reader, Rows, WholeRow, check
from graftwerk.generation.sampling import Sampling, uniforms_of
from graftwerk.generation.sharing import Compiler, Trees, batches, can_share, grow
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
    task_ids: Sequence[int] | None = None,
    compiler: Compiler | None = None,
) -> list[Continuation]:
    """Continues each prompt, in the prompts' order.

    A GPT reads what prompts begin with alike once (`generation.sharing`), where adapters allow it.
    Else those of similar length share a batch, under a `Split` of a GPT those of equal length. A
    row that is finished leaves. A row with adapters of which what they do at a token depends on
    those behind it is read anew with each token.

    Args:
        model: in eval mode, with whatever adapters are active. Under a `Parallel` each prompt is
            continued by each child: n times as many results, child after child.
        prompts: token ids, at least one each; of a T5, the encoder's input.
        sampling: how tokens are chosen, and how many; the model's positions may end a row before
            `tokens_to_generate`. Its `end_strings` are text: `stop` looks for them.
        eos_ids: tokens that end a row; they are not part of the result.
        batch_size: rows at a time; of rows that share what they begin with, as many as the tokens
            of so many hold.
        stop: says of the tokens added so far whether the row is finished.
        progress: is called with the number of rows that a batch finished.
        numbers: one a prompt; with the seed it says what chance makes of the row. None: the
            prompt's place.
        task_ids: the child of a `MultiTask` for each prompt.
        compiler: `torch.compile` or the like, for long continuations on a GPU: a GPT's passes
            behind the first are of one shape then, over a cache with room for all, and rows that
            have ended stay in them. Not where prompts are read by themselves.

    Raises:
        UserError: for a BERT, an empty prompt, and one that fills all the model's positions.
    """
    check(model, prompts)
    assert not isinstance(model, BERT)
    if model.width > 1:
        more = (sampling, eos_ids, batch_size, stop, progress, numbers, task_ids, compiler)
        found: list[Continuation] = []
        for branch in branches(model.active):
            with model.setup(branch, model.plan.skip_layers):
                found += complete(model, prompts, *more)
        return found
    numbers = range(len(prompts)) if numbers is None else numbers
    eos_ids = frozenset(eos_ids)
    results = [Continuation() for _ in prompts]
    for rows, reader in _readers(model, prompts, sampling, batch_size, task_ids, compiler):
        decoding = _Batch(model, reader, sampling, eos_ids, stop)
        decoding.run([results[row] for row in rows], [numbers[row] for row in rows])
        progress(len(rows))
        del decoding, reader  # and the cache, before there is another
    return results


def _readers(
    model: GPT | T5,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    task_ids: Sequence[int] | None,
    compiler: Compiler | None,
) -> Iterator[tuple[list[int], Reader]]:
    """Batches: the numbers of their prompts, and what has read these."""
    device, most = model.device, sampling.tokens_to_generate - 1
    if model.longest:
        most = min(most, model.longest - min(map(len, prompts), default=0))
    if isinstance(model, GPT) and task_ids is None and can_share(model):
        trees = grow(prompts, model.config.hidden_size, batch_size)
        for batch in batches(trees, batch_size, most):
            rows = [row for tree in batch for row in tree.rows]
            yield rows, Trees(model, batch, device, most, compiler)
        return
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    whole = model.plan.whole_row
    size = 1 if whole else batch_size
    alike = isinstance(model, GPT) and bool(below(model.active, Split))  # tokens by their numbers
    groups = groupby(order, key=lambda row: len(prompts[row]) if alike else 0)
    for rows in (rows for _, group in groups for rows in batched(group, size)):
        tasks = None
        if task_ids is not None:
            tasks = torch.tensor([task_ids[row] for row in rows], device=device)
        numbers = torch.tensor(rows, device=device)
        batch = (model, [prompts[row] for row in rows], numbers, tasks)
        yield rows, WholeRow(*batch) if whole else Rows(*batch, most)


def batched(rows: Iterable[int], size: int) -> Iterator[list[int]]:
    """Runs of at most `size` rows."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


class _Batch:
    """A batch while it is decoded. Tensors and lists have an entry for each row that still runs."""

    def __init__(
        self,
        model: GPT | T5,
        reader: Reader,
        sampling: Sampling,
        eos_ids: frozenset[int],
        stop: Stop | None,
    ):
        self.reader, self.sampling, self.eos_ids, self.stop = reader, sampling, eos_ids, stop
        self.device = reader.logits.device
        # How many tokens a row may get: the last needs no position of its own.
        longest, most = model.longest, sampling.tokens_to_generate
        lengths = [len(tokens) for tokens in reader.read]
        self.rooms = [min(most, longest - n + 1) if longest else most for n in lengths]
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros_like(reader.logits, dtype=torch.bool)
            for row, tokens in zip(self.seen, reader.read, strict=True):
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
                self.rooms = [self.rooms[place] for place in going]
                self.seen = None if self.seen is None else self.seen[keep]
                self.reader.keep(keep)
            if self.seen is not None:
                self.seen.scatter_(1, chosen[:, None], True)
            self.reader.take(chosen)

    def _choose(self, step: int, uniforms: Tensor | None) -> Tensor:
        """The next token of each row [N]."""
        logits = self.reader.logits.float()
        if step < self.sampling.min_tokens_to_generate:
            logits = logits.index_fill(-1, self.eos, -torch.inf)
        return self.sampling.choose(logits, self.seen, uniforms)

    def _note(self, results: list[Continuation], chosen: Tensor) -> list[int]:
        """Adds the chosen tokens [N] to the results and returns the places of rows that go on."""
        logprobs: list[float] | None = None
        if self.sampling.compute_logprob:
            own = self.reader.logits.float().log_softmax(-1)
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
