"""Real stages on a real Slurm: the quickstart's task in small, over nodes and requeues."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graftwerk.checkpoints import read_adapters
from tests.slurm.cluster import Cluster, until

# Most of it is imports, which take a minute and more where the machine is busy.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SMALL = [
    "experiment=quickstart",
    "cluster=bcm",
    "cluster_type=bcm",
    "cluster.exclusive=False",
    "cluster.mem=1000",
    "data_prep.rows={train: 400, val: 32, test: 16}",
    "training.trainer.max_steps=20",
    "training.trainer.val_check_interval=20",
    f"adapter_learning.trainer.max_steps={STEPS}",
    "adapter_learning.trainer.num_nodes=2",
    "adapter_learning.trainer.devices=2",
    "adapter_learning.trainer.val_check_interval=20",
    "adapter_learning.trainer.log_every_n_steps=10",
    "adapter_learning.model.micro_batch_size=8",
    "eval.model.inference.tokens_to_generate=4",
]


class Folder:
    """What main.py was told to put below one folder."""

    def __init__(self, slurm: Cluster, root: Path) -> None:
        self.slurm, self.root = slurm, root

    def main(self, *words: str) -> None:
        """`main.py` with the words of SMALL and these."""
        places = [f"data_dir={self.root}/data", f"base_results_dir={self.root}/results"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *SMALL, *places, *words],
            env={**os.environ, "PATH": self.slurm.programs()},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def stage(self, name: str) -> Path:
        """The results folder of a stage."""
        files = self.root.glob("results/**/state.json")
        (folder,) = [f.parent for f in files if json.loads(f.read_text())["stage"] == name]
        return folder

    def state(self, name: str) -> dict:
        return json.loads((self.stage(name) / "state.json").read_text())

    def wait(self, name: str, seconds: float) -> None:
        """Until the queue is empty, and this stage so has succeeded."""
        until(lambda: not self.slurm.ask("squeue", "--noheader"), seconds, "the end", self.tell)
        assert self.state(name)["state"] == "COMPLETED", self.tell()

    def requeued(self, times: int, seconds: float) -> None:
        """Until adapter learning is queued anew for that time, and can be hastened."""

        def pending() -> bool:
            state = self.state("adapter_learning")
            job = self.slurm.job(state["job_id"])
            return job["JobState"] == "PENDING" and state["requeues"] == times

        until(pending, seconds, f"requeue {times}", self.tell)
        time.sleep(2)  # a node starts no job in the second in which it has ended it

    def step(self) -> int:
        """How far adapter learning has come, by its log."""
        logs = [path.read_text() for path in self.stage("adapter_learning").glob("log-*.out")]
        return max(
            (int(n) for log in logs for n in re.findall(r"^step (\d+)/", log, re.M)), default=0
        )

    def rows(self, split: str) -> Path:
        (file,) = self.root.glob(f"data/**/translate_{split}.jsonl")
        return file

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the adapter that was learned."""
        path = self.stage("adapter_learning") / "results/megatron_gpt_adapter.nemo"
        for adapter in read_adapters(path).adapters:
            for key, value in adapter.state.items():
                yield f"{adapter.name}.{key}", value

    def curve(self) -> list[tuple[str, ...]]:
        """Steps, losses and learning rates, without what the clock says."""
        path = self.stage("adapter_learning") / "results/metrics.csv"
        return [tuple(row.split(",")[:6]) for row in path.read_text().splitlines()]

    def tell(self) -> str:
        files = sorted(self.root.glob("results/**/state.json")) + sorted(self.root.rglob("log-*"))
        books = [self.slurm.ask("squeue"), self.slurm.ask("scontrol", "--oneliner", "show", "job")]
        return "\n".join([*books, *(file.read_text() for file in files)])


