"""The encoder-decoder: T5, FLAN-T5, mT5 and Megatron's T5 by `TransformerConfig` alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.adapters.slots import Flow, Record
from graftwerk.models.base import Start, Transformer, decoder_context
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.context import Context
from graftwerk.models.flex import Blocks
from graftwerk.models.layers import Layers
from graftwerk.models.positions import (
    FAR,
    RelativePosition,
    neighbours,
    of_documents,
    visibility,
)
from graftwerk.models.scoring import Score


class T5(Transformer):
    """An encoder, a decoder that attends to it, and embeddings that both share.

    Layers are numbered through: the decoder's follow the encoder's.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        relative = config.position_embedding_type == "relative"
        self.encoder = Layers(
            config,
            config.num_layers,
            relative_position=RelativePosition(config, bidirectional=True) if relative else None,
            stack="encoder",
        )
        self.decoder = Layers(
            config,
            config.decoder_num_layers,
            first=config.num_layers,
            cross=True,
            relative_position=RelativePosition(config, bidirectional=False) if relative else None,
        )
        self.add_output_layer()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        end: Tensor | None = None,
        cache: KeyValueCache | None = None,
        select: Tensor | None = None,
        *,
        source: Tensor | None = None,
        source_documents: Tensor | None = None,
        documents: Tensor | None = None,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        chance: Tensor | None = None,
        score: Score | None = None,
    ) -> Tensor:
        """Logits of the next target token.

        Args:
            tokens: [B, S] the decoder's inputs, of which `decoder_start_token_id` is the first.
            positions, end, cache, select: of the decoder, as in `GPT.forward`.
            source: [B, E] the encoder's input. With a cache it is given on the first pass only.
            source_documents: [B, E] number of each source token's document, -1 for padding. None:
                one document without padding.
            documents: [B, S] the source document that each target token is of, -1 for padding.
                None: targets are of document 0. With active prompts the first columns of each
                source document are room for its own.
            task_ids, record, chance, score: as in `GPT.forward`.

        Returns:
            [B, S, V], [N, V] under `select`, or [N] of `score`; n times as many rows under a
            `Parallel` of n.
        """
        how = {"task_ids": task_ids, "record": record, "chance": chance}
        states = None
        if source is not None:
            rows = None if cache is None else cache.rows
            packed = documents is not None
            states = self._encode(self.begin_source(source, source_documents, rows, packed, **how))
        given = positions, end, cache, states, source_documents, documents
        start = self.begin(tokens, *given, **how)
        x, flow = self._run(start)
        return self.answer(x, flow, select, score)

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        end: Tensor | None = None,
        *,
        source: Tensor | None = None,
        source_documents: Tensor | None = None,
        task_ids: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """[B, S, h] of the decoder behind the last norm; arguments as in `forward`."""
        how = {"task_ids": task_ids, "record": record}
        states = None
        if source is not None:
            states = self.encode(source, source_documents, **how)
        start = self.begin(tokens, positions, end, None, states, source_documents, **how)
        return self.decoder.finish(self._run(start)[0])

    def begin(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        end: Tensor | None = None,
        cache: KeyValueCache | None = None,
        states: Tensor | None = None,
        source_documents: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        chance: Tensor | None = None,
    ) -> Start:
        """The decoder's pass before its first layer; `states` are the encoder's, [B, E, h].

        The other arguments are those of `forward`.
        """
        plan, held = self.plan, cache.length if cache is not None else 0
        packed = documents is not None
        flex = packed and cache is None and self.flexes(tokens)
        context = decoder_context(self.config, self.dtype, tokens, positions, end, cache, flex)
        rows = cache.rows if cache is not None else None
        context.flow = self.flow(task_ids, record, rows, held, chance, self.texts(documents))
        ahead = self.columns_ahead(packed)
        texts = self.texts(source_documents, plan.virtual_tokens) if packed else None
        context.source_flow = self.flow(task_ids, record, rows, -ahead, chance, texts)
        if states is not None:
            if source_documents is not None:
                self._show_states(context, source_documents, documents, ahead, flex)
            if cache is not None:
                cache.cross_mask = context.states_mask
        elif cache is not None:
            context.states_mask = cache.cross_mask
        if plan.widen_at is not None and plan.widen_at < self.config.num_layers:
            tokens = tokens.repeat(plan.width, 1)  # the encoder has repeated the batch already
            context = context.widened(plan.width)
        context.states = states
        self._add_relative_scores(context, tokens.shape[1])
        drawn = context.flow.chance
        told = Flow(offset=held, chance=drawn and drawn.again())
        return Start(tokens, context, told=told)  # the embedding's slots are the encoder's

    def _run(self, start: Start) -> tuple[Tensor, Flow]:
        """The decoder's states behind its last layer, and what slots are told then."""
        plan = self.plan
        x, context = self.decoder(self.embed(start), start.context, plan.width, plan.widen_at)
        return start.own(x, context)

    def encode(
        self,
        source: Tensor,
        documents: Tensor | None = None,
        *,
        task_ids: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Encoder states [B, E, h] of source tokens [B, E]; arguments as in `forward`.

        Those of active prompts come first: v + E states. Under a `Parallel` that begins in the
        encoder they are n*B rows.
        """
        start = self.begin_source(source, documents, task_ids=task_ids, record=record)
        return self._encode(start)

    def _encode(self, start: Start) -> Tensor:
        plan = self.plan
        x, _ = self.encoder(self.embed(start), start.context, plan.width, plan.widen_at)
        return self.encoder.finish(x)

    def begin_source(
        self,
        source: Tensor,
        documents: Tensor | None = None,
        rows: Tensor | None = None,
        packed: bool = False,
        *,
        task_ids: Tensor | None = None,
        record: Record | None = None,
        chance: Tensor | None = None,
    ) -> Start:
        """The encoder's pass before its first layer; arguments as in `encode`.

        `rows` [B]: the rows' numbers, where some have left the batch. `packed`: rows hold several
        texts, which `documents` tells apart.
        """
        plan = self.plan
        virtual = self.columns_ahead(packed)
        source = F.pad(source, (virtual, 0))
        positions = torch.arange(source.shape[1], device=source.device)[None]
        if documents is not None and self.embedding.position_embeddings is not None:
            before = neighbours(documents)[0]  # each document has positions of its own
            positions = F.pad(before.masked_fill(before == FAR, 0) + virtual, (virtual, 0))
            positions[:, :virtual] = torch.arange(virtual, device=source.device)
        texts = self.texts(documents, plan.virtual_tokens) if packed else None
        flow = self.flow(task_ids, record, rows, -virtual, chance, texts)
        context = Context(positions, flow=flow)
        if documents is not None:
            self.keep_apart(context, documents, virtual, packed)
        if self.encoder.relative_position is not None:
            context.relate(self.encoder.relative_position, source.shape[1], source.shape[1])
        if plan.widen_at == -1:
            source = source.repeat(plan.width, 1)
            context = context.widened(plan.width)
        return Start(source, context, virtual)

    def flexes(self, tokens: Tensor) -> bool:
        """As of any model; a table of distances that is trained goes by masks: FlexAttention would
        add up its gradient score by score."""
        tables = self.encoder.relative_position, self.decoder.relative_position
        trained = any(table is not None and table.weight.requires_grad for table in tables)
        return not trained and super().flexes(tokens)

    def _show_states(
        self,
        context: Context,
        sources: Tensor,
        documents: Tensor | None,
        ahead: int,
        flex: bool,
    ) -> None:
        """Says which encoder states the decoder sees; `ahead` of them are prompts'."""
        if documents is None:
            seen = (sources == 0)[:, None]
        elif flex and self.flexes(sources):
            context.states_blocks = Blocks.of_documents(documents, sources)
            return
        else:
            seen = of_documents(documents, sources)
        context.states_mask = F.pad(seen, (ahead, 0), value=True)[:, None]

    def _add_relative_scores(self, context: Context, new: int) -> None:
        relative = self.decoder.relative_position
        if relative is None:
            return
        seen = context.cache.length if context.cache is not None else new
        if context.causal:
            end = torch.full((1, seen), seen, device=context.positions.device)
            context.mask, context.causal = visibility(end, new), False
        context.relate(relative, new, seen)
