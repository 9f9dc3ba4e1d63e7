"""Prediction heads over hidden states, and their losses, in AdapterHub's forms.

A head is a sequence of layers that are numbered as in AdapterHub's files (`heads.<name>.<i>.*`).
Its `config` is the dictionary of those files, by which `build_head` makes it anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.methods.activations import Activation, check_activation
from graftwerk.errors import UserError

IGNORED = -100  # the label of a place that has none

# Each type of head: its settings, with AdapterHub's defaults.
_LABELS = {"num_labels": 2, "layers": 2, "activation_function": "tanh", "label2id": None}
_PLACES = {**_LABELS, "layers": 1, "dropout_prob": None}
_ROWS = {**_LABELS, "use_pooler": False, "bias": True, "dropout_prob": None}
_WORDS = {"vocab_size": None, "layers": 1, "activation_function": None, "layer_norm": False}
_WORDS |= {"bias": False, "shift_labels": False, "label2id": None}
HEAD_TYPES: dict[str, dict[str, Any]] = {
    "classification": _ROWS,
    "multilabel_classification": _ROWS,
    "multiple_choice": {
        **{key: value for key, value in _ROWS.items() if key not in ("num_labels", "bias")},
        "num_choices": 2,
    },
    "tagging": _PLACES,
    "question_answering": _PLACES,
    "causal_lm": {**_WORDS, "embedding_size": None, "shift_labels": True, "dropout_prob": None},
    "seq2seq_lm": _WORDS,
    "masked_lm": {
        **_WORDS,
        "embedding_size": None,
        "layers": 2,
        "activation_function": "gelu",
        "layer_norm": True,
        "bias": True,
    },
}
LM_TYPES = ("causal_lm", "seq2seq_lm", "masked_lm")


@dataclass(frozen=True)
class States:
    """What heads read of a pass over B rows of S tokens.

    `hidden`: [B, S, h]. `cls`: gives the state [B, h] that stands for a row; `pooler` the base's
    pooled one, if it has a pooler. `mask`: [B, S], 0 at padding; None: there is none. `embeddings`:
    the word embeddings [V, h], for heads whose projection they are. `before_words`: what active
    adapters do to states before a vocabulary projection.
    """

    hidden: Tensor
    cls: Callable[[], Tensor]
    pooler: Callable[[], Tensor] | None = None
    mask: Tensor | None = None
    embeddings: Tensor | None = None
    before_words: Callable[[Tensor], Tensor] = lambda x: x

    def rows(self, start: int, stop: int) -> "States":
        """Those of a run of rows. What adapters do to it must not depend on the rows."""
        pooler = self.pooler
        return replace(
            self,
            hidden=self.hidden[start:stop],
            cls=lambda: self.cls()[start:stop],
            pooler=None if pooler is None else lambda: pooler()[start:stop],
            mask=None if self.mask is None else self.mask[start:stop],
        )


class PredictionHead(nn.Sequential):
    """Layers from states to scores. `labels` names the arguments that its loss needs."""

    labels: tuple[str, ...] = ("labels",)

    def __init__(self, config: Mapping[str, Any], layers: list[nn.Module]):
        super().__init__(*layers)
        self.config = dict(config)

    def scores(self, states: States) -> dict[str, Tensor]:
        """What the head says: `logits`, or `start_logits` and `end_logits`."""
        raise NotImplementedError

    def loss(self, scores: dict[str, Tensor], given: dict[str, Tensor], states: States) -> Tensor:
        """The mean loss of the scores under the labels in `given`; every one of `labels` is."""
        raise NotImplementedError

    def through(self, x: Tensor) -> Tensor:
        """States through the layers, in the type of the head's weights; the result in float32."""
        return super().forward(x.to(self.dtype)).float()

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights: float32 at birth, as of a head without weights."""
        return next((each.dtype for each in self.parameters()), torch.float32)

    def forward(self, states: States, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The scores, and with them `loss` where `given` has the labels."""
        scores = self.scores(states)
        have = {name: value for name in self.labels if (value := given.get(name)) is not None}
        if len(have) < len(self.labels):
            return scores
        return {"loss": self.loss(scores, have, states), **scores}

    def file_state(self, embeddings: Tensor) -> dict[str, Tensor]:
        """The head's tensors by number and name, with a tied projection's weight, for a file."""
        return {key: value.detach() for key, value in self.state_dict().items()}

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes such tensors; those of a tied projection are the base's own and are left aside.

        Raises:
            UserError: where they are not the head's.
        """
        own = self.state_dict()
        tied = set(self.file_state(torch.empty(0))) - own.keys()
        given = {key: value for key, value in state.items() if key not in tied}
        wrong = [f"missing {key}" for key in own.keys() - given.keys()]
        wrong += [f"unknown {key}" for key in given.keys() - own.keys()]
        wrong += [
            f"{key} is {list(given[key].shape)}, not {list(own[key].shape)}"
            for key in own.keys() & given.keys()
            if own[key].shape != given[key].shape
        ]
        if wrong:
            kind = self.config["head_type"]
            raise UserError(f"the weights are no {kind} head: {'; '.join(sorted(wrong)[:4])}")
        self.load_state_dict(given)


class ClassificationHead(PredictionHead):
    """A label for each row; of one label a number, by squared error."""

    def scores(self, states: States) -> dict[str, Tensor]:
        """`logits`: [B, labels]."""
        pooled = self.config["use_pooler"]
        if pooled and states.pooler is None:
            raise UserError("a head with use_pooler=True needs a base that has a pooler")
        x = states.pooler() if pooled and states.pooler is not None else states.cls()
        return {"logits": self.through(x)}

    def loss(self, scores: dict[str, Tensor], given: dict[str, Tensor], states: States) -> Tensor:
        logits, labels = scores["logits"], given["labels"]
        if logits.shape[-1] == 1:
            _check_count(labels, logits.shape[:-1])
            return F.mse_loss(logits.view(-1), labels.view(-1).to(logits.dtype))
        return cross_entropy(logits, labels)


class MultiLabelHead(ClassificationHead):
    """Any number of labels for each row; labels [B, labels] of 0 and 1."""

    def loss(self, scores: dict[str, Tensor], given: dict[str, Tensor], states: States) -> Tensor:
        logits, labels = scores["logits"], given["labels"]
        _check_count(labels, logits.shape)
        return F.binary_cross_entropy_with_logits(logits, labels.view_as(logits).to(logits.dtype))


class MultipleChoiceHead(ClassificationHead):
    """One of `num_choices` rows that belong together; labels [B]."""

    def scores(self, states: States) -> dict[str, Tensor]:
        """`logits`: [B, choices], of B * choices rows."""
        logits, choices = super().scores(states)["logits"], self.config["num_choices"]
        if len(logits) % choices:
            raise UserError(f"a head of {choices} choices got {len(logits)} rows")
        return {"logits": logits.view(-1, choices)}

    def loss(self, scores: dict[str, Tensor], given: dict[str, Tensor], states: States) -> Tensor:
        return cross_entropy(scores["logits"], given["labels"])


class TaggingHead(PredictionHead):
    """A label for each token; labels [B, S]."""

    def scores(self, states: States) -> dict[str, Tensor]:
        """`logits`: [B, S, labels]."""
        return {"logits": self.through(states.hidden)}

    def loss(self, scores: dict[str, Tensor], given: dict[str, Tensor], states: States) -> Tensor:
        labels = given["labels"]
        _check_count(labels, scores["logits"].shape[:-1])
        if states.mask is not None:
            labels = labels.masked_fill(states.mask.view_as(labels) == 0, IGNORED)
        return cross_entropy(scores["logits"], labels)


class QuestionAnsweringHead(PredictionHead):
    """Where an answer begins and ends; positions [B] behind the row are ignored."""

    labels = ("start_positions", "end_positions")

    def scores(self, states: States) -> dict[str, Tensor]:
        """`start_logits`, `end_logits`: [B, S]."""
        logits = self.through(states.hidden)
        return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}

    def loss(self, scores: dict[str, Tensor], given: dict[str, Tensor], states: States) -> Tensor:
        length = scores["start_logits"].shape[1]
        for name in self.labels:
            _check_count(given[name], scores["start_logits"].shape[:-1], name)
        start, end = (given[name].view(-1).clamp(0, length) for name in self.labels)
        first = cross_entropy(scores["start_logits"], start, ignored=length)
        return (first + cross_entropy(scores["end_logits"], end, ignored=length)) / 2


class LMHead(PredictionHead):
    """Words for each token: layers of `embedding_size`, then the vocabulary projection."""

    def scores(self, states: States) -> dict[str, Tensor]:
        """`logits`: [B, S, V]."""
        x = states.hidden.to(self.dtype)
        for layer in list(self)[:-1]:
            x = layer(x)
        words = self[-1]
        assert isinstance(words, Words)
        return {"logits": words(states.before_words(x), states.embeddings)}

    def loss(self, scores: dict[str, Tensor], given: dict[str, Tensor], states: States) -> Tensor:
        logits, labels = scores["logits"], given["labels"]
        _check_count(labels, logits.shape[:-1])
        if self.config["shift_labels"]:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return cross_entropy(logits, labels)

    def file_state(self, embeddings: Tensor) -> dict[str, Tensor]:
        state = super().file_state(embeddings)
        return (
            state
            if state.get(key := f"{len(self) - 1}.weight") is not None
            else {
                **state,
                key: embeddings.detach(),
            }
        )


class Words(nn.Module):
    """The projection to the vocabulary: a weight of its own, or the embeddings' (tied)."""

    def __init__(self, size: int, vocabulary: int, bias: bool, tied: bool):
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocabulary, size))
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if bias else None

    def forward(self, x: Tensor, embeddings: Tensor | None) -> Tensor:
        """[..., size] -> [..., V]."""
        weight = embeddings if self.weight is None else self.weight
        assert weight is not None
        return F.linear(x.to(weight.dtype), weight, self.bias).float()


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """The mean over labels [N...] that are not `ignored`; 0 where all are; logits [N..., C].

    Raises:
        UserError: where there are more labels or fewer, and for one that is not from 0 to C - 1.
    """
    _check_count(labels, logits.shape[:-1])
    logits, labels = logits.flatten(0, -2).float(), labels.flatten().long()
    _check_range(labels, logits.shape[-1], ignored)
    total = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp(min=1)


