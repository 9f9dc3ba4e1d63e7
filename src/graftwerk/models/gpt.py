"""The decoder-only model: GPT-2, LLaMA and their kin by `TransformerConfig` alone."""

import math

import torch
from torch import Tensor, nn

from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import Site, Slot
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.layers import (
    Context,
    TransformerLayer,
    make_norm,
    rotary_angles,
    visibility,
)


class Embedding(nn.Module):
    """Word embeddings, learned positions where the model has them, and the embeddings' slot."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = None
        if config.position_embedding_type == "learned_absolute":
            self.position_embeddings = nn.Embedding(
                config.max_position_embeddings, config.hidden_size
            )
        self.output = Slot(Site("embedding", -1, config.hidden_size, config.hidden_size))
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [B, S] and positions [B or 1, S] -> [B, S, h]."""
        x = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        return self.dropout(self.output(x, positions=positions))


class Decoder(nn.Module):
    """The layers and the norm behind the last."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config, i) for i in range(config.num_layers))
        self.final_layernorm = make_norm(config)


class GPT(AdapterModel):
    """A GPT with slots. Weights are random until a checkpoint is read into it."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.decoder = Decoder(config)
        self.output_layer = None
        if not config.share_embeddings_and_output_weights:
            self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

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
        context = self.context(tokens, positions, end, cache)
        if self.widen_at == -1:
            tokens = tokens.repeat(self.width, 1)
            context.widen(self.width)
        x = self.embedding(tokens, context.positions)
        for index, layer in enumerate(self.decoder.layers):
            if index == self.widen_at:
                x = x.repeat(self.width, 1, 1)
                context.widen(self.width)
            x = layer(x, context)
        if select is not None:
            x = x.view(self.width, -1, x.shape[-1])[:, select].flatten(0, 1)
        return self.logits(x)

    def context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        end: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Context:
        """Positions, mask and rotary angles of one forward pass; arguments as in `forward`."""
        batch, new = tokens.shape
        past = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device)[None]
        if cache is not None:
            cache.extend_end(end, batch, new, tokens.device)
            end = cache.end
        mask = None
        if end is not None:
            mask = visibility(end, new)
        elif past and new > 1:
            forever = torch.full((1, past + new), past + new, device=tokens.device)
            mask = visibility(forever, new)
        rotary = None
        if self.config.position_embedding_type == "rope":
            rotary = rotary_angles(positions, self.config, self.dtype)
        causal = mask is None and new > 1
        return Context(mask, causal, positions, rotary, cache)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states behind the last layer [..., h] -> logits [..., V]."""
        x = self.decoder.final_layernorm(x)
        if self.output_layer is not None:
            return self.output_layer(x)
        return nn.functional.linear(x, self.embedding.word_embeddings.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base's weights."""
        return self.embedding.word_embeddings.weight.dtype

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random weights for training from scratch (GPT-2, Radford et al. 2019, section 2.3).

        Normal with `init_method_std`, divided by sqrt(2 layers) where a sublayer joins the
        residual stream; biases zero, norms one.
        """
        std = self.config.init_method_std
        joining = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                joins = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                parameter.normal_(0.0, joining if joins else std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
