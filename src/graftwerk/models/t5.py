"""The encoder-decoder: T5, FLAN-T5, mT5 and Megatron's T5 by `TransformerConfig` alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.adapters.slots import Flow, Record
from graftwerk.models.base import Transformer, decoder_context
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.layers import Context, Layers
from graftwerk.models.positions import RelativePosition, same_document, visibility


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
        task_ids: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Logits of the next target token.

        Args:
            tokens: [B, S] the decoder's inputs, of which `decoder_start_token_id` is the first.
            positions, end, cache, select: of the decoder, as in `GPT.forward`.
            source: [B, E] the encoder's input. With a cache it is given on the first pass only.
            source_documents: [B, E] number of each source token's document, -1 for padding; targets
                see document 0. None: one document without padding.
            task_ids, record: as in `GPT.forward`.

        Returns:
            [B, S, V], or [N, V] under `select`; n times as many rows under a `Parallel` of n.
        """
        x, flow = self._run(
            tokens, positions, end, cache, source, source_documents, task_ids, record
        )
        if self.reads_words(flow):
            return self.words(self.word_states(self.decoder.finish(x), flow, select))
        return self.logits(self.decoder.finish(self.selected(x, select)))

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
        x, _ = self._run(tokens, positions, end, None, source, source_documents, task_ids, record)
        return self.decoder.finish(x)

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        end: Tensor | None,
        cache: KeyValueCache | None,
        source: Tensor | None,
        source_documents: Tensor | None,
        task_ids: Tensor | None,
        record: Record | None,
    ) -> tuple[Tensor, Flow]:
        """The decoder's states behind its last layer, and what slots were told."""
        plan, held = self.plan, cache.length if cache is not None else 0
        context = decoder_context(self.config, self.dtype, tokens, positions, end, cache)
        rows = cache.rows if cache is not None else None
        context.flow = self.flow(task_ids, record, rows, held)
        context.source_flow = self.flow(task_ids, record, rows, -plan.virtual_tokens)
        wide = plan.widen_at is not None and plan.widen_at < self.config.num_layers
        if source is not None:
            context.states = self._encode(source, source_documents, context.source_flow)
            if source_documents is not None:
                seen = F.pad(source_documents == 0, (plan.virtual_tokens, 0), value=True)
                context.states_mask = seen[:, None, None]
            if cache is not None:
                cache.cross_mask = context.states_mask
        elif cache is not None:
            context.states_mask = cache.cross_mask
        if wide:  # the encoder has repeated the batch already
            tokens = tokens.repeat(plan.width, 1)
            states, context.states = context.states, None
            context = context.widened(plan.width)
            context.states = states
        self._add_relative_scores(context, tokens.shape[1])
        x = self.embedding(tokens, context.positions, Flow())  # its slots are the encoder's
        x, context = self.decoder(x, context, plan.width, plan.widen_at)
        return x, context.flow

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
        flow = self.flow(task_ids, record, offset=-self.virtual_tokens)
        return self._encode(source, documents, flow)

    def _encode(self, source: Tensor, documents: Tensor | None, flow: Flow) -> Tensor:
        plan = self.plan
        virtual = plan.virtual_tokens
        source = F.pad(source, (virtual, 0))
        positions = torch.arange(source.shape[1], device=source.device)[None]
        context = Context(positions, flow=flow)
        if documents is not None:
            context.documents = documents
            context.mask = same_document(documents, virtual)
        if self.encoder.relative_position is not None:
            context.relative = self.encoder.relative_position
            context.scores = context.relative(source.shape[1], source.shape[1])
        if plan.widen_at == -1:
            source = source.repeat(plan.width, 1)
            context = context.widened(plan.width)
        x = self.embedding(source, context.positions, context.flow, virtual=virtual)
        x, _ = self.encoder(x, context, plan.width, plan.widen_at)
        return self.encoder.finish(x)

    def _add_relative_scores(self, context: Context, new: int) -> None:
        relative = self.decoder.relative_position
        if relative is None:
            return
        seen = context.cache.length if context.cache is not None else new
        if context.causal:
            end = torch.full((1, seen), seen, device=context.positions.device)
            context.mask, context.causal = visibility(end, new), False
        context.relative, context.scores = relative, relative(new, seen)
