"""SQuAD documents: splits, drops, the official files."""

import json

import pytest
from omegaconf import OmegaConf

from graftwerk.data import squad
from graftwerk.data.download import RemoteFile
from graftwerk.data.jsonl import read_rows
from graftwerk.data.prepared import file_identity, finished_report, prepare
from graftwerk.data.splits import split_sizes
from graftwerk.errors import UserError


def question(n, text=None, **changes):
    entry = {"id": f"q{n}", "question": text or f"what is {n}?"}
    return (
        entry | {"answers": [{"text": f"it is {n}", "answer_start": 0}, {"text": str(n)}]} | changes
    )


def document(*paragraphs):
    return {
        "version": "1.1",
        "data": [
            {"title": "t", "paragraphs": [{"context": c, "qas": qas}]} for c, qas in paragraphs
        ],
    }


def write(path, *paragraphs):
    path.write_text(json.dumps(document(*paragraphs)))
    return path


def config(source, out, **changes):
    keys = {"prefix": "squad", "seed": 1, "split": None, "unanswerable_answer": None}
    return OmegaConf.create(keys | {"source": str(source), "output_dir": str(out)} | changes)


def prepared(source, out, **changes):
    report = prepare(squad.plan(config(source, out, **changes)), out)
    names = ("train", "val", "test", "test_ground_truth")
    return report, {
        name: [row for _, row in read_rows(out / f"squad_{name}.jsonl")] for name in names
    }


def test_train_and_dev_become_the_published_files(tmp_path):
    write(tmp_path / "train-v1.1.json", ("a b", [question(1), question(2)]))
    write(tmp_path / "dev-v1.1.json", ("c d", [question(3)]))
    report, files = prepared(tmp_path, tmp_path / "out")
    row = {"taskname": "squad", "context": "c d", "question": "what is 3?"}
    assert files["train"] == [
        {"taskname": "squad", "context": "a b", "question": f"what is {n}?", "answer": f"it is {n}"}
        for n in (1, 2)
    ]
    assert files["val"] == [row | {"answer": "it is 3"}]
    assert files["test"] == [row | {"id": "q3"}]
    assert files["test_ground_truth"] == [row | {"answer": ["it is 3", "3"], "id": "q3"}]
    assert report["rows_in"] == 3
    assert report["rows_out"] == {"train": 2, "val": 1, "test": 1}
    assert report["dropped"] == {}


def test_a_row_of_the_published_files_is_one_ascii_line_with_its_keys_in_order(tmp_path):
    write(tmp_path / "train.json", ("é\u2028", [question(1)]))
    write(tmp_path / "dev.json", ("c", [question(2)]))
    prepared(tmp_path, tmp_path / "out")
    assert (tmp_path / "out/squad_train.jsonl").read_bytes() == (
        b'{"taskname": "squad", "context": "\\u00e9\\u2028", "question": "what is 1?", '
        b'"answer": "it is 1"}\n'
    )


def test_a_question_in_both_files_is_left_out_of_training(tmp_path):
    write(tmp_path / "train.json", ("same", [question(1), question(2)]))
    write(tmp_path / "dev.json", ("same", [question(2)]))
    report, files = prepared(tmp_path, tmp_path / "out")
    assert [row["question"] for row in files["train"]] == ["what is 1?"]
    assert report["dropped"] == {"also in test": 1}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"question": 7}, "question is not a text"),
        ({"question": None}, "question is missing"),
        ({"question": " "}, "question is empty"),
        ({"answers": []}, "no answer"),
        ({"answers": None}, "answer is missing"),
        ({"answers": [{"text": 7}]}, "answer is not a text"),
        ({"answers": [{"text": " "}]}, "answer is empty"),
        ({"answers": [], "is_impossible": True}, "unanswerable"),
        ({"question": "what is 1?"}, "duplicate"),
    ],
)
def test_an_unsound_question_is_dropped_and_counted(tmp_path, wrong, reason):
    path = write(tmp_path / "x.json", ("c", [question(1), question(2) | wrong]))
    report, files = prepared(path, tmp_path / "out", split={"train": 1.0})
    assert len(files["train"]) == 1
    assert report["dropped"] == {reason: 1}
    assert report["rows_in"] == 2


def test_unanswerable_questions_can_have_an_answer(tmp_path):
    path = write(tmp_path / "x.json", ("c", [question(1, answers=[], is_impossible=True)]))
    _, files = prepared(path, tmp_path / "out", split={"train": 1}, unanswerable_answer="none")
    assert files["train"][0]["answer"] == "none"


def test_a_file_is_split_by_paragraph(shared, tmp_path):
    source = shared / "data" / "squad" / "xquad.en.json"
    report, files = prepared(source, tmp_path / "a", split={"train": 180, "val": 0, "test": 60})
    contexts = {name: {row["context"] for row in rows} for name, rows in files.items()}
    assert len(contexts["train"]) == 180
    assert len(contexts["test"]) == 60
    assert not contexts["train"] & contexts["test"]
    assert files["val"] == []
    # Three of the 1,190 questions occur twice on their paragraph.
    assert report["dropped"] == {"duplicate": 3}
    assert len(files["train"]) + len(files["test"]) == 1187
    assert [row["id"] for row in files["test"]] == [row["id"] for row in files["test_ground_truth"]]
    assert all("answer" not in row for row in files["test"])

    again, _ = prepared(source, tmp_path / "b", split={"train": 180, "val": 0, "test": 60})
    assert again["files"] == report["files"]
    other, _ = prepared(source, tmp_path / "c", split={"train": 180, "val": 0, "test": 60}, seed=2)
    assert other["files"] != report["files"]


