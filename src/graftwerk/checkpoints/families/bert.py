"""BERT and RoBERTa, bare or with one of their heads."""

from typing import Any

from graftwerk.checkpoints.families.family import (
    Family,
    Raw,
    entries,
    heads_of,
    hugging_face_activation,
)
from graftwerk.checkpoints.layout import Entry, Table
from graftwerk.models import TransformerConfig

# The endings of transformers' class names.
HEADS = {
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tagging",
    "ForQuestionAnswering": "question_answering",
}


def _config(raw: Raw, offset: int, pooler: bool) -> TransformerConfig:
    for key, usual in (("is_decoder", False), ("position_embedding_type", "absolute")):
        if raw.get(key, usual) != usual:
            raw.refuse(f"{key}={raw[key]} is not supported; only {usual} is")
    head = _head(raw)
    labels = raw.get("id2label", {0: "", 1: ""})
    return TransformerConfig(
        architecture="bert",
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        num_attention_heads=raw["num_attention_heads"],
        ffn_hidden_size=raw["intermediate_size"],
        max_position_embeddings=raw["max_position_embeddings"] - offset,
        position_offset=offset,
        transformer_block_type="post_ln",
        layernorm_epsilon=raw.get("layer_norm_eps", 1e-12),
        activation=raw.activation("hidden_act", "gelu"),
        final_layernorm=False,
        embedding_layernorm=True,
        num_token_types=raw.get("type_vocab_size", 2),
        share_embeddings_and_output_weights=raw.get("tie_word_embeddings", True),
        pooler=pooler,
        head=head,
        num_labels=raw.get("num_labels", len(labels))
        if head in ("classification", "tagging")
        else 0,
    )


def _head(raw: Raw) -> str | None:
    name = next(iter(raw.get("architectures", [])), "")
    return next((head for end, head in HEADS.items() if str(name).endswith(end)), None)


def _bert_config(raw: Raw) -> TransformerConfig:
    pooler = any(name.endswith("pooler.dense.weight") for name in raw.tensors)
    return _config(raw, 0, pooler)


def _roberta_config(raw: Raw) -> TransformerConfig:
    # Positions begin behind that of padding. The classifier brings a pooler of its own.
    pooler = any(
        name.endswith(("pooler.dense.weight", "classifier.dense.weight")) for name in raw.tensors
    )
    return _config(raw, raw.get("pad_token_id", 1) + 1, pooler)


def _raw(config: TransformerConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings + config.position_offset,
        "layer_norm_eps": config.layernorm_epsilon,
        "hidden_act": hugging_face_activation(config),
        "type_vocab_size": config.num_token_types,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }
    if config.num_labels:
        labels = {i: f"LABEL_{i}" for i in range(config.num_labels)}
        values["id2label"] = labels
        values["label2id"] = {label: i for i, label in labels.items()}
    return values


def _roberta_raw(config: TransformerConfig) -> dict[str, Any]:
    return {**_raw(config), "pad_token_id": config.position_offset - 1}


def _encoder(config: TransformerConfig, root: str) -> Table:
    qkv, words = heads_of(config), f"{root}.embeddings"
    table = {
        **entries("embedding.word_embeddings", f"{words}.word_embeddings", bias=False),
        **entries("embedding.position_embeddings", f"{words}.position_embeddings", bias=False),
        **entries("embedding.token_type_embeddings", f"{words}.token_type_embeddings", bias=False),
        **entries("embedding.layernorm", f"{words}.LayerNorm"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"encoder.layers.{i}", f"{root}.encoder.layer.{i}"
        projections = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
        table |= {
            **entries(f"{ours}.self_attention.linear_qkv", *projections, reshape=qkv),
            **entries(f"{ours}.self_attention.linear_proj", f"{theirs}.attention.output.dense"),
            **entries(f"{ours}.post_attention_layernorm", f"{theirs}.attention.output.LayerNorm"),
            **entries(f"{ours}.mlp.linear_fc1", f"{theirs}.intermediate.dense"),
            **entries(f"{ours}.mlp.linear_fc2", f"{theirs}.output.dense"),
            **entries(f"{ours}.post_mlp_layernorm", f"{theirs}.output.LayerNorm"),
        }
    return table


def _masked_lm(config: TransformerConfig, dense: str, norm: str, decoder: str, bias: str) -> Table:
    table = {**entries("head.dense", dense), **entries("head.layernorm", norm)}
    table["head.bias"] = Entry((bias,))
    if not config.share_embeddings_and_output_weights:
        table |= entries("head.decoder", decoder, bias=False)
    return table


def _bert_table(config: TransformerConfig) -> Table:
    table = _encoder(config, "bert")
    if config.pooler:
        table |= entries("pooler.dense", "bert.pooler.dense")
    if config.head == "masked_lm":
        cls = "cls.predictions"
        dense, norm = f"{cls}.transform.dense", f"{cls}.transform.LayerNorm"
        return table | _masked_lm(config, dense, norm, f"{cls}.decoder", f"{cls}.bias")
    if config.head == "question_answering":
        return table | entries("head.out_proj", "qa_outputs")
    return table | (entries("head.out_proj", "classifier") if config.head else {})


def _roberta_table(config: TransformerConfig) -> Table:
    table = _encoder(config, "roberta")
    if config.head == "classification":
        table |= entries("pooler.dense", "classifier.dense")
        return table | entries("head.out_proj", "classifier.out_proj")
    if config.pooler:
        table |= entries("pooler.dense", "roberta.pooler.dense")
    if config.head == "masked_lm":
        names = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
        return table | _masked_lm(config, *names)
    if config.head == "question_answering":
        return table | entries("head.out_proj", "qa_outputs")
    return table | (entries("head.out_proj", "classifier") if config.head else {})


def _copies(name: str) -> bool:
    ends = ("position_ids", "predictions.decoder.weight", "predictions.decoder.bias")
    ends += ("lm_head.decoder.weight", "lm_head.decoder.bias")
    return name.endswith(ends) or name.startswith("cls.seq_relationship.")


def _classes(prefix: str) -> dict[str | None, str]:
    classes: dict[str | None, str] = {None: f"{prefix}Model"}
    return classes | {
        head: f"{prefix}{end}" for end, head in HEADS.items() if end != "ForPreTraining"
    }


BERT = Family("bert", "bert", _classes("Bert"), _bert_config, _raw, _bert_table, _copies)
ROBERTA = Family(
    "roberta",
    "roberta",
    _classes("Roberta"),
    _roberta_config,
    _roberta_raw,
    _roberta_table,
    _copies,
)
