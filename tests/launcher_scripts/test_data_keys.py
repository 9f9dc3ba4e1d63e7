"""The forms of `model.data`: each is checked, made absolute, and read by the job as it stands."""

import pytest
import yaml

from launcher_scripts.compose import CONF

LEARN = ("stages=adapter_learning", "adapter_learning=gpt3/squad")
SFT = ("adapter_learning.model.task_templates=[]", "adapter_learning.model.new_tasks=[]")
DATA = "adapter_learning.model.data"


@pytest.fixture
def own_files(command, tmp_path):
    """Runs an option of one's own, the shipped one with other `train_ds` in its text.

    Hydra lets no word of the command line put a mapping where a file has a list.
    """

    def run(train, *more):
        shipped = (CONF / "adapter_learning/gpt3/squad.yaml").read_text()
        config = yaml.safe_load(shipped)
        config["model"]["data"]["train_ds"] = train
        folder = tmp_path / "conf" / "adapter_learning"
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text(yaml.safe_dump(config))
        words = ("stages=adapter_learning", "adapter_learning=mine")
        return command(*words, "--config-dir", str(tmp_path / "conf"), *more)

    return run


def test_files_with_weights_become_absolute(command):
    answer = command(*LEARN, f"{DATA}.train_ds=[{{path: a.jsonl, weight: 0.3}}, b.jsonl]")
    assert answer.code == 0, answer.lines
    first, second = answer.config("adapter_learning")["model"]["data"]["train_ds"]
    assert first["path"].endswith("/a.jsonl")
    assert first["path"].startswith("/")
    assert first == {"path": first["path"], "weight": 0.3, "file_names": None, "name": None}
    assert second.startswith("/")


def test_nemos_files_are_read_as_they_are(own_files):
    files = {
        "file_names": ["a.jsonl", "b.jsonl"],
        "concat_sampling_probabilities": [0.3, 0.7],
        "prompt_template": "{input} {output}",
        "label_key": "output",
        "truncation_field": "input",
        "truncation_method": "right",
        "max_seq_length": 512,
        "min_seq_length": 1,
        "add_eos": True,
        "add_sep": False,
        "add_bos": False,
        "shuffle": True,
        "drop_last": True,
        "num_workers": 0,
        "pin_memory": True,
        "memmap_workers": 2,
        "index_mapping_dir": None,
        "hf_dataset": False,
    }
    answer = own_files(files, *SFT)
    assert answer.code == 0, answer.lines
    given = answer.config("adapter_learning")["model"]["data"]["train_ds"]
    assert [path.startswith("/") for path in given["file_names"]] == [True, True]
    assert given["concat_sampling_probabilities"] == [0.3, 0.7]
    assert any("memmap_workers" in line for line in answer.lines)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"file_names": [3]}, "train_ds.file_names.0: must be a path, not 3"),
        ({"names": "x"}, "train_ds.file_names: is missing"),
        ({"file_names": "a", "hf_dataset": True}, "train_ds.hf_dataset: must be false"),
    ],
)
def test_wrong_mappings_are_one_line(own_files, files, message):
    answer = own_files(files)
    assert answer.code == 2
    (line,) = answer.lines
    assert message in line


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (f"{DATA}.train_ds=[{{paht: a}}]", f"{DATA}.train_ds.0.paht: no such key; did you mean"),
        (f"{DATA}.train_ds=[{{path: a, weight: -1}}]", f"{DATA}.train_ds.0.weight: must be"),
        (f"+{DATA}.truncation_method=middle", "must be one of left, right, not middle"),
        (f"+{DATA}.over_long=keep", "must be one of cut, drop or null, not keep"),
        (f"+{DATA}.unlabelled=ignore", "must be one of error, drop, not ignore"),
        (f"+{DATA}.truncation_fields=input", f"did you mean {DATA}.truncation_field?"),
    ],
)
def test_wrong_data_is_one_line(command, word, message):
    answer = command(*LEARN, word)
    assert answer.code == 2
    (line,) = answer.lines
    assert message in line


def test_a_missing_file_of_a_mapping_is_named(command):
    local = ("cluster_type=interactive", "dry_run=False")
    answer = command(*LEARN, *local, f"{DATA}.train_ds=[{{file_names: [/nowhere/a.jsonl]}}]")
    assert answer.code == 2
    assert any("/nowhere/a.jsonl does not exist" in line for line in answer.lines)


def test_eval_reads_rows_as_they_were_learned(command):
    answer = command(
        "stages=[adapter_learning,eval]",
        *LEARN[1:],
        *SFT,
        f"+{DATA}.prompt_template='\\{{input\\}} \\{{reply\\}}'",
        f"+{DATA}.label_key=reply",
        f"+{DATA}.truncation_field=input",
        f"+{DATA}.truncation_method=left",
        f"+{DATA}.over_long=cut",
        f"+{DATA}.tokens_to_generate=9",
        f"+{DATA}.add_sep=True",
    )
    assert answer.code == 0, answer.lines
    learned = answer.config("adapter_learning")["model"]["data"]
    asked = answer.config("eval")["model"]["data"]
    for key in (
        "chat", "prompt_template", "label_key", "truncation_field", "truncation_method",
        "over_long", "tokens_to_generate", "add_sep",
    ):  # fmt: skip
        assert asked[key] == learned[key], key
    assert asked["label_key"] == "reply"
    assert answer.config("eval")["model"]["task_templates"] == []


def test_encoded_rows_are_kept_beside_the_data_unless_a_key_says_no(command):
    def kept(*words):
        answer = command(*LEARN, "data_dir=/mount/data", *words)
        assert answer.code == 0, answer.lines
        return answer.config("adapter_learning")["model"]["data"]["cache_dir"]

    assert kept() == "/mount/data/cache"
    assert kept(f"~{DATA}.cache_dir") == "/mount/data/cache"  # as a file that does not know the key
    assert kept(f"{DATA}.cache_dir=/scratch/rows") == "/scratch/rows"
    assert kept(f"{DATA}.cache_dir=null") is None
    assert kept(f"{DATA}.cache_dir=False") is False
