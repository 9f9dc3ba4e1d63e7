"""Stages peft and fine_tuning on the command line: schemes, blocks, what is behind them."""

import json

import pytest

from launcher_scripts.compose import CONF
from launcher_scripts.schema import Peft
from launcher_scripts.tuning import BLOCKS
from launcher_scripts.validate import fields_of
from tests.launcher_scripts.test_schema import refused

PEFT = "stages=peft"
SCHEME = "peft.model.peft.peft_scheme"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    sizes = {"num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 64}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def test_each_block_is_that_of_a_scheme():
    blocks = {name for name in fields_of(Peft) if name.endswith("_tuning")}
    assert {block for block in BLOCKS.values() if block} == blocks


@pytest.mark.parametrize("stage", ["peft", "fine_tuning"])
def test_there_are_files_for_each_family_and_kind_of_data(stage):
    found = {str(path.relative_to(CONF / stage)) for path in (CONF / stage).rglob("*.yaml")}
    wanted = {f"{f}/{task}.yaml" for f in ("gpt3", "llama", "t5") for task in ("squad", "custom")}
    assert wanted | {"bert/squad.yaml"} == found


def test_the_stages_come_before_those_of_one_method(command):
    answer = command("stages=[eval,ia3_learning,peft,adapter_learning,fine_tuning]")
    order = ["data_prep", "fine_tuning", "peft", "adapter_learning", "ia3_learning", "eval"]
    assert answer.stages() == order


def test_defaults_are_nemos(command):
    model = command(PEFT).config("peft")["model"]
    assert (model["global_batch_size"], model["micro_batch_size"]) == (128, 4)
    optim = model["optim"]
    assert (optim["lr"], optim["weight_decay"], optim["betas"]) == (1e-4, 0.01, [0.9, 0.98])
    assert (optim["sched"]["name"], optim["sched"]["warmup_steps"]) == ("CosineAnnealing", 50)
    blocks = model["peft"]
    for block in ("adapter_tuning", "lora_tuning"):
        assert (blocks[block]["adapter_dim"], blocks[block]["adapter_dropout"]) == (32, 0.0)
    assert blocks["lora_tuning"]["target_modules"] == ["attention_qkv"]
    wanted = {"virtual_tokens": 10, "bottleneck_dim": 1024, "embedding_dim": 1024}
    assert wanted | {"init_std": 0.023, "encoder": "mlp"} == blocks["p_tuning"]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ('"lora,ptuning"', "lora,ptuning"),
        ("[lora,ptuning]", ["lora", "ptuning"]),
        ("null", None),
        ("none", "none"),
    ],
)
def test_a_scheme_is_one_name_or_many(command, value, names):
    answer = command(PEFT, f"{SCHEME}={value}")
    assert answer.code == 0, answer.lines
    assert answer.config("peft")["model"]["peft"]["peft_scheme"] == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([f"{SCHEME}=[lora,ia4]"], "fusion, none, joined by commas, not ia4; did you mean ia3?"),
        ([f"{SCHEME}=[lora,lora]"], "must name each method once"),
        ([f"{SCHEME}=[lora,qlora]"], "must name each method once, and lora or qlora"),
        ([f"{SCHEME}=[none,lora]"], "goes with no other method"),
        ([f"{SCHEME}=3"], "peft_scheme: must be"),
        ([f"{SCHEME}=ia3", "peft.model.peft.ia3_tuning.layer_selection=[]"], "is empty; null"),
        (["peft.model.peft.lora_tuning.target_modules=[q]"], "target_modules.0: must be one of"),
        (["peft.model.peft.lora_tuning.r=8"], "the width of an adapter is adapter_dim"),
        (["peft.model.peft.lora_tuning.use_dora=True"], "ours is model.peft.lora_tuning.dora"),
        (["peft.model.lora_tuning.alpha=8"], "it is model.peft.lora_tuning, of stage peft"),
        (
            [f"{SCHEME}=ptuning", "peft.model.encoder_seq_length=11"],
            "11 leaves no room behind 10 virtual tokens: at least 12",
        ),
        ([f"{SCHEME}=[]"], "peft_scheme: is empty: name some of adapter, "),
    ],
)
def test_a_wrong_method_is_one_line(command, words, said):
    refused(command(PEFT, *words), said)


