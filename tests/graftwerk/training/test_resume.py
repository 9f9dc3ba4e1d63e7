"""A run that was stopped goes on where it was, to the same bits."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.checkpoints.resume import newest_checkpoint, read_checkpoint, write_checkpoint
from graftwerk.errors import Exit, UserError
from graftwerk.stages import learning
from graftwerk.training.module import LearningModule
from tests.graftwerk.learning_stage import (
    elsewhere,
    read_metrics,
    run_killed,
    write_rows,
)
from tests.graftwerk.ranks import start_stage

Weights = dict[str, torch.Tensor]


def run(cfg: DictConfig) -> Weights:
    assert learning.run("adapter_learning", cfg) == 0
    return read_adapter(cfg.model.nemo_path)[1]


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("step", [4, 6, 7, 10])
def test_a_run_that_died_ends_with_the_same_bits(step, cfg, tmp_path):
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    run_killed("adapter_learning", cfg, step)
    assert same(run(cfg), straight)


def test_validation_counted_over_epochs_resumes_to_the_same_bits(cfg, tmp_path):
    cfg.trainer.update(val_check_interval=8, max_epochs=4)
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    run_killed("adapter_learning", cfg, 19)
    assert same(run(cfg), straight)
    assert [int(row["step"]) for row in read_metrics(cfg) if row["val_loss"]] == [8, 16, 24]


def test_worker_processes_and_a_cut_epoch_resume_to_the_same_bits(cfg, tmp_path):
    cfg.trainer.limit_train_batches = 4
    cfg.model.data.num_workers = 1
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    run_killed("adapter_learning", cfg, 7)
    assert same(run(cfg), straight)


def test_a_killed_process_ends_with_the_same_bits(cfg, tmp_path):
    cfg.model.data.train_ds = [str(write_rows(tmp_path / "many.jsonl", 200, 3))]
    cfg.trainer.val_check_interval = 0.1
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    (process,) = start_stage(cfg, tmp_path)
    process.wait_for("step 63/100")
    process.send(signal.SIGKILL)
    assert process.wait() == 128 + signal.SIGKILL
    assert not Path(cfg.model.nemo_path).exists()
    assert same(run(cfg), straight)
    steps = [int(row["step"]) for row in read_metrics(cfg) if row["train_loss"]]
    assert steps == list(range(1, 101))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_and_exits_75(number, cfg, tmp_path, monkeypatch, capsys):
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    whole = LearningModule.training_step

    def signalled(self, batch, batch_idx):
        if self.global_step == 4:
            os.kill(os.getpid(), number)
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LearningModule, "training_step", signalled)
        assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    assert f"stopped by {number.name} at step 5" in capsys.readouterr().out
    assert not Path(cfg.model.nemo_path).exists()
    assert same(run(cfg), straight)
    assert "going on from step 5" in capsys.readouterr().out


def test_key_max_time_per_run_saves_and_exits_75(cfg, tmp_path, monkeypatch):
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    cfg.exp_manager.max_time_per_run = "00:00:00:01"
    whole = LearningModule.training_step

    def slow(self, batch, batch_idx):
        if self.global_step == 7:
            time.sleep(1)
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LearningModule, "training_step", slow)
        assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    cfg.exp_manager.max_time_per_run = None
    assert same(run(cfg), straight)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(cfg, tmp_path, capsys):
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    run_killed("adapter_learning", cfg, 10)
    last = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 9
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    assert same(run(cfg), straight)
    said = capsys.readouterr().out
    assert f"warning: {last} is damaged" in said
    assert "step=9.ckpt" in said


def test_one_altered_byte_is_noticed(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint({"state_dict": {"w": torch.arange(100.0)}, "global_step": 1}, path)
    content = bytearray(path.read_bytes())
    place = content.find(torch.arange(100.0).numpy().tobytes())
    assert place > 0
    content[place + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="none of its 1 checkpoints can be read"):
        newest_checkpoint(tmp_path, lambda line: None)


def test_a_complete_run_writes_its_adapter_again_without_training(cfg, monkeypatch, capsys):
    cfg.exp_manager.checkpoint_callback_params.save_best_model = True
    first = run(cfg)
    Path(cfg.model.nemo_path).unlink()
    summary = (Path(cfg.exp_manager.explicit_log_dir) / "summary.json").read_text()

    def never(self, batch, batch_idx):
        raise AssertionError("trained")

    monkeypatch.setattr(LearningModule, "training_step", never)
    assert same(run(cfg), first)
    assert "complete already" in capsys.readouterr().out
    again = (Path(cfg.exp_manager.explicit_log_dir) / "summary.json").read_text()
    value = '"val_loss": '
    assert again.split(value)[1] == summary.split(value)[1]


def test_more_epochs_go_on_from_a_complete_run(cfg, capsys):
    cfg.trainer.max_epochs = 1
    run(cfg)
    cfg.trainer.max_epochs = 2
    run(cfg)
    assert "going on from step 6" in capsys.readouterr().out
    steps = [int(row["step"]) for row in read_metrics(cfg) if row["train_loss"]]
    assert steps == list(range(1, 13))


def test_key_resume_if_exists_false_starts_anew_and_keeps_what_was_there(cfg, capsys):
    first = run(cfg)
    cfg.exp_manager.resume_if_exists = False
    assert same(run(cfg), first)
    folder = Path(cfg.exp_manager.explicit_log_dir)
    assert f"earlier checkpoints are now in {folder}/checkpoints-1" in capsys.readouterr().out
    assert (folder / "checkpoints-1" / "last.ckpt").is_file()
    assert len(read_metrics(cfg)) == 16  # 12 of training, 4 of validation, of this run alone


def test_key_resume_ignore_no_checkpoint_false_wants_one(cfg):
    cfg.exp_manager.resume_ignore_no_checkpoint = False
    with pytest.raises(UserError, match="holds no checkpoint"):
        learning.run("adapter_learning", cfg)


def test_key_resume_from_checkpoint_goes_on_from_that_file(cfg, tmp_path, capsys):
    straight = run(elsewhere(cfg, tmp_path / "straight"))
    other = elsewhere(cfg, tmp_path / "other")
    run_killed("adapter_learning", other, 7)
    cfg.trainer.resume_from_checkpoint = (
        other.exp_manager.explicit_log_dir + "/checkpoints/last.ckpt"
    )
    capsys.readouterr()
    assert same(run(cfg), straight)
    assert "going on from step 6" in capsys.readouterr().out


def test_a_resume_file_that_is_not_there_is_named(cfg):
    cfg.trainer.resume_from_checkpoint = "/nowhere/a.ckpt"
    with pytest.raises(UserError, match=r"trainer.resume_from_checkpoint=/nowhere/a.ckpt"):
        learning.run("adapter_learning", cfg)


@pytest.mark.parametrize(
    ("key", "value"), [("model.global_batch_size", 8), ("model.adapter_tuning.adapter_dim", 3)]
)
def test_another_configuration_than_the_checkpoints_is_refused(key, value, cfg):
    run(cfg)
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match="checkpoint to go on from"):
        learning.run("adapter_learning", cfg)


def test_a_checkpoint_holds_adapter_weights_and_no_base(cfg):
    run(cfg)
    folder = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints"
    state = read_checkpoint(folder / "last.ckpt")["state_dict"]
    assert all("adapter_layer.adapter." in name for name in state)
    assert sum(tensor.numel() for tensor in state.values()) == 2 * 2 * (2 * 16 * 4 + 2 * 16)


def test_no_partial_file_is_left(cfg):
    run(cfg)
    left = Path(cfg.run.results_dir).rglob("*.partial")
    assert not list(left)
