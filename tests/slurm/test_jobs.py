"""Job scripts on a real Slurm. What runs in them stands in for a stage: see STAGE."""

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from launcher_scripts.main import main
from launcher_scripts.pipeline import launch
from tests.launcher_scripts import chain
from tests.slurm.cluster import Cluster, until

PREP, LEARN, EVAL = "data_prep", "adapter_learning", "eval"

# Runs in place of a stage, by the words of `behave`: `sleeps` runs wait for a signal, at which they
# "checkpoint" and leave with 75. `exit`: {rank: code}, once `file` is there; the others sleep.
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
import yaml
stage, path = sys.argv[1:]
behave = yaml.safe_load(Path(path).read_text()).get("behave", {})
rank, run = os.environ["SLURM_PROCID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda *_: os._exit(75))
met = {"env": dict(os.environ), "run": run, "began": time.time()}
file = Path(path).with_name(f"met-{run}-{rank}.json")
file.with_suffix(".part").write_text(json.dumps(met))
file.with_suffix(".part").rename(file)
print(f"run {run} of rank {rank}", flush=True)
codes = behave.get("exit", {})
if rank in codes:
    while not Path(path).with_name(behave.get("file", "met-0-0.json")).exists():
        time.sleep(0.1)
    print("ValueError: no rows are left", file=sys.stderr)
    sys.exit(codes[rank])
if run < behave.get("sleeps", 0) or codes:
    time.sleep(600)
"""


class Launched:
    """A chain that was submitted, as its files and Slurm know it."""

    def __init__(self, slurm: Cluster, cfg: DictConfig) -> None:
        self.slurm, self.cfg = slurm, cfg

    def state(self, stage: str = LEARN) -> dict[str, Any]:
        return chain.state(self.cfg, stage)

    def job(self, stage: str = LEARN) -> dict[str, str]:
        return self.slurm.job(self.state(stage)["job_id"])

    def log(self, stage: str = LEARN, kind: str = "out") -> str:
        """The one log of a kind."""
        files = list(chain.results(self.cfg, stage).glob(f"log-*.{kind}"))
        assert len(files) <= 1
        return files[0].read_text() if files else ""

    def met(self, run: int = 0, stage: str = LEARN) -> list[dict[str, Any]]:
        """What the ranks of a run wrote down."""
        files = sorted(chain.results(self.cfg, stage).glob(f"met-{run}-*.json"))
        return [json.loads(file.read_text()) for file in files]

    def wait(self, what: str, stage: str = LEARN, seconds: float = 60) -> None:
        """Until state.json says so."""
        until(lambda: self.state(stage)["state"] == what, seconds, what, lambda: self.tell(stage))

    def wait_for_ranks(self, ranks: int, run: int = 0) -> None:
        until(lambda: len(self.met(run)) == ranks, 60, f"{ranks} ranks of run {run}", self.tell)

    def wait_for_end(self, stage: str = LEARN) -> str:
        """Slurm's last word on a job."""
        live = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        until(lambda: self.job(stage)["JobState"] not in live, 60, "the end", self.tell)
        return self.job(stage)["JobState"]

    def hasten(self) -> None:
        """Slurm keeps a job that is queued anew for two minutes; its owner may shorten that."""
        until(lambda: self.job()["JobState"] == "PENDING", 30, "PENDING", self.tell)
        time.sleep(2)  # a node starts no job in the second in which it has ended it
        self.slurm.ask("scontrol", "update", f"jobid={self.state()['job_id']}", "StartTime=now")

    def tell(self, stage: str = LEARN) -> str:
        logs = [f"{kind}: {self.log(stage, kind)}" for kind in ("out", "err")]
        books = [self.slurm.ask("squeue"), str(self.job(stage))]
        return "\n".join([str(self.state(stage)), *books, *logs])


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Submits stages with changes to the configuration of `chain.config`."""
    monkeypatch.setenv("PATH", slurm.programs())

    def submitted(*stages: str, **changes: Any) -> Launched:
        whole = {f"{LEARN}__trainer": {"devices": 2, "num_nodes": 2, "accelerator": "cpu"}}
        whole |= {"cluster__exclusive": False, "cluster__mem": 100, **changes}
        cfg = chain.config(tmp_path, "bcm", *(stages or (LEARN,)), **whole)
        (tmp_path / "checkout/src/graftwerk/__main__.py").write_text(STAGE)
        assert launch(cfg, []) == 0
        return Launched(slurm, cfg)

    return submitted


def test_a_chain_runs_in_order_one_task_for_each_device(submit):
    chained = submit(PREP, LEARN, EVAL)
    chained.wait("COMPLETED", EVAL)
    began = [chained.met(stage=stage)[0]["began"] for stage in (PREP, LEARN, EVAL)]
    assert began == sorted(began)
    ranks = [met["env"] for met in chained.met()]
    assert [env["SLURMD_NODENAME"] for env in ranks] == ["n1", "n1", "n2", "n2"]
    assert [env["SLURM_LOCALID"] for env in ranks] == ["0", "1", "0", "1"]
    assert {env["MASTER_ADDR"] for env in ranks} == {"n1"}
    assert len({env["MASTER_PORT"] for env in ranks}) == 1


def test_after_a_failed_stage_the_next_never_starts_and_status_says_why(submit, tmp_path, capsys):
    chained = submit(PREP, LEARN, EVAL, adapter_learning__behave={"exit": {"2": 1}})
    assert chained.wait_for_end(EVAL) == "CANCELLED"
    state = chained.state()
    assert (state["state"], state["exit_code"], state["requeues"]) == ("FAILED", 1, 0)
    assert re.search("rank 2 on n2: failed with exit code 1", chained.log(kind="err"))
    capsys.readouterr()
    assert main(["action=status", f"results={tmp_path}/results"]) == 0
    table = capsys.readouterr().out
    assert re.search(f"{LEARN} +FAILED .* exit code 1: ValueError: no rows are left", table)
    assert re.search(f"{EVAL} +CANCELLED .* {LEARN} is FAILED", table)
    assert chained.met(stage=EVAL) == []


def test_a_signal_queues_a_job_anew_in_the_same_folder_and_log(submit, slurm):
    chained = submit(LEARN, EVAL, adapter_learning__behave={"sleeps": 2})
    for run in (0, 1):
        chained.wait_for_ranks(4, run)
        slurm.ask("scancel", "--signal=USR1", chained.state()["job_id"])
        chained.wait("REQUEUED")
        assert chained.state()["requeues"] == run + 1
        chained.hasten()
    chained.wait("COMPLETED", EVAL)
    assert chained.state()["state"] == "COMPLETED"
    assert chained.job()["Restarts"] == "2"
    lines = [f"run {run} of rank 0" for run in range(3)]
    assert [line for line in chained.log().splitlines() if line in lines] == lines
    assert chained.state()["submitted"] < chained.state()["started"]


@pytest.mark.long
def test_after_the_last_requeue_the_job_fails_with_a_clear_line(submit, slurm):
    changes = {"adapter_learning__run__max_requeues": 1, "adapter_learning__behave": {"sleeps": 9}}
    chained = submit(LEARN, EVAL, **changes)
    for run in (0, 1):
        chained.wait_for_ranks(4, run)
        slurm.ask("scancel", "--signal=USR1", chained.state()["job_id"])
        if run == 0:
            chained.wait("REQUEUED")
            chained.hasten()
    chained.wait("FAILED")
    assert chained.state()["exit_code"] == 75
    assert "where run.max_requeues=1: launch it again" in chained.log(kind="err")
    assert chained.wait_for_end(EVAL) == "CANCELLED"


def test_scancel_is_no_requeue(submit, slurm):
    chained = submit(adapter_learning__behave={"sleeps": 9})
    chained.wait_for_ranks(4)
    slurm.ask("scancel", chained.state()["job_id"])
    chained.wait("CANCELLED")
    assert chained.wait_for_end() == "CANCELLED"
    assert chained.state()["requeues"] == 0


@pytest.mark.long
def test_scancel_is_no_requeue_at_whatever_moment_it_comes(submit, slurm):
    """Between the script's first line and the start of its processes too."""
    for moment in range(24):
        chained = submit(adapter_learning__behave={"sleeps": 9})
        until(lambda one=chained: one.job()["JobState"] == "RUNNING", 20, "the job", chained.tell)
        time.sleep(moment * 0.04)
        slurm.ask("scancel", chained.state()["job_id"])
        assert chained.wait_for_end() == "CANCELLED"
        until(lambda: not slurm.ask("squeue", "--noheader"), 20, "an empty queue", chained.tell)


def test_a_killed_rank_is_named_and_the_job_queued_anew(submit, slurm):
    chained = submit(adapter_learning__behave={"sleeps": 1})
    chained.wait_for_ranks(4)
    slurm.kill_rank(chained.state()["job_id"], 3)
    started = time.monotonic()
    chained.wait("REQUEUED")
    assert time.monotonic() - started < 60
    assert "rank 3 on n2: killed by signal KILL" in chained.log(kind="err")
    chained.hasten()
    chained.wait("COMPLETED")


def test_a_lost_node_queues_the_job_anew_on_others(submit, slurm):
    chained = submit(adapter_learning__behave={"sleeps": 1})
    chained.wait_for_ranks(4)
    slurm.crash("n2")
    slurm.ask("scontrol", "update", "nodename=n2", "state=down", "reason=crashed")
    until(lambda: chained.job()["JobState"] == "PENDING", 60, "PENDING", chained.tell)
    chained.hasten()
    chained.wait("COMPLETED")
    assert chained.state()["requeues"] == 1
    assert {met["env"]["SLURMD_NODENAME"] for met in chained.met(1)} == {"n1", "n3"}


def test_a_killed_slurmd_queues_the_job_anew_once_slurm_misses_it(submit, slurm):
    chained = submit(adapter_learning__behave={"sleeps": 1})
    chained.wait_for_ranks(4)
    slurm.kill_daemon("n2")
    slurm.ask("scontrol", "update", "nodename=n2", "state=down", "reason=missed")
    chained.hasten()
    chained.wait("COMPLETED")
    assert chained.state()["requeues"] == 1


@pytest.mark.long
def test_an_error_that_comes_of_a_lost_node_is_none_of_the_jobs_own(submit, slurm):
    """The other ranks fail at once; Slurm misses the node some minutes later."""
    chained = submit(
        adapter_learning__behave={"exit": {"0": 1}, "file": "lost"},
        cluster__srun_args=["--wait=5"],
    )
    chained.wait_for_ranks(4)
    slurm.crash("n2")
    (chain.results(chained.cfg, LEARN) / "lost").touch()
    chained.wait("REQUEUED", seconds=90)
    assert "a node was lost: queued anew (1 of" in chained.log()


def test_jobs_of_one_name_run_one_after_the_other(submit, slurm):
    chained = submit(adapter_learning__behave={"sleeps": 9})
    chained.wait_for_ranks(4)
    first = chained.state()["job_id"]
    script = chain.script(chained.cfg, LEARN)
    second = slurm.ask("sbatch", "--parsable", str(script)).strip()
    assert slurm.job(second)["Reason"] in ("Dependency", "None")
    time.sleep(1)
    assert slurm.job(second)["JobState"] == "PENDING"
    slurm.ask("scancel", first)
    until(lambda: slurm.job(second)["JobState"] == "RUNNING", 40, "the second", chained.tell)


def test_jobs_that_share_their_nodes_meet_at_ports_of_their_own(submit, slurm, tmp_path):
    """Also where another program sits on the port that a job would try first."""
    sit = "import os, socket, time; s = socket.socket(); "
    sit += "s.bind(('', 15001 + int(os.environ['SLURM_JOB_ID']))); s.listen(); time.sleep(600)"
    wrapped = f"exec {sys.executable} -c {shlex.quote(sit)}"
    other = slurm.ask(
        *("sbatch", "--parsable", "--nodelist=n1", "--output=/dev/null", "--wrap", wrapped)
    ).strip()
    until(lambda: slurm.job(other)["JobState"] == "RUNNING", 20, "the other program")
    time.sleep(1)
    both = [
        submit(
            cluster__nodelist="n[1-2]",
            adapter_learning__behave={"sleeps": 1},
            adapter_learning__run__name=name,
            adapter_learning__run__results_dir=str(tmp_path / name),
        )
        for name in ("first", "second")
    ]
    assert int(both[0].state()["job_id"]) == int(other) + 1
    for one in both:
        one.wait_for_ranks(4)
    met = [[rank["env"] for rank in one.met()] for one in both]
    assert {env["MASTER_ADDR"] for ranks in met for env in ranks} == {"n1"}
    ports = [{env["MASTER_PORT"] for env in ranks} for ranks in met]
    assert [len(of_one) for of_one in ports] == [1, 1]
    taken = {str(15001 + int(other))}
    assert len(ports[0] | ports[1] | taken) == 3


def test_settings_of_the_cluster_reach_the_job(submit, slurm):
    chained = submit(
        cluster__constraint="fast",
        cluster__nodelist="n[2-3]",
        cluster__mem="300M",
        cluster__overcommit=True,
        cluster__sbatch_args=["--nice=7"],
        adapter_learning__trainer__accelerator="gpu",
    )
    chained.wait("COMPLETED")
    job = chained.job()
    assert (job["Features"], job["Nice"]) == ("fast", "7")
    assert {met["env"]["SLURMD_NODENAME"] for met in chained.met()} == {"n2", "n3"}
    assert job["MinMemoryNode"] == "300M"
    assert [met["env"]["CUDA_VISIBLE_DEVICES"] for met in chained.met()] == ["0", "1"] * 2
