"""Which files `train_ds` and its like name, in any form."""

import json

import pytest
from omegaconf import OmegaConf

from graftwerk.data.datamodule import AnswerDataModule
from graftwerk.data.sources import data_files, settings_of, sources_of
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError

tokenizer = build_tokenizer("word", ["a b c d"])


@pytest.fixture
def files(tmp_path):
    made = []
    for name in ("one", "two", "three"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
        made.append(str(path))
    return made


def config(train, **data):
    return OmegaConf.create(
        {
            "global_batch_size": 2,
            "micro_batch_size": 1,
            "encoder_seq_length": 16,
            "data": {"train_ds": train, "prompt_template": "{input} {output}", **data},
        }
    )


def test_each_form_names_the_same_files(files):
    one, two, _ = files
    forms = [
        [one, two],
        [{"path": one}, two],
        {"file_names": [one, two]},
        [{"file_names": [one, two], "name": "both"}],
    ]
    for form in forms:
        assert data_files(config(form), "train_ds") == [one, two]
    assert data_files(config(one), "train_ds") == data_files(config([one]), "train_ds") == [one]
    assert data_files(config({"file_names": one}), "train_ds") == [one]
    assert [s.files for s in sources_of(config(forms[-1]), "train_ds")] == [(one, two)]
    assert data_files(config(one), "validation_ds") == []


def test_names_are_those_of_the_files_unless_given(files, tmp_path):
    def names(form):
        return [source.name for source in sources_of(config(form), "train_ds")]

    one, two, three = files
    assert names(files) == ["one", "two", "three"]
    assert names([{"path": one, "name": "first"}, two]) == ["first", "two"]
    assert names({"file_names": files, "names": ["x", "y", "z"]}) == ["x", "y", "z"]
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / "one.jsonl"
    other.write_text("{}\n")
    assert names([one, str(other)]) == [f"{tmp_path.name}_one", "more_one"]
    assert len(set(names([three, three, three]))) == 3


def test_wrong_sources_are_refused(files, tmp_path):
    one, two, _ = files
    wrong = {
        "train_ds: /nowhere.jsonl does not exist": [one, "/nowhere.jsonl"],
        r"train_ds\[1\]: 7 is no path": [one, 7],
        "by one of path and file_names": [{"path": one, "file_names": [two]}],
        "give a weight to each of its 2 entries": [{"path": one, "weight": 1.0}, two],
        "must not be negative": [{"path": one, "weight": -1.0}, {"path": two, "weight": 2.0}],
        "not all 0": [{"path": one, "weight": 0.0}],
        "the name 'x' stands for two": [{"path": one, "name": "x"}, {"path": two, "name": "x"}],
        "probabilities has 1 values, file_names has 2": {
            "file_names": [one, two],
            "concat_sampling_probabilities": [1.0],
        },
        "sum to 0.8: they must sum to 1": {
            "file_names": [one, two],
            "concat_sampling_probabilities": [0.3, 0.5],
        },
    }
    for message, form in wrong.items():
        with pytest.raises(UserError, match=message):
            sources_of(config(form), "train_ds")
    weighted = config(one, validation_ds=[{"path": two, "weight": 1.0}])
    with pytest.raises(UserError, match="validation_ds: weights are for train_ds"):
        sources_of(weighted, "validation_ds")


def test_settings_of_the_files_come_before_the_common_ones(files):
    own = {"file_names": files, "add_eos": False, "truncation_field": None, "num_workers": 2}
    settings = settings_of(config(own, truncation_field="input", add_bos=False), "train_ds")
    assert settings["add_eos"] is False
    assert settings["num_workers"] == 2
    assert settings["truncation_field"] == "input"
    assert settings_of(config(own), "validation_ds").get("add_eos") is None


def test_each_set_of_files_has_its_own_length_and_template(files):
    train = {
        "file_names": files[:1],
        "prompt_template": "{input} c {output}",
        "max_seq_length": 4,
        "add_eos": False,
        "global_batch_size": 2,
    }
    module = AnswerDataModule(config(train, validation_ds=files[1:2]), tokenizer, seed=1)
    a, b, c = tokenizer.encode("a b c", add_special_tokens=False)
    example, other = module.train_set[0], module.val_set[0]
    assert [*example.tokens, *(label.token for label in example.labels)] == [a, c, b]
    assert [*other.tokens, other.labels[-1].token] == [a, b, tokenizer.eos_token_id]
    train["max_seq_length"] = 2
    with pytest.raises(UserError, match="longer than encoder_seq_length 2"):
        AnswerDataModule(config(train), tokenizer, seed=1)


def test_batch_sizes_of_the_files_must_be_the_models(files):
    train = {"file_names": files, "global_batch_size": 128}
    with pytest.raises(
        UserError, match=r"train_ds.global_batch_size=128 is not model.global_batch"
    ):
        AnswerDataModule(config(train), tokenizer, seed=1)


def test_a_weighted_source_without_rows_is_refused(files, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"input": "a " * 40, "output": "b"}) + "\n")
    train = [{"path": files[0], "weight": 1.0}, {"path": str(long), "weight": 1.0}]
    with pytest.raises(UserError, match="long has a weight of 1 and no row to train on"):
        AnswerDataModule(config(train), tokenizer, seed=1)
    train[1]["weight"] = 0.0
    assert len(AnswerDataModule(config(train), tokenizer, seed=1).train_set) == 1
