"""`--multirun`: points, their folders and names; arrays on Slurm, one after the other elsewhere."""

import json
import os
import re
import socket
from pathlib import Path
from unittest.mock import patch

import pytest
from omegaconf import OmegaConf

from launcher_scripts import lock
from launcher_scripts.compose import CONF, Composer
from launcher_scripts.main import main
from launcher_scripts.notices import Mistakes
from launcher_scripts.state import now as state_now
from launcher_scripts.sweep import Point, finish_all, points, quick_interpolation
from tests.launcher_scripts import chain

A = "adapter_learning"
LEARN = [
    f"stages=[data_prep,{A}]",
    f"{A}.model.language_model_path=org/name",
    f"{A}.trainer.accelerator=cpu",
    f"{A}.trainer.devices=1",
    f"{A}.trainer.precision=32",
]
# In place of the stage: fails, or waits, at the points that its environment names.
STAGE = """
import json, os, sys
from pathlib import Path
import yaml
stage, path = sys.argv[1:]
config = yaml.safe_load(Path(path).read_text())
Path(path).with_name("met-0.json").write_text(json.dumps({"env": dict(os.environ)}))
with open(os.environ["MET"], "a") as file:
    file.write(f"{stage} {config.get('model', {}).get('seed')}\\n")
sys.exit(stage != "data_prep" and str(config["model"]["seed"]) == os.environ.get("FAILS"))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """`sweep("a=1,2", ...)` runs main.py --multirun on a stage that only writes that it ran."""
    launcher = chain.checkout(tmp_path / "checkout")
    (tmp_path / "checkout/src/graftwerk/__main__.py").write_text(STAGE)
    monkeypatch.setenv("MET", str(tmp_path / "met"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = [
        f"base_results_dir={tmp_path}/results",
        f"data_dir={tmp_path}/data",
        f"launcher_scripts_path={launcher}",
    ]
    return lambda *typed: main(["--multirun", *LEARN, *words, *typed])


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name, source in {
        "sbatch": chain.SBATCH,
        "srun": chain.SRUN,
        "scancel": chain.SCANCEL,
        "squeue": "import sys; sys.exit(1)",
        "sacct": "import sys; sys.exit(1)",
        "scontrol": "import sys; sys.exit(1)",
    }.items():
        chain.program(tmp_path / "bin", name, source)
    home = tmp_path / "slurm"
    home.mkdir()
    (home / "jobs").write_text("0")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return home


def composed(*typed: str) -> list[Point]:
    composer = Composer()
    try:
        return points(composer, [*typed, "base_results_dir=/r"])
    finally:
        composer.close()


def folders(found: list[Point], stage: str) -> list[str]:
    return [p.composition.cfg[stage].run.results_dir.removeprefix("/r/") for p in found]


def met(tmp_path: Path) -> list[str]:
    return (tmp_path / "met").read_text().splitlines()


def point(tmp_path: Path, label: str) -> Path:
    return tmp_path / "results/gpt3_5b/adapter_learning_squad" / label


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


# -- points


@pytest.mark.parametrize(
    ("word", "labels"),
    [
        ("model.seed=1,2", ["seed_1", "seed_2"]),
        ("model.seed=range(1,7,2)", ["seed_1", "seed_3", "seed_5"]),
        ("model.seed=choice(4,5)", ["seed_4", "seed_5"]),
        ("model.seed=sort(3,1)", ["seed_1", "seed_3"]),
        ("model.optim.betas=[0.9,0.98],[0.9,0.99]", ["betas_0.9+0.98", "betas_0.9+0.99"]),
        ("model.restore_path='/a/x.nemo','/b/y'", ["restore_path_x.nemo", "restore_path_y"]),
        ("model.optim.lr=1e-3,1e-4", ["lr_0.001", "lr_0.0001"]),
    ],
)
def test_hydras_syntax_of_sweeps_makes_named_points(word, labels):
    assert [p.label for p in composed(f"stages={A}", f"{A}.{word}")] == labels


def test_a_glob_is_over_the_options_of_a_group():
    found = composed("stages=fine_tuning", "fine_tuning=glob(*/custom)")
    families = sorted(path.parent.name for path in Path(CONF).glob("fine_tuning/*/custom.yaml"))
    assert len(families) > 1
    assert sorted(p.label for p in found) == [f"fine_tuning_{name}-custom" for name in families]


def test_several_sweeps_are_every_combination_the_last_one_fastest():
    found = composed(f"stages={A}", f"{A}.model.seed=1,2", f"{A}.model.optim.lr=1,2")
    assert [p.label for p in found] == ["seed_1-lr_1", "seed_1-lr_2", "seed_2-lr_1", "seed_2-lr_2"]


def test_keys_of_one_name_are_told_apart():
    found = composed("stages=[adapter_learning,eval]", f"{A}.model.seed=1,2", "eval.model.seed=3,4")
    assert found[0].label == "adapter_learning.model.seed_1-eval.model.seed_3"


def test_values_that_read_alike_have_folders_of_their_own():
    found = composed(f"stages={A}", f"{A}.model.restore_path='/a/x','/b/x'")
    assert len(set(folders(found, A))) == 2


def test_a_shared_composition_equals_one_of_its_own():
    words = [f"{A}.model.seed=7", f"{A}.model.optim.lr=0.5"]
    swept = composed(*LEARN, f"{A}.model.seed=1,7", f"{A}.model.optim.lr=0.1,0.5")[-1]
    (alone,) = composed(*LEARN, *words)
    for name in ("results_dir", "name"):
        alone.composition.cfg[A].run[name] = swept.composition.cfg[A].run[name]
    alone.composition.cfg.sweep = swept.composition.cfg.sweep
    assert OmegaConf.to_container(swept.composition.cfg) == OmegaConf.to_container(
        alone.composition.cfg
    )


def test_a_stage_that_no_swept_value_reaches_is_common_to_all_points():
    found = composed("stages=[data_prep,adapter_learning,eval]", f"{A}.model.seed=1,2")
    assert folders(found, "data_prep") == ["data_prep_squad"] * 2
    assert [f.rsplit("/", 1)[-1] for f in folders(found, A)] == ["seed_1", "seed_2"]


def test_a_stage_after_a_swept_one_is_its_points_own():
    found = composed("stages=[data_prep,adapter_learning,eval]", f"{A}.model.seed=1,2")
    assert [f.rsplit("/", 1)[-1] for f in folders(found, "eval")] == ["seed_1", "seed_2"]


def test_a_stage_has_a_folder_for_each_value_that_reaches_it_and_no_more():
    found = composed(
        "stages=[data_prep,adapter_learning]",
        "data_prep.seed=1,2",
        f"{A}.model.micro_batch_size=4,8",
    )
    assert sorted({f.rsplit("/", 1)[-1] for f in folders(found, "data_prep")}) == [
        "seed_1",
        "seed_2",
    ]
    assert len(set(folders(found, A))) == 4


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data_prep.seed=interval(1,2)", "an interval has no points"),
        ("cluster_type=bcm,interactive", "one kind of cluster"),
        ("hydra/launcher=submitit", "no plug-in is used"),
        ("data_prep=glob(nothing*)", "no option of data_prep"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused(word, said):
    with pytest.raises(Mistakes, match=said):
        composed("stages=data_prep", word)


def test_a_long_name_is_cut_and_still_its_own():
    names = ["x" * 90 + end for end in "ab"]
    found = composed(f"stages={A}", f"{A}.model.restore_path={','.join(names)}")
    assert len({p.label for p in found}) == 2
    assert all(len(p.label) <= 80 for p in found)


def test_forty_points_are_composed_once():
    composer = Composer()
    words = [*LEARN, f"{A}.model.seed=range(8)", f"{A}.model.optim.lr=1,2,3,4,5"]
    compose = patch.object(Composer, "compose", autospec=True, side_effect=Composer.compose)
    try:
        with quick_interpolation(), compose as composed:
            found = points(composer, words)
            finish_all(found)
    finally:
        composer.close()
    assert len(found) == 40
    assert composed.call_count == 1
    assert {point.composition.cfg[A].model.seed for point in found} == {*range(8)}


# -- Slurm


def test_a_sweep_is_one_array_for_each_stage(slurm, sweep, tmp_path, capsys):
    assert sweep(f"{A}.model.seed=1,2,3") == 0
    assert (slurm / "jobs").read_text() == "2"
    first, second = (json.loads((slurm / f"{n}.json").read_text()) for n in (1001, 1002))
    assert "--array" not in first
    assert second["--array"] == "0-2"
    assert second["--dependency"].split(",")[0] == "afterok:1001"
    assert met(tmp_path) == ["data_prep None", *(f"{A} {seed}" for seed in (1, 2, 3))]
    assert "job array 1002 (3 points)" in capsys.readouterr().out


def test_a_point_has_its_folder_log_and_id(slurm, sweep, tmp_path):
    sweep(f"{A}.model.seed=1,2")
    folder = point(tmp_path, "seed_2")
    assert state(folder)["job_id"] == "1002_1"
    name = "nemo-megatron-adapter_learning_squad_gpt3_5b_seed_2"
    assert {path.name for path in folder.iterdir()} == {
        f"{name}_hydra.yaml",
        f"{name}_submission.sh",
        f"log-{name}_1002_1.out",
        f"log-{name}_1002_1.err",
        "launcher_cmd.log",
        "met-0.json",
        "state.json",
    }


def test_a_limit_holds_tasks_back(slurm, sweep):
    sweep(f"{A}.model.seed=1,2,3", "sweep.max_parallel=2")
    assert json.loads((slurm / "1002.json").read_text())["--array"] == "0-2%2"


def test_a_failing_point_stops_its_own_chain_alone(slurm, sweep, tmp_path):
    code = sweep(
        f"stages=[{A},eval]",
        f"{A}.model.seed=1,2,3",
        "env_vars.FAILS=2",
        "eval.trainer.devices=1",
        "eval.trainer.accelerator=cpu",
        "eval.model.language_model_path=org/name",
    )
    assert code == 0
    options = json.loads((slurm / "1003.json").read_text())
    assert options["--dependency"].split(",")[0] == "aftercorr:1002"
    assert options["--kill-on-invalid-dep"] == "yes"
    assert state(point(tmp_path, "seed_2"))["state"] == "FAILED"
    evaluated = tmp_path / "results/gpt3_5b/eval_squad"
    assert sorted(p.parent.name for p in evaluated.glob("*/met-0.json")) == ["seed_1", "seed_3"]


def test_points_that_ask_for_other_machines_have_an_array_of_their_own(slurm, sweep):
    sweep(f"{A}.model.seed=1,2", f"{A}.trainer.devices=1,2")
    assert (slurm / "jobs").read_text() == "3"
    tasks = [json.loads((slurm / f"{n}.json").read_text()) for n in (1002, 1003)]
    assert [t["--ntasks-per-node"] for t in tasks] == ["1", "2"]
    assert [t["--array"] for t in tasks] == ["0-1", "0-1"]
    assert {t["--dependency"].split(",")[0] for t in tasks} == {"afterok:1001"}


def test_a_refused_array_cancels_what_was_submitted(slurm, sweep, tmp_path, capsys):
    (slurm / "hold").touch()
    (slurm / "refuse").write_text("1")
    assert sweep(f"{A}.model.seed=1,2") == 1
    assert "invalid partition" in capsys.readouterr().err
    assert (slurm / "cancelled").read_text().split() == ["1001"]
    assert state(tmp_path / "results/data_prep_squad")["state"] == "CANCELLED"


def test_a_dry_run_says_how_to_submit_the_arrays(slurm, sweep, tmp_path, capsys):
    assert sweep(f"{A}.model.seed=1,2", "dry_run=True") == 0
    out = capsys.readouterr().out
    assert "job2=$(sbatch --parsable --dependency=afterok:$job1,singleton" in out
    assert (slurm / "jobs").read_text() == "0"
    assert not list(tmp_path.rglob("state.json"))


# -- this machine


def test_points_run_one_after_the_other_and_a_failing_one_ends_no_other(sweep, tmp_path, capfd):
    code = sweep("cluster_type=interactive", f"{A}.model.seed=1,2,3", "env_vars.FAILS=2")
    assert code == 1
    assert met(tmp_path) == ["data_prep None", *(f"{A} {seed}" for seed in (1, 2, 3))]
    states = [state(point(tmp_path, f"seed_{n}"))["state"] for n in (1, 2, 3)]
    assert states == ["COMPLETED", "FAILED", "COMPLETED"]
    assert "failed: seed_2" in capfd.readouterr().err


def test_a_folder_in_use_refuses_the_whole_sweep(sweep, tmp_path, capsys):
    point(tmp_path, "seed_2").mkdir(parents=True)
    held = {"job_name": "x", "job_id": None, "host": socket.gethostname(), "time": state_now()}
    path = lock.path_of(point(tmp_path, "seed_2"))
    path.write_text(json.dumps({**held, "pid": os.getpid()}))
    assert sweep("cluster_type=interactive", f"{A}.model.seed=1,2") == 2
    assert re.search(r"x \(process \d+ on .*works in .*seed_2", capsys.readouterr().err)
    assert not (tmp_path / "met").exists()
