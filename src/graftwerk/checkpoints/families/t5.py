"""T5 (v1.0, v1.1, FLAN) and mT5."""

from typing import Any

from graftwerk.checkpoints.families.family import (
    GATED,
    Family,
    Raw,
    entries,
    heads_of,
    hugging_face_activation,
)
from graftwerk.checkpoints.layout import Entry, Heads, Stacked, Table
from graftwerk.models import TransformerConfig


def _config(raw: Raw, scales: bool) -> TransformerConfig:
    tied = "lm_head.weight" not in raw.tensors
    kind = raw.get("feed_forward_proj", "relu")
    gated = kind.startswith("gated-")
    name = {"gated-gelu": "gelu_new"}.get(kind, kind.removeprefix("gated-"))
    named = Raw({"feed_forward_proj": name}, raw.path, raw.tensors)
    size = raw["d_model"]
    return TransformerConfig(
        architecture="t5",
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_layers"],
        decoder_num_layers=raw.get("num_decoder_layers", raw["num_layers"]),
        hidden_size=size,
        num_attention_heads=raw["num_heads"],
        kv_channels=raw["d_kv"],
        ffn_hidden_size=raw["d_ff"],
        max_position_embeddings=0,
        normalization="rmsnorm",
        layernorm_epsilon=raw.get("layer_norm_epsilon", 1e-6),
        activation=named.activation("feed_forward_proj", "relu", gated),
        bias=False,
        qkv_bias=False,
        normalize_attention_scores=False,
        position_embedding_type="relative",
        relative_attention_num_buckets=raw.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=raw.get("relative_attention_max_distance", 128),
        share_embeddings_and_output_weights=tied,
        output_scale=size**-0.5 if scales else 1.0,
        decoder_start_token_id=raw.get("decoder_start_token_id", raw.get("pad_token_id", 0)),
    )


def _t5_config(raw: Raw) -> TransformerConfig:
    # T5 v1.1 says by `tie_word_embeddings` that outputs are not scaled.
    tied = raw.get("tie_word_embeddings", True)
    return _config(raw, raw.get("scale_decoder_outputs", tied))


def _mt5_config(raw: Raw) -> TransformerConfig:
    return _config(raw, scales=False)


def _raw(config: TransformerConfig) -> dict[str, Any]:
    name = hugging_face_activation(config)
    if config.activation in GATED.values():
        name = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_num_layers,
        "d_model": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "d_kv": config.kv_channels,
        "d_ff": config.ffn_hidden_size,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "feed_forward_proj": name,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "decoder_start_token_id": config.decoder_start_token_id,
        "pad_token_id": 0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def _t5_raw(config: TransformerConfig) -> dict[str, Any]:
    return {**_raw(config), "scale_decoder_outputs": config.output_scale != 1.0}


def _table(config: TransformerConfig) -> Table:
    table = entries("embedding.word_embeddings", "shared", bias=False)
    for side, count in (
        ("encoder", config.num_layers),
        ("decoder", config.decoder_num_layers),
    ):
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table[f"{side}.relative_position.weight"] = Entry((relative,))
        table |= entries(f"{side}.final_layernorm", f"{side}.final_layer_norm", bias=False)
        for i in range(count):
            table |= _layer(config, f"{side}.layers.{i}", f"{side}.block.{i}.layer", side)
    if not config.share_embeddings_and_output_weights:
        table |= entries("output_layer", "lm_head", bias=False)
    return table


def _layer(config: TransformerConfig, ours: str, theirs: str, side: str) -> Table:
    keys_values = Heads((1, 1), config.num_query_groups, config.kv_channels)
    own, across, mlp = f"{theirs}.0.SelfAttention", f"{theirs}.1.EncDecAttention", 1
    modules: list[tuple[str, list[str], Any]] = [
        ("input_layernorm", [f"{theirs}.0.layer_norm"], None),
        ("self_attention.linear_qkv", [f"{own}.{n}" for n in "qkv"], heads_of(config)),
        ("self_attention.linear_proj", [f"{own}.o"], None),
    ]
    if side == "decoder":
        mlp = 2
        modules += [
            ("pre_cross_attention_layernorm", [f"{theirs}.1.layer_norm"], None),
            ("cross_attention.linear_q", [f"{across}.q"], None),
            ("cross_attention.linear_kv", [f"{across}.{n}" for n in "kv"], keys_values),
            ("cross_attention.linear_proj", [f"{across}.o"], None),
        ]
    dense = f"{theirs}.{mlp}.DenseReluDense"
    inner = [f"{dense}.wi_0", f"{dense}.wi_1"] if config.gated else [f"{dense}.wi"]
    modules += [
        ("pre_mlp_layernorm", [f"{theirs}.{mlp}.layer_norm"], None),
        ("mlp.linear_fc1", inner, Stacked(len(inner))),
        ("mlp.linear_fc2", [f"{dense}.wo"], None),
    ]
    table: Table = {}
    for name, files, reshape in modules:
        how = {} if reshape is None else {"reshape": reshape}
        table |= entries(f"{ours}.{name}", *files, bias=False, **how)
    return table


def _copies(name: str) -> bool:
    # The last is a leftover in old files, never used.
    return name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight") or name.endswith(
        "layer.1.EncDecAttention.relative_attention_bias.weight"
    )


CLASS = "ForConditionalGeneration"
T5 = Family("t5", "", {None: f"T5{CLASS}"}, _t5_config, _t5_raw, _table, _copies)
MT5 = Family("mt5", "", {None: f"MT5{CLASS}"}, _mt5_config, _raw, _table, _copies)
