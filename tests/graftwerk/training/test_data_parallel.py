"""Processes started from outside, as torchrun or srun start them, train as one would."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.checkpoints.resume import read_checkpoint
from graftwerk.errors import Exit, UserError
from graftwerk.stages import learning
from graftwerk.training.world import World
from tests.graftwerk.learning_stage import elsewhere, environment, read_metrics


def torchrun(rank: int, port: int) -> dict[str, str]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def srun(rank: int, port: int) -> dict[str, str]:
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job = {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "first"}
    return {**own, **step, **job, "MASTER_PORT": str(port)}


def start_two(cfg: DictConfig, folder: Path, starter) -> list[subprocess.Popen]:
    """The stage in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "job_hydra.yaml"
    OmegaConf.save(cfg, config)
    command = [sys.executable, "-m", "graftwerk", "adapter_learning", str(config)]
    return [
        subprocess.Popen(
            command,
            env=environment(**starter(rank, port)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def run_two(cfg: DictConfig, folder: Path, starter) -> list[subprocess.CompletedProcess]:
    """The stage in two processes to its end; their outputs by rank."""
    processes = start_two(cfg, folder, starter)
    outputs = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.mark.parametrize("starter", [torchrun, pytest.param(srun, marks=pytest.mark.long)])
def test_two_processes_train_what_one_does(starter, cfg, tmp_path):
    assert cfg.model.adapter_tuning.adapter_dropout == 0.1
    cfg.model.micro_batch_size = 1
    alone = elsewhere(cfg, tmp_path / "alone")
    assert learning.run("adapter_learning", alone) == 0
    cfg.trainer.devices = 2
    first, second = run_two(cfg, tmp_path, starter)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "step 12/12" in first.stdout
    assert second.stdout == ""
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
    processes = start_two(cfg, tmp_path, torchrun)
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line.startswith("step 9/2400"):
            processes[1].send_signal(signal.SIGUSR2)
            break
    said = processes[0].communicate(timeout=120)[0]
    processes[1].communicate(timeout=120)
    assert [process.returncode for process in processes] == [Exit.REQUEUE] * 2
    reasons = ("SIGUSR2 of rank 1", "another process")
    assert any(f"stopped by {reason} at step" in said for reason in reasons)
    last = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] < 2400


def test_a_mistake_is_said_once_and_both_processes_exit_2(cfg, tmp_path):
    cfg.trainer.devices = 2
    cfg.model.data.train_ds = ["/nowhere.jsonl"]
    first, second = run_two(cfg, tmp_path, torchrun)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("\n") == 1
    assert "/nowhere.jsonl does not exist" in first.stderr
    assert second.stderr == ""


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
