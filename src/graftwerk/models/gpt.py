"""The decoder-only model: GPT-2, LLaMA and their kin by `TransformerConfig` alone."""

from dataclasses import replace

from torch import Tensor

from graftwerk.adapters.slots import Flow, Record
from graftwerk.models.base import Transformer, decoder_context, with_virtual
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.layers import Layers


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
        task_ids: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: [B, S] ids.
            positions: [B, S]; None: 0 to S-1, or on from what the cache holds.
            end: [B, S]; query i sees key j iff `j <= i < end[b, j]`, with i and j counted from the
                cache's first token. None: plain causal rows.
            cache: keys and values of earlier tokens; it takes up the new ones.
            select: [N] flat indices into B*S: only these positions reach the final norm and the
                output layer.
            task_ids: [B] the child of a `MultiTask` for each row.
            record: takes up what adapters say of themselves (`adapters.slots.Record`).

        Returns:
            [B, S, V], or [N, V] under `select`. Under an active `Parallel` of n children the batch
            is n*B rows, child after child, and `select` holds for each child: n*N rows.
        """
        x, flow = self._run(tokens, positions, end, cache, task_ids, record)
        if self.reads_words(flow):
            return self.words(self.word_states(self.decoder.finish(x), flow, select))
        return self.logits(self.decoder.finish(self.selected(x, select)))

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
        x, _ = self._run(tokens, positions, end, None, task_ids, record)
        return self.decoder.finish(x)

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        end: Tensor | None,
        cache: KeyValueCache | None,
        task_ids: Tensor | None,
        record: Record | None,
    ) -> tuple[Tensor, Flow]:
        """States of the row's own tokens behind the last layer, and what slots were told."""
        plan, held = self.plan, cache.length if cache is not None else 0
        virtual = plan.virtual_tokens
        if virtual or plan.shift:
            arguments = with_virtual(virtual, plan.shift, tokens, positions, end, None, held)
            tokens, positions, end, _ = arguments
        columns = 0 if held else virtual
        context = decoder_context(self.config, self.dtype, tokens, positions, end, cache)
        context.flow = self.flow(task_ids, record, cache and cache.rows, held - virtual)
        if plan.widen_at == -1:
            tokens = tokens.repeat(plan.width, 1)
            context = context.widened(plan.width)
        x = self.embedding(tokens, context.positions, context.flow, virtual=columns)
        x, context = self.decoder(x, context, plan.width, plan.widen_at)
        return x[:, columns:], replace(context.flow, offset=context.flow.offset + columns)
