"""The encoder: BERT and RoBERTa by `TransformerConfig` alone, and their heads."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.heads import Heads
from graftwerk.adapters.slots import Flow, Record
from graftwerk.models.base import Start, Transformer, with_virtual, within_prompt
from graftwerk.models.config import TransformerConfig
from graftwerk.models.context import Context
from graftwerk.models.layers import ACTIVATIONS, Layers
from graftwerk.models.norms import make_norm


class BERT(Transformer):
    """A bidirectional encoder with the head that `config.head` names, if any."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.encoder = Layers(config, config.num_layers, stack="encoder")
        self.pooler = Pooler(config) if config.pooler else None
        self.head: nn.Module | None = None
        if config.head == "masked_lm":
            self.head = MaskedLMHead(config)
        elif config.head is not None:
            self.head = LabelHead(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
        select: Tensor | None = None,
        *,
        spans: Tensor | None = None,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        chance: Tensor | None = None,
    ) -> Tensor:
        """What the head makes of the hidden states.

        Args:
            tokens: [B, S] ids.
            positions: [B or 1, S]; None: 0 to S-1.
            documents: [B, S]; tokens see those of the same number, -1 is padding. None: one
                document without padding.
            token_types: [B, S]; None: all 0.
            select: [N] flat indices into B*S that reach the head (`masked_lm`, `tagging`, none).
            spans: [D, 2] of each document that an answer is marked in its row and its number there
                (`question_answering`). None: each row is one. With active prompts the first
                columns of each document are room for its own, at negative positions.
            task_ids, record, chance: as in `GPT.forward`.

        Returns:
            No head: [B, S, h]. `masked_lm`: [B, S, V]. `tagging`: [B, S, labels]; each [N, ...]
            under `select`. `classification`: [B, labels]. `question_answering`: [2 B, S], start
            scores of all rows, then end scores; -inf at padding; under `spans` [2 D, S], and -inf
            in other documents. n times as many rows under a `Parallel` of n.
        """
        how = {"task_ids": task_ids, "record": record, "chance": chance}
        packed = spans is not None
        start = self.begin(tokens, positions, documents, token_types, packed, **how)
        x, flow = self._run(start)
        return self.answer(x[:, start.columns :], flow, select, documents, spans)

    def answer(
        self,
        x: Tensor,
        flow: Flow,
        select: Tensor | None,
        documents: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """States behind the last norm [B, S, h] -> what the head makes of them, as `forward` gives
        it."""
        kind = self.config.head
        if kind == "classification":
            return self._answer(self.pooled(x), flow)
        if kind == "question_answering":
            scores = self._answer(x, flow)
            if documents is not None:
                elsewhere = documents < 0
                if spans is not None:
                    rows, numbers = spans.T
                    elsewhere = self.spoken(documents)[rows] != numbers[:, None]
                    scores = scores.unflatten(0, (-1, len(documents)))[:, rows].flatten(0, 1)
                elsewhere = elsewhere.repeat(self.width, 1)
                scores = scores.masked_fill(elsewhere[..., None], float("-inf"))
            return scores.permute(2, 0, 1).flatten(0, 1)
        if isinstance(self.head, MaskedLMHead):
            inverse = self.lm_input if self.reads_words(flow) else None
            x = x if inverse is not None else self.selected(x, select)
            x = self.head.transformed(x)
            if inverse is not None:
                x = self.selected(inverse(x, flow), select)
            return self.head.words(x, self.embedding.word_embeddings.weight)
        if self.head is None or self.plan.head is None:
            x = self.selected(x, select)
            return x if self.head is None else self._answer(x, flow)
        return self.selected(self._answer(x, flow), select)  # adapters' heads see whole rows

    def _answer(self, x: Tensor, flow: Flow) -> Tensor:
        """What the head for labels makes of [..., h]: the model's own, or the active adapters'."""
        assert self.head is not None
        if isinstance(self.head, Heads):
            return self.head(x, self.plan.head, flow)
        return self.head(x)

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
        *,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        prompts: bool = False,
    ) -> Tensor:
        """[B, S, h] behind the last layer; arguments as in `forward`.

        `prompts`: with the columns of active prompts in front, [B, v + S, h].
        """
        how = {"task_ids": task_ids, "record": record}
        start = self.begin(tokens, positions, documents, token_types, **how)
        x, _ = self._run(start)
        return x if prompts else x[:, start.columns :]

    def begin(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
        packed: bool = False,
        *,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        chance: Tensor | None = None,
    ) -> Start:
        """A pass before its first layer; arguments as in `forward`.

        `packed`: rows hold several texts, which `documents` tells apart.
        """
        plan = self.plan
        virtual = self.columns_ahead(packed)
        if plan.own_prompts and packed:
            assert positions is not None
            positions = within_prompt(positions, plan.virtual_tokens, plan.shift)
        elif virtual or plan.shift:
            arguments = with_virtual(virtual, plan.shift, tokens, positions, None, None)
            tokens, positions, _, _ = arguments
            token_types = None if token_types is None else F.pad(token_types, (virtual, 0))
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        texts = self.texts(documents, plan.virtual_tokens) if packed else None
        flow = self.flow(task_ids, record, None, -virtual, chance, texts)
        context = Context(positions, flow=flow)
        if documents is not None:
            self.keep_apart(context, documents, virtual, packed)
        if plan.widen_at == -1:
            tokens = tokens.repeat(plan.width, 1)
            token_types = None if token_types is None else token_types.repeat(plan.width, 1)
            context = context.widened(plan.width)
        return Start(tokens, context, virtual, token_types)

    def _run(self, start: Start) -> tuple[Tensor, Flow]:
        """States behind the last norm, with the columns of prompts, and what slots are told."""
        plan = self.plan
        x, context = self.encoder(self.embed(start), start.context, plan.width, plan.widen_at)
        return self.encoder.finish(x), replace(context.flow, offset=0)

    def pooled(self, x: Tensor) -> Tensor:
        """The first token's state, [B, S, h] -> [B, h], through the pooler where there is one."""
        return x[:, 0] if self.pooler is None else self.pooler(x)


class Pooler(nn.Module):
    """The first token's state through a dense layer and tanh: [B, S, h] -> [B, h]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class MaskedLMHead(nn.Module):
    """Hidden states to words: dense, activation, norm, then a vocabulary projection with bias."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layernorm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = None
        if not config.share_embeddings_and_output_weights:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def transformed(self, x: Tensor) -> Tensor:
        """What comes before the vocabulary projection: [..., h] -> [..., h]."""
        return self.layernorm(self.activation(self.dense(x)))

    def words(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """The vocabulary projection: [..., h] and the word embeddings [V, h] -> [..., V]."""
        return F.linear(x, embeddings if self.decoder is None else self.decoder.weight, self.bias)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """[..., h] and the word embeddings [V, h] -> [..., V]."""
        return self.words(self.transformed(x), embeddings)


class LabelHead(nn.Module):
    """One linear layer to `num_labels` scores, or to a start and an end score."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        labels = 2 if config.head == "question_answering" else config.num_labels
        self.out_proj = nn.Linear(config.hidden_size, labels)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., labels]."""
        return self.out_proj(x)
