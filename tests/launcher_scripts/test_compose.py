"""Command lines as people type them, from words to composed stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launcher_scripts import resolvers
from launcher_scripts.compose import CONF, Composer

ROOT = Path(__file__).resolve().parents[2]
BASE = "/mount/results/gpt3_5b/convert_nemo/results/megatron_gpt.nemo"


def run(*words: str, cwd: Path, entry: str = "main.py", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / entry), *words],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


# ---- stages


@pytest.mark.parametrize(
    ("word", "stages"),
    [
        ("stages=adapter_learning", ["data_prep", "adapter_learning"]),
        ("stages=[adapter_learning]", ["data_prep", "adapter_learning"]),
        (
            "stages=[data_prep,adapter_learning,eval]",
            ["data_prep", "adapter_learning", "eval"],
        ),
        ("stages=data_prep", ["data_prep"]),
        ("stages=training", ["data_prep", "training"]),
    ],
)
def test_stages_is_one_name_or_a_list(command, word, stages):
    answer = command(word)
    assert answer.code == 0
    assert answer.stages() == stages


def test_without_stages_config_yaml_says_what_runs(command):
    answer = command()
    stages = OmegaConf.load(CONF / "config.yaml").stages
    assert answer.stages() == stages


def test_stages_run_in_canonical_order_and_once(command):
    answer = command("stages=[eval,adapter_learning,data_prep,eval]")
    assert answer.code == 0
    assert "note: stages run in this order: data_prep, adapter_learning, eval" in answer.lines


@pytest.mark.parametrize("group", ["adapter_learning", "ia3_learning"])
@pytest.mark.parametrize(
    ("family", "model", "file"),
    [("gpt3", "gpt3_5b", "megatron_gpt.nemo"), ("t5", "t5_220m", "megatron_t5.nemo")],
)
def test_the_documented_command_line_renders(command, group, family, model, file):
    path = f"/mount/results/{model}/convert_nemo/results/{file}"
    answer = command(
        f"{group}={family}/squad",
        f"stages={group}",
        "cluster_type=bcp",
        "launcher_scripts_path=/opt/X/launcher_scripts",
        "data_dir=/mount/data",
        f"{group}.run.model_train_name={model}",
        f"{group}.model.language_model_path={path}",
    )
    assert answer.code == 0
    config = answer.config(group)
    assert config["model"]["language_model_path"] == path
    assert config["model"]["data"]["train_ds"] == ["/mount/data/prompt_data/v1.1/squad_train.jsonl"]
    assert config["run"]["results_dir"].endswith(f"results/{model}/{group}_squad")
    assert "/opt/X/" in answer.script(group)


# ---- the two entries


@pytest.mark.parametrize("entry", ["main.py", "launcher_scripts/main.py"])
def test_both_entries_run_from_any_folder_and_leave_nothing_there(tmp_path, entry):
    here = tmp_path / "here"
    here.mkdir()
    places = [f"base_results_dir={tmp_path}/r", f"data_dir={tmp_path}/d"]
    done = run("stages=adapter_learning", "dry_run=True", *places, cwd=here, entry=entry)
    assert done.returncode == 0, done.stderr
    assert list(here.iterdir()) == []
    assert len(list(tmp_path.rglob("*_submission.sh"))) == 2


def test_a_dry_run_imports_nothing_heavy(tmp_path):
    code = (
        "import json, sys; from launcher_scripts.main import main; "
        f"main(['stages=adapter_learning', 'dry_run=True', 'base_results_dir={tmp_path}']); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    heavy = ("torch", "lightning", "pytorch_lightning", "transformers", "datasets", "numpy")
    assert not loaded & {*heavy, "submitit", "rich"}
    assert "hydra" in loaded


@pytest.mark.parametrize("way", ["dry_run=True", "NEMO_LAUNCHER_DEBUG"])
def test_a_dry_run_submits_nothing(tmp_path, way):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sbatch", "srun"):
        (tools / tool).write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\necho 1\n")
        (tools / tool).chmod(0o755)
    words = [way] if "=" in way else []
    env = {"PATH": f"{tools}:{os.environ['PATH']}"} | ({} if words else {way: "1"})
    places = [f"base_results_dir={tmp_path}/r", f"data_dir={tmp_path}/d"]
    done = run("stages=ia3_learning", *words, *places, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "submitted").exists()
    assert len(list(tmp_path.rglob("*_submission.sh"))) == 2


# ---- data_prep in front


def test_data_prep_is_put_in_front_where_squads_files_are_missing(command):
    answer = command("stages=adapter_learning")
    (note,) = [line for line in answer.lines if "data_prep runs first" in line]
    assert "squad_train.jsonl, squad_val.jsonl" in note
    config = answer.config("data_prep")
    assert config["output_dir"] == str(answer.folder / "data/prompt_data/v1.1")


def test_data_prep_is_not_put_in_front_of_files_that_are_there(command, tmp_path):
    folder = tmp_path / "o/data/prompt_data/v1.1"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"squad_{split}.jsonl").write_text("{}\n")
    answer = command("stages=adapter_learning")
    assert answer.code == 0
    assert answer.stages() == ["adapter_learning"]


def test_data_prep_is_not_put_in_front_of_other_files(command):
    answer = command(
        "stages=adapter_learning",
        "adapter_learning.model.data.train_ds=[/nowhere/a.jsonl]",
        "adapter_learning.model.data.validation_ds=[]",
    )
    assert answer.code == 0
    assert answer.stages() == ["adapter_learning"]


# ---- what is composed


def test_composition_is_hydras_own():
    words = [
        "stages=[adapter_learning]",
        "adapter_learning=t5/squad",
        "adapter_learning.trainer.devices=2",
        "~adapter_learning.model.existing_tasks",
        "+adapter_learning.model.data.add_bos=True",
        "++adapter_learning.model.seed=7",
    ]
    composer = Composer()
    ours = composer.compose(words).cfg
    composer.close()
    resolvers.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        theirs = compose("config", words)
    assert OmegaConf.to_container(ours.adapter_learning) == OmegaConf.to_container(
        theirs.adapter_learning
    )


def test_only_the_groups_of_requested_stages_are_read(command, tmp_path):
    (tmp_path / "conf/training").mkdir(parents=True)
    (tmp_path / "conf/training/broken.yaml").write_text("a: [")
    words = ("training=broken", "--config-dir", str(tmp_path / "conf"))
    assert command("stages=adapter_learning", *words).code == 0
    answer = command("stages=training", *words)
    assert answer.code == 2
    assert len(answer.lines) == 1


def test_a_stage_that_another_refers_to_is_composed(command):
    answer = command(
        "stages=adapter_learning",
        "adapter_learning.model.language_model_path=${training.model.nemo_path}",
    )
    path = answer.config("adapter_learning")["model"]["language_model_path"]
    assert path.endswith("results/gpt3_126m/results/model")


def test_values_of_idle_stages_are_named(command):
    answer = command("stages=data_prep", "training.trainer.devices=2")
    note = "without effect, since their stages do not run: training.trainer.devices=2"
    assert f"note: {note}" in answer.lines


def test_values_of_data_prep_are_named_where_it_is_not_put_in_front(command):
    words = ["stages=training", "training.model.data.validation_ds=[]", "data_prep.seed=2"]
    assert not any("without effect, since" in line for line in command(*words).lines)
    answer = command(*words, "training.model.data.train_ds=[/nowhere/a.jsonl]")
    note = "without effect, since their stages do not run: data_prep.seed=2"
    assert f"note: {note}" in answer.lines


def test_the_choice_of_an_idle_group_can_be_referred_to(command):
    answer = command("stages=data_prep", "data_prep.run.name=${hydra:runtime.choices.cluster}")
    assert answer.config("data_prep")["run"]["name"] == "bcm"


def test_a_deleted_key_has_its_default(command):
    answer = command("stages=adapter_learning", "~adapter_learning.model.optim.betas")
    assert answer.config("adapter_learning")["model"]["optim"]["betas"] == [0.9, 0.98]


def test_a_key_that_the_yaml_leaves_out_needs_no_plus(command):
    answer = command("stages=adapter_learning", "adapter_learning.trainer.limit_val_batches=5")
    assert answer.config("adapter_learning")["trainer"]["limit_val_batches"] == 5


def test_the_cluster_follows_cluster_type(command):
    words = ("stages=data_prep", "cluster_type=interactive", "cluster.python=/opt/python")
    answer = command(*words)
    assert "/opt/python -u -m graftwerk data_prep" in answer.script("data_prep")


def test_relative_paths_become_absolute(command, tmp_path):
    answer = command("stages=data_prep", "data_prep.source=a.json", "data_dir=d")
    config = answer.config("data_prep")
    assert config["source"] == str(tmp_path / "here/a.json")
    assert config["output_dir"] == str(tmp_path / "here/d/prompt_data/v1.1")


def test_a_custom_source_is_a_path_where_there_is_one(command, tmp_path):
    (tmp_path / "here/rows.csv").write_text("question,answer\n")
    words = ("stages=data_prep", "data_prep=custom", "data_prep.prefix=own")
    (tmp_path / "here/rows.csv").rename(tmp_path / "rows.csv")
    answer = command(*words, "data_prep.source=../rows.csv")
    assert answer.config("data_prep")["source"] == str(tmp_path / "rows.csv")
    answer = command(*words, "data_prep.source=org/name")
    assert answer.config("data_prep")["source"] == "org/name"


@pytest.mark.parametrize(
    "value", ["a b$(touch x)", "it's", "a\\'b", "end\\", 'say "x"', "(1)", "a=b", "`x`;y & z"]
)
def test_text_that_hydra_cannot_read_arrives_as_typed(command, value):
    answer = command("stages=training", f"env_vars.FOO={value}")
    assert answer.code == 0, answer.lines
    exports = [line for line in answer.script("training").splitlines() if "FOO=" in line]
    said = subprocess.run(
        ["bash", "-c", f'{exports[0]}\nprintf %s "$FOO"'], capture_output=True, text=True
    )
    assert said.stdout == value


def test_folders_with_spaces_and_quotes_are_taken_as_typed(command, tmp_path):
    answer = command("stages=training", f"base_results_dir={tmp_path}/o/it's (a) b")
    assert answer.code == 0, answer.lines
    assert answer.config("training")["run"]["results_dir"].endswith("/it's (a) b/gpt3_126m")


def test_a_number_typed_as_time_limit_is_minutes(command):
    answer = command("stages=data_prep", "data_prep.run.time_limit=30")
    assert answer.config("data_prep")["run"]["time_limit"] == "30"


def test_the_quickstart_links_its_stages(command):
    answer = command("experiment=quickstart")
    assert answer.code == 0
    model = answer.config("training")["model"]["nemo_path"]
    adapters = []
    for name in ("adapter_learning", "ia3_learning"):
        config = answer.config(name)
        assert config["model"]["language_model_path"] == model
        adapters.append({"name": name, "path": config["model"]["nemo_path"]})
    assert answer.config("eval")["model"]["adapters"] == adapters
    assert answer.config("eval")["model"]["language_model_path"] == model


# ---- Hydra's flags


def test_cfg_job_prints_everything_that_is_composed(command):
    answer = command("stages=eval", "--cfg", "job")
    shown = OmegaConf.create(answer.out)
    assert answer.code == 0
    assert shown.stages == "eval"
    assert shown.training.model.num_layers == 12
    assert not answer.folder.exists()


def test_cfg_job_resolves(command):
    words = ("--cfg", "job", "--resolve", "-p", "adapter_learning.run")
    answer = command("base_results_dir=/r", *words)
    assert OmegaConf.create(answer.out).results_dir == "/r/gpt3_5b/adapter_learning_squad"


def test_cfg_with_a_wrong_key_is_code_2(command):
    answer = command("--cfg", "job", "eval.modle.seed=1")
    assert (answer.code, answer.out) == (2, "")


def test_help_names_stages_groups_and_exit_codes(command):
    answer = command("--help")
    assert answer.code == 0
    for word in (
        "adapter_learning",
        "t5/squad",
        "quickstart",
        "--multirun",
        "exit codes",
        "action=status",
    ):
        assert word in answer.out


def test_multirun_gives_each_point_a_folder_and_runs_what_is_common_once(command):
    answer = command("-m", "stages=[data_prep,training]", "training.model.seed=1,2")
    assert answer.code == 0
    scripts = [Path(name) for name in answer.written() if name.endswith("_submission.sh")]
    assert sorted(script.parent.name for script in scripts) == [
        "data_prep_squad",
        "seed_1",
        "seed_2",
    ]


def test_multirun_leaves_folders_that_differ_alone(command):
    answer = command("-m", "stages=data_prep", "data_prep.run.name=a,b")
    scripts = [name for name in answer.written() if name.endswith("_submission.sh")]
    assert [Path(name).parent.name for name in scripts] == ["data_prep_a", "data_prep_b"]


def test_a_sweep_links_eval_to_its_own_adapter(command):
    command("-m", "stages=[adapter_learning,eval]", "adapter_learning.model.seed=1,2")
    answer = command("-m", "stages=[adapter_learning,eval]", "adapter_learning.model.seed=1,2")
    for point in ("seed_1", "seed_2"):
        (path,) = answer.folder.glob(f"results/gpt3_5b/eval_squad/{point}/*_hydra.yaml")
        (adapter,) = OmegaConf.load(path).model.adapters
        assert f"adapter_learning_squad/{point}/" in adapter.path


def test_a_wrong_point_of_a_sweep_runs_none(command):
    answer = command("-m", "stages=data_prep", "data_prep.seed=1,-2")
    assert answer.code == 2
    assert answer.written() == []


def test_a_folder_of_own_files_is_searched_first(command, tmp_path):
    own = tmp_path / "conf/adapter_learning"
    own.mkdir(parents=True)
    text = (CONF / "adapter_learning/gpt3/squad.yaml").read_text()
    (own / "mine.yaml").write_text(text.replace("adapter_dim: 16", "adapter_dim: 24"))
    for way in (
        ["--config-dir", str(tmp_path / "conf")],
        [f"hydra.searchpath=[file://{tmp_path}/conf]"],
    ):
        answer = command("stages=adapter_learning", "adapter_learning=mine", *way)
        assert answer.code == 0, answer.lines
        tuning = answer.config("adapter_learning")["model"]["adapter_tuning"]
        assert tuning["adapter_dim"] == 24


def test_another_primary_file_and_a_defaults_list_in_a_stage(command, tmp_path):
    conf = tmp_path / "conf"
    (conf / "adapter_learning").mkdir(parents=True)
    (conf / "other.yaml").write_text(
        "defaults: [_self_, {adapter_learning: wide}]\nstages: [adapter_learning]\n"
    )
    (conf / "adapter_learning/wide.yaml").write_text(
        "defaults: [gpt3/squad@_here_]\nmodel: {adapter_tuning: {adapter_dim: 256}}\n"
    )
    answer = command("--config-path", str(conf), "--config-name", "other")
    assert answer.code == 0, answer.lines
    config = answer.config("adapter_learning")
    assert config["model"]["adapter_tuning"]["adapter_dim"] == 256
    assert config["model"]["adapter_tuning"]["type"] == "parallel_adapter"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-path", "/nowhere"], "--config-path: /nowhere is no folder"),
        (["--config-dir", "/nowhere"], "--config-dir: /nowhere is no folder"),
        (["--config-name", "nothing"], "no nothing.yaml in"),
        (["--resolve"], "--resolve: goes with --cfg"),
    ],
)
def test_a_wrong_flag_is_one_line(command, words, said):
    answer = command(*words)
    assert answer.code == 2
    assert len(answer.lines) == 1
    assert said in answer.lines[0]


def test_a_traceback_is_shown_on_request_alone(command, tmp_path, monkeypatch):
    (tmp_path / "conf/eval").mkdir(parents=True)
    (tmp_path / "conf/eval/bad.yaml").write_text("a: [")
    words = ("stages=eval", "eval=bad", "--config-dir", str(tmp_path / "conf"))
    answer = command(*words)
    assert (answer.code, len(answer.lines)) == (2, 1)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="while parsing"):
        command(*words)
