"""Jobs: names, sizes, mounts, and what no cluster can do."""

from pathlib import Path

import pytest

from launcher_scripts.job import build, job_name, unusable
from tests.launcher_scripts import chain

STAGE = "adapter_learning"


def job(tmp_path: Path, stage: str = STAGE, **changes):
    return build(chain.config(tmp_path, "bcm", stage, **changes), stage, "python3")


@pytest.mark.parametrize(
    ("stage", "run_name", "name"),
    [
        ("adapter_learning", "squad_gpt3_5b", "adapter_learning_squad_gpt3_5b"),
        ("ia3_learning", "squad_gpt3_5b", "ia3_learning_squad_gpt3_5b"),
        ("adapter_learning", "adapter_learning_squad", "adapter_learning_squad"),
        ("eval", "squad-eval", "squad-eval"),
        ("eval", "retrieval", "eval_retrieval"),  # a word that only contains the stage's
        ("training", "training", "training"),
    ],
)
def test_a_jobs_name_holds_its_stage_once(stage, run_name, name):
    assert job_name(stage, run_name) == name
    assert job_name(stage, run_name, "ours-") == f"ours-{name}"


def test_size_follows_the_trainer(tmp_path):
    trainer = {"devices": 4, "num_nodes": 2, "accelerator": "gpu"}
    size = job(tmp_path, adapter_learning__trainer=trainer).resources
    assert (size.nodes, size.processes_per_node, size.gpus_per_node) == (2, 4, 4)


def test_accelerator_cpu_asks_for_no_gpus(tmp_path):
    trainer = {"devices": 4, "num_nodes": 1, "accelerator": "cpu"}
    size = job(tmp_path, adapter_learning__trainer=trainer).resources
    assert (size.processes_per_node, size.gpus_per_node) == (4, 0)


def test_data_prep_is_one_process_without_gpus(tmp_path):
    prep = job(tmp_path, "data_prep")
    size = prep.resources
    assert (size.nodes, size.processes_per_node, size.gpus_per_node) == (1, 1, 0)
    assert prep.groups[-1].alone


def test_mounts_name_each_folder_once_and_keep_the_users_own(tmp_path):
    mounts = job(
        tmp_path,
        base_results_dir=str(tmp_path / "data" / "results"),
        container_mounts=[None, "/raid", "/in:/out", "/raid"],
    ).mounts
    own = [tmp_path / "checkout", tmp_path / "data"]
    assert mounts == (*(f"{path}:{path}" for path in own), "/raid:/raid", "/in:/out")


def test_config_of_a_job_is_resolved(tmp_path):
    assert f"results_dir: {tmp_path}/results/tiny/{STAGE}" in job(tmp_path).config


@pytest.mark.parametrize("name", ["a/b", "50%", "a\nb", "a\\b"])
def test_names_that_make_no_file_are_refused(tmp_path, name):
    made = job(tmp_path, adapter_learning__run__name=name)
    (line,) = unusable([made])
    assert line.startswith("adapter_learning.run.name: ")
    assert repr(made.name) in line


@pytest.mark.parametrize("folder", ["50%", "a\nb"])
def test_folders_that_log_names_cannot_hold_are_refused(tmp_path, folder):
    (line,) = unusable([job(tmp_path, base_results_dir=f"/tmp/{folder}")])
    assert line.startswith("adapter_learning.run.results_dir: ")


def test_two_stages_in_one_folder_are_refused(tmp_path):
    cfg = chain.config(tmp_path, "bcm", STAGE, "eval", eval__run__results_dir="/results/x")
    cfg[STAGE].run.results_dir = "/results/x"
    (line,) = unusable([build(cfg, stage, "python3") for stage in cfg.stages])
    assert line.startswith("eval.run.results_dir: /results/x is adapter_learning's too")


@pytest.mark.parametrize("key", ["A B", "1A", "A=B", "A;touch x", ""])
def test_names_that_are_no_variables_are_refused(tmp_path, key):
    cfg = chain.config(tmp_path, "bcm", STAGE)
    cfg.env_vars = {key: "x"}
    (line,) = unusable([build(cfg, STAGE, "python3")])
    assert line.startswith(f"env_vars.{key}: ")
