"""The decoder-only model: GPT-2, LLaMA and their kin by `TransformerConfig` alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.adapters.slots import Flow, Record
from graftwerk.adapters.texts import Texts
from graftwerk.models.base import (
    Start,
    Transformer,
    decoder_context,
    with_virtual,
    within_prompt,
)
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.layers import Layers
from graftwerk.models.scoring import Score


class GPT(Transformer):
    """A GPT with slots. Weights are random until a checkpoint is read into it."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.decoder = Layers(config, config.num_layers)
        self.add_output_layer()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        end: Tensor | None = None,
        cache: KeyValueCache | None = None,
        select: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        chance: Tensor | None = None,
        score: Score | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: [B, S] ids.
            positions: [B, S]; None: 0 to S-1, or on from what the cache holds.
            end: [B, S]; query i sees key j iff `j <= i < end[b, j]`, with i and j counted from the
                cache's first token. None: plain causal rows.
            cache: keys and values of earlier tokens; it takes up the new ones.
            select: [N] flat indices into B*S: only these positions reach the output layer, and the
                final norm where no adapter reads what that gives.
            documents: [B, S] of packed rows: which text, or tree of texts, of its row each token
                is of, -1 for padding; with `positions` and `end`. None: a row is one text. Where
                each text has a prompt of its own (`Plan.own_prompts`), its first columns are room
                for it, at negative positions.
            task_ids: [B] the child of a `MultiTask` for each row.
            record: takes up what adapters say of themselves (`adapters.slots.Record`).
            chance: [B] what dropout draws from for each row (`adapters.masks`); None: from torch's
                random state.
            score: takes the logits [n, V] of some of the positions that `select` names, and which
                of them these are; gives [n]. Many are made in runs, and not kept.

        Returns:
            [B, S, V], [N, V] under `select`, or [N] of `score`. Under an active `Parallel` of n
            children the batch is n*B rows, child after child, and `select` holds for each child:
            n*N rows.
        """
        how = {"task_ids": task_ids, "record": record, "chance": chance}
        start = self.begin(tokens, positions, end, cache, documents, **how)
        x, flow = self._run(start)
        return self.answer(x, flow, select, score)

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        end: Tensor | None = None,
        *,
        task_ids: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """[B, S, h] behind the last norm; arguments as in `forward`."""
        start = self.begin(tokens, positions, end, task_ids=task_ids, record=record)
        return self.decoder.finish(self._run(start)[0])

    def begin(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        end: Tensor | None = None,
        cache: KeyValueCache | None = None,
        documents: Tensor | None = None,
        *,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        chance: Tensor | None = None,
    ) -> Start:
        """A pass before its first layer; arguments as in `forward`."""
        plan, held = self.plan, cache.length if cache is not None else 0
        virtual, texts = self.columns_ahead(documents is not None), None
        if documents is not None and plan.reads_texts:
            texts = self._texts(documents, positions, virtual)
        if plan.own_prompts and not virtual:
            assert positions is not None
            positions = within_prompt(positions, plan.virtual_tokens, plan.shift)
        elif virtual or plan.shift:
            arguments = with_virtual(virtual, plan.shift, tokens, positions, end, None, held)
            tokens, positions, end, _ = arguments
        flex = cache is None and self.flexes(tokens)
        context = decoder_context(self.config, self.dtype, tokens, positions, end, cache, flex)
        rows = cache and cache.rows
        context.flow = self.flow(task_ids, record, rows, held - virtual, chance, texts)
        if documents is not None and plan.own_prompts:
            context.documents = self.spoken(documents)
        if plan.widen_at == -1:
            tokens = tokens.repeat(plan.width, 1)
            context = context.widened(plan.width)
        return Start(tokens, context, 0 if held else virtual)

    def _texts(self, documents: Tensor, positions: Tensor | None, ahead: int) -> Texts:
        """What slots are told of packed rows or trees, before which `ahead` columns come."""
        assert positions is not None, "packed rows say where in its text each token stands"
        prompt = self.plan.virtual_tokens
        place = F.pad(positions + prompt, (ahead, 0))
        place[:, :ahead] = torch.arange(ahead, device=place.device)
        return Texts.of(F.pad(documents, (ahead, 0)), place, prompt)

    def _run(self, start: Start) -> tuple[Tensor, Flow]:
        plan = self.plan
        x, context = self.decoder(self.embed(start), start.context, plan.width, plan.widen_at)
        return start.own(x, context)
