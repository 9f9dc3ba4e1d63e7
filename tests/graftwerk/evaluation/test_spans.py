"""The best span of a window, and of all windows of a question."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.data.question_answering import Window, WindowedQuestion
from graftwerk.evaluation.spans import SpanAnswerer, best_spans
from graftwerk.generation import Sampling

Scores = st.lists(st.integers(-9, 9), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.data())
def test_the_best_span_is_the_best_of_all_that_are_allowed(data):
    starts = data.draw(Scores)
    size = len(starts)
    ends = data.draw(st.lists(st.integers(-9, 9), min_size=size, max_size=size))
    first = data.draw(st.integers(0, size - 1))
    behind = data.draw(st.integers(first + 1, size))
    longest = data.draw(st.integers(1, 14))
    context = torch.zeros(1, size, dtype=torch.bool)
    context[0, first:behind] = True
    ((score, (begin, last)),) = best_spans(
        torch.tensor([starts]).float(), torch.tensor([ends]).float(), context, longest
    )
    allowed = {
        (i, j): starts[i] + ends[j]
        for i in range(first, behind)
        for j in range(i, min(i + longest, behind))
    }
    assert (begin, last) in allowed
    assert allowed[begin, last] == score == max(allowed.values())


class Scripted(torch.nn.Module):
    """Scores each token by its id: as a start, and its negative as an end of other tokens."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[int] = []

    def forward(self, tokens, documents=None, token_types=None):
        self.calls.append(len(tokens))
        scores = tokens.float()
        if documents is not None:
            scores = scores.masked_fill(documents < 0, float("-inf"))
        return torch.cat([scores, scores])


def question(*windows: list[int]) -> WindowedQuestion:
    """Windows of two special tokens and some of the words `a0 a1 a2 ...`, by their ids."""
    words = sorted({word for window in windows for word in window})
    context = " ".join(f"a{word}" for word in words)
    ends = [len(" ".join(f"a{word}" for word in words[: n + 1])) for n in range(len(words))]
    offsets = [(end - len(f"a{word}"), end) for word, end in zip(words, ends, strict=True)]
    made = [Window([99, 98, *w, 97], None, 2, words.index(w[0]), len(w)) for w in windows]
    return WindowedQuestion(context, offsets, made)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_best_window_of_a_question_answers_and_special_tokens_never_do(batch_size):
    questions = [question([1, 2, 3], [2, 3, 4, 5]), question([7, 8]), question([1], [2], [3])]
    done = []
    answerer = SpanAnswerer(Sampling(tokens_to_generate=1), batch_size)
    answers = answerer.answer(Scripted(), questions, done.append)  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == ["a5", "a8", "a3"]
    assert sum(done) == 3


def test_an_answer_is_sliced_from_the_context_as_it_was_written():
    context = "In  1969,\nNeil landed"
    offsets = [(0, 2), (4, 8), (8, 9), (10, 14), (15, 21)]
    asked = WindowedQuestion(context, offsets, [Window([99, 5, 90, 6, 89, 1, 97], None, 1, 0, 5)])
    answerer = SpanAnswerer(Sampling(tokens_to_generate=3), 1)
    model = Scripted()
    (answer,) = answerer.answer(model, [asked])  # type: ignore[arg-type]
    assert answer.text == "1969"
    assert model.calls == [1]
    assert asked.text(0, 2, 4) == "1969,\nNeil"
