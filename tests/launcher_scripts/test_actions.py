"""`action=status|logs|cancel|resume` over Slurm, with stand-ins for its commands."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from launcher_scripts import manifest, state
from launcher_scripts.actions import truth
from launcher_scripts.main import main
from tests.launcher_scripts import chain

ROOT = Path(__file__).resolve().parents[2]
A = "adapter_learning"

# What the controller and the accounts know, as files of the test say: id -> "STATE|reason".
SQUEUE = """
import json, os, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
if not (home / "queue").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
with open(home / "asked", "a") as file:
    print("squeue", file=file)
known = json.loads((home / "queue").read_text())
for name, standing in known.items():
    word, _, reason = standing.partition("|")
    print(f"{name}|{name.split('_')[0]}|{word}|{'n1' if word == 'RUNNING' else ''}|{reason}")
"""
SACCT = """
import json, os, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
if not (home / "accounts").exists():
    sys.exit("Slurm accounting storage is disabled")
print("JobID|JobIDRaw|State|NodeList")
for name, word in json.loads((home / "accounts").read_text()).items():
    print(f"{name}|{name}|{word}|n1")
"""
SCANCEL = """
import json, os, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
with open(home / "cancelled", "a") as file:
    print(*sys.argv[1:], file=file)
known = json.loads((home / "queue").read_text())
known |= {name: "CANCELLED|None" for name in sys.argv[1:]}
(home / "queue").write_text(json.dumps(known))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    tools = {"sbatch": chain.SBATCH, "srun": chain.SRUN, "scancel": SCANCEL}
    for name, source in {**tools, "squeue": SQUEUE, "sacct": SACCT}.items():
        chain.program(tmp_path / "bin", name, source)
    home = tmp_path / "slurm"
    home.mkdir()
    (home / "jobs").write_text("0")
    (home / "queue").write_text("{}")
    (home / "hold").touch()  # nothing runs unless a test says so
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return home


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """A chain of three stages of which each only writes that it ran."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    launcher = chain.checkout(tmp_path / "checkout")
    return [
        f"stages=[data_prep,{A},eval]",
        f"base_results_dir={tmp_path}/results",
        f"data_dir={tmp_path}/data",
        f"launcher_scripts_path={launcher}",
        *(
            f"{stage}.{word}"
            for stage in (A, "eval")
            for word in (
                "model.language_model_path=org/name",
                "trainer.devices=1",
                "trainer.accelerator=cpu",
                "trainer.precision=32",
            )
        ),
    ]


@pytest.fixture
def there(tmp_path) -> str:
    """All that was launched, by its folder: nothing is composed."""
    return f"results={tmp_path}/results"


@pytest.fixture
def call(capfd) -> Callable[..., tuple[int, str, str]]:
    """`call("action=status", ...)`: exit code, standard output, standard error without notes."""

    def run(*typed: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(typed))
        said = capfd.readouterr()
        errors = [line for line in said.err.splitlines() if not line.startswith("note: ")]
        return code, said.out, "\n".join(errors)

    return run


def results(tmp_path: Path, stage: str) -> Path:
    where = {"data_prep": "data_prep_squad", A: "gpt3_5b/adapter_learning_squad"}
    return tmp_path / "results" / where.get(stage, "gpt3_5b/eval_squad")


def queue(home: Path, **standing: str) -> None:
    """What the controller knows: `queue(home, j1001="RUNNING")`."""
    (home / "queue").write_text(json.dumps({k[1:]: v for k, v in standing.items()}))


def tell(folder: Path, **changes: object) -> None:
    """Change a stage's state.json, as its script would."""
    told = state.read(folder / "state.json") or {}
    (folder / "state.json").write_text(json.dumps({**told, **changes}))


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def row(out: str, name: str) -> list[str]:
    """The cells of a line of a table."""
    (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
    return [cell.strip() for cell in line.split("   ") if cell.strip()]


# -- status


def test_status_shows_every_stage_with_its_true_state(slurm, words, call, tmp_path):
    assert call(*words)[0] == 0
    tell(results(tmp_path, "data_prep"), state="COMPLETED", started=ago(7300), ended=ago(3600))
    tell(results(tmp_path, A), state="RUNNING", started=ago(30))
    queue(slurm, j1002="RUNNING", j1003="PENDING|Dependency")
    code, out, err = call(*words, "action=status")
    assert (code, err) == (0, "")
    assert row(out, "data_prep") == ["data_prep", "COMPLETED", "1001", "1h 1m"]
    assert row(out, A)[:3] == [A, "RUNNING on n1", "1002"]
    assert row(out, "eval") == ["eval", "PENDING", "1003", "-", f"waits for {A}"]


def test_a_folder_says_the_same_as_the_words(slurm, words, call, tmp_path):
    call(*words)
    queue(slurm, j1001="PENDING|Priority", j1002="PENDING|Dependency", j1003="PENDING|Dependency")
    expected = call(*words, "action=status")
    for folder in (tmp_path / "results", results(tmp_path, A)):
        assert call("action=status", f"results={folder}") == expected


def test_progress_is_step_losses_and_time_left(slurm, words, call, tmp_path, there):
    call(*words)
    tell(results(tmp_path, A), state="RUNNING", started=ago(30))
    queue(slurm, j1002="RUNNING")
    told = {"step": 30, "max_steps": 100, "train_loss": 0.51234, "val_loss": None}
    told |= {"seconds_left": 3730.0, "updated": ago(100)}
    folder = results(tmp_path, A) / "results"
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps(told))
    assert row(call("action=status", there)[1], A)[4] == "step 30/100, loss 0.5123, ETA 1h 0m"


