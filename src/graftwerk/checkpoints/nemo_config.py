"""NeMo's `model_config.yaml` to a `TransformerConfig` and back.

The keys and their defaults are those of NeMo 1.20 to 2.0, `megatron_gpt_model.py`,
`megatron_base_model.py` and `token_level_encoder_decoder.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from graftwerk.errors import UserError
from graftwerk.models.config import RotaryScaling, TransformerConfig

Variant = Literal["classic", "mcore", "t5"]

# What a key may say: with any other value the weights would compute something else.
ONLY: dict[str, tuple[Any, ...]] = {
    "headscale": (False,),
    "multi_query_attention": (False,),
    "num_moe_experts": (0, 1),
    "apply_embedding_scaling": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "arch": ("transformer",),
    "relative_position_bias_self_attention_only": (True,),
    "num_self_attention_per_cross_attention": (1,),
    "share_token_embeddings": (True,),
    "mcore_t5": (False,),
}
NORMALIZATIONS = {
    "layernorm": "layernorm",
    "layernorm1p": "layernorm1p",
    "rmsnorm": "rmsnorm",
    "low_precision_layernorm": "layernorm",
}
# NeMo's activations without `fast-`; a gelu is the tanh form where fused or `openai_gelu`.
ACTIVATIONS = {
    "gelu": "gelu",
    "geglu": "geglu",
    "swiglu": "swiglu",
    "reglu": "reglu",
    "squared-relu": "squared_relu",
    "relu": "relu",
}
LLAMA3 = RotaryScaling(kind="llama3", factor=8.0)  # what `scale_positional_embedding` means
OTHERS = ("falcon", "gemma", "griffin", "mamba", "hyena", "retro", "mixtral")  # specs by name


@dataclass(frozen=True)
class Layout:
    """How a file says it, which is not what it says.

    `legacy_qkv`: queries, keys and values one after the other, not group by group. `split_glu`:
    gate and up are two tensors. `norms_apart`: mcore without Transformer Engine, whose norms are
    modules of their own. `rows`: of the padded word embeddings.
    """

    variant: Variant
    rows: int
    legacy_qkv: bool = False
    split_glu: bool = False
    norms_apart: bool = False


class Settings:
    """Keys of a `model_config.yaml`; `section` (`encoder`, `decoder`) comes before the top level.

    Raises:
        UserError: for keys that are missing and values that cannot be honoured.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, section: str | None = None):
        self.values, self.path, self.section = values, path, section
        inner = values.get(section) if section else None
        self.inner: Mapping[str, Any] = inner if isinstance(inner, dict) else {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value; the default where it is absent or null."""
        value = self.inner.get(key)
        value = self.values.get(key) if value is None else value
        value = self.resolved(value)
        if value is None:
            return default
        if default is not None and not _alike(value, default):
            self.refuse(key, value, f"a {type(default).__name__} is needed")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number: above 0 where there is no default, else not negative."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < (1 if default is None else 0):
            self.refuse(key, value, "a whole number above 0 is needed")
        return value

    def refuse(self, key: str, value: Any, why: str) -> NoReturn:
        """Raises the error that names the file and the key."""
        key = f"{self.section}.{key}" if self.section and key in self.inner else key
        raise UserError(f"{self.path}: {key}={value!r} cannot be honoured: {why}")

    def resolved(self, value: Any, depth: int = 8) -> Any:
        """The value with `${.key}` and `${multiply:4, ${.key}}` worked out, as Hydra would."""
        if not isinstance(value, str) or "${" not in value or not depth:
            return value
        if link := re.fullmatch(r"\$\{(\.*)([\w.]+)\}", value):
            dots, names = link[1], link[2].removeprefix("model.").split(".")
            found: Any = self.inner if dots == "." and self.inner else self.values
            for name in names:
                found = found.get(name) if isinstance(found, dict) else None
            return self.resolved(found, depth - 1)
        if product := re.fullmatch(r"\$\{multiply:\s*(\d+)\s*,\s*(.+)\}", value):
            factor = self.resolved(product[2], depth - 1)
            return int(product[1]) * factor if isinstance(factor, int) else value
        return value


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))


def to_config(
    values: Mapping[str, Any], path: Path, layout: Layout, vocab_size: int
) -> tuple[TransformerConfig, Layout]:
    """The model that a `model_config.yaml` describes, and the layout of its weights.

    `layout` comes with what the tensors' names say of it.

    Raises:
        UserError: for keys that are missing and values that cannot be honoured, by name.
    """
    sections = ("encoder", "decoder") if layout.variant == "t5" else (None,)
    first, *others = (Settings(values, path, section) for section in sections)
    fields = _shared(first, layout)
    for other in others:
        for key, value in _shared(other, layout).items():
            if fields[key] != value and key != "num_layers":
                other.refuse(key, value, f"the encoder has {fields[key]!r}, and both must agree")
    fields["vocab_size"] = vocab_size
    activation = first.get("activation", "gelu")
    # A T5 that came from Hugging Face holds them one after the other, even if its file is silent.
    converted = fields["position_embedding_type"] == "relative" and not fields["bias"]
    layout = replace(
        layout,
        legacy_qkv=layout.variant != "mcore" and first.get("megatron_legacy", converted),
        split_glu=layout.variant != "mcore" and activation in ("geglu", "swiglu", "reglu"),
    )
    if layout.variant == "t5":
        fields |= _t5(first, others[0], fields["position_embedding_type"])
    return TransformerConfig(**fields), layout


def _shared(settings: Settings, layout: Layout) -> dict[str, Any]:
    """The fields that a GPT and both halves of a T5 say alike."""
    _check(settings, layout)
    bias = settings.get("bias", True)
    normalization = settings.get("normalization", "layernorm")
    if normalization not in NORMALIZATIONS:
        settings.refuse("normalization", normalization, f"use {', '.join(NORMALIZATIONS)}")
    if normalization == "low_precision_layernorm" and not bias:
        settings.refuse("normalization", normalization, "its norms have no bias there")
    block = settings.get("transformer_block_type", "pre_ln")
    known = ("pre_ln", "post_ln") if layout.variant == "classic" else ("pre_ln",)
    if block not in known:
        settings.refuse("transformer_block_type", block, f"use {', '.join(known)}")
    return {
        "num_layers": settings.size("num_layers"),
        "hidden_size": settings.size("hidden_size"),
        "num_attention_heads": settings.size("num_attention_heads"),
        "ffn_hidden_size": settings.size("ffn_hidden_size"),
        "num_query_groups": settings.size("num_query_groups", 0),
        "kv_channels": settings.size("kv_channels", 0),
        "transformer_block_type": block,
        "final_layernorm": block == "pre_ln",
        "normalization": NORMALIZATIONS[normalization],
        "layernorm_epsilon": float(settings.get("layernorm_epsilon", 1e-5)),
        "activation": _activation(settings, bias),
        "bias": bias,
        "qkv_bias": bias or settings.get("qkv_bias", False),
        "mlp_bias": bias,
        "qk_layernorm": settings.get("qk_layernorm", False),
        "normalize_attention_scores": settings.get("normalize_attention_scores", True),
        "share_embeddings_and_output_weights": settings.get(
            "share_embeddings_and_output_weights", True
        ),
        "init_method_std": float(settings.get("init_method_std", 0.02)),
        **_window(settings),
        **_positions(settings, layout),
    }


def _check(settings: Settings, layout: Layout) -> None:
    for key, allowed in ONLY.items():
        value = settings.get(key)
        if value is not None and value not in allowed:
            said = ", ".join(str(a) for a in allowed) or "null"
            settings.refuse(key, value, f"the only value that is: {said}")
    name = str(settings.get("name", ""))
    if any(other in name.lower() for other in OTHERS):
        settings.refuse("name", name, "only NeMo's GPT and T5 are known")
    if settings.get("qk_layernorm", False) and settings.get("normalization") != "rmsnorm":
        settings.refuse("qk_layernorm", True, "only with normalization=rmsnorm")
    if layout.variant == "classic" and settings.get("qk_layernorm", False):
        settings.refuse("qk_layernorm", True, "only with mcore_gpt=true")


def _activation(settings: Settings, bias: bool) -> str:
    name = settings.get("activation", "gelu")
    ours = ACTIVATIONS.get(name.removeprefix("fast-"))
    if ours is None:
        known = ", ".join([*ACTIVATIONS, "and fast-geglu, fast-swiglu, fast-reglu"])
        settings.refuse("activation", name, f"use {known}")
    if ours in ("gelu", "geglu"):
        fused = settings.get("bias_activation_fusion", settings.get("bias_gelu_fusion", True))
        # The fused kernel has the tanh form; it needs biases.
        if settings.get("openai_gelu", False) or (fused is True and bias):
            return f"{ours}_tanh"
    return ours


def _window(settings: Settings) -> dict[str, Any]:
    window = settings.get("window_size")
    if window in (None, [-1, 0], [-1, -1]):
        return {}
    if not isinstance(window, list) or len(window) != 2 or window[1] not in (0, -1):
        settings.refuse("window_size", window, "use [tokens back, 0]")
    if type(window[0]) is not int or window[0] < 0:
        settings.refuse("window_size", window, "use [tokens back, 0]")
    return {"window_size": window[0] + 1}


def _positions(settings: Settings, layout: Layout) -> dict[str, Any]:
    kind = settings.get("position_embedding_type", "learned_absolute")
    known = ("learned_absolute", "relative") if layout.variant == "t5" else ()
    known = known or ("learned_absolute", "rope", "none")
    if kind not in known:
        settings.refuse("position_embedding_type", kind, f"use {', '.join(known)}")
    length = settings.size("max_position_embeddings", 0) or settings.size("encoder_seq_length", 0)
    length = length or settings.size("seq_length", 512)
    fields: dict[str, Any] = {"position_embedding_type": kind, "max_position_embeddings": length}
    if kind == "relative":
        fields["max_position_embeddings"] = 0  # buckets reach any distance
        for key, usual in (
            ("relative_attention_num_buckets", 32),
            ("relative_attention_max_distance", 128),
        ):
            fields[key] = settings.size(key, usual)
    if kind == "rope":
        fields["rotary_base"] = float(settings.get("rotary_base", 10000.0))
        fields["rotary_percentage"] = float(settings.get("rotary_percentage", 1.0))
        fields["rotary_interleaved"] = settings.get("rotary_interleaved", False)
        factor = settings.get("seq_len_interpolation_factor")
        if settings.get("scale_positional_embedding", False):
            fields["rotary_scaling"] = replace(
                LLAMA3, factor=float(settings.get("scale_factor", LLAMA3.factor))
            )
        elif factor is not None:
            fields["rotary_scaling"] = RotaryScaling(kind="linear", factor=float(factor))
    return fields


def _t5(encoder: Settings, decoder: Settings, positions: str) -> dict[str, Any]:
    top = Settings(encoder.values, encoder.path)
    return {
        "architecture": "t5",
        "decoder_num_layers": decoder.size("num_layers"),
        "share_embeddings_and_output_weights": top.get(
            "share_decoder_tokens_head_embeddings", True
        ),
        "output_bias": top.get("tokens_head_bias", True),
        # NeMo has neither key: it starts decoders as its tokenizer says, and never scales.
        "decoder_start_token_id": top.size("decoder_start_token_id", 0),
        "output_scale": float(top.get("output_scale", 1.0)),
    }


def from_config(config: TransformerConfig, mcore: bool) -> dict[str, Any]:
    """The `model_config.yaml` of a model, as NeMo's own scripts write it (TP = PP = 1).

    Raises:
        UserError: naming every field that NeMo has no key for.
    """
    if config.architecture == "bert" or (config.architecture == "t5" and mcore):
        what = "BERT" if config.architecture == "bert" else "T5 under mcore names"
        raise UserError(f"{what} is not written as .nemo; GPT is, and T5 under classic names")
    variant: Variant = "t5" if config.architecture == "t5" else "mcore" if mcore else "classic"
    values = _t5_values(config) if variant == "t5" else _gpt_values(config, mcore)
    plain = replace(config, hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
    path = Path("model_config.yaml")
    back, _ = to_config(values, path, Layout(variant, config.vocab_size), config.vocab_size)
    lost = [key for key, value in plain.to_dict().items() if back.to_dict()[key] != value]
    if lost:
        said = ", ".join(f"{key}={plain.to_dict()[key]}" for key in lost)
        names = "; mcore names have one" if set(lost) <= {"qkv_bias", "qk_layernorm"} else ""
        raise UserError(f"the model cannot be written as .nemo: NeMo has no key for {said}{names}")
    return values


def _layer_values(config: TransformerConfig) -> dict[str, Any]:
    """What a GPT and both halves of a T5 say alike."""
    tanh = config.activation.endswith("_tanh")
    activation = config.activation.removesuffix("_tanh").replace("squared_relu", "squared-relu")
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.kv_channels,
        "init_method_std": config.init_method_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "transformer_block_type": config.transformer_block_type,
        "normalization": config.normalization,
        "layernorm_epsilon": config.layernorm_epsilon,
        "persist_layer_norm": True,
        "bias": config.bias,
        "activation": activation,
        "openai_gelu": tanh,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": False,
        "apply_query_key_layer_scaling": False,
        "normalize_attention_scores": config.normalize_attention_scores,
        "position_embedding_type": config.position_embedding_type,
        "megatron_legacy": False,
        "headscale": False,
    }
    if config.num_query_groups != config.num_attention_heads:
        values["num_query_groups"] = config.num_query_groups
    return values


def _top_values(config: TransformerConfig) -> dict[str, Any]:
    return {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "megatron_amp_O2": False,
        "make_vocab_size_divisible_by": 1,
        "override_vocab_size": config.vocab_size,
    }


def _gpt_values(config: TransformerConfig, mcore: bool) -> dict[str, Any]:
    values = {
        "mcore_gpt": mcore,
        "transformer_engine": mcore,
        "encoder_seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **_layer_values(config),
        "share_embeddings_and_output_weights": config.share_embeddings_and_output_weights,
        **_top_values(config),
        "target": f"{TARGETS}.megatron_gpt_model.MegatronGPTModel",
    }
    if config.gated:
        values["activation"] = f"fast-{values['activation']}"
    if mcore and config.qkv_bias != config.bias:
        values["qkv_bias"] = config.qkv_bias
    if config.qk_layernorm:
        values["qk_layernorm"] = True
    if config.window_size:
        values["window_size"] = [config.window_size - 1, 0]
    if config.position_embedding_type == "rope":
        values["rotary_base"] = config.rotary_base
        values["rotary_percentage"] = config.rotary_percentage
        values["rotary_interleaved"] = config.rotary_interleaved
    scaling = config.rotary_scaling
    if scaling is not None and scaling.kind == "linear":
        values["seq_len_interpolation_factor"] = scaling.factor
    elif scaling is not None:
        values |= {"scale_positional_embedding": True, "scale_factor": scaling.factor}
    return values


def _t5_values(config: TransformerConfig) -> dict[str, Any]:
    half = {"arch": "transformer", **_layer_values(config), "megatron_legacy": True}
    half["relative_attention_num_buckets"] = config.relative_attention_num_buckets
    half["relative_attention_max_distance"] = config.relative_attention_max_distance
    half["relative_position_bias_self_attention_only"] = True
    values = {
        "encoder": half,
        "decoder": {**half, "num_layers": config.decoder_num_layers},
        "seq_length": config.max_position_embeddings or 512,
        "max_position_embeddings": config.max_position_embeddings or 512,
        "share_token_embeddings": True,
        "share_decoder_tokens_head_embeddings": config.share_embeddings_and_output_weights,
        "tokens_head_bias": config.output_bias,
        "decoder_start_token_id": config.decoder_start_token_id,
        "pipeline_model_parallel_split_rank": 0,
        **_top_values(config),
        "target": f"{TARGETS}.megatron_t5_model.MegatronT5Model",
    }
    if config.output_scale != 1.0:
        values["output_scale"] = config.output_scale
    return values


TARGETS = "nemo.collections.nlp.models.language_modeling"
