"""From a configuration to files and runs, whatever the cluster; and the state file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher_scripts import state
from launcher_scripts.clusters import CLUSTERS
from launcher_scripts.job import build
from launcher_scripts.pipeline import interpreter, launch
from tests.launcher_scripts import chain

ROOT = Path(__file__).resolve().parents[2]
STAGE = "adapter_learning"


@pytest.mark.parametrize("cluster_type", sorted(CLUSTERS))
def test_dry_run_writes_each_stages_files_and_no_state(cluster_type, tmp_path, capsys):
    cfg = chain.config(tmp_path, cluster_type, "data_prep", STAGE, dry_run=True)
    assert launch(cfg, []) == 0
    out = capsys.readouterr().out
    for stage in cfg.stages:
        names = sorted(path.name for path in chain.results(cfg, stage).iterdir())
        assert [name.rpartition("_")[2] for name in names if name != "launcher_cmd.log"] == [
            "hydra.yaml",
            "submission.sh",
        ]
        assert str(chain.results(cfg, stage)) in out


def test_the_table_says_what_runs_after_what(tmp_path, capsys):
    cfg = chain.config(tmp_path, "bcm", "data_prep", STAGE, dry_run=True)
    launch(cfg, [])
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "job", "after", "results_dir"]
    assert first.split()[:3] == ["data_prep", "nemo-megatron-data_prep_squad_tiny", "-"]
    assert "data_prep, singleton" in second
    assert len({line.index("/") for line in (first, second)}) == 1


def test_all_mistakes_are_said_at_once_and_nothing_is_written(tmp_path, capsys):
    cfg = chain.config(tmp_path, "interactive", "training", STAGE)
    cfg.training.trainer.num_nodes = 2
    cfg[STAGE].run.name = "a/b"
    cfg.env_vars = {"A B": 1}
    assert launch(cfg, []) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert not (tmp_path / "results").exists()


def test_notices_are_printed_one_a_line(tmp_path, capsys):
    launch(chain.config(tmp_path, "interactive", STAGE, dry_run=True), ["first", "warning: second"])
    assert capsys.readouterr().err.splitlines() == [
        "note: first",
        "warning: second",
        "note: without effect with cluster_type=interactive: run.dependency, run.time_limit",
    ]


def test_a_container_without_effect_is_named(tmp_path, capsys):
    launch(chain.config(tmp_path, "interactive", STAGE, dry_run=True, container="x.sqsh"), [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: without effect with cluster_type=interactive: ")
    assert line.endswith(", container")


def test_a_file_where_results_should_go_is_one_line(tmp_path, capsys):
    (tmp_path / "results").touch()
    assert launch(chain.config(tmp_path, "interactive", STAGE), []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("adapter_learning.run.results_dir: ")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to stop being root")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    cfg = chain.config(tmp_path, "interactive", STAGE, base_results_dir="/usr/no/such")
    code = (
        "import os, sys; from omegaconf import OmegaConf;"
        "from launcher_scripts.pipeline import launch;"
        "import launcher_scripts.clusters.interactive;"
        "cfg = OmegaConf.create(sys.argv[1]); os.setuid(65534); sys.exit(launch(cfg, []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, OmegaConf.to_yaml(cfg)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cannot write to /usr" in line


def test_the_interpreter_is_this_one_unless_a_container_brings_its_own(tmp_path):
    cfg = chain.config(tmp_path, "bcm", STAGE)
    assert interpreter(cfg) == sys.executable
    cfg.container = "image.sqsh"
    assert interpreter(cfg) == "python3"
    cfg.cluster_type = "bcp"  # the launcher runs in that container already
    assert interpreter(cfg) == sys.executable


def test_a_dry_run_imports_neither_submitit_nor_anything_heavy(tmp_path):
    cfg = chain.config(tmp_path, "bcm", "data_prep", STAGE, "eval", dry_run=True)
    code = (
        "import sys; from omegaconf import OmegaConf; from launcher_scripts.pipeline import launch;"
        "assert launch(OmegaConf.create(sys.argv[1]), []) == 0;"
        "heavy = {'submitit', 'torch', 'numpy', 'rich', 'transformers', 'datasets', 'asyncio'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, OmegaConf.to_yaml(cfg)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def job(tmp_path):
    made = build(chain.config(tmp_path, "bcm", STAGE), STAGE, "python3")
    made.results_dir.mkdir(parents=True)
    return made


def test_an_accepted_job_gets_its_id(job):
    before = state.submitted(job)
    state.accepted(job, before, "77")
    assert state.read(job.state_file) == {**before, "job_id": "77"}
    assert [path.name for path in job.results_dir.iterdir()] == ["state.json"]


def test_a_job_that_started_first_is_not_set_back_to_submitted(job):
    before = state.submitted(job)
    running = {**before, "state": "RUNNING", "job_id": "77"}
    state.write_atomically(job.state_file, json.dumps(running))
    state.accepted(job, before, "77")
    assert state.read(job.state_file) == running


def test_a_finished_state_is_not_made_failed(job):
    done = {**state.submitted(job), "state": "COMPLETED", "exit_code": 0}
    state.write_atomically(job.state_file, json.dumps(done))
    state.failed(job, 9)
    assert state.read(job.state_file) == done
