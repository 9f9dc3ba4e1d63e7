"""`python3 -m graftwerk score`: published figures, and ids that do not join."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import graftwerk
from graftwerk.errors import UserError
from graftwerk.evaluation.score import main, score_files


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def published(shared, tmp_path):
    """(predictions, single answers, all answers) as JSONL, for the 1,190 questions of xquad."""
    folder = shared / "data" / "squad"
    document = json.loads((folder / "xquad.en.json").read_text())
    questions = [
        question
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    predicted = json.loads((folder / "predictions_bert_ensemble.json").read_text())
    # The list of all gold answers has no ids: a question is known by its text and an answer.
    every = {}
    for line in (folder / "dev_questions_answers.tsv").read_text().splitlines():
        entry = json.loads(line)
        every.update({(entry["question"], answer): entry["answer"] for answer in entry["answer"]})
    ids = [question["id"] for question in questions]
    return (
        jsonl(tmp_path / "pred.jsonl", [{"id": i, "pred": predicted[i]} for i in ids]),
        jsonl(
            tmp_path / "one.jsonl",
            [{"id": q["id"], "answer": q["answers"][0]["text"]} for q in questions],
        ),
        jsonl(
            tmp_path / "all.jsonl",
            [
                {"id": q["id"], "answer": every[q["question"], q["answers"][0]["text"]]}
                for q in questions
            ],
        ),
    )


def test_published_predictions_get_their_published_figures(published, capsys):
    predictions, one, every = published
    assert main([str(predictions), str(every)]) == 0
    assert capsys.readouterr().out.split() == [
        "exact_match",
        "84.87",
        "f1",
        "91.43",
        "questions",
        "1190",
    ]
    assert main([str(predictions), str(one)]) == 0
    assert capsys.readouterr().out.split() == [
        "exact_match",
        "74.87",
        "f1",
        "86.32",
        "questions",
        "1190",
    ]


def test_ids_that_do_not_join_are_named_and_counted(tmp_path, capsys):
    predictions = jsonl(
        tmp_path / "p",
        [{"id": "a", "pred": "x"}, {"id": "a", "pred": "y"}]
        + [{"id": f"new{n}", "pred": "x"} for n in range(7)],
    )
    truth = jsonl(
        tmp_path / "t",
        [{"id": "a", "answer": "x"}, {"id": "b", "answer": ["x"]}, {"id": "b", "answer": "y"}],
    )
    assert main([str(predictions), str(truth)]) == 0
    output = capsys.readouterr()
    assert output.out.split() == ["exact_match", "50.00", "f1", "50.00", "questions", "2"]
    assert output.err.splitlines() == [
        "1 without a prediction, counted as 0: 'b'",
        "7 predicted but not in the ground truth, left out: "
        "'new0', 'new1', 'new2', 'new3', 'new4', ...",
        "1 predicted more than once, the first counts: 'a'",
        "1 more than once in the ground truth, the first counts: 'b'",
    ]


def test_numbers_and_texts_are_the_same_id(tmp_path):
    predictions = jsonl(tmp_path / "p", [{"id": 7, "pred": "x", "input": "more"}])
    joined = score_files(predictions, jsonl(tmp_path / "t", [{"id": "7", "answer": "x"}]))
    assert joined.scores.exact_match == 100
    assert joined.complaints() == []


@pytest.mark.parametrize(
    ("prediction", "truth", "words"),
    [
        ({"pred": "x"}, {"id": 1, "answer": "x"}, ["p, line 1", "'id'"]),
        ({"id": 1, "prediction": "x"}, {"id": 1, "answer": "x"}, ["p, line 1", "'pred'"]),
        ({"id": 1, "pred": None}, {"id": 1, "answer": "x"}, ["p, line 1", "'pred'", "NoneType"]),
        ({"id": 1, "pred": "x"}, {"id": 1}, ["t, line 1", "'answer'"]),
        ({"id": 1, "pred": "x"}, {"id": 1, "answer": []}, ["t, line 1", "empty list"]),
        ({"id": 1, "pred": "x"}, {"id": 1, "answer": [1]}, ["t, line 1", "list of texts"]),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, prediction, truth, words):
    with pytest.raises(UserError) as error:
        score_files(jsonl(tmp_path / "p", [prediction]), jsonl(tmp_path / "t", [truth]))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_empty_or_missing_file_is_named(tmp_path):
    truth = jsonl(tmp_path / "t", [{"id": 1, "answer": "x"}])
    with pytest.raises(UserError, match="p: the file is empty"):
        score_files(jsonl(tmp_path / "p", []), truth)
    with pytest.raises(UserError, match="nowhere: cannot read it"):
        score_files(tmp_path / "nowhere", truth)


def test_the_command_line(tmp_path):
    predictions = jsonl(tmp_path / "p", [{"id": 1, "pred": "x"}])
    truth = jsonl(tmp_path / "t", [{"id": 1, "answer": "x"}])
    env = {**os.environ, "PYTHONPATH": str(Path(graftwerk.__file__).parents[1])}

    def run(*arguments):
        command = [sys.executable, "-m", "graftwerk", "score", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    done = run(predictions, truth)
    assert (done.returncode, done.stdout.split()[1]) == (0, "100.00")
    refused = run(predictions, tmp_path / "nowhere")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
