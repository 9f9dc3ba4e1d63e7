"""What holds for the scripts of every back end: quoting, secrets, groups, environment."""

import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from launcher_scripts.clusters import CLUSTERS, backend
from launcher_scripts.job import Group
from launcher_scripts.pipeline import interpreter, launch, plan
from tests.launcher_scripts import chain

STAGE = "adapter_learning"
HOSTILE = "a b'\"$(touch pwned)`touch pwned`\\\n;touch pwned; $HOME * ü \t#!~"
NAME = HOSTILE.translate({ord(c): None for c in "\\\n\t"})  # what a path may be made of here


@pytest.fixture(params=sorted(CLUSTERS))
def cluster_type(request: pytest.FixtureRequest) -> str:
    return request.param


def run(cfg: DictConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    """Write the one stage's script and run it by bash, with stand-ins for srun and bcprun."""
    cfg.dry_run = True
    assert launch(cfg, []) == 0
    return bash(chain.script(cfg, STAGE), folder)


def bash(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    for name, source in {"srun": chain.SRUN, "bcprun": chain.BCPRUN}.items():
        chain.program(folder / "bin", name, source)
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "here").mkdir(exist_ok=True)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "FAKE_SLURM": str(folder / "slurm"),
        "FAKE_BCP": str(folder / "calls"),
        "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "HOME": str(folder),
    }
    return subprocess.run(
        ["bash", script], cwd=folder / "here", env=environment, capture_output=True, text=True
    )


def test_hostile_values_arrive_as_they_are_and_run_nothing(cluster_type, tmp_path):
    root = tmp_path / NAME.replace("/", "")
    cfg = chain.config(root, cluster_type, STAGE, env_vars={"FOO": HOSTILE})
    cfg[STAGE].run.name = NAME
    done = run(cfg, tmp_path)
    assert done.returncode == 0, done.stderr
    met = chain.met(cfg, STAGE)
    assert met["env"]["FOO"] == HOSTILE
    assert Path(met["argv"][1]).parent == chain.results(cfg, STAGE)
    assert os.listdir(tmp_path / "here") == []
    assert chain.state(cfg, STAGE)["state"] == "COMPLETED"


@pytest.mark.parametrize("cluster_type", sorted(CLUSTERS))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_value_of_an_environment_variable_arrives_byte_equal(cluster_type, value):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = chain.config(folder, cluster_type, STAGE)
        (job,) = plan(cfg, backend(cluster_type)(cfg.cluster))
        out = folder / "out"
        show = f'printf %s "$FOO" > {out}'
        job = replace(job, results_dir=folder, environment={"FOO": value}, groups=(Group((show,)),))
        (folder / "job.sh").write_text(backend(cluster_type)(cfg.cluster).render(job))
        done = bash(folder / "job.sh", folder)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == value.encode()


def test_a_failing_first_group_stops_the_second(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, STAGE)
    cluster = backend(cluster_type)(cfg.cluster)
    (job,) = plan(cfg, cluster)
    groups = (Group(("exit 7",)), Group((f"touch {tmp_path / 'second'}",)))
    (tmp_path / "job.sh").write_text(
        cluster.render(replace(job, results_dir=tmp_path, groups=groups))
    )
    assert bash(tmp_path / "job.sh", tmp_path).returncode == 7
    assert not (tmp_path / "second").exists()
    assert json.loads((tmp_path / "state.json").read_text())["exit_code"] == 7


def test_a_failing_first_command_stops_its_group(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, STAGE, cluster__setup=["false"])
    assert run(cfg, tmp_path).returncode == 1
    assert not chain.ran(cfg, STAGE)


def test_groups_run_in_order(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, STAGE)
    cluster = backend(cluster_type)(cfg.cluster)
    (job,) = plan(cfg, cluster)
    groups = tuple(Group((f"echo {n} >> {tmp_path / 'order'}",)) for n in (1, 2, 3))
    (tmp_path / "job.sh").write_text(
        cluster.render(replace(job, results_dir=tmp_path, groups=groups))
    )
    assert bash(tmp_path / "job.sh", tmp_path).returncode == 0
    assert (tmp_path / "order").read_text().split() == ["1", "2", "3"]


def test_the_key_file_is_read_when_the_job_runs_and_never_written_down(cluster_type, tmp_path):
    key_file = tmp_path / "my key"
    key_file.write_text("s3cret\n")
    cfg = chain.config(tmp_path, cluster_type, STAGE, wandb_api_key_file=str(key_file))
    assert run(cfg, tmp_path).returncode == 0
    assert chain.met(cfg, STAGE)["env"]["WANDB_API_KEY"] == "s3cret"
    for path in chain.results(cfg, STAGE).iterdir():
        assert path.name.startswith("met-") or "s3cret" not in path.read_text()
    assert cluster_type != "bcp" or "s3cret" not in (tmp_path / "calls").read_text()


def test_a_missing_key_file_fails_the_job(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, STAGE, wandb_api_key_file="/no/such/key")
    assert run(cfg, tmp_path).returncode != 0
    assert not chain.ran(cfg, STAGE)


def test_null_variables_are_left_alone_and_others_become_text(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, STAGE, env_vars={"NONE": None, "ONE": 1})
    assert run(cfg, tmp_path).returncode == 0
    environment = chain.met(cfg, STAGE)["env"]
    assert environment["ONE"] == "1"
    assert "NONE" not in environment


def test_graftwerk_is_found_beside_the_launcher(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, STAGE)
    assert run(cfg, tmp_path).returncode == 0
    path = chain.met(cfg, STAGE)["env"]["PYTHONPATH"]
    assert path.split(":")[0] == str(tmp_path / "checkout" / "src")


def test_scripts_are_bash_without_fault_and_say_how_to_run_them_again(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, "data_prep", STAGE, dry_run=True)
    assert launch(cfg, []) == 0
    for stage in cfg.stages:
        script = chain.script(cfg, stage)
        text = script.read_text()
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert "set -euo pipefail" in text
        assert f"{script}\n" in text.partition("set -euo")[0]
        assert text.endswith("\n")
        assert os.access(script, os.X_OK)


def test_the_command_line_is_kept(cluster_type, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "stages=[adapter_learning]", "a=b c"])
    cfg = chain.config(tmp_path, cluster_type, STAGE, dry_run=True)
    launch(cfg, [])
    launch(cfg, [])
    line = "python3 main.py 'stages=[adapter_learning]' 'a=b c'\n"
    assert (chain.results(cfg, STAGE) / "launcher_cmd.log").read_text() == 2 * line


def test_the_interpreter_can_be_set(cluster_type, tmp_path):
    cfg = chain.config(tmp_path, cluster_type, STAGE, cluster__python="/opt/my python")
    assert interpreter(cfg) == "/opt/my python"
    run(cfg, tmp_path)
    assert "/opt/my python" in chain.script(cfg, STAGE).read_text()
