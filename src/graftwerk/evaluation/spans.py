"""Answers of a BERT: the likeliest span of each question's context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from graftwerk.data.dataset import collate
from graftwerk.data.encoding import Example
from graftwerk.data.question_answering import NOWHERE, Span, Window, WindowedQuestion
from graftwerk.errors import UserError
from graftwerk.evaluation.predict import Answer
from graftwerk.generation import Sampling
from graftwerk.models import BERT, GPT, T5


@dataclass(frozen=True)
class SpanAnswerer:
    """Picks the span with the highest sum of start and end score over all windows of a question.

    A span lies in the context and has at most `sampling.tokens_to_generate` tokens (Devlin et al.
    2018, section 4.2); nothing else of `sampling` has a meaning here.

    Raises:
        UserError: for another option that is set.
    """

    sampling: Sampling
    batch_size: int = 8

    def __post_init__(self) -> None:
        used = ("tokens_to_generate", "seed")
        defaults = {f.name: f.default for f in fields(Sampling) if f.name not in used}
        for name, default in defaults.items():
            if getattr(self.sampling, name) != default:
                raise UserError(
                    f"model.inference.{name}={getattr(self.sampling, name)} has no meaning for "
                    f"head question_answering, which marks a span of at most tokens_to_generate "
                    f"tokens: leave it out"
                )

    def answer(
        self,
        model: GPT | T5 | BERT,
        questions: Sequence[WindowedQuestion],
        progress: Callable[[int], object] = lambda finished: None,
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """The text of the best span of each question's context."""
        best: list[tuple[float, int, Span]] = [(float("-inf"), 0, NOWHERE)] * len(questions)
        left = [len(question.windows) for question in questions]
        # Windows of one length share a batch.
        places = [(n, w) for n, question in enumerate(questions) for w in range(left[n])]
        places.sort(key=lambda place: len(questions[place[0]].windows[place[1]].tokens))
        for start in range(0, len(places), self.batch_size):
            batch = places[start : start + self.batch_size]
            spans = self._spans(model, [questions[n].windows[w] for n, w in batch])
            for (number, window), (score, span) in zip(batch, spans, strict=True):
                best[number] = max(best[number], (score, window, span), key=lambda found: found[0])
                left[number] -= 1
            progress(sum(left[number] == 0 for number in {number for number, _ in batch}))
        return [
            Answer(question.text(window, *span))
            for question, (_, window, span) in zip(questions, best, strict=True)
        ]

    @torch.inference_mode()
    def _spans(self, model: GPT | T5 | BERT, windows: Sequence[Window]) -> list[tuple[float, Span]]:
        """Score and (first, last) token of the best span of each window."""
        device = next(model.parameters()).device
        rows = [Example(w.tokens, token_types=w.token_types, span=NOWHERE) for w in windows]
        scores = model(**collate(rows).to(device).inputs())
        starts, ends = scores.float().chunk(2)
        index = torch.arange(starts.shape[1])
        context = torch.stack([(index >= w.first) & (index < w.first + w.count) for w in windows])
        context = context.to(device)
        return best_spans(starts, ends, context, self.sampling.tokens_to_generate)


def best_spans(
    starts: Tensor, ends: Tensor, context: Tensor, longest: int
) -> list[tuple[float, Span]]:
    """For each row the highest `starts[first] + ends[last]` and its (first, last).

    Both ends lie in the context, the last not before the first, `longest` tokens at most.

    Args:
        starts, ends: [B, S] scores.
        context: [B, S], True at the tokens that a span may hold; at least one in each row.
        longest: tokens.
    """
    width = starts.shape[1]
    starts = starts.masked_fill(~context, float("-inf"))
    ends = ends.masked_fill(~context, float("-inf"))
    # One row of sums for each length of span; of equal sums the shortest span counts.
    sums = [
        (starts[:, : width - more] + ends[:, more:]).max(1) for more in range(min(longest, width))
    ]
    scores, more = torch.stack([best.values for best in sums]).max(0)
    first = torch.stack([best.indices for best in sums]).gather(0, more[None])[0]
    last = first + more
    spans = zip(first.tolist(), last.tolist(), strict=True)
    return list(zip(scores.tolist(), spans, strict=True))
