"""Two launches into one folder do not run at a time; what is left of a dead one is in no way."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher_scripts import lock, manifest, standing, state
from launcher_scripts.job import LaunchError, build
from launcher_scripts.pipeline import launch
from tests.launcher_scripts import chain

ROOT = Path(__file__).resolve().parents[2]
STAGE = "training"


@pytest.fixture
def job(tmp_path):
    made = build(chain.config(tmp_path, "interactive", STAGE), STAGE, "python3")
    made.results_dir.mkdir(parents=True)
    return made


def put(job, **changes):
    """A lock as another launch would have it."""
    content = {
        "job_name": "theirs",
        "job_id": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": state.now(),
        **changes,
    }
    lock.path_of(job.results_dir).write_text(json.dumps(content))


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_lock_is_there_while_it_is_held_and_gone_after(job):
    with lock.hold([job]):
        held = state.read(lock.path_of(job.results_dir))
        assert held is not None
        assert (held["job_name"], held["pid"]) == (job.name, os.getpid())
    assert list(job.results_dir.iterdir()) == []


def test_the_second_of_two_is_refused_and_told_of_the_first(job):
    with lock.hold([job]):
        (line,) = lock.occupied([job])
        with (
            pytest.raises(LaunchError, match=rf"{job.name} \(process {os.getpid()} on "),
            lock.hold([job]),
        ):
            pass
        assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in line
        assert lock.holder(job.results_dir) is not None  # the refused one took nothing away


def test_of_many_at_a_time_one_gets_the_folder(job):
    put(job, pid=dead_pid())  # and a stale one lies there
    ready, got = threading.Barrier(8), []

    def attempt():
        ready.wait()
        try:
            with lock.hold([job]):
                got.append(1)
                time.sleep(0.3)
        except LaunchError:
            got.append(0)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0] * 7 + [1]


def test_a_dead_launchers_lock_is_taken_over(job):
    put(job, pid=dead_pid())
    assert lock.occupied([job]) == []
    with lock.hold([job]):
        pass


def test_a_number_that_another_process_has_now_is_no_holder(job):
    put(job, time="2001-01-01T00:00:00Z")
    assert lock.occupied([job]) == []


def test_a_lock_that_nobody_can_read_is_stale(job):
    lock.path_of(job.results_dir).write_text("{")
    with lock.hold([job]):
        pass


def test_a_holder_on_another_machine_counts_until_it_is_silent(job):
    put(job, host="elsewhere", pid=1)
    assert "on elsewhere" in lock.occupied([job])[0]
    long_ago = time.time() - 2 * lock.SILENCE
    os.utime(lock.path_of(job.results_dir), (long_ago, long_ago))
    assert lock.occupied([job]) == []


def test_a_held_lock_gives_signs_of_life(job, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.hold([job]):
        os.utime(lock.path_of(job.results_dir), (0, 0))
        deadline = time.monotonic() + 10
        while lock.path_of(job.results_dir).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_script_that_outlived_its_launcher_is_found(tmp_path, capsys):
    cfg = chain.config(tmp_path, "interactive", STAGE, training__behave={"sleep": 60})
    OmegaConf.save(cfg, tmp_path / "cfg.yaml")
    code = (
        "import sys; from omegaconf import OmegaConf; from launcher_scripts.pipeline import launch;"
        "sys.exit(launch(OmegaConf.load(sys.argv[1]), []))"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "cfg.yaml"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert first.stdout is not None
    next(line for line in first.stdout if "at work" in line)
    assert launch(cfg, []) == 2
    assert f"(process {first.pid} on " in capsys.readouterr().err
    first.kill()
    first.wait()
    script = standing.process_of(chain.script(cfg, STAGE))
    assert script is not None
    try:
        assert launch(cfg, []) == 2
        assert f"(process {script} on " in capsys.readouterr().err
    finally:
        os.kill(script, 15)
    deadline = time.monotonic() + 30
    while standing.alive(script):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cfg.training.behave.sleep = 0
    assert launch(cfg, []) == 0


def test_the_manifest_lists_the_stages_in_order(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "data_prep", STAGE)
    assert launch(cfg, []) == 0
    (entry,) = manifest.read(tmp_path / "results")
    (only,) = entry.chains
    assert [s.stage for s in only.stages] == ["data_prep", STAGE]
    assert [s.results_dir for s in only.stages] == [chain.results(cfg, s) for s in cfg.stages]


def test_a_launch_takes_the_place_of_those_that_it_repeats(tmp_path):
    for stages in (["data_prep"], ["training"], ["data_prep", "training"], ["training"]):
        assert launch(chain.config(tmp_path, "interactive", *stages), []) == 0
    listed = [[s.stage for s in e.chains[0].stages] for e in manifest.read(tmp_path / "results")]
    assert listed == [["data_prep", "training"], ["training"]]


def test_a_folder_is_found_from_its_root_and_from_itself(tmp_path):
    cfg = chain.config(tmp_path, "interactive", "data_prep", STAGE)
    launch(cfg, [])
    for folder in (tmp_path / "results", tmp_path / "results/tiny", chain.results(cfg, STAGE)):
        (found,), root = manifest.of_folder(folder)
        assert len(found.chains[0].stages) == 2
        assert root == tmp_path / "results"
    assert manifest.of_folder(tmp_path / "elsewhere") == ([], None)
