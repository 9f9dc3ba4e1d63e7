"""AdapterHub's methods for prediction heads."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graftwerk.adapterhub.combining import mean, shares_of
from graftwerk.adapterhub.default_head import BaseWords
from graftwerk.adapterhub.model import HeadedModel
from graftwerk.errors import UserError
from graftwerk.models import BERT
from graftwerk.models.heads import LM_TYPES, PredictionHead, build_head

# The types that AdapterHub's models have, by architecture.
ROWS = ("classification", "multilabel_classification")
TYPES = {
    "bert": (*ROWS, "multiple_choice", "tagging", "question_answering", "masked_lm"),
    "gpt": (*ROWS, "tagging", "question_answering", "causal_lm"),
    "t5": (*ROWS, "question_answering", "seq2seq_lm"),
}
Labels = Mapping[int, str] | None


class HeadMethods(HeadedModel):
    """Adding, deleting and naming heads."""

    def add_head(
        self,
        name: str,
        config: Mapping[str, Any],
        overwrite_ok: bool = False,
        set_active: bool = True,
    ) -> PredictionHead:
        """Adds the head that a dictionary of AdapterHub's keys describes, and activates it.

        Raises:
            UserError: for a name that is taken, and a head that the model cannot have.
        """
        if name in self.heads and not overwrite_ok:
            raise UserError(
                f"a head {name!r} is there already: set overwrite_ok=True to replace it"
            )
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise UserError(
                f"head name {name!r}: a name without dots is needed, and no word of "
                f"torch.nn.ModuleDict such as 'keys' or 'train'"
            )
        kind, base = config.get("head_type"), self.base
        kinds = TYPES[base.config.architecture]
        if kind not in kinds:
            raise UserError(
                f"a {base.config.architecture} has no head of type {kind!r}: one of "
                f"{', '.join(kinds)}"
            )
        if config.get("use_pooler") and getattr(base, "pooler", None) is None:
            raise UserError(f"head {name!r}: use_pooler=True, but this base has no pooler")
        words = base.embedding.word_embeddings.weight if self._ties(kind) else None
        if kind in LM_TYPES:
            config = {**config, "vocab_size": config.get("vocab_size") or base.config.vocab_size}
            if kind != "seq2seq_lm":
                size = config.get("embedding_size") or base.config.hidden_size
                config = {**config, "embedding_size": size}
        epsilon = getattr(self.config, "layer_norm_eps", None) or 1e-12
        head = build_head(config, self._states_size, self.head_dropout, words, epsilon)
        self.heads[name] = head.to(self.device).train(self.training)
        if set_active:
            self.active_head = name
        return head

    def _ties(self, kind: str | None) -> bool:
        return kind in LM_TYPES and self.base.config.share_embeddings_and_output_weights

    @property
    def _states_size(self) -> int:
        """Of the states that heads read: some bases project them to the embeddings' size."""
        config = self.base.config
        inner = None if isinstance(self.base, BERT) else self.base.decoder.projection
        return config.hidden_size if inner is None else config.embedding_size

    def add_classification_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        multilabel: bool = False,
        id2label: Labels = None,
        use_pooler: bool = False,
        dropout_prob: float | None = None,
    ) -> None:
        """Adds a head for labels of rows; of one label for numbers.

        Args:
            multilabel: a row has any number of labels.
            use_pooler: it reads the base's pooled state.
        """
        kind = "multilabel_classification" if multilabel else "classification"
        settings = {"num_labels": num_labels, "layers": layers, "dropout_prob": dropout_prob}
        settings |= {"activation_function": activation_function, "use_pooler": use_pooler}
        self.add_head(head_name, _named(kind, settings, id2label), overwrite_ok)

    def add_multiple_choice_head(
        self,
        head_name: str,
        num_choices: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Labels = None,
        use_pooler: bool = False,
    ) -> None:
        """Adds a head that chooses among rows that belong together."""
        settings = {"num_choices": num_choices, "layers": layers, "use_pooler": use_pooler}
        settings |= {"activation_function": activation_function}
        self.add_head(head_name, _named("multiple_choice", settings, id2label), overwrite_ok)

    def add_tagging_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Labels = None,
    ) -> None:
        """Adds a head for labels of tokens."""
        settings = {"num_labels": num_labels, "layers": layers}
        settings |= {"activation_function": activation_function}
        self.add_head(head_name, _named("tagging", settings, id2label), overwrite_ok)

    def add_qa_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Labels = None,
    ) -> None:
        """Adds a head for where answers begin and end."""
        settings = {"num_labels": num_labels, "layers": layers}
        settings |= {"activation_function": activation_function}
        self.add_head(head_name, _named("question_answering", settings, id2label), overwrite_ok)

    def add_causal_lm_head(
        self,
        head_name: str,
        activation_function: str | None = "gelu",
        layers: int = 2,
        layer_norm: bool = True,
        bias: bool = True,
        overwrite_ok: bool = False,
    ) -> None:
        """Adds a head for next words; its projection is the embeddings' where the base's is."""
        self._add_words(
            "causal_lm", head_name, activation_function, layers, layer_norm, bias, overwrite_ok
        )

    def add_seq2seq_lm_head(self, head_name: str, overwrite_ok: bool = False) -> None:
        """Adds a head for the words of a T5's decoder."""
        self._add_words("seq2seq_lm", head_name, None, 1, False, False, overwrite_ok)

    def add_masked_lm_head(
        self,
        head_name: str,
        activation_function: str | None = "gelu",
        layers: int = 2,
        layer_norm: bool = True,
        bias: bool = True,
        overwrite_ok: bool = False,
    ) -> None:
        """Adds a head for masked words."""
        self._add_words(
            "masked_lm", head_name, activation_function, layers, layer_norm, bias, overwrite_ok
        )

    def _add_words(
        self,
        kind: str,
        name: str,
        activation: str | None,
        layers: int,
        layer_norm: bool,
        bias: bool,
        overwrite_ok: bool,
    ) -> None:
        settings = {"head_type": kind, "layers": layers, "layer_norm": layer_norm, "bias": bias}
        self.add_head(name, {**settings, "activation_function": activation}, overwrite_ok)

    def add_prediction_head_from_config(
        self,
        head_name: str,
        config: Mapping[str, Any],
        overwrite_ok: bool = False,
        set_active: bool = True,
    ) -> None:
        """Adds the head that a dictionary of AdapterHub's describes; see `add_head`."""
        self.add_head(head_name, config, overwrite_ok, set_active)

    def average_head(
        self,
        head_name: str,
        head_list: Sequence[str],
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Adds a head whose weights are a mean of others' of one configuration, dropout aside.

        Args:
            weights: one a head; None: equal ones.
            normalize_weights: divide the weights by their sum.

        Raises:
            UserError: for heads of different configurations, and one for words that is the base's.
        """
        if not head_list:
            raise UserError("average_head: head_list is empty: name the heads to average")
        heads = [self._head(name) for name in head_list]
        configs = [{**head.config, "dropout_prob": None} for head in heads]
        for name, head, config in zip(head_list, heads, configs, strict=True):
            if isinstance(head, BaseWords):
                raise UserError(f"average_head: {name!r} is the base's own: it has no weights")
            if config != configs[0]:
                raise UserError(
                    f"average_head: {name!r} and {head_list[0]!r} have different configurations"
                )
        shares = shares_of(head_list, weights, normalize_weights, "average_head", "heads")
        state = mean(shares, [dict(head.state_dict()) for head in heads])
        made = self.add_head(head_name, heads[0].config, overwrite_ok, set_active)
        made.load_state_dict(state)

    def delete_head(self, head_name: str) -> None:
        """Removes a head; where it was active, none is.

        Raises:
            UserError: for a head that is not there.
        """
        self._head(head_name)
        del self.heads[head_name]
        self._active_heads = [name for name in self._active_heads if name != head_name]

    def get_labels_dict(self, head_name: str | None = None) -> dict[int, str] | None:
        """The labels of a head by their numbers; None: the active head."""
        name = head_name or self.active_head
        if not isinstance(name, str):
            raise UserError("get_labels_dict: several heads or none are active: name one")
        label2id = self._head(name).config.get("label2id")
        return label2id and {number: label for label, number in label2id.items()}

    def get_labels(self, head_name: str | None = None) -> list[str] | None:
        """The labels of a head in the order of their numbers; None: the active head."""
        named = self.get_labels_dict(head_name)
        return [named[number] for number in sorted(named)] if named else None


def _named(kind: str, settings: Mapping[str, Any], id2label: Labels) -> dict[str, Any]:
    named = {} if id2label is None else {"id2label": dict(id2label)}
    return {"head_type": kind, **settings, **named}
