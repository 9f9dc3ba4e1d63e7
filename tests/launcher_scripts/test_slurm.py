"""`cluster_type=bcm`: real scripts and real submitit; stand-ins for sbatch, srun and scancel."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from launcher_scripts.clusters.slurm import named_nodes, seconds
from launcher_scripts.pipeline import launch
from tests.launcher_scripts import chain

PREP, LEARN, EVAL = "data_prep", "adapter_learning", "eval"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the stand-ins keep what they were given."""
    for name in ("sbatch", "srun", "scancel", "scontrol"):
        chain.program(tmp_path / "bin", name, getattr(chain, name.upper()))
    home = tmp_path / "slurm"
    home.mkdir()
    (home / "jobs").write_text("0")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return home


def options(slurm: Path, number: int) -> dict[str, str]:
    """What sbatch read from the script of the n-th job."""
    return json.loads((slurm / f"{1000 + number}.json").read_text())


def directives(cfg: DictConfig, stage: str) -> list[str]:
    lines = chain.script(cfg, stage).read_text().splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]


def dry(tmp_path: Path, *stages: str, **changes: Any) -> DictConfig:
    cfg = chain.config(tmp_path, "bcm", *stages, dry_run=True, **changes)
    assert launch(cfg, []) == 0
    return cfg


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """What `launch` says to a configuration that it must refuse without a trace."""
    assert launch(chain.config(tmp_path, "bcm", LEARN, dry_run=True, **changes), []) == 2
    assert not (tmp_path / "results").exists()
    return capsys.readouterr().err


def test_chain_is_submitted_runs_and_leaves_its_files(slurm, tmp_path, capsys):
    cfg = chain.config(tmp_path, "bcm", PREP, LEARN, EVAL)
    assert launch(cfg, []) == 0
    for number, stage in enumerate(cfg.stages, start=1):
        job = f"nemo-megatron-{stage}_squad_tiny"
        assert {path.name for path in chain.results(cfg, stage).iterdir()} == {
            f"{job}_hydra.yaml",
            f"{job}_submission.sh",
            f"log-{job}_{1000 + number}.out",
            f"log-{job}_{1000 + number}.err",
            "launcher_cmd.log",
            "met-0.json",
            "state.json",
        }
    out = capsys.readouterr().out
    assert "squeue --jobs=1001,1002,1003" in out


def test_state_of_a_job_that_ran_is_its_scripts(slurm, tmp_path):
    cfg = chain.config(tmp_path, "bcm", PREP)
    launch(cfg, [])
    state = chain.state(cfg, PREP)
    assert (state["state"], state["exit_code"], state["job_id"]) == ("COMPLETED", 0, "1001")
    assert state["submitted"] <= state["started"] <= state["ended"]


def test_state_of_a_waiting_job_holds_its_id(slurm, tmp_path):
    (slurm / "hold").touch()
    cfg = chain.config(tmp_path, "bcm", PREP)
    launch(cfg, [])
    state = chain.state(cfg, PREP)
    assert (state["state"], state["job_id"], state["started"]) == ("SUBMITTED", "1001", None)


def test_each_job_waits_for_success_of_the_one_before_and_for_its_own_dependency(slurm, tmp_path):
    cfg = chain.config(tmp_path, "bcm", PREP, LEARN, EVAL, eval__run__dependency="after:7")
    launch(cfg, [])
    assert "--dependency" not in options(slurm, 1)
    assert options(slurm, 2)["--dependency"] == "afterok:1001,singleton"
    assert options(slurm, 3)["--dependency"] == "afterok:1002,after:7"
    assert options(slurm, 3)["--kill-on-invalid-dep"] == "yes"


def test_a_failing_stage_stops_the_chain_and_its_code_is_the_jobs(slurm, tmp_path):
    cfg = chain.config(tmp_path, "bcm", PREP, LEARN, data_prep__behave={"exit": 2})
    launch(cfg, [])
    assert (slurm / "1001.rc").read_text() == "2"
    assert chain.state(cfg, PREP)["state"] == "FAILED"
    assert chain.state(cfg, PREP)["exit_code"] == 2
    assert not chain.ran(cfg, LEARN)