@pytest.mark.parametrize(
    ("scheme", "settings", "said"),
    [
        ("[qlora,selective]", [], "peft_scheme: selective trains parameters of the base"),
        ("qlora", ["lora_tuning.dora=True"], "lora_tuning.dora: reads weights that qlora holds"),
        (
            "lora",
            ["lora_tuning.dora=True", "lora_tuning.weight_tying=True"],
            "lora_tuning.dora: goes with untied layers",
        ),
        ("lora", ["lora_tuning.target_modules=[]"], "lora_tuning.target_modules: is empty"),
        (
            "adapter",
            ["adapter_tuning.position_embedding_strategy=add"],
            "adapter_tuning.position_embedding_strategy: add tells tied layers apart",
        ),
        (
            "selective",
            ["selective_tuning.tunable_base_param_names=[]"],
            "selective_tuning.tunable_base_param_names: is empty",
        ),
        (
            "ptuning",
            ["p_tuning.encoder=lstm", "p_tuning.embedding_dim=7"],
            "p_tuning.embedding_dim: 7: an lstm needs an even number",
        ),
    ],
)
def test_what_a_method_would_refuse_in_its_job_is_refused_before_it(
    command, scheme, settings, said
):
    words = [f"peft.model.peft.{setting}" for setting in settings]
    refused(command(PEFT, f"{SCHEME}={scheme}", *words), said)
    if settings:  # of another method they have no effect, which a notice says
        assert command(PEFT, f"{SCHEME}=ia3", *words).code == 0


def test_an_unknown_scheme_lists_the_known_ones(command):
    answer = command(PEFT, f"{SCHEME}=houlsby")
    refused(answer, "adapter, ia3, lora, ptuning, prefix, prompt, selective, qlora, fusion, none")


@pytest.mark.parametrize("stage", ["peft.model.peft.adapter_tuning", "peft.model.peft.ia3_tuning"])
def test_layers_beyond_the_models_are_named(command, checkpoint, stage):
    scheme = "adapter" if "adapter_tuning" in stage else "ia3"
    base = f"peft.model.language_model_path={checkpoint}"  # a T5 of 3 + 3 layers
    words = (PEFT, "peft=t5/squad", base, f"{SCHEME}={scheme}")
    assert command(*words, f"{stage}.layer_selection=[1,6]").code == 0
    answer = command(*words, f"{stage}.layer_selection=[1,7]", "base_results_dir=/tmp/nowhere")
    assert answer.lines == [f"{stage}.layer_selection: [7] are beyond the model's 6 layers"]


def test_a_block_that_is_not_chosen_is_told_where_it_was_set(command):
    words = (PEFT, f"{SCHEME}=lora")
    told = [line for line in command(*words).lines if "peft_scheme" in line]
    assert told == []
    answer = command(*words, "peft.model.peft.p_tuning.virtual_tokens=20", "dry_run=True")
    told = [line for line in answer.lines if "peft_scheme" in line]
    assert told == [
        "note: peft: without effect, since peft_scheme is lora: model.peft.p_tuning",
    ]


def test_eval_takes_adapters_and_models(command):
    words = ("stages=[fine_tuning,peft,ia3_learning,eval]", f"{SCHEME}=lora")
    model = command(*words).config("eval")["model"]
    assert [each["name"] for each in model["adapters"]] == ["peft", "ia3_learning"]
    assert [each["name"] for each in model["models"]] == ["fine_tuning"]
    assert model["models"][0]["path"].endswith("fine_tuning_squad/results/megatron_gpt")


@pytest.mark.parametrize("scheme", ["none", "null", "[none]"])
def test_eval_takes_what_peft_leaves_without_a_method_as_a_model(command, scheme):
    model = command("stages=[peft,eval]", f"{SCHEME}={scheme}").config("eval")["model"]
    assert model["adapters"] == []
    assert [each["name"] for each in model["models"]] == ["peft"]


def test_peft_begins_with_a_fine_tuned_model_where_it_is_told_to(command):
    answer = command(
        "stages=[fine_tuning,peft,eval]",
        "peft.model.language_model_path=${fine_tuning.model.nemo_path}",
    )
    assert answer.code == 0, answer.lines
    path = answer.config("peft")["model"]["language_model_path"]
    assert path.endswith("fine_tuning_squad/results/megatron_gpt")
    assert not any("peft.model.language_model_path" in line for line in answer.lines)
