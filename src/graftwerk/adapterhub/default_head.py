"""The head that a base brings along, as AdapterHub's models have it: the head called `default`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.models import BERT, GPT, T5
from graftwerk.models.bert import LabelHead, MaskedLMHead
from graftwerk.models.heads import LMHead, PredictionHead, States, build_head, complete

DEFAULT = "default"


class BaseWords(LMHead):
    """The base's own way from states to words. It holds no weights: the base does."""

    def __init__(self, config: Mapping[str, Any], base: GPT | T5 | BERT):
        PredictionHead.__init__(self, config, [])
        object.__setattr__(self, "base", base)  # not a child: its weights are not this module's
        self.base: GPT | T5 | BERT

    def scores(self, states: States) -> dict[str, Tensor]:
        """`logits`: [B, S, V]."""
        x, head = states.hidden, getattr(self.base, "head", None)
        if isinstance(head, MaskedLMHead):
            words = self.base.embedding.word_embeddings.weight
            return {"logits": head.words(states.before_words(head.transformed(x)), words)}
        assert not isinstance(self.base, BERT)
        return {"logits": self.base.words(states.before_words(x))}

    def file_state(self, embeddings: Tensor) -> dict[str, Tensor]:
        head = getattr(self.base, "head", None)
        if isinstance(head, MaskedLMHead):
            own = None if head.decoder is None else head.decoder.weight
            tensors = {
                "0.weight": head.dense.weight,
                "0.bias": head.dense.bias,
                "2.weight": getattr(head.layernorm, "weight", None),
                "2.bias": getattr(head.layernorm, "bias", None),
                "3.weight": embeddings if own is None else own,
                "3.bias": head.bias,
            }
        else:
            layer = getattr(self.base, "output_layer", None)
            own = None if layer is None else layer.weight
            bias = None if layer is None else layer.bias
            tensors = {"0.weight": embeddings if own is None else own, "0.bias": bias}
        return {key: value.detach() for key, value in tensors.items() if value is not None}

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """A base's own words are never changed by an adapter's file."""


def default_head(base: GPT | T5 | BERT, dropout: float) -> PredictionHead | None:
    """The base's own head in AdapterHub's form; None: it has none.

    A head for labels leaves the base and is trained with adapters; one for words stays where it is,
    frozen like the base.
    """
    config = base.config
    if isinstance(base, GPT | T5):
        kind = "causal_lm" if isinstance(base, GPT) else "seq2seq_lm"
        bias = base.output_layer is not None and base.output_layer.bias is not None
        words = {"head_type": kind, "vocab_size": config.vocab_size, "bias": bias}
        return BaseWords(complete(words), base)
    if isinstance(base.head, MaskedLMHead):
        activation = "gelu_new" if config.activation == "gelu_tanh" else config.activation
        words = {"head_type": "masked_lm", "vocab_size": config.vocab_size}
        return BaseWords(complete({**words, "activation_function": activation}), base)
    if not isinstance(base.head, LabelHead):
        return None
    kind, own = config.head, base.head.out_proj
    settings = {"head_type": kind, "layers": 1, "activation_function": None}
    settings["num_labels"] = own.out_features
    if kind == "classification":
        settings["use_pooler"] = base.pooler is not None
    head = build_head(settings, config.hidden_size, dropout)
    last = head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.copy_(own.weight)
        last.bias.copy_(own.bias)
    base.head = None
    return head