def test_directives_are_sorted_and_complete(tmp_path):
    cfg = dry(
        tmp_path,
        LEARN,
        cluster__partition="gpu",
        cluster__account="me",
        cluster__nodelist="n[1-2]",
        cluster__qos="high",
        cluster__constraint="a100&nvlink",
        cluster__reservation="ours",
        adapter_learning__trainer={"devices": 4, "num_nodes": 2, "accelerator": "gpu"},
    )
    log = f"{chain.results(cfg, LEARN)}/log-nemo-megatron-adapter_learning_squad_tiny_%j"
    assert directives(cfg, LEARN) == [
        "--account=me",
        '--constraint="a100&nvlink"',
        "--dependency=singleton",
        f"--error={log}.err",
        "--exclusive",
        "--gpus-per-node=4",
        "--gpus-per-task=1",
        "--job-name=nemo-megatron-adapter_learning_squad_tiny",
        "--kill-on-invalid-dep=yes",
        "--mem=0",
        "--nodelist=n[1-2]",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--open-mode=append",
        f"--output={log}.out",
        "--partition=gpu",
        "--qos=high",
        "--requeue",
        "--reservation=ours",
        "--signal=USR1@60",
        "--time=01:00:00",
    ]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("exclusive", False, "--exclusive"),
        ("mem", None, "--mem=0"),
        ("overcommit", True, "--overcommit"),
        ("job_name_prefix", "ours-", "--job-name=ours-adapter_learning_squad_tiny"),
        ("sbatch_args", ["--qos=high prio"], '"--qos=high prio"'),
    ],
)
def test_a_key_of_the_cluster_changes_its_directive(tmp_path, key, value, line):
    before = directives(dry(tmp_path / "1", LEARN), LEARN)
    after = directives(dry(tmp_path / "2", LEARN, **{f"cluster__{key}": value}), LEARN)
    assert (line in before) != (line in after)


def test_a_node_with_more_gpus_than_devices_is_asked_for_as_a_whole(tmp_path):
    trainer = {"devices": 4, "num_nodes": 1, "accelerator": "gpu"}
    cfg = dry(tmp_path, LEARN, cluster__gpus_per_node=8, adapter_learning__trainer=trainer)
    asked = [line for line in directives(cfg, LEARN) if line.startswith("--gpu")]
    assert asked == ["--gpus-per-node=8"]  # with --gpus-per-task=1 Slurm would want 8 tasks


def test_gpus_per_task_can_be_left_out(tmp_path):
    trainer = {"devices": 4, "num_nodes": 1, "accelerator": "gpu"}
    cfg = dry(tmp_path, LEARN, cluster__gpus_per_task=None, adapter_learning__trainer=trainer)
    assert [line for line in directives(cfg, LEARN) if line.startswith("--gpu")] == [
        "--gpus-per-node=4"
    ]


def test_a_cpu_stage_asks_for_no_gpus(tmp_path):
    cfg = dry(tmp_path, PREP, LEARN)
    for stage in (PREP, LEARN):
        assert not any("gpu" in line for line in directives(cfg, stage))


def test_adapter_and_ia3_of_one_model_have_different_job_names(tmp_path):
    cfg = dry(tmp_path, LEARN, "ia3_learning")
    names = {line for s in cfg.stages for line in directives(cfg, s) if "job-name" in line}
    assert len(names) == 2


def test_one_task_runs_for_each_device(slurm, tmp_path):
    cfg = chain.config(tmp_path, "bcm", LEARN, adapter_learning__trainer__devices=3)
    assert launch(cfg, []) == 0
    ranks = [chain.met(cfg, LEARN, rank)["env"]["SLURM_PROCID"] for rank in range(3)]
    assert ranks == ["0", "1", "2"]