def test_a_job_that_slurm_does_not_know_is_lost(slurm, words, call, tmp_path, there):
    call(*words)
    tell(results(tmp_path, "data_prep"), state="RUNNING", started=ago(30))
    out = call("action=status", there)[1]
    assert row(out, "data_prep")[1] == "LOST"
    assert row(out, "data_prep")[-1] == "Slurm knows no job 1001"


def test_a_task_that_was_taken_out_of_its_array_is_cancelled(slurm, words, call, there):
    call("--multirun", *words, f"{A}.model.seed=1,2,3,4")
    accounts = {"1001": "RUNNING", "1002_[0,2-3%4]": "CANCELLED by 0"}
    (slurm / "accounts").write_text(json.dumps(accounts))
    out = call("action=status", there)[1]
    assert row(out, "seed_2")[-2:] == ["-", "it left the queue before it began"]
    assert [row(out, f"seed_{n}")[2] for n in (1, 2, 3, 4)] == ["CANCELLED"] * 4


def test_where_slurm_does_not_answer_nothing_is_lost(slurm, words, call, tmp_path, there):
    call(*words)
    tell(results(tmp_path, "data_prep"), state="RUNNING", started=ago(30))
    (slurm / "queue").unlink()
    line = row(call("action=status", there)[1], "data_prep")
    assert (line[1], line[-1]) == ("RUNNING", "Slurm does not answer: by state.json")


@pytest.mark.parametrize("where", ["queue", "accounts"])
def test_an_end_that_no_script_could_write_is_slurms_word(
    slurm, words, call, tmp_path, where, there
):
    call(*words)
    tell(results(tmp_path, "data_prep"), state="RUNNING", started=ago(30))
    (slurm / where).write_text(json.dumps({"1001": "NODE_FAIL", "1002": "CANCELLED by 0"}))
    out = call("action=status", there)[1]
    assert row(out, "data_prep")[1] == "NODE_FAIL"
    assert (
        row(out, A)[1:] == ["CANCELLED", "1002", "-", "data_prep is NODE_FAIL"] or where == "queue"
    )


def test_a_failed_stage_says_its_last_error(slurm, words, call, tmp_path, there):
    (slurm / "hold").unlink()
    assert call(*words)[0] == 0
    tell(results(tmp_path, A), state="FAILED", exit_code=1)
    (log,) = results(tmp_path, A).glob("log-*.err")
    log.write_text(
        "warning: 3 rows failed\nTraceback (most recent call last):\n  File x\n"
        "ValueError: loss is \x1b[1mnan\x1b[0m\nrank 0 on n1: failed with exit code 1\n"
        "srun: error: n1: task 0: Exited with exit code 193\n"
    )
    assert row(call("action=status", there)[1], A)[-1] == "exit code 1: ValueError: loss is nan"


def test_a_requeued_job_says_how_often(slurm, words, call, tmp_path, there):
    call(*words)
    tell(results(tmp_path, "data_prep"), state="REQUEUED", requeues=2, started=ago(9))
    queue(slurm, j1001="PENDING|BeginTime")
    cells = row(call("action=status", there)[1], "data_prep")
    assert cells == ["data_prep", "REQUEUED (requeued 2x)", "1001", "-", "BeginTime"]


