"""Sweeps on a real Slurm: one array for each stage, whose tasks live and die by themselves."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher_scripts.main import main
from tests.launcher_scripts import chain
from tests.slurm.cluster import Cluster, until

A = "adapter_learning"

# In place of a stage, by what BEHAVE says of "stage seed": `fail`, or `wait` for a signal, at which
# it "checkpoints" and leaves with 75; a run after that goes through. The loss is least at seed 13.
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
import yaml
stage, path = sys.argv[1:]
seed = yaml.safe_load(Path(path).read_text()).get("model", {}).get("seed")
run = int(os.environ.get("SLURM_RESTART_COUNT", 0))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: os._exit(75))
with open(os.environ["MET"], "a") as file:
    file.write(f"{stage} {seed} {run}\\n")
if stage == "adapter_learning":
    results = Path(path).with_name("results")
    results.mkdir(exist_ok=True)
    (results / "progress.json").write_text(json.dumps({"best_val_loss": 1 + (seed - 13) ** 2}))
do = json.loads(Path(os.environ["BEHAVE"]).read_text()).get(f"{stage} {seed}")
if do == "fail":
    sys.exit("ValueError: the loss is nan")
if do == "wait" and run == 0:
    time.sleep(600)
"""


class Sweep:
    """`main.py --multirun` on the cluster, and what came of it."""

    def __init__(self, slurm: Cluster, root: Path) -> None:
        self.slurm, self.root = slurm, root
        self.said = ""

    def main(self, *words: str) -> int:
        common = [
            f"base_results_dir={self.root}/results",
            f"data_dir={self.root}/data",
            f"launcher_scripts_path={chain.checkout(self.root / 'checkout')}",
            "cluster.exclusive=False",
            "cluster.mem=50",
            "cluster.gpus_per_task=null",
        ]
        (self.root / "checkout/src/graftwerk/__main__.py").write_text(STAGE)
        for stage in (A, "eval"):
            common += [f"{stage}.model.language_model_path=org/name"]
            common += [f"{stage}.trainer.{word}" for word in ("devices=1", "accelerator=cpu")]
            common += [f"{stage}.trainer.precision=32"]
        return main(["--multirun", *common, *words])

    def behave(self, **points: str) -> None:
        """What the stages do: `behave(adapter_learning_7="fail")`."""
        told = {" ".join(key.rsplit("_", 1)): do for key, do in points.items()}
        (self.root / "behave").write_text(json.dumps(told))

    def met(self) -> list[str]:
        """`stage seed run`, of all that ran, in order."""
        path = self.root / "met"
        return path.read_text().splitlines() if path.exists() else []

    def state(self, seed: int, stage: str = A) -> dict:
        folder = self.root / f"results/gpt3_5b/{stage}_squad/seed_{seed}"
        return json.loads((folder / "state.json").read_text())

    def jobs(self) -> list[dict[str, str]]:
        """Every job and task that the controller knows."""
        lines = self.slurm.ask("scontrol", "--oneliner", "show", "job").splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if "JobId" in line]

    def wait(self, seconds: float = 120) -> None:
        until(lambda: not self.slurm.ask("squeue", "--noheader"), seconds, "the end", self.tell)

    def tell(self) -> str:
        return "\n".join([self.slurm.ask("squeue", "--array"), *self.met()])