def test_container_and_its_mounts_reach_srun(slurm, tmp_path):
    cfg = chain.config(
        tmp_path,
        "bcm",
        LEARN,
        container="nvcr.io#team/image:1",
        container_mounts=[None, "/raid", "/a:/b"],
        cluster__srun_args=["--no-container-mount-home", "--mpi=pmix"],
        cluster__python="python3",
    )
    assert launch(cfg, []) == 0
    (args,) = [json.loads(line) for line in (slurm / "srun").read_text().splitlines()]
    assert args[args.index("--container-image") + 1] == "nvcr.io#team/image:1"
    mounts = args[args.index("--container-mounts") + 1].split(",")
    own = [f"{tmp_path}/{name}" for name in ("checkout", "data", "results")]
    assert mounts == [*(f"{path}:{path}" for path in own), "/raid:/raid", "/a:/b"]
    assert "--no-container-mount-home" in args
    assert "--mpi=pmix" in args


def test_bare_metal_has_no_word_of_containers(slurm, tmp_path):
    cfg = chain.config(tmp_path, "bcm", LEARN)
    assert launch(cfg, []) == 0
    assert "container" not in chain.script(cfg, LEARN).read_text()


def test_a_container_has_its_own_python(tmp_path):
    cfg = dry(tmp_path, LEARN, container="image.sqsh")
    assert "  python3 -u -m graftwerk" in chain.script(cfg, LEARN).read_text()


def test_missing_sbatch_is_one_line_code_2_and_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(chain.config(tmp_path, "bcm", PREP), []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`sbatch`" in line
    assert not (tmp_path / "results").exists()


def test_dry_run_submits_nothing_and_names_the_job_before(slurm, tmp_path, capsys):
    cfg = dry(tmp_path, PREP, LEARN)
    assert (slurm / "jobs").read_text() == "0"
    assert not (chain.results(cfg, LEARN) / "state.json").exists()
    (line,) = [line for line in directives(cfg, LEARN) if "dependency" in line]
    assert line == "--dependency=afterok:ID_OF_nemo_megatron_data_prep_squad_tiny,singleton"
    out = capsys.readouterr().out
    assert str(chain.results(cfg, LEARN)) in out
    assert "job2=$(sbatch --parsable --dependency=afterok:$job1,singleton" in out


def test_a_refusal_half_way_cancels_what_was_submitted(slurm, tmp_path, capsys):
    (slurm / "hold").touch()
    (slurm / "refuse").write_text("2")  # the third job is refused
    cfg = chain.config(tmp_path, "bcm", PREP, LEARN, EVAL)
    assert launch(cfg, []) == 1
    err = capsys.readouterr().err
    assert "invalid partition specified: nowhere" in err
    assert "job 1001 was submitted before that and is cancelled" in err
    assert (slurm / "cancelled").read_text().split() == ["1002", "1001"]
    assert chain.state(cfg, PREP)["state"] == "FAILED"
    assert not list(chain.results(cfg, EVAL).glob(".submission*"))


def test_an_answer_without_an_id_is_shown_as_perhaps_accepted(slurm, tmp_path, capsys):
    (slurm / "mumble").touch()
    cfg = chain.config(tmp_path, "bcm", PREP)
    assert launch(cfg, []) == 1
    err = capsys.readouterr().err
    assert "queued, thank you" in err
    assert "may have been accepted" in err
    assert "Traceback" not in err


def test_more_devices_than_the_node_has_are_refused(tmp_path, capsys):
    trainer = {"devices": 8, "num_nodes": 1, "accelerator": "gpu"}
    err = refused(tmp_path, capsys, cluster__gpus_per_node=4, adapter_learning__trainer=trainer)
    assert "adapter_learning.trainer.devices: 8 is more than cluster.gpus_per_node=4" in err


@pytest.mark.parametrize("key", ["sbatch_args", "srun_args"])
@pytest.mark.parametrize(
    "option", ["--nodes=4", "-N 4", "-n8", "--ntasks-per-node=2", "--array=1-4"]
)
def test_free_options_that_change_the_number_of_processes_are_refused(
    tmp_path, capsys, key, option
):
    err = refused(tmp_path, capsys, **{f"cluster__{key}": [option]})
    assert f"cluster.{key}: {option} is not free" in err


def test_more_named_nodes_than_the_job_has_are_refused(tmp_path, capsys):
    err = refused(tmp_path, capsys, cluster__nodelist="n[1-2],m7")
    assert "cluster.nodelist: n[1-2],m7 names 3 nodes" in err
    assert "adapter_learning.trainer.num_nodes is 1" in err


@pytest.mark.parametrize(
    ("nodelist", "count"),
    [("", 0), ("n1", 1), ("n[1-4,7],m2", 6), ("r[1-2]n[01-10]", 20), ("/a/file", None)],
)
def test_a_nodelist_is_counted_as_slurm_reads_it(nodelist, count):
    assert named_nodes(nodelist) == count


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("2", 120),
        ("1:30", 90),
        ("1:00:01", 3601),
        ("2-0", 172800),
        ("1-1:30", 91800),
        ("1-0:0:5", 86405),
    ],
)
def test_a_time_limit_is_counted_as_slurm_reads_it(limit, expected):
    assert seconds(limit) == expected


