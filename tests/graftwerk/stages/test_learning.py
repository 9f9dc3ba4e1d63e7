"""A learning stage from its configuration to the files it leaves."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints import load_adapter, load_base, load_tokenizer
from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.data.datamodule import AnswerDataModule
from graftwerk.errors import UserError
from graftwerk.stages import learning
from tests.graftwerk.learning_stage import base, cfg, elsewhere, read_metrics, rows

__all__ = ["base", "cfg", "rows"]


def results(cfg: DictConfig) -> Path:
    return Path(cfg.exp_manager.explicit_log_dir)


def summary(cfg: DictConfig) -> dict:
    return json.loads((results(cfg) / "summary.json").read_text())


def as_ia3(cfg: DictConfig) -> DictConfig:
    other = cfg.copy()
    del other.model["adapter_tuning"]
    return other


def as_training(cfg: DictConfig) -> DictConfig:
    other = as_ia3(cfg)
    del other.model["language_model_path"]
    other.model.nemo_path = str(results(cfg) / "model")
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    other.model.update(**shape, tokenizer={"type": "word"})
    return other


def test_an_adapter_learns_and_is_left_with_its_summary(cfg, base):
    assert learning.run("adapter_learning", cfg) == 0
    told = summary(cfg)
    losses = [float(row["val_loss"]) for row in read_metrics(cfg) if row["val_loss"]]
    assert losses[-1] < losses[0]
    # NeMo's count: 2 (2 h d + 2 h) a layer.
    assert told["trainable_parameters"] == 2 * 2 * (2 * 16 * 4 + 2 * 16)
    model = load_base(base)
    whole = sum(p.numel() for p in model.parameters()) + told["trainable_parameters"]
    assert told["total_parameters"] == whole
    assert told["steps"] == 12
    assert told["file_bytes"] == Path(cfg.model.nemo_path).stat().st_size
    assert told["val_loss"] == pytest.approx(losses[-1])
    assert told["method"] == "BottleneckConfig"
    assert told["base"] == str(base)
    assert told["rows"]["train"]["kept"] == 22
    assert told["seconds"] > 0
    assert told["peak_memory_bytes"] > 10**7
    assert load_adapter(model, cfg.model.nemo_path) == "adapter"


def test_the_written_adapter_has_the_validation_loss_that_was_said(cfg, base):
    """Recomputed row by row, from the files alone."""
    learning.run("adapter_learning", cfg)
    model = load_base(base)
    model.set_active(load_adapter(model, cfg.model.nemo_path))
    data = AnswerDataModule(cfg.model, load_tokenizer(base), seed=1)
    total, count = 0.0, 0
    for index in range(len(data.val_set)):
        example = data.val_set[index]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([example.tokens]))[0].log_softmax(-1)
        for label in example.labels:
            total -= log_probabilities[label.position, label.token].item()
            count += 1
    assert summary(cfg)["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_first_loss_is_the_bases_and_the_mean_over_the_labels_of_the_global_batch(cfg, base):
    """At birth the adapter changes nothing; rows of several lengths and two micro-batches."""
    cfg.trainer.max_steps = 1
    cfg.model.data.shuffle = False
    cfg.model.task_templates[0].answer_only_loss = False
    learning.run("adapter_learning", cfg)
    model, losses = load_base(base), []
    data = AnswerDataModule(cfg.model, load_tokenizer(base), seed=1)
    for index in range(4):
        example = data.train_set[index]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([example.tokens]))[0].log_softmax(-1)
        losses += [-log_probabilities[p, token].item() for p, token, _ in example.labels]
    found = float(read_metrics(cfg)[0]["train_loss"])
    assert found == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_ia3_learning_trains_scales_alone(cfg, capsys):
    cfg = as_ia3(cfg)
    assert learning.run("ia3_learning", cfg) == 0
    # NeMo's count: 2 kv + ffn a layer.
    assert summary(cfg)["trainable_parameters"] == 2 * (2 * 16 + 4 * 8)
    state = read_adapter(cfg.model.nemo_path)[1]
    assert any((value != 1).any() for value in state.values())
    assert "weight_decay=0.01 has no effect: only vectors are trained" in capsys.readouterr().out


def test_training_makes_a_model_that_an_adapter_can_sit_on(cfg):
    trained = as_training(cfg)
    assert learning.run("training", trained) == 0
    told = summary(trained)
    assert told["trainable_parameters"] == told["total_parameters"]
    losses = [float(row["val_loss"]) for row in read_metrics(trained) if row["val_loss"]]
    assert losses[-1] < losses[0]
    tokenizer = load_tokenizer(trained.model.nemo_path)
    words = tokenizer.encode("context w1", add_special_tokens=False)
    assert tokenizer.unk_token_id not in words
    adapted = elsewhere(cfg, Path(cfg.run.results_dir) / "adapted")
    adapted.model.language_model_path = trained.model.nemo_path
    assert learning.run("adapter_learning", adapted) == 0


def test_training_in_bfloat16_keeps_its_weights_in_float32(cfg):
    cfg = as_training(cfg)
    cfg.trainer.precision = "bf16"
    cfg.trainer.max_epochs = 1
    assert learning.run("training", cfg) == 0
    model = load_base(cfg.model.nemo_path)
    # Float32 weights that were never rounded to bfloat16.
    assert any((p.bfloat16().float() != p).any() for p in model.parameters())


def test_dropout_of_a_whole_model_does_not_depend_on_micro_batches(cfg):
    cfg = as_training(cfg)
    cfg.trainer.max_steps = 3
    cfg.model.optim.eps = 1.0  # steps that do not magnify the smallest gradients
    found = {}
    for size, rate in ((4, 0.0), (4, 0.1), (1, 0.1)):
        one = elsewhere(cfg, Path(cfg.run.results_dir) / f"{size}-{rate}")
        one.model.nemo_path = str(results(one) / "model")
        one.model.update(micro_batch_size=size, hidden_dropout=rate, embedding_dropout=rate)
        assert learning.run("training", one) == 0
        found[size, rate] = [float(row["train_loss"]) for row in read_metrics(one)[:3]]
    assert found[1, 0.1] == pytest.approx(found[4, 0.1], rel=1e-5)
    assert found[4, 0.0] != pytest.approx(found[4, 0.1], rel=1e-3)


def test_training_resumes_to_the_same_bits(cfg):
    cfg = as_training(cfg)
    straight = elsewhere(cfg, Path(cfg.run.results_dir) / "straight")
    straight.model.nemo_path = str(results(straight) / "model")
    learning.run("training", straight)
    # The schedule's length is the whole run's in both.
    cfg.model.optim.sched.max_steps = 12
    cfg.trainer.max_steps = 7
    learning.run("training", cfg)
    cfg.trainer.max_steps = -1
    learning.run("training", cfg)
    one, other = (load_base(c.model.nemo_path).state_dict() for c in (straight, cfg))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_switched_off_after_training_the_adapter_leaves_exactly_the_base(cfg, base, monkeypatch):
    learners, whole = [], learning.finish
    monkeypatch.setattr(learning, "finish", lambda *a: (learners.append(a[2]), whole(*a))[1])
    learning.run("adapter_learning", cfg)
    model, tokens = learners[0].model.eval(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = load_base(base)(tokens)
        assert not torch.equal(model(tokens), expected)
        model.set_active(None)
        assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.language_model_path", "/nowhere", "model.language_model_path=/nowhere"),
        ("model.data.train_ds", ["/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        ("model.global_batch_size", 5, "global_batch_size 5 must be a multiple of micro_batch"),
        ("model.nemo_path", None, "model.nemo_path is missing"),
        ("model.adapter_tuning.type", "houlsby", "model.adapter_tuning.type='houlsby'"),
        ("model.optim.name", "rmsprop", "model.optim.name='rmsprop'"),
        ("exp_manager.explicit_log_dir", None, "explicit_log_dir or exp_manager.exp_dir"),
        ("exp_manager.max_time_per_run", "1h", "exp_manager.max_time_per_run='1h' is no time"),
    ],
)
def test_wrong_input_is_named_and_nothing_written(key, value, message, cfg):
    folder = results(cfg)
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=message):
        learning.run("adapter_learning", cfg)
    assert not folder.exists()


def test_plain_output_has_no_control_codes_and_no_chatter(cfg, capfd):
    learning.run("adapter_learning", cfg)
    out, err = capfd.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "\r" not in out
    allowed = ("train:", "validation:", "training 640 of", "step ")
    lines = [line for line in out.splitlines() if line and line[0].isalpha()]
    assert [line for line in lines if not line.startswith(allowed)] == []
    shown = [line for line in lines if line.startswith("step 7/12")]
    assert "train_loss" in shown[0]
    assert "samples/s" in shown[0]
    assert "tokens/s" in shown[0]


def test_a_terminal_gets_a_bar_with_loss_and_speed(cfg, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    learning.run("adapter_learning", cfg)
    out = capsys.readouterr().out
    assert "step 7/12" not in out
    for word in ("train_loss", "samples/s", "tokens/s", "val_loss"):
        assert word in out


def test_a_disk_without_room_is_named_before_training_starts(cfg, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the disk has 0.00 GB free"):
        learning.run("adapter_learning", cfg)
    assert not list(results(cfg).rglob("*"))
    assert not Path(cfg.model.nemo_path).exists()
