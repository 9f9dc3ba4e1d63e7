"""`generate`, in the words of `transformers`, by the engine's own decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapterhub.model import HeadedModel
from graftwerk.errors import UserError
from graftwerk.generation import Sampling, complete
from graftwerk.models import BERT, GPT

LENGTH = 20  # of what `transformers` gives where no length is said


class GenerationMethods(HeadedModel):
    """Continuing text under the active adapters."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        task_ids: Tensor | None = None,
    ) -> Tensor:
        """Continues each row by the base's own words.

        Args:
            input_ids: [B, S]; of a T5 the encoder's. Padding may be on either side.
            attention_mask: [B, S], 0 at padding; None: where the padding token is.
            max_new_tokens: at most; None: `max_length` (20) less what the decoder has read.
            do_sample: draw, by torch's random state; the likeliest token otherwise.
            eos_token_id: what ends a row; None: the configuration's.
            pad_token_id: what fills a row that has ended; None: the configuration's, or its end.
            task_ids: [B] the child of a `MultiTask` for each row.

        Returns:
            A GPT's rows and what follows them, a T5's start token and what follows it: [B, T].
            Under a `Parallel` of n the rows of its children one after the other: [n B, T].

        Raises:
            UserError: for a BERT, and for options out of range.
        """
        base, tokens = self.base, self.tokens
        if isinstance(base, BERT):
            raise UserError("a BERT continues no text: use a GPT or a T5")
        pad = tokens.pad if pad_token_id is None else pad_token_id
        ends: Any = (
            getattr(self.config, "eos_token_id", None) if eos_token_id is None else eos_token_id
        )
        eos: set[int] = set(
            ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        )
        fill = pad if pad is not None else min(eos, default=0)
        if attention_mask is None and pad is not None and pad not in eos:
            attention_mask = input_ids != pad
        read = input_ids.shape[1] if isinstance(base, GPT) else 1
        count = max((max_length or LENGTH) - read, 1) if max_new_tokens is None else max_new_tokens
        sampling = Sampling(
            greedy=not do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            tokens_to_generate=count,
            min_tokens_to_generate=min_new_tokens,
            seed=int(torch.randint(2**62, ())) if do_sample else 0,
        )
        kept = (
            input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -1)
        )
        prompts = [[token for token in row if token >= 0] for row in kept.tolist()]
        start = input_ids.new_full((len(prompts), 1), tokens.start)
        front = input_ids if isinstance(base, GPT) else start
        tasks = None if task_ids is None else task_ids.tolist()
        with self._in_setup():
            rows = self._continued(prompts, sampling, eos, tasks)
        width = max(len(row) for row in rows)
        new = front.new_tensor([row + [fill] * (width - len(row)) for row in rows])
        return torch.cat([front.repeat(len(new) // len(front), 1), new], 1)

    def _continued(
        self, prompts: list[list[int]], sampling: Sampling, eos: set[int], tasks: list[int] | None
    ) -> list[list[int]]:
        """The new tokens of each row, with the one that ends it."""
        base = self.base
        assert not isinstance(base, BERT)
        training, least = base.training, sampling.min_tokens_to_generate

        def ended(row: list[int]) -> bool:
            return row[-1] in eos and len(row) > least

        base.eval()
        try:
            rows = complete(base, prompts, sampling, (), len(prompts), ended, task_ids=tasks)
        finally:
            base.train(training)
        return [row.tokens for row in rows]
