"""Configuration classes: AdapterHub's keys and defaults, strings, unions, and what is refused."""

import json
import subprocess
import sys

import pytest

from graftwerk import adapterhub
from graftwerk.adapterhub import (
    ADAPTER_CONFIG_MAP,
    AdapterConfig,
    BnConfig,
    CompacterConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    HoulsbyConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ParallelConfig,
    ParBnConfig,
    PfeifferConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from graftwerk.errors import UserError
from tests.graftwerk.learning_stage import environment


def test_a_dictionary_of_the_librarys_files_comes_back_as_it_was(shared):
    files = list((shared / "golden" / "adapters").rglob("adapter_config.json"))
    assert files
    for file in files:
        said = json.loads(file.read_text())["config"]
        assert AdapterConfig.from_dict(said).to_dict() == said


@pytest.mark.parametrize("name", ADAPTER_CONFIG_MAP)
def test_a_name_its_class_and_its_dictionary_say_the_same(name):
    config = AdapterConfig.load(name)
    assert config == ADAPTER_CONFIG_MAP[name]
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_older_names_are_the_newer_classes():
    assert PfeifferConfig() == AdapterConfig.load("pfeiffer") == SeqBnConfig()
    assert HoulsbyConfig() == AdapterConfig.load("houlsby") == DoubleSeqBnConfig()
    assert ParallelConfig() == AdapterConfig.load("parallel") == ParBnConfig()
    places = {"mh_adapter": True, "output_adapter": True}
    shape = {"reduction_factor": 8, "non_linearity": "relu"}
    assert AdapterConfig(**places, **shape) == BnConfig(**places, **shape)


def test_arguments_in_a_string():
    assert AdapterConfig.load("lora[r=16, alpha=32]") == LoRAConfig(r=16, alpha=32)
    assert AdapterConfig.load("lora[attn_matrices=[q, k, 'v']]").attn_matrices == ["q", "k", "v"]
    mapped = AdapterConfig.load("seq_bn[reduction_factor={'0': 2, default: 16}]")
    assert mapped == SeqBnConfig(reduction_factor={"0": 2, "default": 16})
    assert AdapterConfig.load("ia3[use_gating=True,dropout=0.5]") == IA3Config(
        use_gating=True, dropout=0.5
    )


def test_a_union_in_a_string():
    config = AdapterConfig.load("prefix_tuning[bottleneck_size=800]|parallel")
    assert config == MAMConfig() == AdapterConfig.load("mam")
    assert isinstance(config, ConfigUnion)


def test_a_union_is_seen_as_a_list_and_as_a_mapping():
    config = MAMConfig(adapter=ParBnConfig(reduction_factor=4))
    assert config[1] is config.adapter
    assert config["1.reduction_factor"] == 4
    assert len(config) == len(config[0]) + len(config[1]) == len(list(config))


def test_unipelt_has_all_its_members_gated():
    assert UniPELTConfig() == ConfigUnion(
        PrefixTuningConfig(prefix_length=10, use_gating=True),
        PfeifferConfig(reduction_factor=16, use_gating=True),
        LoRAConfig(r=8, alpha=2, use_gating=True),
    )


def test_replacing_leaves_the_first_as_it_was():
    first = SeqBnConfig()
    second = first.replace(reduction_factor=8)
    assert (first["reduction_factor"], second["reduction_factor"]) == (16, 8)
    assert AdapterConfig.load(second, reduction_factor=4, dropout=None) == SeqBnConfig(
        reduction_factor=4
    )
    with pytest.raises(AttributeError):
        first.reduction_factor = 2  # type: ignore[misc]


def test_what_the_librarys_files_leave_out_is_said_where_it_matters():
    assert "subtract_projection" not in LoReftConfig().to_dict()
    said = DiReftConfig().to_dict()
    assert AdapterConfig.from_dict(said) == DiReftConfig() != LoReftConfig(orthogonality=False)
    assert "random_uniform_scale" not in PromptTuningConfig().to_dict()


def test_the_nested_form_of_older_files_is_read():
    said = {key: value for key, value in SeqBnConfig().to_dict().items() if "inv" not in key}
    said["invertible_adapter"] = {"block_type": "nice", "reduction_factor": 2}
    assert AdapterConfig.from_dict(said) == AdapterConfig.load("pfeiffer+inv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra", "'lorra' is not known: one of seq_bn"),
        ("lora[rank=3]", "LoRAConfig has no key 'rank'"),
        ("lora[r]", "'r' must be key=value"),
        ("lora[r=3", "brackets do not match"),
        ("lora[r=3]x", "does not end with"),
        ("lora[r=__import__('os')]", "is no number, word, list or text"),
        ("seq_bn|double_seq_bn", "two bottlenecks at output_adapter"),
        ("lora|ia3", "two configurations of lora"),
        ("mam|lora", "is no configuration of a single method"),
    ],
)
def test_a_wrong_string_is_refused_with_what_is_right(text, said):
    with pytest.raises(UserError, match=said):
        AdapterConfig.load(text)


def test_layers_left_out_are_judged_on_a_model_only():
    ConfigUnion(SeqBnConfig(leave_out=[0]), CompacterConfig(leave_out=[1]))


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="architecture 'hyper' is not known"):
        AdapterConfig.from_dict({"architecture": "hyper"})


def test_the_base_class_imported_alone_knows_all_others():
    code = (
        "from graftwerk.adapterhub import AdapterConfig as C; "
        "C(mh_adapter=True, output_adapter=True, reduction_factor=8, non_linearity='relu'); "
        "C.from_dict({'architecture': 'union', 'configs': [{'architecture': 'lora'}]})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_every_public_name_is_there():
    for name in adapterhub.__all__:
        assert getattr(adapterhub, name) is not None
