"""The eval stage on a tiny base: its files, its figures, and input that a person can mend."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters import IA3Config, PromptTuningConfig
from graftwerk.checkpoints import (
    load_base,
    load_tokenizer,
    save_adapter,
    save_adapters,
    save_base,
)
from graftwerk.data.jsonl import read_rows
from graftwerk.errors import UserError
from graftwerk.evaluation.score import score_files
from graftwerk.stages.eval import run
from tests.graftwerk.learning_stage import TEMPLATE, WORDS, base  # noqa: F401
from tests.graftwerk.tiny import shake


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def cfg(base: Path, tmp_path: Path) -> DictConfig:  # noqa: F811
    """Six questions for a base and one adapter, both shaken so that their answers differ."""
    model = load_base(base)
    for seed in range(30):  # enough that the layers outweigh the tied embedding's echo
        shake(model.decoder, seed)
    save_base(model, load_tokenizer(base), tmp_path / "base")
    model.add_adapter("ia3", IA3Config())
    for _, _, part in model.parts("ia3"):
        shake(part, 1)
    (tmp_path / "learned").mkdir()
    save_adapter(model, "ia3", tmp_path / "learned" / "ia3.nemo")
    summary = {"trainable_parameters": 64, "total_parameters": 6400, "seconds": 1.5}
    summary |= {"file_bytes": 10240, "steps": 3}
    (tmp_path / "learned" / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"taskname": "first", "id": f"q{n}", "context": context, "question": "first"}
        for n, context in enumerate(" ".join(WORDS[n : n + 3]) for n in range(6))
    ]
    truth = [{"id": row["id"], "answer": [row["context"].split()[0], "x"]} for row in rows]
    return OmegaConf.create(
        {
            "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "precision": 32},
            "exp_manager": {"explicit_log_dir": str(tmp_path / "results")},
            "model": {
                "seed": 1,
                "language_model_path": str(tmp_path / "base"),
                "adapters": [{"name": "mine", "path": str(tmp_path / "learned" / "ia3.nemo")}],
                "evaluate_base": True,
                "task_templates": [{"taskname": "first", "prompt_template": TEMPLATE}],
                "encoder_seq_length": 64,
                "tensor_model_parallel_size": 1,
                "pipeline_model_parallel_size": 1,
                "data": {
                    "test_ds": [write_lines(tmp_path / "test.jsonl", rows)],
                    "ground_truth_ds": [write_lines(tmp_path / "truth.jsonl", truth)],
                    "batch_size": 4,
                    "add_bos": False,
                },
                "inference": {"greedy": True, "tokens_to_generate": 3, "end_strings": []},
            },
        }
    )


def predictions(cfg: DictConfig, name: str) -> dict[str, str]:
    path = Path(cfg.exp_manager.explicit_log_dir) / name / "predictions.jsonl"
    return {row["id"]: row["pred"] for _, row in read_rows(path)}


def metrics(cfg: DictConfig) -> dict:
    return json.loads((Path(cfg.exp_manager.explicit_log_dir) / "metrics.json").read_text())


def test_base_and_adapter_are_scored_side_by_side(cfg: DictConfig, capsys):
    assert run(cfg) == 0
    results = {result["name"]: result for result in metrics(cfg)["results"]}
    assert list(results) == ["base", "mine"]
    assert results["mine"]["trainable_parameters"] == 64
    assert "trainable_parameters" not in results["base"]
    assert predictions(cfg, "base") != predictions(cfg, "mine")
    for name, result in results.items():
        files = Path(cfg.exp_manager.explicit_log_dir) / name / "predictions.jsonl"
        scores = score_files(files, cfg.model.data.ground_truth_ds[0]).scores
        assert (result["exact_match"], result["f1"]) == (scores.exact_match, scores.f1)
    table = capsys.readouterr().out
    assert "mine" in table
    assert "1.00%" in table


def test_a_whole_model_is_scored_beside_the_base(cfg: DictConfig, tmp_path: Path):
    model = load_base(cfg.model.language_model_path)
    shake(model.decoder, 99)
    save_base(model, load_tokenizer(cfg.model.language_model_path), tmp_path / "tuned" / "model")
    summary = {"trainable_parameters": 6400, "total_parameters": 6400}
    (tmp_path / "tuned" / "summary.json").write_text(json.dumps(summary))
    cfg.model.models = [{"name": "tuned", "path": str(tmp_path / "tuned" / "model")}]
    run(cfg)
    results = {result["name"]: result for result in metrics(cfg)["results"]}
    assert list(results) == ["base", "mine", "tuned"]
    assert results["tuned"]["trainable_parameters"] == 6400
    said = predictions(cfg, "tuned")
    assert said not in (predictions(cfg, "base"), predictions(cfg, "mine"))
    cfg.model.language_model_path = str(tmp_path / "tuned" / "model")
    cfg.model.update(adapters=[], models=[])
    run(cfg)
    assert predictions(cfg, "base") == said


def test_a_model_of_another_vocabulary_is_refused(cfg: DictConfig, tmp_path: Path):
    from tests.graftwerk.tiny import tiny_gpt

    save_base(tiny_gpt(), load_tokenizer(cfg.model.language_model_path), tmp_path / "other")
    cfg.model.models = [{"name": "other", "path": str(tmp_path / "other")}]
    with pytest.raises(UserError, match=r"model.models: .*other is a gpt model of"):
        run(cfg)
    assert not Path(cfg.exp_manager.explicit_log_dir).exists()


def test_several_adapters_of_a_file_answer_together_and_prompts_too(
    cfg: DictConfig, tmp_path: Path
):
    model = load_base(cfg.model.language_model_path)
    model.add_adapter("ia3", IA3Config())
    model.add_adapter("prompt", PromptTuningConfig(virtual_tokens=4))
    for name in ("ia3", "prompt"):
        for _, _, part in model.parts(name):
            shake(part, 1)
    for file, names in (("both", ["ia3", "prompt"]), ("one", ["prompt"])):
        save_adapters(model, names, tmp_path / file)
    cfg.model.adapters = [{"name": file, "path": str(tmp_path / file)} for file in ("both", "one")]
    run(cfg)
    both, one, alone = (predictions(cfg, name) for name in ("both", "one", "base"))
    assert both != one != alone != both


def test_the_table_is_whole_in_the_width_of_a_log(cfg: DictConfig, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cfg.model.adapters[0].name = "adapter_learning"
    summary = {
        "trainable_parameters": 1_234_567,
        "total_parameters": 135_749_632,
        "seconds": 1234.5,
    }
    folder = Path(cfg.model.adapters[0].path).parent
    (folder / "summary.json").write_text(json.dumps(summary | {"file_bytes": 5_000_000}))
    run(cfg)
    out = capsys.readouterr().out
    assert "…" not in out
    for word in ("exact", "trained", "share", "training", "file", "answers"):
        assert word in out
    assert "1,234,567 0.91% 1,234.5 s 4,883 kB" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_key_tokens_to_generate_bounds_the_answers(cfg: DictConfig):
    cfg.model.inference.tokens_to_generate = 1
    run(cfg)
    assert max(len(answer.split()) for answer in predictions(cfg, "base").values()) <= 1


def test_key_end_strings_cuts_the_answers(cfg: DictConfig):
    run(cfg)
    free = predictions(cfg, "base")
    end = next(answer.split()[0] for answer in free.values() if answer)
    cfg.model.inference.end_strings = [end]
    run(cfg)
    assert predictions(cfg, "base") == {q: a.split(end)[0].strip() for q, a in free.items()}


def test_key_evaluate_base_leaves_the_base_out(cfg: DictConfig):
    cfg.model.evaluate_base = False
    run(cfg)
    assert [result["name"] for result in metrics(cfg)["results"]] == ["mine"]


def test_key_batch_size_changes_no_answer(cfg: DictConfig):
    run(cfg)
    together = predictions(cfg, "mine")
    cfg.model.data.batch_size = 1
    run(cfg)
    assert predictions(cfg, "mine") == together


def test_key_compile_changes_no_answer(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch):
    run(cfg)
    plain, compiled = predictions(cfg, "mine"), []
    monkeypatch.setattr("graftwerk.stages.eval.why_not_compiled", lambda kind: None)
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    cfg.model.compile = True
    run(cfg)
    assert compiled
    assert predictions(cfg, "mine") == plain


def test_key_compile_is_refused_where_passes_cannot_be_compiled(
    cfg: DictConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("graftwerk.stages.eval.why_not_compiled", lambda kind: "no compiler here")
    cfg.model.compile = True
    with pytest.raises(UserError, match="no compiler here: set it to False"):
        run(cfg)


def test_questions_that_do_not_fit_are_counted_and_score_zero(cfg: DictConfig, capsys):
    cfg.model.encoder_seq_length = 12
    long = {"taskname": "first", "id": "q5", "context": " ".join(WORDS), "question": "first"}
    path = Path(cfg.model.data.test_ds[0])
    rows = [row for _, row in read_rows(path)][:5]
    write_lines(path, [*rows, long])
    run(cfg)
    assert sum(metrics(cfg)["dropped"].values()) == 1
    assert "q5" not in predictions(cfg, "base")
    assert "1 questions were not asked and count 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.adapters": "auto"}, "model.adapters=auto"),
        ({"model.tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2"),
        ({"model.data.test_ds": []}, "model.data.test_ds is empty"),
        ({"model.adapters": [], "model.evaluate_base": False}, "nothing to evaluate"),
        ({"model.adapters": [{"name": "base", "path": "x"}]}, "none is 'base'"),
        ({"model.adapters": [{"name": "a", "path": "/nowhere"}]}, "no adapter at /nowhere"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(cfg, change, message):
    for key, value in change.items():
        OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(UserError, match=message):
        run(cfg)
    assert not Path(cfg.exp_manager.explicit_log_dir).exists()


def test_questions_without_a_gold_answer_are_named(cfg: DictConfig):
    truth = Path(cfg.model.data.ground_truth_ds[0])
    write_lines(truth, [row for _, row in read_rows(truth)][1:])
    with pytest.raises(UserError, match=r"no answer for 1 questions .* such as id 'q0'"):
        run(cfg)


def test_an_adapter_of_another_base_is_refused(cfg: DictConfig, tmp_path: Path):
    from tests.graftwerk.tiny import tiny_gpt

    torch.manual_seed(0)
    other = tiny_gpt()
    other.add_adapter("a", IA3Config())
    save_adapter(other, "a", tmp_path / "other.nemo")
    cfg.model.adapters[0].path = str(tmp_path / "other.nemo")
    with pytest.raises(UserError, match="the weights do not fit"):
        run(cfg)
