"""Tiny random models of every family, made by `transformers`."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SIZES,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **SIZES}
NEOX = {**ROPE, "bos_token_id": 0}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 61,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def _gpt(config: hf.PretrainedConfig) -> Any:
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _t5(config: hf.PretrainedConfig) -> Any:
    return hf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")


# GPT: several sizes, with and without bias, tied and untied, grouped queries, parallel residual,
# each kind of rotary positions, windows, gated and plain, pre- and post-norm.
GPTS = {
    "gpt2": hf.GPT2Config(**GPT2),
    "gpt2_wide": hf.GPT2Config(**{**GPT2, "n_embd": 48, "n_head": 3, "n_inner": 40}),
    "gpt2_untied": hf.GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2_scaled_by_layer": hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt2_unscaled": hf.GPT2Config(**GPT2, scale_attn_weights=False),
    "gptj": hf.GPTJConfig(**{**GPT2, "rotary_dim": 4}),
    "gptj_full_rotary": hf.GPTJConfig(**{**GPT2, "rotary_dim": 8}),
    "neox": hf.GPTNeoXConfig(**NEOX, rotary_pct=0.25),
    "neox_sequential": hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False, rotary_pct=1.0),
    "neox_without_bias": hf.GPTNeoXConfig(**NEOX, attention_bias=False, rotary_pct=0.5),
    "opt": hf.OPTConfig(**OPT),
    "opt_post_norm": hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt_without_bias": hf.OPTConfig(**OPT, enable_bias=False),
    "llama": hf.LlamaConfig(**ROPE, num_key_value_heads=2, rope_theta=5000.0),
    "llama_bias_tied": hf.LlamaConfig(
        **ROPE,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama_3.1": hf.LlamaConfig(**ROPE, rope_parameters=LLAMA3),
    "llama_linear": hf.LlamaConfig(
        **ROPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "smollm": hf.LlamaConfig(
        **{**ROPE, "hidden_size": 24, "num_attention_heads": 3},
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "mistral": hf.MistralConfig(**ROPE, num_key_value_heads=2, sliding_window=5),
    "mistral_no_window": hf.MistralConfig(**ROPE, num_key_value_heads=2, sliding_window=None),
    "qwen2": hf.Qwen2Config(**ROPE, num_key_value_heads=2),
    "qwen2_window": hf.Qwen2Config(
        **ROPE,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3": hf.Qwen3Config(**ROPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "nemotron": hf.NemotronConfig(**ROPE, num_key_value_heads=2, head_dim=8),
}
T5S = {
    "t5": hf.T5Config(**T5, feed_forward_proj="relu"),
    "t5_v1.1": hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": hf.MT5Config(**{**T5, "d_kv": 6}, feed_forward_proj="gated-gelu"),
}
BERTS = {
    "bert": (hf.BertModel, hf.BertConfig(**BERT)),
    "bert_masked_lm": (hf.BertForMaskedLM, hf.BertConfig(**BERT)),
    "bert_classification": (
        hf.BertForSequenceClassification,
        hf.BertConfig(**BERT, num_labels=3),
    ),
    "bert_tagging": (hf.BertForTokenClassification, hf.BertConfig(**BERT, num_labels=5)),
    "bert_question_answering": (hf.BertForQuestionAnswering, hf.BertConfig(**BERT)),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**BERT, type_vocab_size=1)),
    "roberta_masked_lm": (hf.RobertaForMaskedLM, hf.RobertaConfig(**BERT, type_vocab_size=1)),
    "roberta_classification": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**BERT, num_labels=3),
    ),
    "roberta_tagging": (
        hf.RobertaForTokenClassification,
        hf.RobertaConfig(**BERT, num_labels=3),
    ),
    "roberta_question_answering": (hf.RobertaForQuestionAnswering, hf.RobertaConfig(**BERT)),
}
ALL = (*GPTS, *T5S, *BERTS)


def make(name: str, seed: int = 0) -> Any:
    """The random model of this name in eval mode, no weight of which is zero or one."""
    torch.manual_seed(seed)
    if name in BERTS:
        kind, config = BERTS[name]
        config._attn_implementation = "eager"
        model = kind(config)
    else:
        model = _gpt(GPTS[name]) if name in GPTS else _t5(T5S[name])
    noise = 0.05 if name in T5S else 0.1  # T5's scores are not scaled
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    if name == "t5_v1.1":  # transformers ties these at birth
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model.eval()


def write(name: str, path: Path, **how: Any) -> Any:
    """Writes the model of this name as a Hugging Face folder, and returns it."""
    model = make(name)
    model.save_pretrained(path, **how)
    return model