def _check_count(labels: Tensor, shape: torch.Size, name: str = "labels") -> None:
    if labels.numel() != shape.numel():
        raise UserError(
            f"{name} has shape {list(labels.shape)}, and the head answers for {list(shape)}: give "
            f"one for each"
        )


def _check_range(labels: Tensor, count: int, ignored: int) -> None:
    """On a GPU the kernel asserts it: to ask there would wait for all that is under way."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= count))]
    if wrong.numel():
        raise UserError(
            f"labels holds {int(wrong[0])}, and the head has {count} labels: use 0 to {count - 1}, "
            f"or {IGNORED} for a place without one"
        )


CLASSES: dict[str, type[PredictionHead]] = {
    "classification": ClassificationHead,
    "multilabel_classification": MultiLabelHead,
    "multiple_choice": MultipleChoiceHead,
    "tagging": TaggingHead,
    "question_answering": QuestionAnsweringHead,
    "causal_lm": LMHead,
    "seq2seq_lm": LMHead,
    "masked_lm": LMHead,
}


def build_head(
    config: Mapping[str, Any],
    hidden_size: int,
    dropout: float = 0.0,
    embeddings: Tensor | None = None,
    epsilon: float = 1e-12,
) -> PredictionHead:
    """The head that a dictionary of AdapterHub's keys describes, in float32, weights random.

    Args:
        config: `head_type` and settings; those that are absent have AdapterHub's defaults.
        dropout: where `dropout_prob` does not say another.
        embeddings: of words [V, h], to be the vocabulary projection too; None: it has its own.
        epsilon: of the norms of heads for words.

    Raises:
        UserError: for a type, a key or a value that is not known.
    """
    config = complete(config)
    kind = config["head_type"]
    if kind in LM_TYPES:
        layers = _layers_to_words(config, hidden_size, embeddings is not None, epsilon)
    else:
        given = config.get("dropout_prob")
        layers = _layers_to_labels(config, hidden_size, dropout if given is None else given)
    head = CLASSES[kind](config, layers)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    return head


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A head's dictionary with all the settings of its type.

    Raises:
        UserError: for a type or a key that is not known, a number below 1, and an `id2label` that
            does not name each label once.
    """
    kind = config.get("head_type")
    if kind not in HEAD_TYPES:
        raise UserError(f"head_type {kind!r} is not known: one of {', '.join(HEAD_TYPES)}")
    known = HEAD_TYPES[kind]
    for key in config:
        if key not in known and key not in ("head_type", "id2label"):
            raise UserError(f"a {kind} head has no key {key!r}: use one of {', '.join(known)}")
    made = {"head_type": kind, **known, **config}
    for key in ("num_labels", "num_choices", "layers"):
        number = made.get(key, 1)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"{key}={number!r} of a {kind} head: a whole number from 1 is needed")
    if kind == "question_answering" and made["num_labels"] != 2:
        raise UserError(
            f"num_labels={made['num_labels']} of a {kind} head: it must be 2, begin and end"
        )
    names = made.pop("id2label", None)
    count = made.get("num_labels", made.get("num_choices"))
    if names is not None:
        made["label2id"] = _numbers(names, kind, count)
    if count is not None and made["label2id"] is None:
        made["label2id"] = {f"LABEL_{number}": number for number in range(count)}
    return made


