"""The YAML that ships: complete, right, told in docs/configuration.md; keys do what they say."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launcher_scripts.compose import CONF
from launcher_scripts.notices import ABSENT_KEYS
from launcher_scripts.schema import CLUSTERS, PREP_KINDS, STAGE_SCHEMAS, Root
from launcher_scripts.stages import STAGES
from launcher_scripts.validate import leaves

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([^`]+)` \|(.+)\|$")


def tables() -> tuple[dict[str, str], dict[str, str]]:
    """The rows of docs/configuration.md: key -> its other cells, with and without an effect."""
    text = (ROOT / "docs/configuration.md").read_text()
    effect, inert = text.split("## Keys without effect")
    return tuple(  # pyright: ignore
        {m[1]: m[2] for m in map(ROW.match, part.splitlines()) if m} for part in (effect, inert)
    )


def schema_keys() -> dict[str, bool]:
    """Every key that may be set -> whether it is accepted without effect."""
    found = dict.fromkeys((key for key, _, _ in leaves(Root)), False)
    found |= {f"cluster.{key}": False for s in CLUSTERS.values() for key, _, _ in leaves(s)}
    found |= dict.fromkeys(ABSENT_KEYS, True)
    stages = {**STAGE_SCHEMAS}
    del stages["data_prep"]
    parts = [*stages.items(), *(("data_prep", schema) for schema in PREP_KINDS.values())]
    for stage, schema in parts:
        for key, _, field in leaves(schema, stage):
            found[key.replace("[]", "")] = bool(field and field.metadata.get("inert"))
    return found


def row_of(key: str, rows: dict[str, str]) -> str | None:
    """The row of a key: its own, or that of all stages that have it."""
    short = key.split(".", 1)[-1]
    return next((name for name in (key, short) if name in rows), None)


def test_every_key_is_in_the_table_of_its_kind():
    effect, inert = tables()
    for key, without in schema_keys().items():
        assert row_of(key, inert if without else effect), key


def test_the_tables_hold_no_other_keys():
    effect, inert = tables()
    keys = schema_keys()
    # What holds keys may have a row too: `eval.model.adapters` is `auto` or a list.
    holders = {key.rsplit(".", 1)[0] for key in keys}
    known = {name for key in (*keys, *holders) for name in (key, key.split(".", 1)[-1])}
    assert not set(effect) - known
    assert not set(inert) - known


def test_every_key_of_conf_is_in_a_table():
    rows = {**tables()[0], **tables()[1]}
    for path in [*CONF.glob("*/*.yaml"), *CONF.glob("*/*/*.yaml")]:
        group = path.relative_to(CONF).parts[0]
        if group == "experiment":
            continue
        group = {"shared": "peft.model.peft"}.get(group, group)
        held: Any = OmegaConf.to_container(OmegaConf.load(path))
        held.pop("defaults", None)
        for key in plain_keys(held, group):
            below = [row for row in rows if row.startswith(f"{key}.")]  # `split: null`
            above = key.rsplit(".", 1)[0]  # `field_map: {a: b}`
            assert row_of(key, rows) or below or row_of(above, rows), f"{path}: {key}"


def plain_keys(value, key: str) -> list[str]:
    if isinstance(value, list):
        return [k for item in value for k in plain_keys(item, key)] or [key]
    if isinstance(value, dict):
        return [k for name, item in value.items() for k in plain_keys(item, f"{key}.{name}")]
    return [key]


def test_every_key_that_acts_names_a_test_that_exists():
    for key, cells in tables()[0].items():
        named = re.findall(r"`(\S+\.py)::(\w+)`", cells)
        assert named, f"{key} names no test"
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{key}: {file}::{test}"


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_shipped_option_renders(command, stage):
    for path in sorted((CONF / stage).rglob("*.yaml")):
        option = path.relative_to(CONF / stage).with_suffix("")
        more = ["data_prep.source=org/name"] if path.name == "custom.yaml" else []
        if path.name == "tiny.yaml":
            more = ["data_prep=synthetic"]
        if stage == "conversion":
            more = ["conversion.model.checkpoint_folder=/base"]
        if stage == "export":
            more = [
                "export.model.language_model_path=/base",
                "export.model.adapters=[{name: a, path: /a}]",
            ]
        if "bert" in str(path) and stage != "eval":
            more = [f"{stage}.model.language_model_path=/base"]
        answer = command(f"stages={stage}", f"{stage}={option}", *more)
        assert answer.code == 0, answer.lines


def test_launcher_keys_of_the_published_file_have_their_defaults(command):
    config = command("stages=adapter_learning").config("adapter_learning")
    assert config["trainer"]["devices"] == 8
    assert config["exp_manager"]["name"] == "megatron_gpt_adapter"
    assert config["exp_manager"]["checkpoint_callback_params"]["save_top_k"] == 5
    assert config["model"]["adapter_tuning"]["adapter_dim"] == 16
    assert config["model"]["optim"]["betas"] == [0.9, 0.98]
    assert config["model"]["encoder_seq_length"] == 2048


# ---- keys of the launcher, each by what it changes


@pytest.mark.parametrize(
    ("key", "value", "ends"),
    [
        ("task_name", "quiz", "results/gpt3_5b/adapter_learning_quiz"),
        ("model_train_name", "mine", "results/mine/adapter_learning_squad"),
        ("results_dir", "/there", "/there"),
    ],
)
def test_parts_of_names_change_the_results_dir(command, key, value, ends):
    words = ["stages=adapter_learning", f"adapter_learning.run.{key}={value}", "--cfg", "job"]
    shown = command(*words, "--resolve", "-p", "adapter_learning.run").out
    assert OmegaConf.create(shown).results_dir.endswith(ends)


@pytest.mark.parametrize("key", ["convert_name", "convert_dir"])
def test_parts_of_the_checkpoints_path_change_it(command, key):
    answer = command("stages=adapter_learning", f"adapter_learning.run.{key}=/there")
    path = answer.config("adapter_learning")["model"]["language_model_path"]
    assert path.endswith("/there/results/megatron_gpt.nemo")


def test_name_and_task_name_are_the_jobs_name(command):
    answer = command("stages=ia3_learning", "ia3_learning.run.task_name=quiz")
    assert "--job-name=nemo-megatron-ia3_learning_quiz_gpt3_5b" in answer.script("ia3_learning")
    answer = command(
        "stages=ia3_learning", "ia3_learning.run.name=own", "base_results_dir=" + str(answer.folder)
    )
    assert any("nemo-megatron-ia3_learning_own_submission.sh" in name for name in answer.written())


def test_time_limit_and_dependency_reach_the_script(command):
    words = ["training.run.time_limit=1-2", "training.run.dependency=afterok:12"]
    script = command("stages=training", *words).script("training")
    assert "#SBATCH --time=1-2\n" in script
    assert "afterok:12" in script


def test_data_dir_is_where_data_is_written_and_read(command):
    answer = command("stages=adapter_learning", "data_dir=/mine")
    config = answer.config("adapter_learning")
    assert answer.config("data_prep")["output_dir"] == "/mine/prompt_data/v1.1"
    assert config["model"]["data"]["train_ds"] == ["/mine/prompt_data/v1.1/squad_train.jsonl"]


def test_launcher_scripts_path_is_this_checkout_unless_it_is_set(command):
    assert f"{ROOT}/src" in command("stages=data_prep").script("data_prep")
    words = ("stages=training", "launcher_scripts_path=/opt/X/launcher_scripts")
    assert "/opt/X/src" in command(*words).script("training")


def test_base_results_dir_holds_every_stage(command, tmp_path):
    answer = command("experiment=quickstart", f"base_results_dir={tmp_path}/o/elsewhere")
    assert len([name for name in answer.written() if name.endswith(".sh")]) == 5
    assert {name.split("/")[0] for name in answer.written()} == {"elsewhere"}


def test_bos_and_limits_of_a_stage_reach_its_job(command):
    words = {
        "eval.model.data.add_bos": True,
        "eval.model.encoder_seq_length": 512,
        "eval.model.language_model_path": "/base",
        "eval.trainer.precision": "32",
        "eval.exp_manager.explicit_log_dir": "/logs",
    }
    answer = command("stages=eval", *(f"{key}={value}" for key, value in words.items()))
    config = OmegaConf.create({"eval": answer.config("eval")})
    for key, value in words.items():
        assert str(OmegaConf.select(config, key)) == str(value)


def test_profile_reaches_every_stage_that_learns(command):
    stages = [name for name, stage in STAGES.items() if stage.learns]
    words = [f"stages=[{','.join(stages)},eval]", "adapter_learning.trainer.profile=False"]
    for word, expected in (("profile=True", True), ("profile=False", False)):
        answer = command(*words, word)
        assert answer.code == 0, answer.lines
        for stage in stages:
            own = expected and stage != "adapter_learning"
            assert answer.config(stage)["trainer"]["profile"] is own
        assert "profile" not in answer.config("eval")["trainer"]
    assert command("stages=peft", "profile=sometimes").code == 2


def test_model_parallel_size_is_their_product(command):
    words = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]
    answer = command("stages=ia3_learning", *(f"ia3_learning.model.{word}" for word in words))
    assert answer.config("ia3_learning")["model"]["model_parallel_size"] == 4


def test_gpus_per_task_is_one(command):
    answer = command("stages=training", "cluster.gpus_per_task=2")
    assert answer.code == 2
    assert "cluster.gpus_per_task: 2" in answer.lines[0]


def test_the_subset_reaches_the_hub(command):
    words = ("stages=data_prep", "data_prep=custom", "data_prep.source=org/name")
    assert command(*words, "data_prep.subset=en").config("data_prep")["subset"] == "en"