def test_the_cluster_is_asked_once_for_a_whole_sweep(slurm, words, call):
    sweep = ["--multirun", *words, f"{A}.model.seed=range(6)"]
    assert call(*sweep)[0] == 0
    (slurm / "asked").write_text("")
    call(*sweep, "action=status")
    assert (slurm / "asked").read_text() == "squeue\n"


def test_a_sweep_is_a_table_of_points_with_the_best(slurm, words, call, tmp_path):
    sweep = ["--multirun", *words, f"{A}.model.seed=1,2,3"]
    call(*sweep)
    tell(results(tmp_path, "data_prep"), state="COMPLETED")
    for seed, loss in ((1, 0.5), (2, 0.25), (3, float("nan"))):
        folder = results(tmp_path, A) / f"seed_{seed}"
        tell(folder, state="COMPLETED", started=ago(9), ended=ago(8))
        (folder / "results").mkdir()
        (folder / "results/progress.json").write_text(json.dumps({"best_val_loss": loss}))
    queue(slurm, j1003_0="RUNNING", j1003_1="PENDING|Priority", j1003_2="FAILED")
    tell(results(tmp_path, "eval") / "seed_1", started=ago(3605), state="RUNNING")
    _, out, _ = call(*sweep, "action=status")
    assert row(out, "seed_1") == ["seed_1", "eval", "RUNNING on n1", "1003_0", "1h 0m", "0.5"]
    assert row(out, "seed_2")[:6] == ["seed_2", "eval", "PENDING", "1003_1", "-", "0.25 best"]
    assert "3 points: 1 RUNNING, 1 PENDING, 1 FAILED; best val_loss 0.25: seed_2" in out


def test_watch_stays_until_all_has_ended(slurm, words, call, tmp_path, monkeypatch, there):
    from launcher_scripts.actions import status

    call(*words)
    for number, stage in enumerate(("data_prep", A, "eval"), start=1001):
        tell(results(tmp_path, stage), state="COMPLETED" if number < 1003 else "RUNNING")
    queue(slurm, j1003="RUNNING")
    looked = []

    def end(seconds: float) -> None:
        if seconds == status.EVERY:
            looked.append(seconds)
            tell(results(tmp_path, "eval"), state="COMPLETED")

    monkeypatch.setattr(status.time, "sleep", end)
    code, out, _ = call("action=status", there, "watch=True")
    assert (code, looked) == (0, [status.EVERY])
    assert row(out, "eval")[1] == "COMPLETED"


# -- logs


def test_logs_are_those_of_the_stage_that_is_named(slurm, words, call, there):
    (slurm / "hold").unlink()
    call(*words)
    code, out, err = call("action=logs", there, "stage=data_prep")
    assert (code, out) == (0, "data_prep rank 0 at work\n")
    assert err.startswith("==> ")


def test_without_a_name_the_failed_stage_is_shown(slurm, words, call, tmp_path, there):
    (slurm / "hold").unlink()
    call(*words)
    tell(results(tmp_path, A), state="FAILED")
    assert call("action=logs", there)[1] == f"{A} rank 0 at work\n"


def test_no_log_yet_is_said_with_the_reason(slurm, words, call, there):
    call(*words)
    queue(slurm, j1001="PENDING|Resources")
    code, out, err = call("action=logs", there, "stage=data_prep")
    assert (code, out, err) == (1, "", "data_prep has no log yet: it is PENDING (Resources)")


def test_several_launches_in_one_root_are_all_shown_and_none_is_cancelled(
    slurm, words, call, tmp_path, there
):
    call(*words, "stages=data_prep")
    call(*words, "stages=data_prep", f"data_prep.run.results_dir={tmp_path}/results/other")
    queue(slurm, j1001="RUNNING", j1002="PENDING|Priority")
    out = call("action=status", there)[1]
    shown = [line.split() for line in out.splitlines() if line.split()[:1] == ["data_prep"]]
    assert [line[1] for line in shown] == ["RUNNING", "PENDING"]
    code, _, err = call("action=cancel", there)
    assert code == 2
    assert err.startswith(f"results: 2 launches share {tmp_path}/results; name a stage's: ")


