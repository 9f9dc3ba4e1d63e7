"""Processes started from outside, as torchrun or srun start them, train as one would."""

import signal
from pathlib import Path

import pytest
import torch

from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.checkpoints.resume import read_checkpoint
from graftwerk.errors import Exit, UserError
from graftwerk.stages import learning
from graftwerk.training.world import World
from tests.graftwerk.learning_stage import elsewhere, read_metrics
from tests.graftwerk.ranks import start_stage, torchrun


def srun(rank: int, size: int, port: int) -> dict[str, str]:
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": f"{size}", "SLURM_NTASKS_PER_NODE": f"{size}"}
    job = {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "first"}
    return {**own, **step, **job, "MASTER_PORT": str(port)}


@pytest.mark.parametrize("starter", [torchrun, srun])
def test_two_processes_train_what_one_does(starter, cfg, tmp_path):
    assert cfg.model.adapter_tuning.adapter_dropout == 0.1
    cfg.model.micro_batch_size = 1
    alone = elsewhere(cfg, tmp_path / "alone")
    assert learning.run("adapter_learning", alone) == 0
    cfg.trainer.devices = 2
    first, second = start_stage(cfg, tmp_path, 2, starter=starter)
    assert (first.wait(), second.wait()) == (0, 0), first.complained + second.complained
    assert "step 12/12" in first.said
    assert second.said == ""
    expected, found = (read_adapter(c.model.nemo_path)[1] for c in (alone, cfg))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    losses = [
        [float(row["val_loss"] or row["train_loss"]) for row in read_metrics(c)]
        for c in (alone, cfg)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_one_process_that_is_told_to_stop_stops_both_with_their_state_saved(cfg, tmp_path):
    cfg.trainer.update(devices=2, max_epochs=400, val_check_interval=1.0)
    cfg.model.micro_batch_size = 1
    first, second = start_stage(cfg, tmp_path, 2)
    first.wait_for("step 9/2400")
    second.send(signal.SIGUSR2)
    assert (first.wait(), second.wait()) == (Exit.REQUEUE, Exit.REQUEUE)
    reasons = ("SIGUSR2 of rank 1", "another process")
    assert any(f"stopped by {reason} at step" in first.said for reason in reasons)
    last = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] < 2400


def test_a_mistake_is_said_once_and_both_processes_exit_2(cfg, tmp_path):
    cfg.trainer.devices = 2
    cfg.model.data.train_ds = ["/nowhere.jsonl"]
    first, second = start_stage(cfg, tmp_path, 2)
    assert (first.wait(), second.wait()) == (Exit.WRONG_INPUT, Exit.WRONG_INPUT)
    said = first.complained + second.complained  # by the one that was first
    assert said.count("\n") == 1
    assert "/nowhere.jsonl does not exist" in said


def test_key_devices_wants_a_process_for_each_device(cfg):
    cfg.trainer.devices = 2
    with pytest.raises(UserError, match=r"trainer.devices=2 x trainer.num_nodes=1 needs 2 proc"):
        learning.run("adapter_learning", cfg)


def test_key_num_nodes_counts_too(cfg):
    cfg.trainer.num_nodes = 2
    with pytest.raises(UserError, match=r"trainer.num_nodes=2 needs 2 processes"):
        learning.run("adapter_learning", cfg)


def test_a_batch_scripts_slurm_variables_do_not_make_it_a_job_step():
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert World.from_environment(batch).size == 1


def test_a_rank_that_is_no_number_is_named():
    with pytest.raises(UserError, match="environment variable RANK='x' must be a whole number"):
        World.from_environment({"RANK": "x", "WORLD_SIZE": "2"})
