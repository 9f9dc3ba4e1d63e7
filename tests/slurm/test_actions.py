"""`action=...` and true state on a real Slurm, without accounts and with."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher_scripts.main import main
from tests.launcher_scripts import chain
from tests.slurm.cluster import Cluster, cluster, lacking, until

ROOT = Path(__file__).resolve().parents[2]
PREP, LEARN, EVAL = "data_prep", "adapter_learning", "eval"
FORGETS = 2  # seconds that the controller remembers a job for; it looks every ten

# In place of a stage: learning goes on until the file `enough` is there.
STAGE = """
import os, sys, time
from pathlib import Path
stage, path = sys.argv[1:]
print(f"{stage} began", flush=True)
while stage == "adapter_learning" and not Path(os.environ["ENOUGH"]).exists():
    time.sleep(0.1)
print(f"{stage} done", flush=True)
"""


NONE = pytest.param(False, id="no-accounts")
KEPT = pytest.param(True, id="accounts", marks=pytest.mark.long)


@pytest.fixture(scope="module")
def slurm(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if why := lacking(accounts=request.param):
        pytest.skip(why)
    with cluster(nodes=1, accounts=request.param, memory=FORGETS) as running:
        yield running


class Chain:
    """Three stages on the cluster."""

    def __init__(self, slurm: Cluster, root: Path) -> None:
        self.slurm, self.root = slurm, root
        self.words = [
            f"stages=[{PREP},{LEARN},{EVAL}]",
            f"base_results_dir={root}/results",
            f"data_dir={root}/data",
            f"launcher_scripts_path={chain.checkout(root / 'checkout')}",
            "cluster.exclusive=False",
            "cluster.mem=50",
            "cluster.gpus_per_task=null",
        ]
        (root / "checkout/src/graftwerk/__main__.py").write_text(STAGE)
        for stage in (LEARN, EVAL):
            self.words += [
                f"{stage}.model.language_model_path=org/name",
                f"{stage}.trainer.devices=1",
                f"{stage}.trainer.accelerator=cpu",
                f"{stage}.trainer.precision=32",
            ]

    def folder(self, stage: str) -> Path:
        where = {PREP: "data_prep_squad", LEARN: "gpt3_5b/adapter_learning_squad"}
        return self.root / "results" / where.get(stage, "gpt3_5b/eval_squad")

    def state(self, stage: str) -> dict:
        return json.loads((self.folder(stage) / "state.json").read_text())

    def wait(self, stage: str, state: str) -> None:
        until(lambda: self.state(stage)["state"] == state, 60, f"{stage} {state}", self.tell)

    def tell(self) -> str:
        logs = [path.read_text() for path in self.root.rglob("log-*")]
        return "\n".join([self.slurm.ask("squeue"), *logs])

    def log(self, stage: str) -> str:
        return "".join(path.read_text() for path in self.folder(stage).glob("log-*.out"))

    def enough(self) -> None:
        (self.root / "enough").touch()


@pytest.fixture
def launched(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """A chain whose second stage runs."""
    monkeypatch.setenv("PATH", slurm.programs())
    monkeypatch.setenv("ENOUGH", str(tmp_path / "enough"))
    monkeypatch.chdir(tmp_path)
    started = Chain(slurm, tmp_path)
    assert main(started.words) == 0
    started.wait(LEARN, "RUNNING")
    until(lambda: "began" in started.log(LEARN), 30, "the stage", started.tell)
    return started


@pytest.fixture
def call(launched: Chain, capfd) -> Callable[..., tuple[int, str, str]]:
    """`call("action=status", ...)`: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([*launched.words, *words])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each stage."""
    lines = [line.split("  ") for line in table.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {line[0]: line[1:] for line in cells if line and line[0] in (PREP, LEARN, EVAL)}


@pytest.mark.parametrize("slurm", [NONE, KEPT], indirect=True)
def test_status_logs_cancel_and_resume_of_a_chain(launched, call, slurm):
    table = rows(call("action=status")[1])
    jobs = [launched.state(stage)["job_id"] for stage in (PREP, LEARN, EVAL)]
    assert table[PREP][:2] == ["COMPLETED", jobs[0]]
    assert table[LEARN][:2] == ["RUNNING on n1", jobs[1]]
    assert table[EVAL] == ["PENDING", jobs[2], "-", f"waits for {LEARN}"]

    code, out, err = call("action=logs")
    assert (code, out) == (0, f"{LEARN} began\n")
    assert str(launched.folder(LEARN)) in err

    code, out, _ = call("action=cancel")
    assert code == 0
    names = [f"nemo-megatron-{stage}_squad_gpt3_5b" for stage in (EVAL, LEARN)]
    assert out.splitlines() == [
        f"cancelled {name} (job {job})" for name, job in zip(names, (jobs[2], jobs[1]), strict=True)
    ]
    assert slurm.ask("squeue", "--noheader") == ""
    ends = {stage: cells[0] for stage, cells in rows(call("action=status")[1]).items()}
    assert ends == {PREP: "COMPLETED", LEARN: "CANCELLED", EVAL: "CANCELLED"}

    launched.enough()
    assert call("action=resume")[0] == 0
    launched.wait(EVAL, "COMPLETED")
    assert launched.state(PREP)["job_id"] == jobs[0]
    assert launched.state(LEARN)["job_id"] != jobs[1]


@pytest.mark.long
@pytest.mark.parametrize("slurm", [NONE], indirect=True)
def test_status_and_logs_are_watched_until_all_has_ended(launched, call):
    command = [sys.executable, str(ROOT / "main.py"), "watch=True", *launched.words]
    watching, said = [], []
    for action in ("status", "logs"):
        said.append(launched.root / f"{action}.txt")
        with open(said[-1], "w") as out:
            watching.append(subprocess.Popen([*command, f"action={action}"], stdout=out))
    until(lambda: said[1].read_text() == f"{LEARN} began\n", 90, "the log", launched.tell)
    assert [process.poll() for process in watching] == [None, None]
    launched.enough()
    for process in watching:
        process.wait(90)
    status, logs = (path.read_text() for path in said)
    assert [process.returncode for process in watching] == [0, 0]
    assert {cells[0] for cells in rows(status).values()} == {"COMPLETED"}
    assert logs == f"{LEARN} began\n{LEARN} done\n"


@pytest.mark.parametrize("slurm", [NONE], indirect=True)
def test_no_second_launch_joins_a_job_that_is_queued_or_runs(launched, call):
    running, queued = (launched.state(stage)["job_id"] for stage in (LEARN, EVAL))
    for own in ("singleton", "null"):
        code, _, err = call(f"{LEARN}.run.dependency={own}")
        assert code == 2
        assert f"{LEARN}.run.results_dir: job {running} (RUNNING on n1" in err
        assert f"{EVAL}.run.results_dir: job {queued} (PENDING" in err
    assert [launched.state(stage)["job_id"] for stage in (LEARN, EVAL)] == [running, queued]
    launched.enough()
    launched.wait(EVAL, "COMPLETED")
    assert call()[0] == 0  # over, and launched again


@pytest.mark.parametrize("slurm", [NONE, KEPT], indirect=True)
def test_an_end_that_no_script_could_write_is_told_by_the_accounts(launched, call, slurm):
    """The script is killed; a controller that has forgotten the job leaves nothing else."""
    job = launched.state(LEARN)["job_id"]
    slurm.ask("scancel", "--batch", "--signal=KILL", job)
    until(lambda: not slurm.ask("squeue", "--noheader"), 40, "the end")
    assert launched.state(LEARN)["state"] == "RUNNING"
    until(lambda: slurm.run("scontrol", "show", "job", job).returncode, 60, "forgotten")
    table = rows(call("action=status")[1])
    known = "FAILED" if slurm.accounts else "LOST"
    assert table[LEARN][0] == known
    assert (f"Slurm knows no job {job}" in table[LEARN]) == (known == "LOST")
    assert (table[EVAL][0], table[EVAL][-1]) == ("CANCELLED", f"{LEARN} is {known}")
    launched.enough()
    assert call("action=resume")[0] == 0
    launched.wait(EVAL, "COMPLETED")
