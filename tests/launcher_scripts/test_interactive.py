"""`cluster_type=interactive`: scripts run by real bash on this machine."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from launcher_scripts.pipeline import launch
from tests.launcher_scripts import chain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_chain_runs_in_order_and_leaves_every_file(tmp_path, capfd):
    cfg = chain.config(tmp_path, "interactive", "data_prep", "adapter_learning")
    assert launch(cfg, []) == 0
    for stage in cfg.stages:
        folder = chain.results(cfg, stage)
        names = {re.sub(r"\d{4}_\d{6}", "TIME", path.name) for path in folder.iterdir()}
        job = f"{stage}_squad_tiny"
        assert names == {
            f"{job}_hydra.yaml",
            f"{job}_submission.sh",
            f"log-{job}_TIME.out",
            "launcher_cmd.log",
            "state.json",
            "met-0.json",
        }
    assert os.listdir(".") == []
    out = capfd.readouterr().out
    assert out.index("data_prep rank 0 at work") < out.index("adapter_learning rank 0 at work")


def test_a_stage_gets_its_name_and_its_resolved_config(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "data_prep")
    launch(cfg, [])
    stage, path = chain.met(cfg, "data_prep")["argv"]
    assert stage == "data_prep"
    assert OmegaConf.load(path).output_dir == str(tmp_path / "data" / "squad")
    assert "${" not in Path(path).read_text()


def test_state_tells_the_end_and_the_exit_code(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "data_prep")
    launch(cfg, [])
    state = chain.state(cfg, "data_prep")
    times = [state.pop(key) for key in ("submitted", "started", "ended")]
    assert state == {
        "stage": "data_prep",
        "job_name": "data_prep_squad_tiny",
        "job_id": None,
        "state": "COMPLETED",
        "exit_code": 0,
        "requeues": 0,
    }
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", t) for t in times)
    assert times == sorted(times)


@pytest.mark.parametrize("code", [1, 2, 75])
def test_first_failure_stops_the_chain_with_its_exit_code(tmp_path, capfd, code):
    cfg = chain.config(
        tmp_path, "interactive", "data_prep", "training", data_prep__behave={"exit": code}
    )
    assert launch(cfg, []) == code
    state = chain.state(cfg, "data_prep")
    assert (state["state"], state["exit_code"]) == ("FAILED", code)
    assert not chain.ran(cfg, "training")
    assert f"data_prep failed with exit code {code}" in capfd.readouterr().err


def test_output_reaches_the_log_and_standard_output(tmp_path, capfd):
    cfg = chain.config(tmp_path, "interactive", "data_prep", data_prep__behave={"say": "hällo"})
    launch(cfg, [])
    (log,) = chain.results(cfg, "data_prep").glob("log-*.out")
    assert log.read_text() == "hällo\n"
    assert "hällo\n" in capfd.readouterr().out


def test_output_has_no_control_codes_where_it_is_no_terminal(tmp_path, capfd):
    said = "\x1b[1mloss\x1b[0m 1\rloss 2\r\nend\x07"
    cfg = chain.config(tmp_path, "interactive", "data_prep", data_prep__behave={"say": said})
    launch(cfg, [])
    assert "\nloss 1\nloss 2\nend\n" in capfd.readouterr().out


def test_each_device_has_a_process_with_its_rank(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "training", training__trainer__devices=3)
    assert launch(cfg, []) == 0
    environments = [chain.met(cfg, "training", rank)["env"] for rank in range(3)]
    assert [env["LOCAL_RANK"] for env in environments] == ["0", "1", "2"]
    assert {env["WORLD_SIZE"] for env in environments} == {"3"}
    assert {env["MASTER_ADDR"] for env in environments} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in environments}) == 1


def test_one_device_has_no_rank_in_its_environment(tmp_path, monkeypatch):
    cfg = chain.config(tmp_path, "interactive", "training")
    launch(cfg, [])
    assert not {"RANK", "WORLD_SIZE"} & set(chain.met(cfg, "training")["env"])


def test_one_failing_rank_ends_the_others_with_its_code(tmp_path):
    behave = {"failing_rank": 1, "exit": 2, "sleep": 60}
    cfg = chain.config(
        tmp_path, "interactive", "training", training__trainer__devices=2, training__behave=behave
    )
    started = time.monotonic()
    assert launch(cfg, []) == 2
    assert time.monotonic() - started < 30
    assert not alive(chain.met(cfg, "training", 0)["pid"])


def test_several_nodes_are_refused_before_anything_is_written(tmp_path, capsys):
    cfg = chain.config(tmp_path, "interactive", "training", training__trainer__num_nodes=2)
    assert launch(cfg, []) == 2
    assert "training.trainer.num_nodes: 2" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_script_runs_again_by_hand(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "data_prep", dry_run=True)
    assert launch(cfg, []) == 0
    assert not chain.ran(cfg, "data_prep")
    again = subprocess.run(["bash", chain.script(cfg, "data_prep")], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "data_prep rank 0 at work\n")
    assert chain.state(cfg, "data_prep")["state"] == "COMPLETED"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def launch_apart(cfg: DictConfig, tmp_path: Path) -> subprocess.Popen[str]:
    """`launch` in a process of its own, as main.py calls it."""
    OmegaConf.save(cfg, tmp_path / "cfg.yaml")
    code = (
        "import sys; from omegaconf import OmegaConf; from launcher_scripts.pipeline import launch;"
        "sys.exit(launch(OmegaConf.load(sys.argv[1]), []))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "cfg.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_processes_and_leaves_the_state_cancelled(tmp_path, number, devices):
    cfg = chain.config(
        tmp_path,
        "interactive",
        "training",
        "adapter_learning",
        training__trainer__devices=devices,
        training__behave={"sleep": 60},
    )
    process = launch_apart(cfg, tmp_path)
    assert process.stdout is not None
    at_work = (line for line in process.stdout if "at work" in line)
    for _ in range(devices):
        next(at_work)
    process.send_signal(number)
    assert process.wait(timeout=120) == 128 + number
    state = chain.state(cfg, "training")
    assert (state["state"], state["exit_code"]) == ("CANCELLED", 128 + number)
    assert not any(alive(chain.met(cfg, "training", rank)["pid"]) for rank in range(devices))
    assert not chain.ran(cfg, "adapter_learning")


def at_work(
    tmp_path: Path, devices: int, **behave: Any
) -> tuple[DictConfig, subprocess.Popen[str]]:
    """A launch whose processes are all at work, for a minute."""
    changes = {"training__trainer__devices": devices, "training__behave": {"sleep": 60, **behave}}
    cfg = chain.config(tmp_path, "interactive", "training", **changes)
    process = launch_apart(cfg, tmp_path)
    assert process.stdout is not None
    lines = (line for line in process.stdout if "at work" in line)
    for _ in range(devices):
        next(lines)
    return cfg, process


def test_a_killed_rank_is_named_and_the_others_end(tmp_path):
    cfg, process = at_work(tmp_path, 3)
    started = time.monotonic()
    os.kill(chain.met(cfg, "training", 1)["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1: killed by signal KILL\n" in out
    assert "rank 0" not in out.partition("killed")[2]
    assert not any(alive(chain.met(cfg, "training", rank)["pid"]) for rank in range(3))
    assert chain.state(cfg, "training")["state"] == "FAILED"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_reaches_the_processes_and_how_to_go_on_is_said(tmp_path, number):
    cfg, process = at_work(tmp_path, 2, checkpoints=True)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"checkpointed; to go on: bash {chain.script(cfg, 'training')}\n" in out
    assert "killed" not in out


def test_a_persons_end_lets_the_processes_checkpoint_and_starts_nothing_again(tmp_path):
    cfg, process = at_work(tmp_path, 2, checkpoints=True)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "checkpointed; to go on: bash " in out
    assert chain.state(cfg, "training")["state"] == "CANCELLED"


def test_state_is_failed_when_the_script_itself_is_killed(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "training", training__behave={"sleep": 60})
    process = launch_apart(cfg, tmp_path)
    assert process.stdout is not None
    next(line for line in process.stdout if "at work" in line)
    pid = chain.met(cfg, "training")["pid"]
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().split()[3]), signal.SIGKILL)
    assert process.wait(timeout=120) == 128 + signal.SIGKILL
    state = chain.state(cfg, "training")
    assert (state["state"], state["exit_code"]) == ("FAILED", 137)
    assert not alive(pid)


def test_setup_commands_run_before_the_stage_and_a_failing_one_stops_it(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "training", cluster__setup=["export SEEN=yes"])
    assert launch(cfg, []) == 0
    assert chain.met(cfg, "training")["env"]["SEEN"] == "yes"
    cfg = chain.config(tmp_path / "2", "interactive", "training", cluster__setup=["false"])
    assert launch(cfg, []) == 1
    assert not chain.ran(cfg, "training")


def test_the_jobs_write_json_that_any_reader_takes(tmp_path):
    name = "a \"b\" 'c' ü"
    cfg = chain.config(tmp_path, "interactive", "training", training__run__name=name)
    assert launch(cfg, []) == 0
    assert chain.state(cfg, "training")["job_name"] == f"training_{name}"
