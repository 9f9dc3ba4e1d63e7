"""Files of the published launcher, in the spelling of 23.03 and of 23.11, run here unchanged."""

import json
from pathlib import Path

import pytest
import yaml

THEIRS = Path(__file__).parent / "theirs"
VERSIONS = ("23.03", "23.11")


def words(version: str, *more: str) -> list[str]:
    return ["--config-path", str(THEIRS / version), *more]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("stage", ["adapter_learning", "ia3_learning"])
@pytest.mark.parametrize("family", ["gpt3", "t5"])
def test_each_file_renders_with_every_value_it_holds(command, version, stage, family):
    answer = command(*words(version, f"stages=[{stage}]", f"{stage}={family}/squad"))
    assert answer.code == 0, answer.lines
    config = answer.config(stage)
    given = yaml.safe_load((THEIRS / version / stage / family / "squad.yaml").read_text())
    assert_holds(config, given)
    model = {"gpt3": "gpt3_5b", "t5": "t5_220m"}[family]
    assert config["run"]["results_dir"].endswith(f"/results/{model}/{stage}_squad")
    assert config["model"]["model_parallel_size"] == 1
    assert f"#SBATCH --job-name=nemo-megatron-{stage}_squad_{model}" in answer.script(stage)
    assert "registry.example/training" in answer.script(stage)


def assert_holds(config, given, key=""):
    """Every plain value of `given` is in `config`; interpolations are resolved there."""
    if isinstance(given, dict):
        for name, value in given.items():
            assert_holds(config[name], value, f"{key}.{name}")
    elif isinstance(given, list):
        assert len(config) == len(given), key
        for one, other in zip(config, given, strict=True):
            assert_holds(one, other, key)
    elif isinstance(given, str) and "${" in given:
        assert "${" not in str(config), key
    else:
        assert config == (float(given) if key.endswith(".lr") else given), key


def test_their_stages_are_ours_where_we_have_them(command):
    answer = command(*words("23.11"))
    assert answer.code == 0, answer.lines
    assert answer.stages() == ["data_prep", "adapter_learning", "eval"]
    assert "note: stages: data_preparation is data_prep here" in answer.lines
    assert "note: stages: evaluation is eval here" in answer.lines


@pytest.mark.parametrize("stage", ["prompt_learning", "conversion_hf2nemo", "quantization"])
def test_their_stages_that_we_do_not_have_are_refused_by_name(command, stage):
    answer = command(*words("23.11", f"stages=[adapter_learning,{stage}]"))
    assert answer.code == 2
    assert len(answer.lines) == 1
    assert answer.lines[0].startswith(f"stages={stage}: it is not here; there are data_prep")


def test_a_stage_that_their_file_sets_to_null_is_one_line(command):
    answer = command(*words("23.03"))
    assert answer.code == 2
    assert answer.lines == [
        "adapter_learning: is null, but stages names it; choose a configuration, such as "
        "adapter_learning=gpt3/squad"
    ]


def test_an_evaluation_that_we_do_not_have_is_refused(command):
    answer = command(*words("23.03", "stages=[eval]"))
    assert answer.code == 2
    assert answer.lines == [
        "evaluation: gpt3/evaluate_all (in config.yaml) is not here; choose one with "
        "eval=bert/squad|gpt3/squad|t5/squad"
    ]


def test_an_option_of_their_defaults_that_we_do_not_have_is_refused(command):
    answer = command(*words("23.11", "stages=[conversion]"))
    assert answer.code == 2
    assert answer.lines == [
        "conversion: gpt3/convert_gpt3 (in config.yaml) is not here; choose one with "
        "conversion=gpt3/hf_to_nemo|gpt3/nemo_to_hf|gpt3/to_graftwerk|t5/hf_to_nemo|"
        "t5/nemo_to_hf|t5/to_graftwerk"
    ]


def test_their_file_dropped_beside_ours_is_an_option(command, tmp_path):
    folder = tmp_path / "conf/adapter_learning/gpt3"
    folder.mkdir(parents=True)
    text = (THEIRS / "23.03/adapter_learning/gpt3/squad.yaml").read_text()
    (folder / "theirs.yaml").write_text(text.replace("adapter_dim: 16", "adapter_dim: 48"))
    more = ("adapter_learning=gpt3/theirs", "--config-dir", str(tmp_path / "conf"))
    answer = command("stages=adapter_learning", *more)
    assert answer.code == 0, answer.lines
    assert answer.config("adapter_learning")["model"]["adapter_tuning"]["adapter_dim"] == 48


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_without_effect_are_named_in_one_notice(command, version):
    answer = command(*words(version, "stages=adapter_learning", "adapter_learning=gpt3/squad"))
    (notice,) = [line for line in answer.lines if "accepted without effect" in line]
    sampler = {"23.03": "replace_sampler_ddp", "23.11": "use_distributed_sampler"}[version]
    for key in (
        f"trainer.{sampler}",
        "model.gradient_as_bucket_view",
        "model.virtual_prompt_style",
    ):
        assert key in notice
    assert "adapter_dim" not in notice


@pytest.fixture
def base(tmp_path_factory) -> Path:
    """A tiny model where the files look for it, and a few rows where they look for these."""
    import torch

    from graftwerk.checkpoints import save_base
    from graftwerk.data.tokenizers import build_tokenizer
    from graftwerk.models import GPT, TransformerConfig

    folder = tmp_path_factory.mktemp("theirs")
    rows = [
        {"taskname": "squad", "context": f"red is {n}", "question": "red", "answer": str(n)}
        for n in range(8)
    ] * 8
    data = folder / "data/prompt_data/v1.1"
    data.mkdir(parents=True)
    for split, part in (("train", rows), ("val", rows[:8])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (data / f"squad_{split}.jsonl").write_text(text)
    texts = ["context: question: answer:", *(" ".join(row.values()) for row in rows)]
    tokenizer = build_tokenizer("word", texts)
    config = TransformerConfig(
        vocab_size=len(tokenizer),
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        max_position_embeddings=2048,
        position_embedding_type="rope",
    )
    model = GPT(config)
    model.initialise(torch.Generator().manual_seed(0))
    save_base(model, tokenizer, folder / "results/gpt3_5b/convert_nemo/results/megatron_gpt.nemo")
    return folder


BOTH = {"adapter_learning": "adapter", "ia3_learning": "ia3"}


@pytest.mark.parametrize(
    ("version", "stages"),
    [
        pytest.param("23.03", [*BOTH], marks=pytest.mark.long),
        pytest.param("23.11", [*BOTH], marks=pytest.mark.long),
        ("23.11", ["adapter_learning"]),
    ],
)
def test_the_gpt_files_train_with_device_overrides_only(
    command, base, version, stages, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = [f"stages=[{','.join(stages)}]", "cluster_type=interactive", "container=null"]
    for stage in stages:
        more += [f"{stage}=gpt3/squad", f"{stage}.trainer.devices=1"]
        more += [f"{stage}.trainer.accelerator=cpu"]
    results = base / "results"
    places = [f"base_results_dir={results}", f"data_dir={base}/data", "dry_run=False"]
    answer = command(*words(version, *more, *places))
    assert answer.code == 0, answer.lines
    for stage in stages:
        folder = results / f"gpt3_5b/{stage}_squad/results"
        assert (folder / f"megatron_gpt_{BOTH[stage]}.nemo").is_file()
        assert json.loads((folder / "summary.json").read_text())["steps"] == 4