@pytest.fixture
def sweep(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setenv("PATH", slurm.programs())
    monkeypatch.setenv("MET", str(tmp_path / "met"))
    monkeypatch.setenv("BEHAVE", str(tmp_path / "behave"))
    monkeypatch.chdir(tmp_path)
    started = Sweep(slurm, tmp_path)
    started.behave()
    return started


@pytest.fixture
def status(sweep: Sweep, capsys) -> Callable[[], str]:
    """What `action=status` prints of all that was launched."""

    def ask() -> str:
        capsys.readouterr()
        assert main(["action=status", f"results={sweep.root}/results"]) == 0
        return capsys.readouterr().out

    return ask


def line(table: str, name: str) -> list[str]:
    (found,) = [line.split() for line in table.splitlines() if line.split()[:1] == [name]]
    return found


def test_forty_points_are_one_array_and_a_table_with_the_best(sweep, status):
    sweep.behave(adapter_learning_7="fail")
    before = {job["JobId"] for job in sweep.jobs()}
    words = [f"stages=[data_prep,{A}]", f"{A}.model.seed=range(1,41)", "sweep.max_parallel=16"]
    assert sweep.main(*words) == 0
    sweep.wait()
    new = [job for job in sweep.jobs() if job["JobId"] not in before]
    tasks = [job for job in new if "ArrayJobId" in job]
    assert len({job["ArrayJobId"] for job in tasks}) == 1
    assert sorted(int(job["ArrayTaskId"]) for job in tasks) == list(range(40))
    assert {job["ArrayTaskThrottle"] for job in tasks} == {"16"}
    assert len(new) - len(tasks) == 1  # what no swept value reaches
    assert sweep.met()[0] == "data_prep None 0"
    assert sorted(sweep.met()[1:]) == sorted(f"{A} {seed} 0" for seed in range(1, 41))
    ends = {seed: sweep.state(seed)["state"] for seed in range(1, 41)}
    assert ends == {seed: "FAILED" if seed == 7 else "COMPLETED" for seed in range(1, 41)}
    table = status()
    assert line(table, "seed_13")[-2:] == ["1", "best"]
    assert re.search("seed_7 .* FAILED .* exit code 1: ValueError: the loss is nan", table)
    assert "40 points: 39 COMPLETED, 1 FAILED; best val_loss 1: seed_13" in " ".join(table.split())


def test_a_killed_point_ends_its_own_chain_and_no_other(sweep, status):
    sweep.behave(adapter_learning_2="wait")
    words = [f"stages=[data_prep,{A},eval]", f"{A}.model.seed=1,2,3"]
    assert sweep.main(*words) == 0
    until(lambda: "eval 1" in str(sweep.met()) and f"{A} 2 0" in sweep.met(), 60, "2", sweep.tell)
    sweep.slurm.ask("scancel", sweep.state(2)["job_id"])
    sweep.wait()
    assert {seed: sweep.state(seed)["state"] for seed in (1, 2, 3)} == {
        1: "COMPLETED",
        2: "CANCELLED",
        3: "COMPLETED",
    }
    assert [sweep.state(seed, "eval")["state"] for seed in (1, 3)] == ["COMPLETED"] * 2
    assert not any(word.startswith("eval 2") for word in sweep.met())
    assert line(status(), "seed_2")[1:3] == [A, "CANCELLED"]
    # What succeeded does not run again.
    sweep.behave()
    ran = len(sweep.met())
    assert sweep.main(*words, "action=resume") == 0
    sweep.wait()
    assert [word.split()[0] for word in sweep.met()[ran:]] == [A, "eval"]
    assert sweep.state(2, "eval")["state"] == "COMPLETED"


# The last task has the array's own number.
@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.long), 4])
def test_a_point_is_queued_anew_alone(sweep, status, seed):
    sweep.behave(**{f"adapter_learning_{other}": "wait" for other in (1, 2, 3, 4)})
    assert sweep.main(f"stages=[data_prep,{A}]", f"{A}.model.seed=1,2,3,4") == 0
    until(lambda: len(sweep.met()) == 5, 60, "all points", sweep.tell)
    task = sweep.state(seed)["job_id"]
    sweep.slurm.ask("scancel", "--signal=USR1", task)
    until(lambda: sweep.state(seed)["state"] == "REQUEUED", 30, "a requeue", sweep.tell)
    until(lambda: f"{task}|PENDING" in queue(sweep), 30, "PENDING", sweep.tell)
    others = [other for other in (1, 2, 3, 4) if other != seed]
    assert all(f"{sweep.state(other)['job_id']}|RUNNING" in queue(sweep) for other in others)
    assert {sweep.state(other)["state"] for other in others} == {"RUNNING"}
    assert "REQUEUED (requeued 1x)" in " ".join(line(status(), f"seed_{seed}"))
    for other in others:
        sweep.slurm.ask("scancel", sweep.state(other)["job_id"])
    until(lambda: queue(sweep) == [f"{task}|PENDING"], 30, "one task", sweep.tell)
    time.sleep(2)  # a node starts no job in the second in which it has ended it
    sweep.slurm.ask("scontrol", "update", f"jobid={task}", "StartTime=now")
    sweep.wait()
    assert sweep.state(seed)["state"] == "COMPLETED"
    assert sweep.met()[5:] == [f"{A} {seed} 1"]


def queue(sweep: Sweep) -> list[str]:
    """`12_3|RUNNING` of each task in the queue."""
    return sweep.slurm.ask("squeue", "--noheader", "--array", "--format=%i|%T").split()
