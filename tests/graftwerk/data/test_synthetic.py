"""Generated tasks: reproducible, disjoint, over one vocabulary."""

import pytest
from omegaconf import OmegaConf

from graftwerk.data import synthetic
from graftwerk.data.jsonl import read_rows
from graftwerk.data.prepared import prepare
from graftwerk.errors import UserError


def generated(out, tasks=("lookup", "translate"), seed=1, **rows):
    rows = {"train": 300, "val": 40, "test": 50} | rows
    cfg = OmegaConf.create({"tasks": list(tasks), "rows": rows, "seed": seed})
    reports = [prepare(plan, out) for plan in synthetic.plans(cfg)]
    return reports, {path.stem: [row for _, row in read_rows(path)] for path in out.glob("*.jsonl")}


def keys(rows):
    return [(row["context"], row["question"]) for row in rows]


def test_each_task_has_its_four_files_of_the_asked_size(tmp_path):
    _, files = generated(tmp_path)
    for task in ("lookup", "translate"):
        sizes = [len(files[f"{task}_{name}"]) for name in ("train", "val", "test")]
        assert sizes == [300, 40, 50]
        assert len(files[f"{task}_test_ground_truth"]) == 50
        assert set(files[f"{task}_train"][0]) == {"taskname", "context", "question", "answer"}


def test_no_test_row_occurs_in_training_of_any_task_seed_or_size(tmp_path):
    _, files = generated(tmp_path / "1")
    _, others = generated(tmp_path / "2", seed=2, train=3000)
    tests = {key for found in (files, others) for task in synthetic.TASKS
             for key in keys(found[f"{task}_test"])}  # fmt: skip
    trained = [key for found in (files, others) for task in synthetic.TASKS
               for split in ("train", "val") for key in keys(found[f"{task}_{split}"])]  # fmt: skip
    assert tests.isdisjoint(trained)
    for task in synthetic.TASKS:
        assert len(set(keys(files[f"{task}_train"]))) == 300


def test_a_seed_repeats_the_files_whatever_other_tasks_there_are(tmp_path):
    one, _ = generated(tmp_path / "1")
    two, _ = generated(tmp_path / "2", tasks=["translate"])
    three, _ = generated(tmp_path / "3", tasks=["translate"], seed=2)
    assert one[1]["files"] == two[0]["files"]
    assert two[0]["files"] != three[0]["files"]


def test_lookup_is_answered_by_the_context(tmp_path):
    _, files = generated(tmp_path)
    for row in files["lookup_train"]:
        kind = row["question"].split()[1]
        (told,) = [word for word in row["context"].split() if word in synthetic.KINDS[kind]]
        assert row["answer"] == told


def test_translate_asks_the_same_but_never_wants_the_word_of_the_context(tmp_path):
    _, files = generated(tmp_path)
    assert keys(files["translate_train"]) == keys(files["lookup_train"])
    pairs = {
        (a["answer"], b["answer"])
        for a, b in zip(files["lookup_train"], files["translate_train"], strict=True)
    }
    assert len(pairs) == len(synthetic.VALUES), "a word has one translation"
    assert {old for old, _ in pairs} == {new for _, new in pairs} == set(synthetic.VALUES)
    assert all(old != new for old, new in pairs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["lokup"]}, ["tasks", "lokup", "lookup"]),
        ({"tasks": []}, ["tasks", "empty"]),
        ({"rows": {"trian": 5}}, ["rows", "trian", "train"]),
        ({"rows": {"test": 10**9}}, ["rows.test", "1000000000"]),
        ({"rows": {"train": 0.5}}, ["rows.train", "0.5"]),
    ],
)
def test_a_wrong_config_is_refused(changes, words):
    cfg = OmegaConf.create({"tasks": ["lookup"], "rows": {"train": 1}, "seed": 1} | changes)
    with pytest.raises(UserError) as error:
        synthetic.plans(cfg)
    assert all(word in str(error.value) for word in words)
