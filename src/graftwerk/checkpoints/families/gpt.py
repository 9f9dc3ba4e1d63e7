"""GPT-2, GPT-J, GPT-NeoX (Pythia) and OPT: decoders with layer norms and biases."""

from typing import Any

from graftwerk.checkpoints.families.family import (
    Family,
    Raw,
    entries,
    heads_of,
    hugging_face_activation,
    rope_keys,
)
from graftwerk.checkpoints.layout import Table, Transposed
from graftwerk.models import TransformerConfig

# ---- GPT-2


def _gpt2_config(raw: Raw) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["n_layer"],
        hidden_size=raw["n_embd"],
        num_attention_heads=raw["n_head"],
        ffn_hidden_size=raw.get("n_inner", 4 * raw["n_embd"]),
        max_position_embeddings=raw["n_positions"],
        layernorm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        activation=raw.activation("activation_function", "gelu_new"),
        normalize_attention_scores=raw.get("scale_attn_weights", True),
        scale_by_layer=raw.get("scale_attn_by_inverse_layer_idx", False),
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", True),
    )


def _gpt2_raw(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "activation_function": hugging_face_activation(config),
        "scale_attn_weights": config.normalize_attention_scores,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def _gpt2_table(config: TransformerConfig) -> Table:
    root, transposed = "transformer", Transposed()
    qkv = heads_of(config, concatenated=True, transposed=True)
    table = {
        **entries("embedding.word_embeddings", f"{root}.wte", bias=False),
        **entries("embedding.position_embeddings", f"{root}.wpe", bias=False),
        **entries("decoder.final_layernorm", f"{root}.ln_f"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"{root}.h.{i}"
        table |= {
            **entries(f"{ours}.input_layernorm", f"{theirs}.ln_1"),
            **entries(f"{ours}.self_attention.linear_qkv", f"{theirs}.attn.c_attn", reshape=qkv),
            **entries(
                f"{ours}.self_attention.linear_proj", f"{theirs}.attn.c_proj", reshape=transposed
            ),
            **entries(f"{ours}.pre_mlp_layernorm", f"{theirs}.ln_2"),
            **entries(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.c_fc", reshape=transposed),
            **entries(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.c_proj", reshape=transposed),
        }
    return table | _output_layer(config, "lm_head")


def _output_layer(config: TransformerConfig, theirs: str) -> Table:
    if config.share_embeddings_and_output_weights:
        return {}
    return entries("output_layer", theirs, bias=config.output_bias)


# ---- GPT-J


def _gptj_config(raw: Raw) -> TransformerConfig:
    head_size = raw["n_embd"] // raw["n_head"]
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["n_layer"],
        hidden_size=raw["n_embd"],
        num_attention_heads=raw["n_head"],
        ffn_hidden_size=raw.get("n_inner", 4 * raw["n_embd"]),
        max_position_embeddings=raw["n_positions"],
        layernorm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        activation=raw.activation("activation_function", "gelu_new"),
        position_embedding_type="rope",
        rotary_percentage=raw.get("rotary_dim", 64) / head_size,
        rotary_interleaved=True,
        parallel_residual=True,
        shared_layernorm=True,
        bias=False,
        qkv_bias=False,
        mlp_bias=True,
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", False),
        output_bias=True,
    )


def _gptj_raw(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "n_positions": config.max_position_embeddings,
        "rotary_dim": config.rotary_size,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "activation_function": hugging_face_activation(config),
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def _gptj_table(config: TransformerConfig) -> Table:
    root, qkv = "transformer", heads_of(config)
    table = {
        **entries("embedding.word_embeddings", f"{root}.wte", bias=False),
        **entries("decoder.final_layernorm", f"{root}.ln_f"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"{root}.h.{i}"
        projections = [f"{theirs}.attn.{name}_proj" for name in "qkv"]
        table |= {
            **entries(f"{ours}.input_layernorm", f"{theirs}.ln_1"),
            **entries(f"{ours}.self_attention.linear_qkv", *projections, bias=False, reshape=qkv),
            **entries(f"{ours}.self_attention.linear_proj", f"{theirs}.attn.out_proj", bias=False),
            **entries(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.fc_in"),
            **entries(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.fc_out"),
        }
    tied = config.share_embeddings_and_output_weights
    output = entries("output_layer", "lm_head")
    return table | {name: e for name, e in output.items() if not tied or name.endswith("bias")}


# ---- GPT-NeoX


def _neox_config(raw: Raw) -> TransformerConfig:
    rotary = raw.rotary("rotary_emb_base", "rotary_pct")
    bias = raw.get("attention_bias", True)
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        num_attention_heads=raw["num_attention_heads"],
        ffn_hidden_size=raw["intermediate_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        layernorm_epsilon=raw.get("layer_norm_eps", 1e-5),
        activation=raw.activation("hidden_act", "gelu"),
        parallel_residual=raw.get("use_parallel_residual", True),
        bias=bias,
        qkv_bias=bias,
        mlp_bias=True,
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", False),
        **{"rotary_percentage": 0.25, **rotary},
    )


def _neox_raw(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.layernorm_epsilon,
        "hidden_act": hugging_face_activation(config),
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.bias,
        "rotary_emb_base": config.rotary_base,
        "rotary_pct": config.rotary_percentage,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        **rope_keys(config),
    }


def _neox_table(config: TransformerConfig) -> Table:
    root = "gpt_neox"
    table = {
        **entries("embedding.word_embeddings", f"{root}.embed_in", bias=False),
        **entries("decoder.final_layernorm", f"{root}.final_layer_norm"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"{root}.layers.{i}"
        table |= {
            **entries(f"{ours}.input_layernorm", f"{theirs}.input_layernorm"),
            **entries(  # query, key and value of one head after the other, as ours
                f"{ours}.self_attention.linear_qkv",
                f"{theirs}.attention.query_key_value",
                bias=config.qkv_bias,
            ),
            **entries(
                f"{ours}.self_attention.linear_proj", f"{theirs}.attention.dense", bias=config.bias
            ),
            **entries(f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm"),
            **entries(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.dense_h_to_4h"),
            **entries(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.dense_4h_to_h"),
        }
    return table | _output_layer(config, "embed_out")


# ---- OPT


def _opt_config(raw: Raw) -> TransformerConfig:
    if not raw.get("layer_norm_elementwise_affine", True):
        raw.refuse("layer_norm_elementwise_affine=False is not supported; only True is")
    hidden, words = raw["hidden_size"], raw.get("word_embed_proj_dim", raw["hidden_size"])
    before, bias = raw.get("do_layer_norm_before", True), raw.get("enable_bias", True)
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        hidden_size=hidden,
        num_attention_heads=raw["num_attention_heads"],
        ffn_hidden_size=raw["ffn_dim"],
        max_position_embeddings=raw["max_position_embeddings"],
        position_offset=2,
        activation=raw.activation("activation_function", "relu"),
        transformer_block_type="pre_ln" if before else "post_ln",
        final_layernorm=before and not raw.get("_remove_final_layer_norm", False),
        bias=bias,
        qkv_bias=bias,
        embedding_size=0 if words == hidden else words,
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", True),
    )


def _opt_raw(config: TransformerConfig) -> dict[str, Any]:
    before = config.transformer_block_type == "pre_ln"
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "ffn_dim": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "activation_function": hugging_face_activation(config),
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_layernorm,
        "enable_bias": config.bias,
        "word_embed_proj_dim": config.embedding_size or config.hidden_size,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def _opt_table(config: TransformerConfig) -> Table:
    root, qkv, bias = "model.decoder", heads_of(config), config.bias
    post = config.transformer_block_type == "post_ln"
    table = {
        **entries("embedding.word_embeddings", f"{root}.embed_tokens", bias=False),
        **entries("embedding.position_embeddings", f"{root}.embed_positions", bias=False),
    }
    if config.final_layernorm:
        table |= entries("decoder.final_layernorm", f"{root}.final_layer_norm")
    if config.embedding_size:
        table |= entries("embedding.projection", f"{root}.project_in", bias=False)
        table |= entries("decoder.projection", f"{root}.project_out", bias=False)
    first = "post_attention_layernorm" if post else "input_layernorm"
    second = "post_mlp_layernorm" if post else "pre_mlp_layernorm"
    for i in range(config.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"{root}.layers.{i}"
        projections = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
        table |= {
            **entries(f"{ours}.{first}", f"{theirs}.self_attn_layer_norm"),
            **entries(f"{ours}.self_attention.linear_qkv", *projections, bias=bias, reshape=qkv),
            **entries(
                f"{ours}.self_attention.linear_proj", f"{theirs}.self_attn.out_proj", bias=bias
            ),
            **entries(f"{ours}.{second}", f"{theirs}.final_layer_norm"),
            **entries(f"{ours}.mlp.linear_fc1", f"{theirs}.fc1", bias=bias),
            **entries(f"{ours}.mlp.linear_fc2", f"{theirs}.fc2", bias=bias),
        }
    return table | _output_layer(config, "lm_head")


def _buffers(name: str) -> bool:
    ends = (".attn.bias", ".masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
    return name.endswith(ends) or name in ("lm_head.weight", "embed_out.weight")


GPT2 = Family(
    "gpt2",
    "transformer",
    {None: "GPT2LMHeadModel"},
    _gpt2_config,
    _gpt2_raw,
    _gpt2_table,
    _buffers,
)
GPTJ = Family(
    "gptj",
    "transformer",
    {None: "GPTJForCausalLM"},
    _gptj_config,
    _gptj_raw,
    _gptj_table,
    _buffers,
)
GPT_NEOX = Family(
    "gpt_neox",
    "gpt_neox",
    {None: "GPTNeoXForCausalLM"},
    _neox_config,
    _neox_raw,
    _neox_table,
    _buffers,
)
OPT = Family("opt", "model", {None: "OPTForCausalLM"}, _opt_config, _opt_raw, _opt_table, _buffers)