def test_rows_read_are_rows_written_and_dropped(shared, tmp_path):
    source = shared / "data" / "squad" / "xquad.en.json"
    report, _ = prepared(source, tmp_path / "a", split={"train": 0.5, "val": 0.1, "test": 0.1})
    assert report["rows_in"] == 1190
    assert sum(report["rows_out"].values()) + sum(report["dropped"].values()) == 1190
    assert report["dropped"]["in no split"] > 0


def test_paragraphs_of_one_text_stay_together(tmp_path):
    paragraphs = [(f"text {n % 10}", [question(n)]) for n in range(40)]
    _, files = prepared(write(tmp_path / "x.json", *paragraphs), tmp_path / "out")
    contexts = [{row["context"] for row in files[name]} for name in ("train", "val", "test")]
    assert [len(found) for found in contexts] == [8, 1, 1]
    assert len(set.union(*contexts)) == 10


def test_questions_without_an_id_get_one_and_double_ids_differ(tmp_path):
    qas = [question(1, id=None), question(2, id="x"), question(3, id="x")]
    path = write(tmp_path / "x.json", ("c", qas))
    _, files = prepared(path, tmp_path / "out", split={"train": 0, "test": 1.0})
    ids = [row["id"] for row in files["test_ground_truth"]]
    assert ids[1] == "x"
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not valid JSON"]),
        ("[]", ["'data'"]),
        ('{"data": [{}]}', ["data[0]", "'paragraphs'"]),
        ('{"data": [{"paragraphs": [{"context": "c"}]}]}', ["data[0].paragraphs[0]", "'qas'"]),
        ('{"data": []}', ["nothing to train on"]),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}',
            ["nothing to train on", "1 answer is missing"],
        ),
    ],
)
def test_a_file_that_is_no_squad_is_refused_and_nothing_written(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        prepared(path, tmp_path / "out")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not any((tmp_path / "out").glob("*"))


def test_a_folder_must_say_which_file_is_which(tmp_path):
    with pytest.raises(UserError, match="no JSON file"):
        squad.source_files(tmp_path)
    (tmp_path / "train-v1.1.json").touch()
    assert len(squad.source_files(tmp_path)) == 1
    (tmp_path / "train-v2.0.json").touch()
    (tmp_path / "dev-v1.1.json").touch()
    with pytest.raises(UserError, match=r"train-v1\.1\.json, train-v2\.0\.json"):
        squad.source_files(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        squad.source_files(tmp_path / "nowhere")


def test_a_split_of_what_comes_split_is_refused(tmp_path):
    write(tmp_path / "train.json", ("a", [question(1)]))
    write(tmp_path / "dev.json", ("c", [question(2)]))
    for source in (str(tmp_path), None):
        cfg = config(source, tmp_path, split={"train": 1})
        cfg.source = source
        with pytest.raises(UserError, match=r"data_prep\.split"):
            squad.plan(cfg)


def test_official_files_are_read_from_output_dir_and_only_when_needed(tmp_path):
    train = write(tmp_path / "train-v1.1.json", ("a", [question(1)]))
    dev = write(tmp_path / "dev-v1.1.json", ("c", [question(2)]))
    official = [
        RemoteFile(f"http://127.0.0.1:9/{path.name}", **file_identity(path))
        for path in (train, dev)
    ]
    cfg = config(None, tmp_path)
    cfg.source = None
    plan = squad.plan(cfg, official=official, say=lambda line: None)
    report = prepare(plan, tmp_path)
    assert report["rows_out"] == {"train": 1, "val": 1, "test": 1}
    train.unlink()
    dev.unlink()
    assert finished_report(squad.plan(cfg, official=official), tmp_path) == report


def test_the_official_files_are_those_published(shared):
    facts = (shared / "data" / "README.md").read_text()
    for remote in squad.OFFICIAL:
        assert f"{remote.bytes:,}" in facts
        assert remote.sha256 in facts


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        (None, (8, 1, 1)),
        ({"train": 6, "test": 4}, (6, 0, 4)),
        ({"train": 0.5, "val": 0, "test": 0.5}, (5, 0, 5)),
        ({"train": 1.0}, (10, 0, 0)),
        ({"train": 1}, (1, 0, 0)),
        ({"train": 0.35, "val": 0.35, "test": 0.3}, (3, 4, 3)),
    ],
)
def test_counts_and_fractions(split, sizes):
    assert tuple(split_sizes(split, 10, "rows").values()) == sizes


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"train": 9, "test": 2}, ["9 + 0 + 2 rows", "10"]),
        ({"train": 0.9, "test": 0.2}, ["more than 1"]),
        ({"train": 0.9, "test": 2}, ["mixes"]),
        ({"trian": 1}, ["trian", "train"]),
        ({"train": -1}, ["train", "-1"]),
        ({"train": "all"}, ["train", "all"]),
    ],
)
def test_a_wrong_split_is_refused(split, words):
    with pytest.raises(UserError) as error:
        split_sizes(split, 10, "rows")
    assert all(word in str(error.value) for word in ["data_prep.split", *words])
