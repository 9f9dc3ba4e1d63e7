"""The table of stages, and the values that eval takes from the others."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from launcher_scripts.stages import STAGES, fill_auto

ADAPTER, IA3 = "adapter_learning", "ia3_learning"


def learner(name: str, folder: Path, base: str = "/base", task: str = "squad") -> dict:
    template = {"taskname": task, "prompt_template": f"{{question}} {name} {{answer}}"}
    return {
        "model": {
            "nemo_path": f"{folder}/{name}.nemo",
            "language_model_path": base,
            "encoder_seq_length": 512,
            "task_templates": [template],
            "data": {"train_ds": ["/data/train.jsonl"], "validation_ds": ["/data/val.jsonl"]},
        }
    }


def config(folder: Path, *stages: str, **changes) -> DictConfig:
    auto = dict.fromkeys(
        ("language_model_path", "task_templates", "adapters", "encoder_seq_length"), "auto"
    )
    training = {"model": {"nemo_path": f"{folder}/model", "encoder_seq_length": 128}}
    cfg = {
        "stages": list(stages),
        "training": training,
        ADAPTER: learner(ADAPTER, folder),
        IA3: learner(IA3, folder),
        "eval": {
            "run": {"results_dir": "/results/eval"},
            "model": {**auto, "data": {"test_ds": ["/data/t"], "ground_truth_ds": ["/data/g"]}},
        },
    }
    return OmegaConf.create({**cfg, **changes})


def names(cfg: DictConfig) -> list[str]:
    return [adapter.name for adapter in cfg.eval.model.adapters]


def test_stages_stand_in_canonical_order():
    learning = ["fine_tuning", "peft", ADAPTER, IA3]
    assert list(STAGES) == ["data_prep", "training", "conversion", *learning, "eval", "export"]


def test_eval_takes_every_adapter_of_the_same_run(tmp_path):
    cfg = config(tmp_path, ADAPTER, IA3, "eval")
    assert fill_auto(cfg) == []
    model = cfg.eval.model
    assert model.language_model_path == "/base"
    assert model.encoder_seq_length == 512
    assert OmegaConf.to_container(model.adapters) == [
        {"name": ADAPTER, "path": f"{tmp_path}/adapter_learning.nemo"},
        {"name": IA3, "path": f"{tmp_path}/ia3_learning.nemo"},
    ]
    assert [t.prompt_template for t in model.task_templates] == [
        "{question} adapter_learning {answer}"
    ]


def test_eval_takes_the_templates_of_all_tasks(tmp_path):
    cfg = config(tmp_path, ADAPTER, IA3, "eval", **{IA3: learner(IA3, tmp_path, task="boolq")})
    fill_auto(cfg)
    assert [t.taskname for t in cfg.eval.model.task_templates] == ["squad", "boolq"]


def test_eval_alone_takes_the_adapters_that_exist_and_says_so(tmp_path):
    (tmp_path / "ia3_learning.nemo").touch()
    cfg = config(tmp_path, "eval")
    (line,) = fill_auto(cfg)
    assert IA3 in line
    assert names(cfg) == [IA3]


def test_eval_alone_without_adapters_scores_the_base_and_says_so(tmp_path):
    cfg = config(tmp_path, "eval")
    (line,) = fill_auto(cfg)
    assert "base alone" in line
    assert f"{tmp_path}/ia3_learning.nemo" in line
    assert names(cfg) == []
    assert cfg.eval.model.language_model_path == "/base"


def test_eval_after_training_alone_scores_the_new_model(tmp_path):
    cfg = config(tmp_path, "training", "eval")
    fill_auto(cfg)
    assert cfg.eval.model.language_model_path == f"{tmp_path}/model"
    assert cfg.eval.model.encoder_seq_length == 128
    assert names(cfg) == []


def test_an_adapter_of_another_base_is_left_out_and_named(tmp_path):
    cfg = config(tmp_path, ADAPTER, IA3, "eval", **{IA3: learner(IA3, tmp_path, base="/other")})
    (line,) = fill_auto(cfg)
    assert "ia3_learning" in line
    assert "/other" in line
    assert names(cfg) == [ADAPTER]


def test_what_the_user_set_stays(tmp_path):
    cfg = config(tmp_path, ADAPTER, "eval")
    cfg.eval.model.update({"language_model_path": "/mine", "adapters": [], "encoder_seq_length": 9})
    fill_auto(cfg)
    assert cfg.eval.model.language_model_path == "/mine"
    assert cfg.eval.model.adapters == []
    assert cfg.eval.model.encoder_seq_length == 9


def test_nothing_happens_without_eval(tmp_path):
    cfg = config(tmp_path, ADAPTER)
    before = OmegaConf.to_container(cfg)
    assert fill_auto(cfg) == []
    assert OmegaConf.to_container(cfg) == before


def test_learning_reads_its_data_and_its_base_and_writes_its_file(tmp_path):
    part = config(tmp_path, ADAPTER)[ADAPTER]
    assert STAGES[ADAPTER].reads(part) == ["/data/train.jsonl", "/data/val.jsonl", "/base"]
    assert STAGES[ADAPTER].writes(part) == [f"{tmp_path}/adapter_learning.nemo"]


def test_eval_reads_base_data_and_adapters(tmp_path):
    cfg = config(tmp_path, ADAPTER, "eval")
    fill_auto(cfg)
    reads = STAGES["eval"].reads(cfg.eval)
    assert reads == ["/base", "/data/t", "/data/g", f"{tmp_path}/adapter_learning.nemo"]
    assert STAGES["eval"].writes(cfg.eval) == ["/results/eval/results/metrics.json"]


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        (None, []),
        ("/data/squad", ["/data/squad"]),
        ("rows.jsonl", ["rows.jsonl"]),
        ("org/name", []),  # a data set of a Hub
        ({"train": "/a.csv", "test": None}, ["/a.csv"]),
    ],
)
def test_data_prep_reads_what_can_only_be_a_path(source, reads):
    cfg = OmegaConf.create({"source": source, "tokenizer": None})
    assert STAGES["data_prep"].reads(cfg) == reads


def test_data_prep_writes_four_files_for_each_task():
    cfg = OmegaConf.create({"kind": "synthetic", "tasks": ["a", "b"], "output_dir": "/out"})
    splits = ("train", "val", "test", "test_ground_truth")
    expected = [f"/out/{task}_{split}.jsonl" for task in "ab" for split in splits]
    assert STAGES["data_prep"].writes(cfg) == expected
    cfg = OmegaConf.create({"kind": "squad", "prefix": "squad", "output_dir": "/out"})
    assert STAGES["data_prep"].writes(cfg)[0] == "/out/squad_train.jsonl"