def test_a_signal_before_the_start_is_refused(tmp_path, capsys):
    run = {"adapter_learning__run__time_limit": "1", "adapter_learning__run__signal_seconds": 60}
    assert "adapter_learning.run.signal_seconds: 60" in refused(tmp_path, capsys, **run)


@pytest.mark.parametrize("dependency", ["banana!", "afterok:1 ,singleton", "singleton\n--x"])
def test_a_dependency_that_is_none_is_refused(tmp_path, capsys, dependency):
    err = refused(tmp_path, capsys, adapter_learning__run__dependency=dependency)
    assert "adapter_learning.run.dependency" in err


def test_a_line_break_in_a_directive_is_refused(tmp_path, capsys):
    assert "line break" in refused(tmp_path, capsys, cluster__partition="a\n#SBATCH --uid=0")


def test_folders_that_log_names_cannot_hold_are_refused(tmp_path, capsys):
    err = refused(tmp_path, capsys, base_results_dir=str(tmp_path / "50%"))
    assert "adapter_learning.run.results_dir" in err


def test_a_script_submits_again_by_hand_after_a_rerun(slurm, tmp_path):
    cfg = chain.config(tmp_path, "bcm", PREP)
    assert launch(cfg, []) == launch(cfg, []) == 0
    assert chain.state(cfg, PREP)["job_id"] == "1002"


SACCT = r"""
import os
from pathlib import Path
print("JobID|State|NodeList")
print("1001|" + (Path(os.environ["FAKE_SLURM"]) / "standing").read_text() + "|n1")
"""


def rerun(slurm: Path, tmp_path: Path, standing: str, **changes: Any) -> int:
    """Launch one job, whose accounts then say `standing`, and launch once more with changes."""
    chain.program(tmp_path / "bin", "sacct", SACCT)
    (slurm / "standing").write_text(standing)
    (slurm / "hold").touch()
    assert launch(chain.config(tmp_path, "bcm", LEARN), []) == 0
    return launch(chain.config(tmp_path, "bcm", LEARN, **changes), [])


def test_a_queued_jobs_config_is_not_changed_under_it(slurm, tmp_path, capsys):
    assert rerun(slurm, tmp_path, "PENDING", adapter_learning__model__seed=7) == 2
    assert "job 1001 (PENDING on n1, submitted " in capsys.readouterr().err
    (config,) = (tmp_path / "results/tiny" / LEARN).glob("*_hydra.yaml")
    assert "seed" not in config.read_text()


def test_the_same_job_is_not_launched_twice(slurm, tmp_path, capsys):
    assert rerun(slurm, tmp_path, "RUNNING") == 2
    assert "job 1001 (RUNNING on n1, submitted " in capsys.readouterr().err
    assert (slurm / "jobs").read_text() == "1"


def test_a_job_that_ended_is_in_nobodys_way(slurm, tmp_path):
    assert rerun(slurm, tmp_path, "CANCELLED by 0", adapter_learning__model__seed=7) == 0


@pytest.mark.parametrize("value", ["a b", "it's", 'say "x"', "$(x)", "a#b", "n[1-4],m2", ""])
def test_a_value_of_a_directive_arrives_as_it_is(slurm, tmp_path, value):
    (slurm / "hold").touch()
    assert launch(chain.config(tmp_path, "bcm", LEARN, cluster__partition=value), []) == 0
    assert options(slurm, 1)["--partition"] == value


