"""`cluster_type=bcp`: real scripts; a stand-in for bcprun."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from launcher_scripts.clusters.bcp import BaseCommand
from launcher_scripts.job import Group, Job, Resources
from launcher_scripts.pipeline import launch
from tests.launcher_scripts import chain

PREP, LEARN = "data_prep", "adapter_learning"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the stand-in notes how it was called."""
    chain.program(tmp_path / "bin", "bcprun", chain.BCPRUN)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("FAKE_BCP", str(tmp_path / "calls"))
    for variable in ("NGC_ARRAY_SIZE", "NGC_GPUS_PER_NODE", "NGC_JOB_ID"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "calls"


def read(calls: Path) -> list[list[str]]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_stages_run_here_one_after_the_other(calls, tmp_path, capfd):
    cfg = chain.config(tmp_path, "bcp", PREP, LEARN, adapter_learning__trainer__devices=2)
    assert launch(cfg, []) == 0
    first, second = read(calls)
    assert first[:4] == ["--nnodes", "1", "--npernode", "1"]
    assert second[:4] == ["--nnodes", "1", "--npernode", "2"]
    assert [chain.met(cfg, LEARN, rank)["env"]["LOCAL_RANK"] for rank in (0, 1)] == ["0", "1"]
    out = capfd.readouterr().out
    assert out.index("data_prep rank 0 at work") < out.index("adapter_learning rank 1 at work")


def test_job_names_have_no_prefix(calls, tmp_path):
    cfg = chain.config(tmp_path, "bcp", LEARN)
    cfg.cluster = chain.BCM  # as where `cluster: bcm` stays the default
    launch(cfg, [])
    assert chain.script(cfg, LEARN).name == "adapter_learning_squad_tiny_submission.sh"


@pytest.mark.parametrize("code", [1, 2, 3])
def test_first_failure_stops_the_chain_with_its_code(calls, tmp_path, capfd, code):
    cfg = chain.config(tmp_path, "bcp", PREP, LEARN, data_prep__behave={"exit": code})
    assert launch(cfg, []) == code
    assert not chain.ran(cfg, LEARN)
    state = chain.state(cfg, PREP)
    assert (state["state"], state["exit_code"]) == ("FAILED", code)


def test_output_is_in_the_log_and_on_standard_output_without_control_codes(calls, tmp_path, capfd):
    said = "\x1b[32mstep 1\x1b[0m\rstep 2\n"
    cfg = chain.config(tmp_path, "bcp", LEARN, adapter_learning__behave={"say": said})
    launch(cfg, [])
    (log,) = chain.results(cfg, LEARN).glob("log-adapter_learning_squad_tiny_*.out")
    assert "step 2" in log.read_text()
    assert "\nstep 1\nstep 2\n" in capfd.readouterr().out


def test_missing_bcprun_is_one_line_code_2_and_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(chain.config(tmp_path, "bcp", PREP), []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`bcprun`" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [("NGC_ARRAY_SIZE", "2", "num_nodes"), ("NGC_GPUS_PER_NODE", "4", "devices")],
)
def test_a_job_too_small_for_the_trainer_is_refused(
    calls, tmp_path, capsys, monkeypatch, variable, value, key
):
    monkeypatch.setenv(variable, value)
    trainer = {"devices": 8, "num_nodes": 3, "accelerator": "gpu"}
    cfg = chain.config(tmp_path, "bcp", LEARN, adapter_learning__trainer=trainer)
    assert launch(cfg, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"adapter_learning.trainer.{key}: ")
    assert f"{variable}={value}" in line
    assert not calls.exists()


def test_a_job_of_the_right_size_is_taken(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("NGC_ARRAY_SIZE", "1")
    monkeypatch.setenv("NGC_GPUS_PER_NODE", "2")
    monkeypatch.setenv("NGC_JOB_ID", "4711")
    trainer = {"devices": 2, "num_nodes": 1, "accelerator": "gpu"}
    cfg = chain.config(tmp_path, "bcp", LEARN, adapter_learning__trainer=trainer)
    assert launch(cfg, []) == 0
    assert chain.state(cfg, LEARN)["job_id"] == "4711"


def test_only_the_last_group_runs_on_all_nodes(tmp_path):
    job = Job(
        name="j",
        stage=LEARN,
        python="python3",
        groups=(Group(("true",)), Group(("true",))),
        resources=Resources(2, 8, 8, None),
        environment={},
        source=tmp_path,
        results_dir=tmp_path,
        config="",
    )
    lines = [line for line in BaseCommand({}).render(job).splitlines() if line.startswith("bcprun")]
    sizes = [line.split(" --cmd")[0] for line in lines]
    assert sizes == ["bcprun --nnodes 1 --npernode 1", "bcprun --nnodes 2 --npernode 8"]


def test_dry_run_runs_nothing_and_prints_where_the_scripts_are(calls, tmp_path, capsys):
    cfg = chain.config(tmp_path, "bcp", PREP, dry_run=True)
    assert launch(cfg, []) == 0
    assert not calls.exists()
    assert f"bash {chain.script(cfg, PREP)}" in capsys.readouterr().out


def test_a_checkpoint_says_how_to_go_on(calls, tmp_path, capfd):
    cfg = chain.config(tmp_path, "bcp", LEARN, adapter_learning__behave={"exit": 75})
    assert launch(cfg, []) == 75
    assert f"checkpointed; to go on: bash {chain.script(cfg, LEARN)}" in capfd.readouterr().out
    assert (chain.state(cfg, LEARN)["state"], chain.state(cfg, LEARN)["exit_code"]) == (
        "FAILED",
        75,
    )


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_the_script_goes_on_to_bcprun(tmp_path, monkeypatch, name):
    told = tmp_path / "told"
    chain.program(
        tmp_path / "bin",
        "bcprun",
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        f"def note(number, frame): Path({str(told)!r}).write_text(signal.Signals(number).name)\n"
        "signal.signal(signal.SIGUSR1, lambda *a: (note(*a), os._exit(75)))\n"
        "signal.signal(signal.SIGTERM, lambda *a: (note(*a), os._exit(75)))\n"
        "print('at work', flush=True); time.sleep(60)\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    cfg = chain.config(tmp_path, "bcp", LEARN, dry_run=True)
    assert launch(cfg, []) == 0
    command = ["bash", chain.script(cfg, LEARN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        next(line for line in script.stdout if "at work" in line)
        script.send_signal(getattr(signal, f"SIG{name}"))
        out = script.stdout.read()
    assert told.read_text() == f"SIG{name}"
    assert "checkpointed; to go on" in out
    ends = {"USR1": ("FAILED", 75), "TERM": ("CANCELLED", 143)}
    state = chain.state(cfg, LEARN)
    assert (state["state"], state["exit_code"]) == ends[name]
