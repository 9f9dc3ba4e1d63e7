"""The decoder-only model: GPT-2, LLaMA and their kin by `TransformerConfig` alone."""

from torch import Tensor

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

        Returns:
            [B, S, V], or [N, V] under `select`. Under an active `Parallel` of n children the batch
            is n*B rows, child after child, and `select` holds for each child: n*N rows.
        """
        virtual = self.virtual_tokens
        first = cache is None or not cache.length
        if virtual:
            arguments = with_virtual(virtual, tokens, positions, end, select, first)
            tokens, positions, end, select = arguments
        columns = virtual if first else 0
        context = decoder_context(self.config, self.dtype, tokens, positions, end, cache)
        if self.widen_at == -1:
            tokens = tokens.repeat(self.width, 1)
            context.widen(self.width)
        x = self.embedding(tokens, context.positions, virtual=columns)
        x = self.decoder(x, context, self.width, self.widen_at)
        x = x[:, columns:] if select is None else self.selected(x, select)
        return self.logits(self.decoder.finish(x))