# ---- what queues itself anew


def ended(slurm: Path, tmp_path: Path, code: int, **changes: Any) -> dict[str, Any]:
    """The state of a job whose stage ends with `code`."""
    cfg = chain.config(
        tmp_path, "bcm", LEARN, adapter_learning__behave={"exit": code, "say": "x"}, **changes
    )
    assert launch(cfg, []) == 0
    return chain.state(cfg, LEARN)


def asked(slurm: Path) -> list[str]:
    """What scontrol was asked to do."""
    file = slurm / "scontrol"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if "show" not in line]


@pytest.mark.parametrize("code", [75, 76, 128 + 9, 128 + 10, 128 + 15])
def test_a_checkpoint_a_lost_process_and_a_signal_queue_the_job_anew(slurm, tmp_path, code):
    state = ended(slurm, tmp_path, code)
    assert (state["state"], state["requeues"], state["ended"]) == ("REQUEUED", 1, None)
    assert asked(slurm) == ["requeue 1001"]


@pytest.mark.parametrize("code", [1, 2, 7, 127, 128 + 11])
def test_an_error_of_its_own_does_not(slurm, tmp_path, code):
    state = ended(slurm, tmp_path, code)
    assert (state["state"], state["requeues"]) == ("FAILED", 0)
    assert state["exit_code"] == (code if code < 60 else 1)
    assert asked(slurm) == []


@pytest.mark.parametrize("code", [1, 75, 128 + 9])
def test_a_cancelled_job_is_not_queued_anew_whatever_its_processes_say(slurm, tmp_path, code):
    """srun may fail of scancel before the script is told."""
    known = chain.SCONTROL.replace("JobState=RUNNING", "JobState=CANCELLED")
    chain.program(tmp_path / "bin", "scontrol", known)
    assert ended(slurm, tmp_path, code)["state"] == "CANCELLED"
    assert asked(slurm) == []


def test_the_rank_that_failed_is_named(slurm, tmp_path):
    ended(slurm, tmp_path, 3)
    (log,) = (tmp_path / "results/tiny" / LEARN).glob("*.err")
    assert re.search(r"rank 0 on \S+: failed with exit code 3", log.read_text())


def test_the_limit_ends_it_with_a_clear_line(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    state = ended(slurm, tmp_path, 75)
    assert (state["state"], state["exit_code"], state["requeues"]) == ("FAILED", 75, 2)
    assert asked(slurm) == []
    (log,) = (tmp_path / "results/tiny" / LEARN).glob("*.err")
    assert "queued anew 2 times, where run.max_requeues=2: launch it again" in log.read_text()


def test_without_requeues_slurm_does_none_either(slurm, tmp_path):
    state = ended(slurm, tmp_path, 75, adapter_learning__run__max_requeues=0)
    assert state["state"] == "FAILED"
    assert "--no-requeue" in options(slurm, 1)


def test_a_slurm_that_will_not_queue_it_anew_is_quoted(slurm, tmp_path):
    (slurm / "stay").touch()
    state = ended(slurm, tmp_path, 75)
    assert (state["state"], state["exit_code"], state["requeues"]) == ("FAILED", 75, 0)
    (log,) = (tmp_path / "results/tiny" / LEARN).glob("*.err")
    assert "Requested operation is presently disabled" in log.read_text()


def test_jobs_on_one_node_meet_at_different_ports(slurm, tmp_path):
    ports = []
    for name in ("a", "b"):
        cfg = chain.config(tmp_path / name, "bcm", LEARN)
        assert launch(cfg, []) == 0
        ports.append(int(chain.met(cfg, LEARN)["env"]["MASTER_PORT"]))
    assert ports[0] != ports[1]
    assert all(15000 <= port < 31000 for port in ports)


def test_a_port_in_use_is_passed_over(slurm, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 15000 + 1001))
        taken.listen()
        cfg = chain.config(tmp_path, "bcm", LEARN)
        assert launch(cfg, []) == 0
    assert chain.met(cfg, LEARN)["env"]["MASTER_PORT"] != "16001"
