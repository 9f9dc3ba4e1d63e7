"""Disks that fill up, go away or damage files: the last good checkpoint stays good and is found."""

import errno
import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from graftwerk.checkpoints import resume
from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.checkpoints.leftovers import remove_leftovers
from graftwerk.checkpoints.resume import read_checkpoint, write_checkpoint
from graftwerk.stages import learning
from graftwerk.training.module import LearningModule
from tests.graftwerk.learning_stage import elsewhere
from tests.graftwerk.ranks import start_stage


def weights(cfg):
    return read_adapter(cfg.model.nemo_path)[1]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def checkpoints(cfg):
    return Path(cfg.exp_manager.explicit_log_dir) / "checkpoints"


@pytest.fixture
def straight(cfg, tmp_path):
    """The weights of an undisturbed run."""
    other = elsewhere(cfg, tmp_path / "straight")
    assert learning.run("adapter_learning", other) == 0
    return weights(other)


def before_step(step, act):
    """A patch: something happens before a step."""
    whole = LearningModule.training_step

    def acting(self, batch, batch_idx):
        if self.global_step == step:
            act(self)
        return whole(self, batch, batch_idx)

    return acting


# ---- a disk that fails while the run goes on


def full_disk(module):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # whatever is larger: "File too large"


def read_only(module):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    resume.open = refuse  # type: ignore[attr-defined]


def vanished(module):
    folder = Path(module.trainer.default_root_dir)
    folder.rename(folder.with_name("elsewhere"))


def fails_from_step_7(act, rank):
    LearningModule.training_step = before_step(7, act)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (full_disk, "File too large"),
        (read_only, "Read-only file system"),
        (vanished, "No such file or directory"),
    ],
)
def test_a_failing_disk_is_one_line_and_the_last_checkpoint_stays_good(
    act, words, cfg, straight, tmp_path
):
    (rank,) = start_stage(cfg, tmp_path, 1, partial(fails_from_step_7, act))
    assert rank.wait() == 1
    assert rank.complained.count("\n") == 1
    assert rank.complained.startswith("error: ")
    assert rank.complained.endswith(f"cannot be written: {words}\n")
    results = Path(cfg.exp_manager.explicit_log_dir)
    if act is vanished:
        assert not results.exists()
        results.with_name("elsewhere").rename(results)
    assert read_checkpoint(checkpoints(cfg) / "last.ckpt")["global_step"] == 6
    assert learning.run("adapter_learning", cfg) == 0
    assert same(weights(cfg), straight)


# ---- files that were damaged meanwhile


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def all_zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def folder(path):
    path.unlink()
    path.mkdir()
    (path / "lost").touch()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [cut_short, emptied, zeroed, all_zero, folder, dangling])
@pytest.mark.parametrize("validates", [True, False])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    damage, validates, cfg, tmp_path, monkeypatch, capsys
):
    cfg.trainer.update(max_epochs=1, limit_val_batches=1.0 if validates else 0)
    cfg.exp_manager.checkpoint_callback_params.every_n_train_steps = 2
    assert learning.run("adapter_learning", cfg) == 0
    first = weights(cfg)
    Path(cfg.model.nemo_path).unlink()
    last = checkpoints(cfg) / "last.ckpt"
    damage(last)
    capsys.readouterr()
    assert learning.run("adapter_learning", cfg) == 0
    assert f"warning: {last} is damaged" in capsys.readouterr().out
    assert same(weights(cfg), first)


def test_a_folder_in_the_place_of_a_checkpoint_is_put_aside(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "kept").touch()
    write_checkpoint({"state_dict": {}, "global_step": 1}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    assert (tmp_path / "last.ckpt-1" / "kept").exists()


# ---- what killed processes leave


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_temporaries_of_dead_processes_go_and_others_stay(tmp_path, dead):
    ours = [f".last.ckpt.{dead}.partial", f".metrics.csv.{dead}.tmp", f".m.nemo.{os.getpid()}.old"]
    others = ["last.ckpt", ".last.ckpt.partial", f".last.ckpt.{os.getppid()}.partial", ".x.1y.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    (tmp_path / f".model.{dead}.partial").mkdir()
    (tmp_path / f".model.{dead}.partial" / "shard-0.partial").touch()
    gone = remove_leftovers(tmp_path)
    assert {path.name for path in gone} == {*ours, f".model.{dead}.partial"}
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_a_number_that_is_another_processs_by_now_protects_nothing(tmp_path):
    path = tmp_path / f".last.ckpt.{os.getppid()}.partial"
    path.touch()
    os.utime(path, (1e9, 1e9))
    assert remove_leftovers(tmp_path) == [path]


def test_in_a_shared_folder_only_the_named_go(tmp_path, dead):
    own, other = (tmp_path / f".{name}.{dead}.partial" for name in ("mine.nemo", "yours.nemo"))
    own.touch()
    other.touch()
    assert remove_leftovers(tmp_path, ("mine.nemo",)) == [own]
    assert other.exists()


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path):
    assert remove_leftovers(tmp_path / "none") == []


def dies_in_writing(rank):
    whole = torch.save
    count = []

    def dying(checkpoint, file):
        whole(checkpoint, file)
        file.flush()
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


def test_killed_while_a_checkpoint_is_written_leaves_nothing_after_the_next_run(
    cfg, straight, tmp_path
):
    (rank,) = start_stage(cfg, tmp_path, 1, dies_in_writing)
    assert rank.wait() == 128 + signal.SIGKILL
    assert len(list(checkpoints(cfg).glob(".*.partial"))) == 1
    assert learning.run("adapter_learning", cfg) == 0
    assert not list(Path(cfg.run.results_dir).rglob("*.partial"))
    assert same(weights(cfg), straight)
    shutil.rmtree(checkpoints(cfg))
