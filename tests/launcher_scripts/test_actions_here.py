"""The actions where stages run on this machine: by `state.json`, the lock and the processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher_scripts import lock, standing
from launcher_scripts.main import main
from tests.launcher_scripts import chain

ROOT = Path(__file__).resolve().parents[2]
A = "adapter_learning"
# In place of a stage: waits where the test says so, and ends at once when it is told to.
STAGE = """
import os, sys, time
from pathlib import Path
stage, path = sys.argv[1:]
Path(path).with_name("began").touch()
print(stage, "began", flush=True)
if stage != "data_prep" and os.environ.get("WAIT", "") in path:
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`start("a=b", ...)` runs main.py in a process of its own."""
    launcher = chain.checkout(tmp_path / "checkout")
    (tmp_path / "checkout/src/graftwerk/__main__.py").write_text(STAGE)
    words = [
        f"stages=[data_prep,{A}]",
        "cluster_type=interactive",
        f"base_results_dir={tmp_path}/results",
        f"data_dir={tmp_path}/data",
        f"launcher_scripts_path={launcher}",
        f"{A}.model.language_model_path=org/name",
        f"{A}.trainer.devices=1",
        f"{A}.trainer.accelerator=cpu",
        f"{A}.trainer.precision=32",
    ]
    begun: list[subprocess.Popen[bytes]] = []

    def run(*typed: str, **environment: str) -> subprocess.Popen[bytes]:
        begun.append(
            subprocess.Popen(
                [sys.executable, ROOT / "main.py", *words, *typed],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **environment},
                cwd=tmp_path,
            )
        )
        return begun[-1]

    yield run
    for process in begun:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=30)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def learning(tmp_path: Path, point: str = "") -> Path:
    return tmp_path / "results/gpt3_5b/adapter_learning_squad" / point


def script(folder: Path) -> Path:
    (found,) = folder.glob("*_submission.sh")
    return found


def state(folder: Path) -> str:
    return json.loads((folder / "state.json").read_text())["state"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_stage_is_shown_and_cancelled_through_its_launcher(start, tmp_path, capsys):
    launcher = start()
    until((learning(tmp_path) / "began").exists)
    there = f"results={tmp_path}/results"
    shown = said(capsys, "action=status", there)
    assert "data_prep COMPLETED" in shown
    assert f"{A} RUNNING on " in shown
    pid = standing.process_of(script(learning(tmp_path)))
    assert f"cancelled {A}_squad_gpt3_5b" in said(capsys, "action=cancel", there)
    assert launcher.wait(timeout=30) == 143
    assert pid is not None
    assert not standing.alive(pid)
    assert state(learning(tmp_path)) == "CANCELLED"
    assert f"{A} CANCELLED" in said(capsys, "action=status", there)


def test_a_stage_whose_launcher_was_killed_is_still_shown_and_cancelled(start, tmp_path, capsys):
    launcher = start()
    until((learning(tmp_path) / "began").exists)
    launcher.kill()
    launcher.wait()
    there = f"results={learning(tmp_path)}"
    pid = standing.process_of(script(learning(tmp_path)))
    assert f"RUNNING on {lock.socket.gethostname()}" in said(capsys, "action=status", there)
    said(capsys, "action=cancel", there)
    assert pid is not None
    assert not standing.alive(pid)
    assert state(learning(tmp_path)) == "CANCELLED"


def test_a_stage_that_died_without_a_word_is_lost_and_can_be_resumed(start, tmp_path, capsys):
    launcher = start()
    until((learning(tmp_path) / "began").exists)
    pid = standing.process_of(script(learning(tmp_path)))
    assert pid is not None
    launcher.kill()
    launcher.wait()
    os.killpg(pid, signal.SIGKILL)
    until(lambda: not standing.alive(pid))
    there = f"results={tmp_path}/results"
    assert f"{A} LOST" in said(capsys, "action=status", there)
    (learning(tmp_path) / "began").unlink()
    (tmp_path / "results/data_prep_squad/began").unlink()
    again = start("action=resume", WAIT="nowhere")
    assert again.wait(timeout=60) == 0
    assert (learning(tmp_path) / "began").exists()
    assert not (tmp_path / "results/data_prep_squad/began").exists()
    assert state(learning(tmp_path)) == "COMPLETED"


def test_cancelling_a_point_of_a_sweep_lets_the_others_run(start, tmp_path, capsys):
    launcher = start("--multirun", f"{A}.model.seed=1,2,3", WAIT="seed_1")
    until((learning(tmp_path, "seed_1") / "began").exists)
    said(capsys, "action=cancel", f"results={learning(tmp_path, 'seed_2')}")  # before it began
    said(capsys, "action=cancel", f"results={learning(tmp_path, 'seed_1')}")
    assert launcher.wait(timeout=60) == 143
    states = [state(learning(tmp_path, f"seed_{seed}")) for seed in (1, 2, 3)]
    assert states == ["CANCELLED", "CANCELLED", "COMPLETED"]
    assert not (learning(tmp_path, "seed_2") / "began").exists()
    assert not list(tmp_path.rglob("lock.json"))


def test_a_signal_to_a_sweep_ends_all_of_it(start, tmp_path):
    launcher = start("--multirun", f"{A}.model.seed=1,2", WAIT="seed_1")
    until((learning(tmp_path, "seed_1") / "began").exists)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 130
    assert [state(learning(tmp_path, f"seed_{seed}")) for seed in (1, 2)] == ["CANCELLED"] * 2
    assert not (learning(tmp_path, "seed_2") / "began").exists()
