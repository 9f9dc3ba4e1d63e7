"""A run is told to stop: wherever it is, it saves its state, and goes on to the same bits."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.checkpoints.resume import read_checkpoint
from graftwerk.data.datamodule import AnswerDataModule
from graftwerk.errors import Exit
from graftwerk.stages import learning
from graftwerk.training.module import LearningModule
from tests.graftwerk.learning_stage import elsewhere, read_metrics
from tests.graftwerk.ranks import start_stage


def weights(cfg):
    return read_adapter(cfg.model.nemo_path)[1]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def kept(cfg):
    folder = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints"
    return sorted(path.name for path in folder.glob("*"))


def signals_at(name, at, number=signal.SIGUSR1, process=0):
    """A patch: a method of the module sends its own process a signal once, at a step."""
    whole = getattr(LearningModule, name)

    def signalling(self, *args):
        if self.trainer.global_rank == process and self.global_step == at[0]:
            if at[1] == 0:
                os.kill(os.getpid(), number)
            at[1] -= 1
        return whole(self, *args)

    return signalling


def assert_equal_runs(one, other):
    """Adapter, checkpoints and metrics of two runs, up to times."""
    assert same(weights(one), weights(other))
    assert kept(one) == kept(other)
    for row, twin in zip(read_metrics(one), read_metrics(other), strict=True):
        for timed in ("samples/s", "tokens/s"):
            del row[timed], twin[timed]
        assert row == twin


@pytest.mark.parametrize(
    ("step", "batch", "stopped"), [(3, 0, 3), (6, 0, 6), (12, 0, 12), (6, 1, 7), (12, 1, None)]
)
def test_stopped_in_a_validation_repeats_it_and_ends_with_the_same_bits(
    step, batch, stopped, cfg, tmp_path, monkeypatch, capsys
):
    straight = elsewhere(cfg, tmp_path / "straight")
    for config in (cfg, straight):
        config.exp_manager.checkpoint_callback_params.save_best_model = True
        config.model.optim.sched = {"name": "ReduceLROnPlateau", "factor": 0.1, "patience": 0}
    assert learning.run("adapter_learning", straight) == 0
    with monkeypatch.context() as patch:
        # After the first of two batches it is asked once more, after the second no more.
        signalling = signals_at("validation_step", [step, batch])
        patch.setattr(LearningModule, "validation_step", signalling)
        code = learning.run("adapter_learning", cfg)
    assert code == (Exit.DONE if stopped is None else Exit.REQUEUE)
    if stopped is not None:
        assert f"stopped by SIGUSR1 at step {stopped}:" in capsys.readouterr().out
        validated = [int(row["step"]) for row in read_metrics(cfg) if row["val_loss"]]
        assert validated == [n for n in (3, 6, 9, 12) if n < stopped]
        assert learning.run("adapter_learning", cfg) == 0
    assert_equal_runs(cfg, straight)


@pytest.mark.parametrize("step", [5, 6, 11])
def test_stopped_without_validation_ends_with_the_same_bits(step, cfg, tmp_path, monkeypatch):
    cfg.trainer.limit_val_batches = 0
    straight = elsewhere(cfg, tmp_path / "straight")
    assert learning.run("adapter_learning", straight) == 0
    with monkeypatch.context() as patch:
        signalling = signals_at("training_step", [step - 1, 0])
        patch.setattr(LearningModule, "training_step", signalling)
        assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    assert learning.run("adapter_learning", cfg) == 0
    assert_equal_runs(cfg, straight)


def test_sigterm_in_a_validation_is_not_lightnings(cfg, monkeypatch, capsys):
    signalling = signals_at("validation_step", [3, 0], signal.SIGTERM)
    monkeypatch.setattr(LearningModule, "validation_step", signalling)
    assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    assert "stopped by SIGTERM at step 3:" in capsys.readouterr().out


def test_stopped_while_loading_ends_at_once_and_loses_nothing(cfg, monkeypatch, capsys):
    whole = AnswerDataModule.__init__

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        whole(self, *args, **kwargs)

    monkeypatch.setattr(AnswerDataModule, "__init__", signalled)
    assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    assert capsys.readouterr().out == "stopped by SIGTERM before the first step\n"
    assert not Path(cfg.exp_manager.explicit_log_dir).exists()


def test_a_signal_while_the_base_is_read_is_no_damaged_file(cfg, monkeypatch, capsys):
    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__init__", signalled)
    assert learning.run("adapter_learning", cfg) == Exit.REQUEUE
    assert capsys.readouterr().out == "stopped by SIGTERM before the first step\n"


def test_stopped_while_the_result_is_written_finishes(cfg, monkeypatch):
    whole = learning.write_result

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args)

    monkeypatch.setattr(learning, "write_result", signalled)
    assert learning.run("adapter_learning", cfg) == 0
    assert Path(cfg.model.nemo_path).is_file()


def test_signals_have_their_old_handlers_afterwards(cfg):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert learning.run("adapter_learning", cfg) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


# ---- two processes


@pytest.fixture
def two(cfg):
    """The stage for two processes."""
    cfg.trainer.devices = 2
    cfg.model.micro_batch_size = 1
    return cfg


def signal_rank_1(method, step, rank):
    setattr(LearningModule, method, signals_at(method, [step, 0], signal.SIGUSR2, process=1))


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("validation_step", 6),
        pytest.param("training_step", 4, marks=pytest.mark.long),
        pytest.param("validation_step", 12, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_process_stops_both_at_one_step(method, step, two, tmp_path):
    straight = elsewhere(two, tmp_path / "straight")
    patch = partial(signal_rank_1, method, step)
    ranks = [
        *start_stage(straight, tmp_path / "straight", 2),
        *start_stage(two, tmp_path / "stopped", 2, patch),
    ]
    assert [rank.wait() for rank in ranks] == [Exit.DONE] * 2 + [Exit.REQUEUE] * 2, ranks[
        2
    ].complained
    first, second = ranks[2:]
    at = step + 1 if method == "training_step" else step
    assert f"stopped by SIGUSR2 of rank 1 at step {at}" in first.said or (
        f"stopped by another process at step {at}" in first.said
    )
    assert (second.said, first.complained, second.complained) == ("", "", "")
    last = Path(two.exp_manager.explicit_log_dir) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == at
    assert [rank.wait() for rank in start_stage(two, tmp_path / "again", 2)] == [0, 0]
    assert_equal_runs(two, straight)


def signal_while_loading(rank):
    whole = AnswerDataModule.__init__

    def signalled(self, *args, **kwargs):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        whole(self, *args, **kwargs)

    AnswerDataModule.__init__ = signalled


def test_a_signal_to_one_process_while_both_load_ends_both(two, tmp_path):
    first, second = start_stage(two, tmp_path, 2, signal_while_loading)
    assert (first.wait(), second.wait()) == (Exit.REQUEUE, Exit.REQUEUE), (
        first.complained + second.complained
    )
    assert first.said == "stopped by SIGTERM of rank 1 before the first step\n"
    assert (second.said, first.complained, second.complained) == ("", "", "")
