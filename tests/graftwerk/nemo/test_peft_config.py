"""PEFT configuration classes: one place of defaults, NeMo's key names, clear refusals."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    methods_from_config,
)
from graftwerk.errors import UserError
from graftwerk.nemo import (
    PEFT_CONFIG_MAP,
    CanonicalAdaptersPEFTConfig,
    LoraPEFTConfig,
    PrefixTuningPEFTConfig,
    PtuningPEFTConfig,
    QLoraPEFTConfig,
    SelectivePEFTConfig,
)

METHODS = {
    "adapter": BottleneckConfig,
    "ia3": IA3Config,
    "lora": LoRAConfig,
    "qlora": LoRAConfig,
    "ptuning": PTuningConfig,
    "prompt": PromptTuningConfig,
    "prefix": PrefixTuningConfig,
}


@pytest.mark.parametrize("scheme", METHODS)
def test_without_a_block_a_configuration_is_the_methods_defaults(scheme: str) -> None:
    kind = PEFT_CONFIG_MAP[scheme]
    assert kind is not None
    assert kind({}).method == METHODS[scheme]()


@pytest.mark.parametrize("scheme", METHODS)
def test_a_configuration_is_what_the_stage_peft_reads(scheme: str) -> None:
    blocks = {"lora_tuning": {"adapter_dim": 3}, "p_tuning": {"virtual_tokens": 4}}
    model_cfg = OmegaConf.create({"peft": {"peft_scheme": scheme, **blocks}})
    kind = PEFT_CONFIG_MAP[scheme]
    assert kind is not None
    made = kind(model_cfg)
    assert [(made.name, made.method)] == methods_from_config(model_cfg, "peft")


def test_the_map_holds_no_class_for_training_the_whole_model() -> None:
    assert PEFT_CONFIG_MAP["none"] is None
    assert PEFT_CONFIG_MAP[None] is None


def test_nemos_keys_reach_the_method() -> None:
    made = CanonicalAdaptersPEFTConfig(
        {
            "peft": {
                "adapter_tuning": {"adapter_dim": 5, "layer_selection": [1], "weight_tying": True}
            }
        }
    )
    assert made.method == BottleneckConfig(dim=5, layer_selection=(1,), weight_tying=True)
    assert made.layer_selection == (1,)
    assert made.weight_tying
    assert (
        PtuningPEFTConfig({"peft": {"p_tuning": {"virtual_tokens": 7}}}).method.virtual_tokens == 7
    )


def test_selective_tuning_takes_nemos_plain_names() -> None:
    block = {"selective_tuning": {"tunable_base_param_names": ["self_attention"]}}
    made = SelectivePEFTConfig({"peft": block})
    assert isinstance(made.method, SelectiveConfig)
    assert made.method.replaces("decoder.layers.0.self_attention.linear_qkv.weight")
    assert not made.method.replaces("decoder.layers.0.mlp.linear_fc1.weight")


def test_qloras_adapter_is_a_lora() -> None:
    assert QLoraPEFTConfig({}).name == LoraPEFTConfig({}).name == "lora"


def test_an_unknown_key_of_a_block_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.peft\.lora_tuning\.lora_dim is not known"):
        LoraPEFTConfig({"peft": {"lora_tuning": {"lora_dim": 8}}})


@pytest.mark.parametrize(
    ("kind", "block", "said"),
    [
        (LoraPEFTConfig, {"lora_tuning": {"adapter_dim": "8"}}, "adapter_dim='8' must be a whole"),
        (
            LoraPEFTConfig,
            {"lora_tuning": {"adapter_dim": True}},
            "adapter_dim=True must be a whole",
        ),
        (LoraPEFTConfig, {"lora_tuning": {"alpha": [8]}}, r"alpha=\(8,\) must be a number"),
        (LoraPEFTConfig, {"lora_tuning": {"alpha": float("nan")}}, "alpha=nan must be a number"),
        (
            LoraPEFTConfig,
            {"lora_tuning": {"target_modules": "all"}},
            r"target_modules='all' must be a list \(text each\)",
        ),
        (
            CanonicalAdaptersPEFTConfig,
            {"adapter_tuning": {"type": "mlp_adapter"}},
            "must be 'parallel_adapter' or 'linear_adapter'",
        ),
        (
            SelectivePEFTConfig,
            {"selective_tuning": {"tunable_base_param_names": "mlp"}},
            "tunable_base_param_names='mlp' must be a list",
        ),
        (PtuningPEFTConfig, {"p_tuning": {"embedding_dim": -1}}, "embedding_dim=-1: at least 1"),
        (
            PtuningPEFTConfig,
            {"p_tuning": {"init_std": -0.1}},
            "init_std=-0.1: must not be negative",
        ),
        (PrefixTuningPEFTConfig, {"prefix_tuning": {"bottleneck_dim": 0}}, "bottleneck_dim=0: at"),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_named(kind: Any, block: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        kind({"peft": block})


@pytest.mark.parametrize(
    ("scheme", "block", "key"),
    [
        ("ptuning", "p_tuning", "layer_selection"),
        ("prompt", "prompt_tuning", "weight_tying"),
        ("prompt", "prompt_tuning", "prompt_init_text"),
        ("selective", "selective_tuning", "weight_tying"),
    ],
)
def test_a_key_that_a_method_has_no_use_for_is_not_known(scheme: str, block: str, key: str) -> None:
    kind = PEFT_CONFIG_MAP[scheme]
    assert kind is not None
    with pytest.raises(UserError, match=rf"model\.peft\.{block}\.{key} is not known"):
        kind({"peft": {block: {key: [1]}}})
