"""Exact match and F1 by the official SQuAD rules, as torchmetrics computes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Means over `questions`, in percent."""

    exact_match: float
    f1: float
    questions: int


def squad_scores(
    predictions: Mapping[str, str], answers: Mapping[str, str | Sequence[str]]
) -> Scores:
    """Score predictions, by question id, against the gold answers.

    Both are compared without case, punctuation, articles and extra space; of several gold answers
    the best counts. A question without a prediction counts 0, a prediction without a question
    nothing. Raises `ValueError` where there is no question, or one without a gold answer.

    Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 6.1.
    """
    if not answers:
        raise ValueError("there is no question to score")
    golds = {
        name: [gold] if isinstance(gold, str) else list(gold) for name, gold in answers.items()
    }
    for name, gold in golds.items():
        if not gold:
            raise ValueError(f"question {name!r} has no gold answer")
    answered = [name for name in golds if name in predictions]
    if not answered:
        return Scores(0.0, 0.0, len(golds))

    from torchmetrics.functional.text import squad

    result = squad(
        [{"id": name, "prediction_text": predictions[name]} for name in answered],
        [
            {"id": name, "answers": {"text": golds[name], "answer_start": [0] * len(golds[name])}}
            for name in answered
        ],
    )
    share = len(answered) / len(golds)
    return Scores(float(result["exact_match"]) * share, float(result["f1"]) * share, len(golds))
