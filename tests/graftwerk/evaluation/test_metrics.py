"""Exact match and F1 against hand-worked cases of the official rules."""

import pytest

from graftwerk.evaluation.metrics import squad_scores


@pytest.mark.parametrize(
    ("pred", "gold", "exact", "f1"),
    [
        ("blue", "blue", 100, 100),
        ("The  Blue!", "blue", 100, 100),
        ("light blue", "blue", 0, 200 / 3),  # precision 1/2, recall 1
        ("a dark blue sea", "the blue sky", 0, 40),  # 1 of 3, 1 of 2
        ("red", "blue", 0, 0),
        ("", "blue", 0, 0),
        ("blue", ["red", "blue"], 100, 100),
        ("blue sky", ["red", "blue"], 0, 200 / 3),
    ],
)
def test_one_answer(pred, gold, exact, f1):
    scores = squad_scores({"q": pred}, {"q": gold})
    assert scores.exact_match == pytest.approx(exact)
    assert scores.f1 == pytest.approx(f1)


def test_the_mean_is_over_all_questions_answered_or_not():
    scores = squad_scores(
        {"1": "a b", "3": "x", "9": "no such question"}, dict.fromkeys("1234", "x")
    )
    assert (scores.exact_match, scores.f1, scores.questions) == (25, 25, 4)


def test_nothing_answered_is_nothing_right():
    assert squad_scores({}, {"1": "x"}).f1 == 0


def test_no_question_and_no_gold_answer_are_errors():
    with pytest.raises(ValueError, match="no question"):
        squad_scores({"1": "x"}, {})
    with pytest.raises(ValueError, match="'1' has no gold answer"):
        squad_scores({"1": "x"}, {"1": []})