def test_following_a_log_ends_with_its_job(slurm, words, call, tmp_path, monkeypatch, there):
    from launcher_scripts.actions import logs

    monkeypatch.setattr(logs, "EVERY", 0.02)
    monkeypatch.setattr(logs, "ASK_EVERY", 0.05)
    call(*words)
    folder = results(tmp_path, "data_prep")
    tell(folder, state="RUNNING", started=ago(1))
    queue(slurm, j1001="RUNNING")
    log = folder / "log-nemo-megatron-data_prep_squad_1001.out"

    def work() -> None:
        for number in range(3):
            with open(log, "a") as file:
                file.write(f"line {number}\n")
            time.sleep(0.1)
        with open(log, "a") as file:
            file.write("last\n")
        tell(folder, state="COMPLETED")

    worker = threading.Thread(target=work)
    worker.start()
    code, out, _ = call("action=logs", there, "stage=data_prep", "watch=True")
    worker.join()
    assert (code, out) == (0, "line 0\nline 1\nline 2\nlast\n")


def test_a_sweeps_log_is_of_a_point(slurm, words, call, there):
    sweep = ["--multirun", *words, f"{A}.model.seed=1,2"]
    (slurm / "hold").unlink()
    call(*sweep)
    code, _, err = call("action=logs", there)
    assert (code, err) == (2, "point: say which one; there are seed_1, seed_2")
    code, out, _ = call("action=logs", there, "point=seed_2", f"stage={A}")
    assert (code, out) == (0, f"{A} rank 0 at work\n")


# -- cancel


def test_cancel_ends_the_whole_chain_the_last_first(slurm, words, call, tmp_path, there):
    call(*words)
    tell(results(tmp_path, "data_prep"), state="RUNNING", started=ago(1))
    queue(slurm, j1001="RUNNING", j1002="PENDING|Dependency", j1003="PENDING|Dependency")
    assert call("action=cancel", there)[0] == 0
    assert (slurm / "cancelled").read_text().split() == ["1003", "1002", "1001"]
    states = [state.read(results(tmp_path, s) / "state.json") for s in ("data_prep", A, "eval")]
    assert [one and one["state"] for one in states] == ["CANCELLED"] * 3


def test_cancelling_a_point_leaves_the_others_and_what_they_share(slurm, words, call, tmp_path):
    sweep = ["--multirun", *words, f"{A}.model.seed=1,2"]
    call(*sweep)
    queue(
        slurm, j1001="RUNNING", **{f"j{n}_{t}": "PENDING|x" for n in (1002, 1003) for t in (0, 1)}
    )
    assert call("action=cancel", f"results={results(tmp_path, A)}/seed_2")[0] == 0
    assert (slurm / "cancelled").read_text().split() == ["1003_1", "1002_1"]