@pytest.fixture(scope="module")
def whole(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The chain from nothing to scores, on the cluster."""
    folder = Folder(slurm, tmp_path_factory.mktemp("whole"))
    folder.main("stages=[data_prep,training,adapter_learning,eval]")
    folder.wait("eval", 600)
    return folder


def test_the_chain_learns_over_two_nodes_and_is_scored(whole):
    stages = ("data_prep", "training", "adapter_learning", "eval")
    assert [whole.state(stage)["job_id"] for stage in stages] == ["1", "2", "3", "4"]
    summary = json.loads((whole.stage("adapter_learning") / "results/summary.json").read_text())
    assert summary["steps"] == STEPS
    metrics = json.loads((whole.stage("eval") / "results/metrics.json").read_text())
    assert [result["name"] for result in metrics["results"]] == ["base", "adapter_learning"]
    assert whole.slurm.job("3")["NodeList"] == "n[1-2]"


# ---- stopped, and gone on

BRAKE = """
import runpy, time
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: time.sleep(WAIT))
runpy.run_module("graftwerk", run_name="__main__", alter_sys=True)
"""


def again(whole: Folder, root: Path, *words: str, wait: float = 0) -> Folder:
    """Adapter learning as `whole` did it, with changes; each step takes `wait` seconds longer."""
    folder = Folder(whole.slurm, root)
    (root / "brake.py").write_text(BRAKE.replace("WAIT", str(wait)))
    python = root / "python"
    python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -u {root}/brake.py "$@"\n')
    python.chmod(0o755)
    (training,) = whole.root.glob("results/*/results/model")
    folder.main(
        "stages=[adapter_learning]",
        f"cluster.python={python}",
        f"adapter_learning.model.language_model_path={training}",
        f"adapter_learning.model.data.train_ds=[{whole.rows('train')}]",
        f"adapter_learning.model.data.validation_ds=[{whole.rows('val')}]",
        *words,
    )
    return folder


def assert_same(stopped: Folder, whole: Folder) -> None:
    """The adapters are bit-equal, and so are the curves, which have each step once."""
    ours, theirs = (dict(folder.weights()) for folder in (stopped, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert stopped.curve() == whole.curve()


def test_a_time_limit_that_hits_twice_changes_nothing(whole, tmp_path):
    """Limits are whole minutes; this one is drawn near once there is progress."""
    words = ["adapter_learning.trainer.max_steps=700", "adapter_learning.trainer.num_nodes=1"]
    words += ["adapter_learning.run.dependency=null"]  # both at a time
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    signal = "adapter_learning.run.signal_seconds=60"
    stopped = again(whole, tmp_path / "stopped", *words, signal, wait=0.1)
    uninterrupted = again(whole, tmp_path / "whole", *words)
    job, change = stopped.state("adapter_learning")["job_id"], ("scontrol", "update")
    reached = 0
    for times in (1, 2):
        until(lambda least=reached + 20: stopped.step() > least, 300, "steps", stopped.tell)
        stopped.slurm.ask(*change, f"jobid={job}", "EndTime=now+100")
        stopped.requeued(times, 120)
        reached = stopped.step()
        assert "stopped by SIGUSR1 at step" in stopped.tell()
        stopped.slurm.ask(*change, f"jobid={job}", "TimeLimit=10", "StartTime=now")
    stopped.wait("adapter_learning", 300)
    assert stopped.state("adapter_learning")["requeues"] == 2
    assert stopped.slurm.job(job)["Restarts"] == "2"
    assert len(list(stopped.stage("adapter_learning").glob("log-*.out"))) == 1
    assert_same(stopped, uninterrupted)


def test_a_crash_of_a_node_changes_nothing(whole, tmp_path):
    stopped = again(whole, tmp_path, wait=0.5)
    job = stopped.state("adapter_learning")["job_id"]
    last = stopped.stage("adapter_learning") / "results/checkpoints"
    until(lambda: list(last.glob("*.ckpt")), 240, "a checkpoint", stopped.tell)
    stopped.slurm.crash("n2")
    file = stopped.stage("adapter_learning") / "state.json"
    until(lambda: "REQUEUED" in file.read_text(), 300, "a requeue", stopped.tell)
    assert re.search(r"ranks? 2\b.*\b3\b.* n2", stopped.tell())  # what was lost is named
    time.sleep(3)  # a node starts no job in the second in which it has ended it
    stopped.slurm.ask("scontrol", "update", "nodename=n2", "state=down", "reason=crashed")
    time.sleep(3)
    stopped.slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now")
    stopped.wait("adapter_learning", 400)
    assert "going on from step" in stopped.tell()
    assert_same(stopped, whole)
