"""Heads of transformers' own classes, as AdapterHub saves them beside an adapter.

Their JSON names no head and no settings; the class says what they are. Each is a head of numbered
layers too, of which some are modules of the class.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from graftwerk.errors import UserError


class FixedHead(NamedTuple):
    """The settings that a class stands for, and its modules by the numbers of layers."""

    config: Mapping[str, Any]
    layers: Mapping[int, str]


def _labels(kind: str, modules: Mapping[int, str], **settings: Any) -> FixedHead:
    plain = {"layers": 1, "activation_function": None}
    return FixedHead({"head_type": kind, **plain, **settings}, modules)


def _words(kind: str, *modules: str) -> FixedHead:
    """Behind a dense layer, its activation and a norm the projection; or the projection alone."""
    if len(modules) == 1:
        return FixedHead({"head_type": kind}, {0: modules[0]})
    settings = {"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True}
    return FixedHead({"head_type": kind, **settings}, dict(zip((0, 2, 3), modules, strict=True)))


_TANH = {"layers": 2, "activation_function": "tanh"}
_ONE, _SCORE, _SPANS = {1: "classifier"}, {1: "score"}, {1: "qa_outputs"}
_TOKENS = _labels("tagging", _ONE)
_ANSWERS = _labels("question_answering", _SPANS)
_CHOICES = _labels("multiple_choice", _ONE, use_pooler=True)
_ROBERTA = {
    "ForSequenceClassification": _labels(
        "classification", {1: "classifier.dense", 4: "classifier.out_proj"}, **_TANH
    ),
    "ForMultipleChoice": _CHOICES,
    "ForTokenClassification": _TOKENS,
    "ForQuestionAnswering": _ANSWERS,
    "ForMaskedLM": _words("masked_lm", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
}
_T5 = {
    "ForConditionalGeneration": _words("seq2seq_lm", "lm_head"),
    "ForQuestionAnswering": _ANSWERS,
    "ForSequenceClassification": _labels(
        "classification",
        {1: "classification_head.dense", 4: "classification_head.out_proj"},
        **_TANH,
    ),
}
_LLAMA = {
    "ForSequenceClassification": _labels("classification", _SCORE, bias=False, dropout_prob=0),
    "ForCausalLM": _words("causal_lm", "lm_head"),
    "ForQuestionAnswering": _ANSWERS,
    "ForTokenClassification": _labels("tagging", _SCORE),
}
_BY_FAMILY: dict[str, dict[str, FixedHead]] = {
    "Bert": {
        "ForSequenceClassification": _labels("classification", _ONE, use_pooler=True),
        "ForMultipleChoice": _CHOICES,
        "ForTokenClassification": _TOKENS,
        "ForQuestionAnswering": _ANSWERS,
        "ForMaskedLM": _words(
            "masked_lm",
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
        ),
    },
    "Roberta": _ROBERTA,
    "XLMRoberta": _ROBERTA,
    "GPT2": {
        "ForSequenceClassification": _labels("classification", _SCORE, bias=False),
        "LMHeadModel": _words("causal_lm", "lm_head"),
        "ForTokenClassification": _TOKENS,
        "ForQuestionAnswering": _ANSWERS,
    },
    "Llama": _LLAMA,
    "Mistral": _LLAMA,
    "T5": _T5,
    "MT5": _T5,
}
FIXED = {
    f"{family}{head}": row for family, rows in _BY_FAMILY.items() for head, row in rows.items()
}


def numbered(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors (`<i>.<parameter>`) of a head of one of transformers' classes.

    Args:
        about: what its JSON says: `model_class`, `label2id`, `num_labels`.

    Raises:
        UserError: for a class that is not known, and labels that are none.
    """
    model_class = about.get("model_class")
    row = FIXED.get(model_class) if isinstance(model_class, str) else None
    if row is None:
        raise UserError(
            f"{where}: the head of a {model_class} has no form here: load the adapter without its "
            f"head (with_head=False)"
        )
    config, found = dict(row.config), {}
    for number, module in row.layers.items():
        start = f"{module}."
        for name, tensor in tensors.items():
            if name.startswith(start):
                found[f"{number}.{name.removeprefix(start)}"] = tensor
    if config["head_type"] not in ("masked_lm", "causal_lm", "seq2seq_lm"):
        labels = about.get("label2id") or {"LABEL_0": 0, "LABEL_1": 1}
        count = about.get("num_labels") or len(labels)
        if not isinstance(labels, dict) or type(count) is not int:
            raise UserError(f"{where}: label2id={labels!r}, num_labels={count!r}: no labels")
        key = "num_choices" if config["head_type"] == "multiple_choice" else "num_labels"
        config |= {key: count, "label2id": labels}
    return config, found