def _numbers(names: Mapping[Any, str], kind: str, count: int | None) -> dict[str, int]:
    """The numbers of labels by their names, of `id2label`."""
    key = "num_choices" if kind == "multiple_choice" else "num_labels"
    try:
        said = {label: int(number) for number, label in names.items()}
    except (TypeError, ValueError):
        raise UserError(f"id2label={names!r} of a {kind} head: labels by their numbers") from None
    if count is not None and sorted(said.values()) != list(range(count)):
        raise UserError(
            f"id2label={dict(names)} of a {kind} head: with {key}={count} it must name each of 0 "
            f"to {count - 1}, each otherwise"
        )
    return said


def _activation(config: Mapping[str, Any]) -> list[nn.Module]:
    name = config["activation_function"]
    if name is None:
        return []
    check_activation(name, "activation_function")
    return [Activation(name)]


def _layers_to_labels(config: Mapping[str, Any], size: int, dropout: float) -> list[nn.Module]:
    labels = config.get("num_labels", 1)
    layers: list[nn.Module] = []
    for _ in range(config["layers"] - 1):
        layers += [nn.Dropout(dropout), nn.Linear(size, size), *_activation(config)]
    return [*layers, nn.Dropout(dropout), nn.Linear(size, labels, bias=config.get("bias", True))]


def _layers_to_words(
    config: dict[str, Any], size: int, tied: bool, epsilon: float
) -> list[nn.Module]:
    inner = config.get("embedding_size") or size
    if tied and inner != size:
        raise UserError(f"embedding_size={inner}: a tied projection needs states of size {size}")
    layers: list[nn.Module] = []
    for number in range(config["layers"] - 1):
        layers += [nn.Linear(inner if number else size, inner), *_activation(config)]
        if config["layer_norm"]:
            layers.append(nn.LayerNorm(inner, eps=epsilon))
    return [*layers, Words(inner, config["vocab_size"], bool(config["bias"]), tied)]
