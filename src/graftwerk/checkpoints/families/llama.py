"""LLaMA and those that followed it: Mistral, Qwen2, Qwen3, SmolLM (a LLaMA), Nemotron."""

from typing import Any

from graftwerk.checkpoints.families.family import (
    Family,
    Raw,
    entries,
    heads_of,
    hugging_face_activation,
    rope_keys,
)
from graftwerk.checkpoints.layout import Stacked, Table
from graftwerk.models import TransformerConfig


def _shape(raw: Raw, activation: str = "silu", gated: bool = True) -> dict[str, Any]:
    """What the configurations of all of them say in the same words."""
    return {
        "vocab_size": raw["vocab_size"],
        "num_layers": raw["num_hidden_layers"],
        "hidden_size": raw["hidden_size"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_query_groups": raw.get("num_key_value_heads", 0),
        "kv_channels": raw.get("head_dim", 0),
        "ffn_hidden_size": raw["intermediate_size"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "normalization": "rmsnorm",
        "layernorm_epsilon": raw.get("rms_norm_eps", 1e-6),
        "activation": raw.activation("hidden_act", activation, gated),
        "share_embeddings_and_output_weights": raw.get("tie_word_embeddings", False),
        **raw.rotary(),
    }


def _raw(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "hidden_act": hugging_face_activation(config),
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        **rope_keys(config),
    }


def _table(config: TransformerConfig) -> Table:
    qkv, norm_bias = heads_of(config), config.normalization != "rmsnorm"
    mlp_bias, names = bool(config.mlp_bias), ("gate", "up") if config.gated else ("up",)
    table = {
        **entries("embedding.word_embeddings", "model.embed_tokens", bias=False),
        **entries("decoder.final_layernorm", "model.norm", bias=norm_bias),
    }
    for i in range(config.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        attention = f"{ours}.self_attention"
        projections = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
        inner = [f"{theirs}.mlp.{name}_proj" for name in names]
        table |= {
            **entries(f"{ours}.input_layernorm", f"{theirs}.input_layernorm", bias=norm_bias),
            **entries(f"{attention}.linear_qkv", *projections, bias=config.qkv_bias, reshape=qkv),
            **entries(f"{attention}.linear_proj", f"{theirs}.self_attn.o_proj", bias=config.bias),
            **entries(
                f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm", bias=norm_bias
            ),
            **entries(f"{ours}.mlp.linear_fc1", *inner, bias=mlp_bias, reshape=Stacked(len(inner))),
            **entries(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.down_proj", bias=mlp_bias),
        }
        if config.qk_layernorm:
            table |= entries(
                f"{attention}.query_layernorm", f"{theirs}.self_attn.q_norm", bias=False
            )
            table |= entries(f"{attention}.key_layernorm", f"{theirs}.self_attn.k_norm", bias=False)
    if not config.share_embeddings_and_output_weights:
        table |= entries("output_layer", "lm_head", bias=False)
    return table


def _buffers(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _llama_config(raw: Raw) -> TransformerConfig:
    bias = raw.get("attention_bias", False)
    return TransformerConfig(
        **_shape(raw), bias=bias, qkv_bias=bias, mlp_bias=raw.get("mlp_bias", False)
    )


def _llama_raw(config: TransformerConfig) -> dict[str, Any]:
    return {**_raw(config), "attention_bias": config.bias, "mlp_bias": config.mlp_bias}


def _mistral_config(raw: Raw) -> TransformerConfig:
    window = raw.values.get("sliding_window", 4096) or 0  # null: none; absent: 4096
    return TransformerConfig(**_shape(raw), bias=False, qkv_bias=False, window_size=window)


def _mistral_raw(config: TransformerConfig) -> dict[str, Any]:
    return {**_raw(config), "sliding_window": config.window_size or None}


def _window(raw: Raw) -> dict[str, Any]:
    """Qwen's windows: from layer `max_window_layers` on, or where `layer_types` says."""
    layers, size = raw["num_hidden_layers"], raw.get("sliding_window", 4096)
    if not raw.get("use_sliding_window", False):
        return {}
    first = raw.get("max_window_layers", 28)
    usual = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    types = raw.get("layer_types", usual)
    windowed = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if not windowed:
        return {}
    return {"window_size": size, "window_layers": None if len(windowed) == layers else windowed}


def _qwen_raw(config: TransformerConfig) -> dict[str, Any]:
    layers = range(config.num_layers) if config.window_layers is None else config.window_layers
    types = [
        "sliding_attention" if config.window_size and i in layers else "full_attention"
        for i in range(config.num_layers)
    ]
    return {
        **_raw(config),
        "use_sliding_window": config.window_size > 0,
        "sliding_window": config.window_size or None,
        "max_window_layers": next((i for i, t in enumerate(types) if t[0] == "s"), len(types)),
        "layer_types": types,
    }


def _qwen2_config(raw: Raw) -> TransformerConfig:
    return TransformerConfig(**_shape(raw), bias=False, qkv_bias=True, **_window(raw))


def _qwen3_config(raw: Raw) -> TransformerConfig:
    bias = raw.get("attention_bias", False)
    shape = {**_shape(raw), "kv_channels": raw.get("head_dim", 128)}
    return TransformerConfig(
        **shape, bias=bias, qkv_bias=bias, mlp_bias=False, qk_layernorm=True, **_window(raw)
    )


def _qwen3_raw(config: TransformerConfig) -> dict[str, Any]:
    return {**_qwen_raw(config), "attention_bias": config.bias}


def _nemotron_config(raw: Raw) -> TransformerConfig:
    bias = raw.get("attention_bias", False)
    shape = {
        "rotary_percentage": 0.5,
        **_shape(raw, "relu2", gated=False),
        "normalization": "layernorm1p",
        "layernorm_epsilon": raw.get("norm_eps", 1e-5),
    }
    return TransformerConfig(**shape, bias=bias, qkv_bias=bias, mlp_bias=raw.get("mlp_bias", False))


def _nemotron_raw(config: TransformerConfig) -> dict[str, Any]:
    values = {
        **_raw(config),
        "norm_eps": config.layernorm_epsilon,
        "partial_rotary_factor": config.rotary_percentage,
        "attention_bias": config.bias,
        "mlp_bias": config.mlp_bias,
    }
    del values["rms_norm_eps"]
    return values


def _family(model_type: str, name: str, to_config: Any, from_config: Any) -> Family:
    return Family(model_type, "model", {None: name}, to_config, from_config, _table, _buffers)


LLAMA = _family("llama", "LlamaForCausalLM", _llama_config, _llama_raw)
MISTRAL = _family("mistral", "MistralForCausalLM", _mistral_config, _mistral_raw)
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", _qwen2_config, _qwen_raw)
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", _qwen3_config, _qwen3_raw)
NEMOTRON = _family("nemotron", "NemotronForCausalLM", _nemotron_config, _nemotron_raw)
