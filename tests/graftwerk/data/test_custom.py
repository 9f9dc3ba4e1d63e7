"""Custom sources: formats, field maps, splits."""

import csv
import json

import pytest
from omegaconf import OmegaConf

from graftwerk.data import custom
from graftwerk.data.jsonl import read_rows
from graftwerk.data.prepared import prepare
from graftwerk.errors import UserError

ROWS = [{"passage": f"text {n}", "query": f"q {n}?", "label": f"l{n}"} for n in range(10)]
MAP = {"context": "passage", "question": "query", "answer": "label"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(source, out, **changes):
    keys = {
        "prefix": "mine",
        "prompt_template": "context: {context} question: {question} answer: {answer}",
        "field_map": MAP,
        "answer_words": {},
        "subset": None,
        "split": None,
        "seed": 1,
    }
    return OmegaConf.create(keys | {"source": source, "output_dir": str(out)} | changes)


def prepared(source, out, **changes):
    if not isinstance(source, dict):
        source = str(source)
    report = prepare(custom.plan(config(source, out, **changes)), out)
    names = ("train", "val", "test", "test_ground_truth")
    return report, {
        name: [row for _, row in read_rows(out / f"mine_{name}.jsonl")] for name in names
    }


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"), [("x.jsonl", jsonl), ("x.csv", write_csv), ("x.parquet", write_parquet)]
)
def test_each_format_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name, ROWS)
    report, files = prepared(tmp_path / name, tmp_path / "out")
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 8, "val": 1, "test": 1, "test_ground_truth": 1,
    }  # fmt: skip
    rows = files["train"] + files["val"] + files["test_ground_truth"]
    assert sorted(row["context"] for row in rows) == [row["passage"] for row in ROWS]
    for row in files["train"]:
        number = row["context"].removeprefix("text ")
        assert row == {
            "taskname": "mine",
            "context": f"text {number}",
            "question": f"q {number}?",
            "answer": f"l{number}",
        }
    assert files["test"][0].keys() == {"taskname", "context", "question", "id"}
    (truth,) = files["test_ground_truth"]
    assert files["test"] == [{k: v for k, v in truth.items() if k != "answer"}]
    assert truth["answer"] == [f"l{truth['context'].removeprefix('text ')}"]
    assert report["rows_in"] == 10


