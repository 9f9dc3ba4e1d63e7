"""Hugging Face's layout: `config.json` beside safetensors, under the names of `transformers`.

An architecture is two functions: its `config.json` to a `TransformerConfig`, and that to the table
of where each of our parameters comes from.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.checkpoints.tensors import Source
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

Table = dict[str, Source]


def read_config(folder: Path) -> tuple[TransformerConfig, Table, Callable[[str], bool]]:
    """The model's shape, the table of its tensors, and which file tensors are no weights.

    Raises:
        UserError: for an architecture or an option of it that is not known.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{path}: model_type {kind!r} is not known; those that are: {known}")
    shape, tensors, ignore = ARCHITECTURES[kind]
    try:
        config = shape(raw, path)
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from None
    return config, tensors(config), ignore


def _activation(raw: dict[str, Any], key: str, known: dict[str, str], path: Path) -> str:
    if raw[key] not in known:
        raise UserError(f"{path}: {key}={raw[key]!r} is not known: one of {', '.join(known)}")
    return known[raw[key]]


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, head_size: int) -> Tensor:
    """Rows of q, k and v in Megatron's order: for each group its q heads, its key, its value.

    Weights [heads d, h] and [groups d, h] give [(heads + 2 groups) d, h]; biases likewise.
    """
    groups = key.shape[0] // head_size
    blocks = [part.unflatten(0, (groups, -1)) for part in (query, key, value)]
    return torch.cat(blocks, 1).flatten(0, 1)


def _gpt2_shape(raw: dict[str, Any], path: Path) -> TransformerConfig:
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if raw.get(key, usual) is not usual:
            raise UserError(f"{path}: {key}={raw[key]} is not supported; only {usual} is")
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["n_layer"],
        hidden_size=raw["n_embd"],
        num_attention_heads=raw["n_head"],
        ffn_hidden_size=raw.get("n_inner") or 4 * raw["n_embd"],
        max_position_embeddings=raw["n_positions"],
        layernorm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        activation=_activation(
            {"activation_function": "gelu_new", **raw}, "activation_function", activations, path
        ),
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", True),
    )


def _gpt2_tensors(config: TransformerConfig) -> Table:
    def transposed(weight: Tensor) -> Tensor:  # GPT-2's Conv1D holds [in, out]
        return weight.t()

    def qkv(fused: Tensor) -> Tensor:
        query, key, value = (fused.t() if fused.ndim > 1 else fused).chunk(3)
        return fuse_qkv(query, key, value, config.kv_channels)

    table = {
        "embedding.word_embeddings.weight": Source(("wte.weight",)),
        "embedding.position_embeddings.weight": Source(("wpe.weight",)),
        "decoder.final_layernorm.weight": Source(("ln_f.weight",)),
        "decoder.final_layernorm.bias": Source(("ln_f.bias",)),
    }
    for i in range(config.num_layers):
        for ours, theirs, weight in (
            ("input_layernorm", "ln_1", None),
            ("self_attention.linear_qkv", "attn.c_attn", qkv),
            ("self_attention.linear_proj", "attn.c_proj", transposed),
            ("pre_mlp_layernorm", "ln_2", None),
            ("mlp.linear_fc1", "mlp.c_fc", transposed),
            ("mlp.linear_fc2", "mlp.c_proj", transposed),
        ):
            for kind in ("weight", "bias"):
                source = Source((f"h.{i}.{theirs}.{kind}",))
                if weight is not None and (kind == "weight" or weight is qkv):
                    source = Source(source.names, weight)
                table[f"decoder.layers.{i}.{ours}.{kind}"] = source
    table = {
        ours: Source(tuple(f"transformer.{n}" for n in source.names), source.build)
        for ours, source in table.items()
    }
    if not config.share_embeddings_and_output_weights:
        table["output_layer.weight"] = Source(("lm_head.weight",))
    return table


def _llama_shape(raw: dict[str, Any], path: Path) -> TransformerConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{path}: rotary scaling {kind!r} is not supported; only 'default' is")
    if raw.get("mlp_bias", False) != raw.get("attention_bias", False):
        raise UserError(f"{path}: mlp_bias and attention_bias must be the same")
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        num_attention_heads=raw["num_attention_heads"],
        num_query_groups=raw.get("num_key_value_heads") or 0,
        kv_channels=raw.get("head_dim") or 0,
        ffn_hidden_size=raw["intermediate_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        normalization="rmsnorm",
        layernorm_epsilon=raw.get("rms_norm_eps", 1e-6),
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        activation=_activation(
            {"hidden_act": "silu", **raw},
            "hidden_act",
            {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"},
            path,
        ),
        bias=raw.get("attention_bias", False),
        qkv_bias=raw.get("attention_bias", False),
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", False),
    )


def _llama_tensors(config: TransformerConfig) -> Table:
    def qkv(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fuse_qkv(query, key, value, config.kv_channels)

    def joined(gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat([gate, up])

    table = {
        "embedding.word_embeddings.weight": Source(("model.embed_tokens.weight",)),
        "decoder.final_layernorm.weight": Source(("model.norm.weight",)),
    }
    kinds = ("weight", "bias") if config.bias else ("weight",)
    for i in range(config.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        table[f"{ours}.input_layernorm.weight"] = Source((f"{theirs}.input_layernorm.weight",))
        table[f"{ours}.pre_mlp_layernorm.weight"] = Source(
            (f"{theirs}.post_attention_layernorm.weight",)
        )
        for kind in kinds:
            table[f"{ours}.self_attention.linear_qkv.{kind}"] = Source(
                tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"), qkv
            )
            table[f"{ours}.self_attention.linear_proj.{kind}"] = Source(
                (f"{theirs}.self_attn.o_proj.{kind}",)
            )
            table[f"{ours}.mlp.linear_fc1.{kind}"] = Source(
                tuple(f"{theirs}.mlp.{part}_proj.{kind}" for part in ("gate", "up")), joined
            )
            table[f"{ours}.mlp.linear_fc2.{kind}"] = Source((f"{theirs}.mlp.down_proj.{kind}",))
    if not config.share_embeddings_and_output_weights:
        table["output_layer.weight"] = Source(("lm_head.weight",))
    return table


def _gpt2_buffers(name: str) -> bool:
    return name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight"


def _llama_buffers(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


# model_type -> (shape, table of tensors, file tensors that are no weights: masks, tied copies)
ARCHITECTURES = {
    "gpt2": (_gpt2_shape, _gpt2_tensors, _gpt2_buffers),
    "llama": (_llama_shape, _llama_tensors, _llama_buffers),
}