def test_a_job_that_was_put_back_into_the_queue_by_hand_holds_its_folder(slurm, words, call):
    (slurm / "hold").unlink()
    call(*words)
    for path in (slurm.parent / "results").rglob("state.json"):
        tell(path.parent, state="FAILED")
    queue(slurm, j1001="COMPLETING")
    assert call(*words)[0] == 0
    for path in (slurm.parent / "results").rglob("state.json"):
        tell(path.parent, state="FAILED")
    queue(slurm, j1004="PENDING|BeginTime")
    code, _, err = call(*words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "job 1004 (PENDING, submitted" in err


def test_nothing_to_cancel_is_no_error(slurm, words, call, there):
    (slurm / "hold").unlink()
    call(*words)
    assert call("action=cancel", there)[:2] == (
        0,
        "nothing to cancel: no stage is queued or running\n",
    )


# -- resume


def fail(slurm: Path, words: list[str], call, tmp_path: Path) -> None:
    """A chain whose second stage failed and whose third never ran."""
    call(*words)
    tell(results(tmp_path, "data_prep"), state="COMPLETED")
    tell(results(tmp_path, A), state="FAILED", exit_code=1, started=ago(2), ended=ago(1))
    queue(slurm, j1003="CANCELLED|DependencyNeverSatisfied")


def test_resume_submits_from_the_first_stage_that_did_not_succeed(slurm, words, call, tmp_path):
    fail(slurm, words, call, tmp_path)
    assert call(*words, "action=resume")[0] == 0
    assert (slurm / "jobs").read_text() == "5"
    first, second = (json.loads((slurm / f"{n}.json").read_text()) for n in (1004, 1005))
    assert A in first["--job-name"]
    assert "afterok" not in first["--dependency"]
    assert second["--dependency"].startswith("afterok:1004")


def test_a_folder_is_resumed_by_the_words_of_its_launch(slurm, words, call, tmp_path):
    fail(slurm, words, call, tmp_path)
    code, *_ = call(
        "action=resume", f"results={results(tmp_path, A)}", f"{A}.run.time_limit='9:00'"
    )
    assert code == 0
    assert json.loads((slurm / "1004.json").read_text())["--time"] == "9:00"
    assert len(manifest.read(tmp_path / "results")) == 1


def test_resume_refuses_words_that_compute_something_else(slurm, words, call, tmp_path):
    fail(slurm, words, call, tmp_path)
    code, _, err = call(*words, f"{A}.model.optim.lr=0.5", "action=resume")
    assert (code, (slurm / "jobs").read_text()) == (2, "3")
    assert err.startswith(f"{A}.model.optim.lr: 0.5, but the run to resume has 0.")
    (config,) = results(tmp_path, A).glob("*_hydra.yaml")
    assert yaml.safe_load(config.read_text())["model"]["optim"]["lr"] != 0.5


def test_resume_takes_another_layout_and_time_limit(slurm, words, call, tmp_path):
    fail(slurm, words, call, tmp_path)
    assert (
        call(*words, f"{A}.trainer.devices=2", f"{A}.run.time_limit='8:00'", "action=resume")[0]
        == 0
    )
    assert json.loads((slurm / "1004.json").read_text())["--ntasks-per-node"] == "2"


def test_a_chain_that_goes_on_is_not_resumed(slurm, words, call):
    call(*words)
    queue(slurm, j1001="RUNNING", j1002="PENDING|x", j1003="PENDING|x")
    code, _, err = call(*words, "action=resume")
    assert (code, (slurm / "jobs").read_text()) == (2, "3")
    assert err.startswith("nothing to resume: data_prep (job 1001) is RUNNING")


def test_resuming_a_sweep_takes_only_the_points_that_failed(slurm, words, call, tmp_path):
    sweep = ["--multirun", *words, f"{A}.model.seed=1,2,3,4"]
    (slurm / "hold").unlink()
    call(*sweep)
    for seed in (2, 4):
        tell(results(tmp_path, A) / f"seed_{seed}", state="FAILED")
        tell(results(tmp_path, "eval") / f"seed_{seed}", state="CANCELLED")
    assert call(*sweep, "action=resume")[0] == 0
    again = [json.loads((slurm / f"{n}.json").read_text()) for n in (1004, 1005)]
    assert [options["--array"] for options in again] == ["0-1", "0-1"]
    assert again[1]["--dependency"].startswith("aftercorr:1004")
    assert (slurm / "jobs").read_text() == "5"
    states = [truth.state.read(p) for p in (tmp_path / "results").rglob("state.json")]
    assert {one and one["state"] for one in states} == {"COMPLETED"}


# -- words


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["action=statsu"], "action: statsu is none; did you mean status?"),
        (["action=cancel", "watch=True"], "watch: goes with action=status or logs, not cancel"),
        (["action=status", "watch=perhaps"], "watch: perhaps is neither True nor False"),
        (["action=status", "results=/no/such"], "results: there is no folder /no/such"),
        (["watch=True"], "watch: no such key; it goes with action=status or action=logs"),
        (["action=status", "stages=nope"], "stages=nope: "),
    ],
)
def test_wrong_words_are_one_line_and_code_2(words, call, typed, said):
    code, out, err = call(*typed)
    assert (code, out) == (2, "")
    assert err.startswith(said)
    assert len(err.splitlines()) == 1


def test_an_empty_folder_is_one_line_and_code_2(words, call, tmp_path):
    code, _, err = call("action=status", f"results={tmp_path}/here")
    assert code == 2
    assert err.startswith(f"results: nothing was launched in {tmp_path}/here")


def test_actions_import_nothing_heavy_and_rich_only_for_a_table(slurm, words, call, tmp_path):
    call(*words)
    code = (
        "import sys; from launcher_scripts.main import main; main(sys.argv[1:]);"
        "heavy = {'submitit', 'torch', 'numpy', 'rich', 'transformers', 'datasets', 'lightning'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    for action, expected in (("cancel", "[]"), ("status", "['rich']")):
        done = subprocess.run(
            [sys.executable, "-c", code, f"action={action}", f"results={tmp_path}/results"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines()[-1] == expected
