"""T5 and BERT through learning and eval, by the same stages as a GPT."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints import load_adapter, load_base, load_tokenizer, save_base
from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.data.jsonl import read_rows
from graftwerk.errors import UserError
from graftwerk.models import BERT
from graftwerk.stages import eval as evaluation
from graftwerk.stages import learning
from graftwerk.training.module import LearningModule
from tests.graftwerk.learning_stage import base, cfg, elsewhere, read_metrics, rows, run_killed
from tests.graftwerk.tiny_families import (
    MARKS,
    as_family,
    bert_shape,
    bert_tokenizer,
    eval_cfg,
    save_tiny,
    task_rows,
    write_lines,
)

__all__ = ["base", "cfg", "rows"]

STAGES = ["adapter_learning", "ia3_learning"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_tiny(family, folder / family) for family in ("t5", "bert")}


@pytest.fixture(params=["t5", "bert"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def losses(cfg: DictConfig) -> list[float]:
    return [float(row["val_loss"]) for row in read_metrics(cfg) if row["val_loss"]]


def scores(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    return {result["name"]: result["exact_match"] for result in metrics["results"]}


def predictions(folder: Path, name: str) -> list[str]:
    return [row["pred"] for _, row in read_rows(folder / "eval" / name / "predictions.jsonl")]


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_learns_and_eval_sees_it(stage, family, bases, cfg, tmp_path, capsys):
    steps = {"t5": 80, "bert": 45}[family]
    learned = as_family(cfg, bases[family], tmp_path, steps)
    learned.model.optim.lr = 0.02
    learned.model.micro_batch_size = learned.model.global_batch_size  # half the passes
    assert learning.run(stage, learned) == 0
    found = losses(learned)
    assert found[-1] < 0.7 * found[0]
    assert evaluation.run(eval_cfg(learned, tmp_path)) == 0
    exact = scores(tmp_path)
    assert exact["mine"] > exact["base"] + 25
    said = capsys.readouterr().out
    assert ("answers with a random one" in said) == (family == "bert")


def test_answers_of_a_bert_are_slices_of_the_context(bases, cfg, tmp_path):
    learned = as_family(cfg, bases["bert"], tmp_path, steps=2)
    learning.run("adapter_learning", learned)
    wanted = eval_cfg(learned, tmp_path)
    wanted.model.inference.tokens_to_generate = 2
    evaluation.run(wanted)
    contexts = [row["context"] for _, row in read_rows(wanted.model.data.test_ds[0])]
    for context, answer in zip(contexts, predictions(tmp_path, "base"), strict=True):
        assert answer in context
        assert 1 <= len(answer.split()) <= 2


def test_windows_and_batch_sizes_change_no_answer_of_a_trained_bert(bases, cfg, tmp_path):
    learned = as_family(cfg, bases["bert"], tmp_path, steps=30)
    learned.model.optim.lr = 0.02
    learning.run("adapter_learning", learned)
    wanted = eval_cfg(learned, tmp_path)
    wanted.model.data.batch_size = 1
    evaluation.run(wanted)
    whole = predictions(tmp_path, "mine")
    wanted.model.update(encoder_seq_length=8)
    wanted.model.data.batch_size = 5
    evaluation.run(wanted)
    assert predictions(tmp_path, "mine") == whole


@pytest.mark.parametrize("file", ["adapter.nemo", "adapter"])
def test_the_written_adapter_gives_the_outputs_of_the_trained_one(
    file, family, bases, cfg, tmp_path, monkeypatch
):
    learners, whole = [], learning.finish
    monkeypatch.setattr(learning, "finish", lambda *a: (learners.append(a[2]), whole(*a))[1])
    learned = as_family(cfg, bases[family], tmp_path, steps=3)
    learned.model.nemo_path = str(tmp_path / file)
    learning.run("adapter_learning", learned)
    trained = learners[0].model.eval()
    fresh = load_base(bases[family], head=learned.model.get("head"))
    tokens = torch.arange(12).view(2, 6)
    inputs = {"tokens": tokens, **({"source": tokens + 3} if family == "t5" else {})}
    name = load_adapter(fresh, tmp_path / file)
    with torch.no_grad():
        before = fresh(**inputs)
        fresh.set_active(name)
        assert torch.equal(fresh(**inputs), trained(**inputs))
        assert not torch.equal(fresh(**inputs), before)
        trained.set_active(None)
        expected = load_base(bases[family], head=learned.model.get("head"), seed=1234)
        assert torch.equal(trained(**inputs), expected(**inputs))


def test_the_head_of_a_bert_is_trained_counted_and_travels_with_the_adapter(bases, cfg, tmp_path):
    learned = as_family(cfg, bases["bert"], tmp_path, steps=2)
    learning.run("ia3_learning", learned)
    config, state = read_adapter(learned.model.nemo_path)
    assert config["head"] == "question_answering"
    assert state["head.out_proj.weight"].shape == (2, 32)
    summary = json.loads((Path(learned.exp_manager.explicit_log_dir) / "summary.json").read_text())
    # IA3's scales of 2 layers, and the head.
    assert summary["trainable_parameters"] == 2 * (2 * 32 + 48) + (2 * 32 + 2)
    model = load_base(bases["bert"], head="question_answering", seed=1234)
    assert isinstance(model, BERT)
    assert not torch.equal(state["head.out_proj.weight"], model.head.out_proj.weight)  # type: ignore


def test_a_head_that_the_base_has_is_where_training_begins(cfg, tmp_path, capsys):
    """It answers for the base as it is, and eval needs no `model.head`."""
    torch.manual_seed(0)
    model, tokenizer = BERT(bert_shape(80, "question_answering")), bert_tokenizer()
    assert len(tokenizer) <= 80
    save_base(model, tokenizer, tmp_path / "with_head_bert")
    learned = as_family(cfg, tmp_path / "with_head_bert", tmp_path, steps=0)
    learned.model.head = None
    learning.run("adapter_learning", learned)
    state = read_adapter(learned.model.nemo_path)[1]
    assert torch.equal(state["head.out_proj.weight"], model.head.out_proj.weight)  # type: ignore
    capsys.readouterr()
    evaluation.run(eval_cfg(learned, tmp_path))
    assert "random one" not in capsys.readouterr().out
    assert predictions(tmp_path, "base") == predictions(tmp_path, "mine")


def test_eval_takes_the_head_from_the_adapter_where_none_is_named(bases, cfg, tmp_path):
    learned = as_family(cfg, bases["bert"], tmp_path, steps=2)
    learning.run("ia3_learning", learned)
    wanted = eval_cfg(learned, tmp_path)
    wanted.model.head = None
    assert evaluation.run(wanted) == 0


def test_bfloat16_trains_head_and_adapter_in_float32(family, bases, cfg, tmp_path, monkeypatch):
    types = set()
    whole = LearningModule.training_step

    def watching(self, batch, batch_idx):
        types.update((n in self.trained, p.dtype) for n, p in self.model.named_parameters())
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(LearningModule, "training_step", watching)
    learned = as_family(cfg, bases[family], tmp_path, steps=2)
    learned.trainer.precision = "bf16"
    learning.run("adapter_learning", learned)
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    wanted = eval_cfg(learned, tmp_path)
    wanted.trainer.precision = "bf16"
    assert evaluation.run(wanted) == 0


def test_a_run_that_died_ends_with_the_same_bits(family, bases, cfg, tmp_path):
    learned = as_family(cfg, bases[family], tmp_path, steps=18)
    learned.model.adapter_tuning.adapter_dropout = 0.1
    straight = elsewhere(learned, tmp_path / "straight")
    learning.run("adapter_learning", straight)
    run_killed("adapter_learning", learned, 15)
    learning.run("adapter_learning", learned)
    one, other = (read_adapter(c.model.nemo_path)[1] for c in (straight, learned))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_key_restore_path_starts_from_an_adapter_and_its_head(family, bases, cfg, tmp_path):
    first = as_family(cfg, bases[family], tmp_path, steps=2)
    learning.run("adapter_learning", first)
    second = elsewhere(first, tmp_path / "second")
    second.model.restore_path = first.model.nemo_path
    second.trainer.max_steps = 0
    learning.run("adapter_learning", second)
    one, other = (read_adapter(c.model.nemo_path)[1] for c in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_length_of_a_t5s_rows_may_be_left_out(bases, cfg, tmp_path):
    learned = as_family(cfg, bases["t5"], tmp_path, steps=1)
    del learned.model["encoder_seq_length"]
    long = task_rows(40, 1)
    long[3]["context"] = "w0 " * 600
    learned.model.data.train_ds = [write_lines(tmp_path / "long.jsonl", long)]
    learning.run("adapter_learning", learned)
    summary = json.loads((Path(learned.exp_manager.explicit_log_dir) / "summary.json").read_text())
    assert summary["rows"]["train"]["dropped"] == {
        "longer than encoder_seq_length 512, truncate_field is null": 1
    }


def test_key_restore_from_path_names_the_base_too(family, bases, cfg, tmp_path):
    learned = as_family(cfg, bases[family], tmp_path, steps=1)
    learned.model.restore_from_path = learned.model.language_model_path
    learned.model.language_model_path = None
    assert learning.run("adapter_learning", learned) == 0
    wanted = eval_cfg(learned, tmp_path)
    wanted.model.restore_from_path = str(bases[family])
    assert evaluation.run(wanted) == 0


def test_a_tokenizer_beyond_the_vocabulary_is_refused_before_training(bases, cfg, tmp_path):
    tokenizer = load_tokenizer(bases["t5"])
    tokenizer.add_tokens(["another"])
    save_base(load_base(bases["t5"]), tokenizer, tmp_path / "t5")
    learned = as_family(cfg, tmp_path / "t5", tmp_path)
    with pytest.raises(UserError, match="the tokenizer does not fit the model: it has tokens up"):
        learning.run("adapter_learning", learned)
    assert not Path(learned.exp_manager.explicit_log_dir).exists()
    wanted = OmegaConf.merge(
        eval_cfg(learned, tmp_path), {"model": {"adapters": [], "evaluate_base": True}}
    )
    assert isinstance(wanted, DictConfig)
    with pytest.raises(UserError, match="the tokenizer does not fit the model"):
        evaluation.run(wanted)


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("t5", "model.head", "question_answering", "is a t5 model, and heads are for BERT"),
        ("bert", "model.head", None, "a BERT without a head for a task: set model.head to"),
        ("bert", "model.head", "tagging", "model.head=tagging: no stage trains or evaluates"),
        ("bert", "model.encoder_seq_length", 65, "longer than the 64 positions that the model"),
        ("bert", "model.task_templates.0.truncate_field", "context", "truncate_field='context'"),
        ("bert", "model.data.add_bos", True, "data.add_bos and data.add_eos have no meaning"),
        ("t5", "model.task_templates.0.answer_only_loss", False, "a T5 learns the answer alone"),
    ],
)
def test_what_a_family_cannot_do_is_refused_before_anything_is_written(
    family, key, value, message, bases, cfg, tmp_path
):
    learned = as_family(cfg, bases[family], tmp_path)
    OmegaConf.update(learned, key, value)
    with pytest.raises(UserError, match=message):
        learning.run("adapter_learning", learned)
    assert not Path(learned.exp_manager.explicit_log_dir).exists()


def test_stage_training_goes_on_from_no_t5(bases, cfg, tmp_path):
    learned = as_family(cfg, bases["t5"], tmp_path)
    learned.model.restore_path = str(bases["t5"])
    learned.model.nemo_path = str(tmp_path / "out")
    with pytest.raises(UserError, match="stage training trains GPTs"):
        learning.run("training", learned)


@pytest.mark.parametrize(
    ("key", "value"), [("greedy", False), ("end_strings", ["x"]), ("compute_logprob", True)]
)
def test_options_of_generation_are_refused_for_a_bert(key, value, bases, cfg, tmp_path):
    learned = as_family(cfg, bases["bert"], tmp_path)
    wanted = eval_cfg(learned, tmp_path)
    wanted.model.adapters = []
    wanted.model.inference[key] = value
    with pytest.raises(UserError, match=f"model.inference.{key}=.* has no meaning for head"):
        evaluation.run(wanted)


def test_an_adapter_with_a_head_is_refused_on_a_base_without(bases, cfg, tmp_path):
    learned = as_family(cfg, bases["bert"], tmp_path, steps=1)
    learning.run("ia3_learning", learned)
    with pytest.raises(UserError, match="a head for question_answering, but the model's head is"):
        load_adapter(load_base(bases["bert"]), learned.model.nemo_path)


def test_marks_are_no_fillers():
    """The task is one: a context holds one mark."""
    assert all(len(set(row["context"].split()) & set(MARKS)) == 1 for row in task_rows(50, 0))