def test_the_same_seed_cuts_the_same_way(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", ROWS)
    cut = {"train": 5, "val": 2, "test": 2}
    one, _ = prepared(source, tmp_path / "1", split=cut)
    two, _ = prepared(source, tmp_path / "2", split=cut)
    three, _ = prepared(source, tmp_path / "3", split=cut, seed=2)
    assert one["files"] == two["files"] != three["files"]
    assert one["dropped"] == {"in no split": 1}


def test_a_file_for_each_split_is_taken_as_it_is(tmp_path):
    source = {
        "train": str(jsonl(tmp_path / "a.jsonl", ROWS[:6])),
        "val": str(jsonl(tmp_path / "b.jsonl", ROWS[6:8])),
        "test": str(jsonl(tmp_path / "c.jsonl", ROWS[8:] + ROWS[:1])),
    }
    report, files = prepared(source, tmp_path / "out")
    assert [row["context"] for row in files["test"]] == ["text 8", "text 9", "text 0"]
    assert [row["context"] for row in files["val"]] == ["text 6", "text 7"]
    # A row of the test file is not trained on.
    assert [row["context"] for row in files["train"]] == [f"text {n}" for n in range(1, 6)]
    assert report["dropped"] == {"also in test": 1}


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_one_held_out_file_serves_as_val_and_test(tmp_path, held_out):
    source = {
        "train": str(jsonl(tmp_path / "a.jsonl", ROWS[:6])),
        held_out: str(jsonl(tmp_path / "b.jsonl", ROWS[6:])),
    }
    _, files = prepared(source, tmp_path / "out")
    contexts = [f"text {n}" for n in range(6, 10)]
    assert [row["context"] for row in files["val"]] == contexts
    assert [row["context"] for row in files["test"]] == contexts


def test_nested_columns_lists_of_answers_and_ids_are_found(tmp_path):
    rows = [
        {
            "id": "x1",
            "context": "c",
            "question": "q",
            "answers": {"text": ["a", "b"], "start": [1, 2]},
        }
    ]
    _, files = prepared(
        jsonl(tmp_path / "x.jsonl", rows),
        tmp_path / "out",
        field_map={"answer": "answers.text"},
        split={"train": 0, "test": 1},
    )
    assert files["test_ground_truth"] == [
        {"taskname": "mine", "context": "c", "question": "q", "answer": ["a", "b"], "id": "x1"}
    ]


def test_labels_become_words_and_other_values_text(tmp_path):
    rows = [{"question": n, "answer": n % 2 == 0, "score": n / 2} for n in range(3)]
    _, files = prepared(
        jsonl(tmp_path / "x.jsonl", rows),
        tmp_path / "out",
        prompt_template="{question} {score} {answer}",
        field_map={},
        answer_words={"true": "yes"},
        split={"train": 1.0},
    )
    assert files["train"] == [
        {"taskname": "mine", "question": "0", "score": "0.0", "answer": "yes"},
        {"taskname": "mine", "question": "1", "score": "0.5", "answer": "false"},
        {"taskname": "mine", "question": "2", "score": "1.0", "answer": "yes"},
    ]


def test_class_labels_are_named_and_held_back_ones_dropped(tmp_path):
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_dict(
        {"question": ["a", "b", "c"], "answer": [1, 0, -1]}, features=features
    )
    columns = custom._Columns(["question", "answer"], {}, {})
    assert [answers for _, answers, _ in columns.read(part)] == [["yes"], ["no"], [None]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": None}, "answer is missing"),
        ({"label": " "}, "answer is empty"),
        ({"query": None}, "question is missing"),
        ({"passage": "text 0", "query": "q 0?"}, "duplicate"),
    ],
)
def test_an_unsound_row_is_dropped_and_counted(tmp_path, changes, reason):
    source = jsonl(tmp_path / "x.jsonl", [ROWS[0], ROWS[1] | changes, ROWS[2]])
    report, files = prepared(source, tmp_path / "out", split={"train": 1.0})
    assert len(files["train"]) == 2
    assert report["dropped"] == {reason: 1}
    assert report["rows_in"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"field_map": {**MAP, "context": "pasage"}},
            ["'pasage'", "query", "did you mean 'passage'"],
        ),
        ({"field_map": {"contxt": "passage"}}, ["field_map", "contxt", "context"]),
        ({"prompt_template": "{answer} {question}"}, ["answer_field", "last"]),
        ({"prompt_template": "{context} {label}"}, ["answer"]),
        ({"split": {"train": 11}}, ["split", "11", "10"]),
        ({"source": None}, ["data_prep.source"]),
        ({"source": "missing.jsonl"}, ["data_prep.source", "missing.jsonl"]),
        ({"source": {"tran": "x"}}, ["data_prep.source", "tran", "train"]),
        ({"source": "nobody/nothing-here"}, ["data_prep.source", "nobody/nothing-here"]),
    ],
)
def test_a_wrong_config_is_one_line_that_names_it(tmp_path, changes, words):
    source = str(jsonl(tmp_path / "x.jsonl", ROWS))
    with pytest.raises(UserError) as error:
        prepare(custom.plan(config(**{"source": source, "out": tmp_path} | changes)), tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mine_train.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", "", ["empty"]),
        ("x.jsonl", "{oops\n", ["cannot load", "x.jsonl"]),
        ("x.parquet", "not a table", ["cannot load", "x.parquet"]),
        ("x.xlsx", "x", ["no known format", ".csv"]),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    source = str(tmp_path / name) if name != "x.xlsx" else {"train": str(tmp_path / name)}
    with pytest.raises(UserError) as error:
        prepared(source, tmp_path / "out")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
