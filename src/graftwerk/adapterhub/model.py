"""A base of ours that answers as AdapterHub's models do: inputs by name, an output with a loss."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.adapterhub.context import AdapterSetup, head_names, heads_of
from graftwerk.adapterhub.default_head import DEFAULT, default_head
from graftwerk.adapterhub.inputs import Inputs, Tokens, shifted
from graftwerk.adapterhub.outputs import AdapterModelOutput, MultiHeadOutput, recorded
from graftwerk.adapters.composition import BatchSplit, Composition, Parallel, Stack
from graftwerk.adapters.composition import names as names_in
from graftwerk.adapters.configs import PromptTuningConfig
from graftwerk.adapters.slots import Record
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5
from graftwerk.models.heads import PredictionHead, States

Labels = Tensor | Mapping[str, Tensor] | Sequence[Tensor] | None


class HeadedModel(nn.Module):
    """The engine's model (`base`), prediction heads by name, and which of them are active.

    `config` is the checkpoint's own (`transformers.PretrainedConfig`). What parts of an adapter
    share is once in `state_dict`.
    """

    _keys_to_ignore_on_save = None  # transformers.Trainer asks, where a checkpoint holds no base

    def __init__(self, base: GPT | T5 | BERT, config: Any):
        super().__init__()
        self.base = base
        self.config = config
        self.heads = nn.ModuleDict()
        self._active_heads: list[str] = []
        head = default_head(base, self.head_dropout)
        if head is not None:
            self.heads[DEFAULT] = head
            self._active_heads = [DEFAULT]
        self.train(base.training)
        self.register_state_dict_post_hook(_once)
        self.register_load_state_dict_pre_hook(_everywhere)

    # ---- what the model is

    @property
    def device(self) -> torch.device:
        """Where the base's weights are."""
        return self.base.embedding.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base's weights."""
        return self.base.dtype

    @property
    def tokens(self) -> Tokens:
        """The ids of special tokens, as the configuration says them."""
        pad, eos = (getattr(self.config, f"{name}_token_id", None) for name in ("pad", "eos"))
        eos = eos[0] if isinstance(eos, list | tuple) else eos
        return Tokens(pad, eos, self.base.config.decoder_start_token_id)

    @property
    def head_dropout(self) -> float:
        """Dropout in heads that do not say another."""
        for name in ("classifier_dropout", "hidden_dropout_prob", "dropout_rate", "resid_pdrop"):
            value = getattr(self.config, name, None)
            if value is not None:
                return float(value)
        return 0.0

    # ---- a pass

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Labels = None,
        start_positions: Labels = None,
        end_positions: Labels = None,
        head: str | Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        output_adapter_gating_scores: bool = False,
        output_adapter_fusion_attentions: bool = False,
        return_dict: bool | None = True,
    ) -> Any:
        """What the active heads make of the base's states under the active adapters.

        Args:
            input_ids: [B, S], or [B, choices, S] for a head of choices.
            attention_mask: of the same shape, 0 at padding; token_type_ids and position_ids too.
            decoder_input_ids: [B, T], of a T5; None: the labels of a head for words, otherwise
                `input_ids`, moved back by one.
            labels, start_positions, end_positions: as the head's loss needs them. Where several
                heads answer: one tensor for all, or one a head, by name or in their order.
            head: answers instead of the active one; several do so side by side.
            task_ids: [B] the child of a `MultiTask` for each row.
            output_adapter_gating_scores, output_adapter_fusion_attentions: ask for these fields.
            return_dict: False: a tuple of what the output holds.

        Returns:
            `AdapterModelOutput`; `MultiHeadOutput` of several heads.

        Raises:
            UserError: where inputs are missing or do not fit the head.
        """
        if input_ids is None:
            raise UserError("give input_ids: a model here reads no embeddings of its caller")
        given = {"labels": labels, "start_positions": start_positions}
        given["end_positions"] = end_positions
        with self._in_setup() as used:
            names = head_names(head) or used
            inputs = Inputs(
                input_ids.flatten(0, -2),
                _rows(attention_mask),
                _rows(token_type_ids),
                _rows(position_ids),
                self._decoder_inputs(input_ids, decoder_input_ids, labels, names),
                decoder_attention_mask,
            )
            wanted = output_adapter_gating_scores or output_adapter_fusion_attentions
            record = Record() if wanted else None
            output = self._answer(inputs, names, given, task_ids, record)
            if record is not None:
                gates, fusions = output_adapter_gating_scores, output_adapter_fusion_attentions
                for key, value in recorded(record, gates, fusions).items():
                    output[key] = value
            if self.training and output.loss is not None and self.base.fusions:
                output["loss"] = output.loss + self.base.fusion_loss()
        return output if return_dict is not False else output.to_tuple()

    def _answer(
        self,
        inputs: Inputs,
        names: list[str],
        given: Mapping[str, Labels],
        task_ids: Tensor | None,
        record: Record | None,
    ) -> Any:
        base = self.base
        given_ = inputs.arguments(base, self.tokens) | {"task_ids": task_ids, "record": record}
        if isinstance(base, BERT):
            whole = base.hidden_states(**given_, prompts=True)
            x = whole[:, base.virtual_tokens :]
        else:
            whole = x = base.hidden_states(**given_)
        if not names:
            return AdapterModelOutput(last_hidden_state=x)
        states = self._states(inputs, x, whole if _begins_with_prompt(base) else x, task_ids)
        branches = self._branches(len(inputs.input_ids), len(x), names)
        if branches is None:
            (name,) = names
            alone = {
                key: _for_rows(_of_head(value, name, 0), len(inputs.input_ids), len(x))
                for key, value in given.items()
            }
            return AdapterModelOutput(**self._head(name)(states, alone))
        outputs = []
        for number, (name, child, rows, labelled) in enumerate(branches):
            part = self._part(states, child, rows)
            own = {
                key: own[labelled] if (own := _of_head(value, name, number)) is not None else None
                for key, value in given.items()
            }
            outputs.append(AdapterModelOutput(**self._head(name)(part, own)))
        losses = [output.loss for output in outputs]
        said = [loss for loss in losses if loss is not None]
        return MultiHeadOutput(outputs, torch.stack(said).sum() if said else None)

    def _states(self, inputs: Inputs, x: Tensor, row: Tensor, task_ids: Tensor | None) -> States:
        """What heads read: hidden states, and the columns `row` in which a row's own is found."""
        base = self.base
        pooler = getattr(base, "pooler", None)
        mask = inputs.attention_mask
        if mask is not None and isinstance(base, T5):
            mask = inputs.decoder_attention_mask
        return States(
            x if isinstance(base, BERT) else base.scaled(x),  # rows' states are not, as there
            cls=lambda: inputs.pooled(base, row, self.tokens),
            pooler=None if pooler is None else lambda: pooler(row),
            mask=None if mask is None else mask.repeat(len(x) // len(mask), 1),
            embeddings=base.embedding.word_embeddings.weight,
            before_words=lambda y: base.lm_input(y, base.flow(task_ids)),
        )

    def _part(self, states: States, child: Composition | str, rows: slice) -> States:
        """The states of a branch's rows; its own adapters change them before words."""

        def before_words(y: Tensor) -> Tensor:
            if not self.base.reads_words(self.base.flow()):
                return y
            with self.base.setup(child, self.base.plan.skip_layers):
                return self.base.lm_input(y, self.base.flow())

        return replace(states.rows(rows.start, rows.stop), before_words=before_words)

    def _branches(
        self, rows: int, wide: int, names: list[str]
    ) -> list[tuple[str, Composition | str, slice, slice]] | None:
        """Of each head: its name, its adapters, its rows, and its labels' rows.

        None where one head answers for all rows.
        """
        active = self.base.active
        block: Composition | str | None = active
        while isinstance(block, Stack):
            block = block.children[-1]
        if isinstance(block, Parallel | BatchSplit):
            children = list(block.children)
        else:
            children = [active or ""] * len(names)
        if len(names) == 1:
            return None
        if len(names) != len(children):
            raise UserError(
                f"{len(names)} heads are active ({', '.join(names)}), and {active} has "
                f"{len(children)} branches: name one head, or one for each"
            )
        if isinstance(block, BatchSplit):
            edges = [sum(block.batch_sizes[:n]) for n in range(len(names) + 1)]
            cuts = [slice(a, b) for a, b in pairwise(edges)]
            return list(zip(names, children, cuts, cuts, strict=True))
        if isinstance(block, Parallel):
            cuts = [slice(n * rows, (n + 1) * rows) for n in range(len(names))]
        else:
            cuts = [slice(0, wide)] * len(names)
        return [(n, c, cut, slice(None)) for n, c, cut in zip(names, children, cuts, strict=True)]

    def _decoder_inputs(
        self, source: Tensor, given: Tensor | None, labels: Labels, names: list[str]
    ) -> Tensor | None:
        if given is not None or not isinstance(self.base, T5):
            return given
        words = names and self._head(names[0]).config["head_type"] == "seq2seq_lm"
        read = labels if words and isinstance(labels, Tensor) else source
        return shifted(read, self.tokens.start, self.tokens.pad)

    # ---- heads

    def _head(self, name: str) -> PredictionHead:
        if name not in self.heads:
            have = ", ".join(self.heads) or "none"
            raise UserError(f"no head is called {name!r}: this model has {have}")
        head = self.heads[name]
        assert isinstance(head, PredictionHead)
        return head

    @property
    def active_head(self) -> str | list[str] | None:
        """The head that answers, or those that do side by side; set by name or names."""
        heads = self._active_heads
        return None if not heads else heads[0] if len(heads) == 1 else list(heads)

    @active_head.setter
    def active_head(self, heads: str | Sequence[str] | Composition | None) -> None:
        names = head_names(heads)
        for name in names:
            self._head(name)
        self._active_heads = names
        if len(names) == 1:
            label2id = self._head(names[0]).config.get("label2id")
            if label2id:
                self.config.label2id = dict(label2id)
                self.config.id2label = {number: label for label, number in label2id.items()}

    @contextmanager
    def _in_setup(self) -> Iterator[list[str]]:
        """Within it the adapters of an `AdapterSetup`, if there is one, are active; the heads."""
        setup = AdapterSetup.current()
        if setup is None:
            yield self._active_heads
            return
        own = [name for name in heads_of(setup.composition) if name in self.heads]
        complete = own and len(own) == len(heads_of(setup.composition))
        with setup.active_in(self.base):
            yield setup.heads or (own if complete else self._active_heads)


def _begins_with_prompt(base: GPT | T5 | BERT) -> bool:
    """Whether a BERT's row begins with a prompt for its heads: in the library, that of `prefix`."""
    methods = [base.adapters[name] for name in names_in(base.active)]
    single = [each for method in methods for each in getattr(method, "configs", (method,))]
    return isinstance(base, BERT) and any(
        isinstance(each, PromptTuningConfig)
        and not each.shifts_positions
        and each.combine == "prefix"
        for each in single
    )


def _shared(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, first name) of every parameter that has another name before."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            yield name, first[id(parameter)]


def _once(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in _shared(model):
        state.pop(prefix + name, None)


def _everywhere(model: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
    for name, first in _shared(model):
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def _rows(tensor: Tensor | None) -> Tensor | None:
    """Choices [B, C, S] as rows [B C, S]."""
    return tensor if tensor is None or tensor.ndim < 3 else tensor.flatten(0, 1)


def _of_head(labels: Labels, name: str, number: int) -> Tensor | None:
    """What a head gets of labels for several."""
    if labels is None or isinstance(labels, Tensor):
        return labels
    if isinstance(labels, Mapping):
        return labels.get(name)
    if number >= len(labels):
        raise UserError(f"labels for {len(labels)} heads, and head {name!r} is number {number + 1}")
    return labels[number]


def _for_rows(labels: Tensor | None, rows: int, wide: int) -> Tensor | None:
    """Labels of the batch for as many copies of it as there are."""
    if labels is None or len(labels) != rows or wide == rows:
        return labels
    return labels.repeat(wide // rows, *([1] * (labels.ndim - 1)))
