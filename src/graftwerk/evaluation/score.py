"""`python3 -m graftwerk score PREDICTIONS GROUND_TRUTH`: two JSONL files, two figures."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwerk.data.jsonl import read_rows
from graftwerk.errors import UserError
from graftwerk.evaluation.metrics import Scores, squad_scores

NAMED = 5  # ids that a message names before it only counts


@dataclass
class Joined:
    """Scores, and the ids that did not join one to one, in the order of the files."""

    scores: Scores
    missing: list[str]
    unknown: list[str]
    double_predictions: list[str] = field(default_factory=list)
    double_questions: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """One line for each kind of id that did not join."""
        kinds = [
            (self.missing, "without a prediction, counted as 0"),
            (self.unknown, "predicted but not in the ground truth, left out"),
            (self.double_predictions, "predicted more than once, the first counts"),
            (self.double_questions, "more than once in the ground truth, the first counts"),
        ]
        return [f"{len(ids)} {what}: {_some(ids)}" for ids, what in kinds if ids]


def score_files(
    predictions: str | os.PathLike[str], ground_truth: str | os.PathLike[str]
) -> Joined:
    """Join two JSONL files by `id` and score them.

    Predictions hold `id` and `pred`; ground truth holds `id` and `answer`, a text or a list of
    texts. Other fields are passed over. Raises `UserError`, with file and line, for rows without.
    """
    predicted, double_predictions = _by_id(predictions, "pred", _prediction)
    answers, double_questions = _by_id(ground_truth, "answer", _answers)
    return Joined(
        scores=squad_scores(predicted, answers),
        missing=[name for name in answers if name not in predicted],
        unknown=[name for name in predicted if name not in answers],
        double_predictions=double_predictions,
        double_questions=double_questions,
    )


def main(argv: Sequence[str]) -> int:
    """The command; prints both figures in percent, and on standard error what did not join."""
    parser = argparse.ArgumentParser(
        prog="python3 -m graftwerk score",
        description="Exact match and F1 by the official SQuAD rules, in percent.",
    )
    parser.add_argument("predictions", metavar="PREDICTIONS", help="JSONL with id and pred")
    parser.add_argument(
        "ground_truth", metavar="GROUND_TRUTH", help="JSONL with id and answer: a text or a list"
    )
    arguments = parser.parse_args(list(argv))
    joined = score_files(arguments.predictions, arguments.ground_truth)
    for complaint in joined.complaints():
        print(complaint, file=sys.stderr)
    print(f"exact_match {joined.scores.exact_match:.2f}")
    print(f"f1 {joined.scores.f1:.2f}")
    print(f"questions {joined.scores.questions}")
    return 0


def _by_id(path: str | os.PathLike[str], key: str, check: Any) -> tuple[dict[str, Any], list[str]]:
    """{id: checked value} of a file, and the ids that occur again."""
    values: dict[str, Any] = {}
    double: dict[str, None] = {}
    for number, row in read_rows(path):
        for needed in ("id", key):
            if needed not in row:
                raise UserError(
                    f"{path}, line {number}: no field {needed!r}; the row has {_some(row)}"
                )
        try:
            value = check(row[key])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {key!r} {error}") from None
        # Ids may be numbers in one file and texts in the other.
        name = str(row["id"])
        if name in values:
            double[name] = None
        else:
            values[name] = value
    if not values:
        raise UserError(f"{path}: the file is empty; it must hold rows with id and {key}")
    return values, list(double)


def _prediction(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text, not {type(value).__name__}")
    return value


def _answers(value: Any) -> list[str]:
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("must be a text or a list of texts")
    if not answers:
        raise ValueError("is an empty list; a question needs a gold answer")
    return answers


def _some(names: Iterable[Any]) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
