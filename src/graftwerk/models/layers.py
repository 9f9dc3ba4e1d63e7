"""The one transformer layer that builds every model, with its slots.

Shapes: B batch, S new tokens, h hidden_size. Nothing here knows of parallelism: sizes that tensor
parallelism splits are read off the weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.slots import Flow, JoinSlot, LayerSlot, Rows, Site, Slot
from graftwerk.models.attention import Attention, CrossAttention
from graftwerk.models.config import TransformerConfig
from graftwerk.models.context import Context
from graftwerk.models.norms import make_norm
from graftwerk.models.positions import RelativePosition

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": lambda x: F.relu(x).square(),
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
}


class MLP(nn.Module):
    """`linear_fc2(activation(linear_fc1(x)))`; gated: `linear_fc1` is [gate; up], [2 ffn, h]."""

    def __init__(self, config: TransformerConfig, number: int, stack: str):
        super().__init__()
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        wide = 2 * inner if config.gated else inner
        self.linear_fc1 = nn.Linear(hidden, wide, bias=bool(config.mlp_bias))
        self.linear_fc2 = nn.Linear(inner, hidden, bias=bool(config.mlp_bias))

        def slot(name: str, outputs: int, rows: Rows) -> Slot:
            blocks = outputs // inner
            return Slot(Site(name, number, hidden, outputs, "column", blocks, stack, rows))

        halves = (1, 2, -1)
        self.fc1 = slot("fc1", wide, Rows("linear_fc1"))
        self.gate = self.up = None
        if config.gated:
            self.gate = slot("gate", inner, Rows("linear_fc1", halves, 0, 1))
            self.up = slot("up", inner, Rows("linear_fc1", halves, 1, 2))
        self.inner = Slot(
            Site("mlp_inner", number, inner, inner, "column", stack=stack, feeds="linear_fc2")
        )
        fc2 = Rows("linear_fc2")
        self.fc2 = Slot(Site("fc2", number, inner, hidden, "row", stack=stack, rows=fc2))

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        inner = self.fc1(self.linear_fc1(x), flow, x)
        if self.gate is not None and self.up is not None:
            gate, up = inner.chunk(2, -1)
            inner = self.activation(self.gate(gate, flow, x)) * self.up(up, flow, x)
        else:
            inner = self.activation(inner)
        inner = self.inner(inner, flow, x)
        return self.fc2(self.linear_fc2(inner), flow, inner)


class TransformerLayer(nn.Module):
    """Attention and MLP, each added to the residual stream.

    `pre_ln`: `x + f(norm(x))`; `post_ln`: `norm(x + f(x))`; `parallel_residual`:
    `x + attention(norm(x)) + mlp(norm(x))`. A decoder's layer has cross-attention between the two.
    """

    def __init__(self, config: TransformerConfig, layer: int, number: int, cross: bool, stack: str):
        super().__init__()
        hidden = config.hidden_size
        self.number = number
        self.parallel_residual = config.parallel_residual
        post = config.transformer_block_type == "post_ln"
        self.input_layernorm = None if post else make_norm(config)
        self.self_attention = Attention(config, layer, number, stack)
        self.attention_output = JoinSlot(
            Site("attention_output", number, hidden, hidden, stack=stack)
        )
        self.attention_dropout = Dropout(config.hidden_dropout, self.attention_output.key)
        self.post_attention_layernorm = make_norm(config) if post else None
        self.cross_attention = None
        if cross:
            self.pre_cross_attention_layernorm = make_norm(config)
            self.cross_attention = CrossAttention(config, layer, number, stack)
            self.cross_attention_output = JoinSlot(
                Site("cross_attention_output", number, hidden, hidden, stack=stack)
            )
            key = self.cross_attention_output.key
            self.cross_attention_dropout = Dropout(config.hidden_dropout, key)
        self.pre_mlp_layernorm = None if post or config.shared_layernorm else make_norm(config)
        self.mlp = MLP(config, number, stack)
        self.mlp_output = JoinSlot(Site("mlp_output", number, hidden, hidden, stack=stack))
        self.post_mlp_layernorm = make_norm(config) if post else None
        self.mlp_dropout = Dropout(config.hidden_dropout, self.mlp_output.key)
        self.output = LayerSlot(Site("layer_output", number, hidden, hidden, stack=stack))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        normed = x if self.input_layernorm is None else self.input_layernorm(x)
        residual = x
        x = self.attention_output(
            self.self_attention(normed, context),
            context.flow,
            normed,
            x,
            self.attention_dropout,
            self.post_attention_layernorm,
            self.self_attention.linear_proj.bias,
            context.positions,
        )
        if self.cross_attention is not None:
            x = self._across(x, self.cross_attention, context)
        if self.pre_mlp_layernorm is not None:
            normed = self.pre_mlp_layernorm(residual if self.parallel_residual else x)
        elif self.post_attention_layernorm is not None:
            normed = x
        x = self.mlp_output(
            self.mlp(normed, context.flow),
            context.flow,
            normed,
            x,
            self.mlp_dropout,
            self.post_mlp_layernorm,
            self.mlp.linear_fc2.bias,
            context.positions,
        )
        return self.output(x, context.flow, context.positions, context.neighbours)

    def _across(self, x: Tensor, attention: CrossAttention, context: Context) -> Tensor:
        normed = self.pre_cross_attention_layernorm(x)
        return self.cross_attention_output(
            attention(normed, context),
            context.flow,
            normed,
            x,
            self.cross_attention_dropout,
            bias=attention.linear_proj.bias,
            positions=context.positions,
        )


class Layers(nn.Module):
    """Layers one after the other, the norm behind the last, and the table of their distances.

    `first` is the number of the first layer among all of the model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        count: int,
        first: int = 0,
        cross: bool = False,
        relative_position: RelativePosition | None = None,
        stack: str = "decoder",
    ):
        super().__init__()
        self.relative_position = relative_position
        self.layers = nn.ModuleList(
            TransformerLayer(config, i, first + i, cross, stack) for i in range(count)
        )
        self.final_layernorm = make_norm(config) if config.final_layernorm else None
        self.projection = None
        if config.embedding_size:
            self.projection = nn.Linear(config.hidden_size, config.embedding_size, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Context,
        width: int,
        widen_at: int | None,
        run: range | None = None,
    ) -> tuple[Tensor, Context]:
        """[B, S, h] -> [B, S, h], without what is behind the last layer, and its context.

        Before layer `widen_at` the batch is repeated `width` times. `run`: these layers only.
        """
        for layer in self.layers if run is None else [self.layers[n] for n in run]:
            assert isinstance(layer, TransformerLayer)
            if layer.number == widen_at:
                x = x.repeat(width, 1, 1)
                context = context.widened(width)
            x = layer(x, context)
        return x, context

    def finish(self, x: Tensor) -> Tensor:
        """What is behind the last layer: norm and projection; [..., h] -> [..., h or e]."""
        if self.final_layernorm is not None:
            x = self.final_layernorm(x)
        return x if self.projection is None else self.projection(x)


class Lookup(nn.Embedding):
    """A table of vectors; on the meta device nothing fills it.

    `normal_` there would import torch's compiler, which takes longer than reading a model.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Module):
    """Words, learned positions and token types where the model has them, and the slot behind."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden, words = config.hidden_size, config.embedding_size or config.hidden_size
        self.position_offset = config.position_offset
        self.word_embeddings = Lookup(config.vocab_size, words)
        self.projection = nn.Linear(words, hidden, bias=False) if config.embedding_size else None
        self.position_embeddings = self.token_type_embeddings = self.layernorm = None
        if config.position_embedding_type == "learned_absolute":
            rows = config.max_position_embeddings + config.position_offset
            self.position_embeddings = Lookup(rows, hidden)
        if config.num_token_types:
            self.token_type_embeddings = Lookup(config.num_token_types, hidden)
        if config.embedding_layernorm:
            self.layernorm = make_norm(config)
        stack = "decoder" if config.architecture == "gpt" else "encoder"  # a T5's are its encoder's
        self.words = Slot(Site("word_embedding", -1, hidden, hidden, stack=stack))
        self.output = Slot(Site("embedding", -1, hidden, hidden, stack=stack))
        self.dropout = Dropout(config.embedding_dropout, "embedding")

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        flow: Flow,
        types: Tensor | None = None,
        virtual: int = 0,
    ) -> Tensor:
        """Tokens [B, S], positions [B or 1, S] and token types [B, S] or None (0) -> [B, S, h].

        The first `virtual` columns are for prompts to fill.
        """
        x = self.word_embeddings(tokens)
        if self.projection is not None:
            x = self.projection(x)
        x = self.words(x, flow, virtual=virtual)
        if self.token_type_embeddings is not None:
            if types is None:
                types = torch.zeros_like(tokens)
            x = x + self.token_type_embeddings(types)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions + self.position_offset)
        if self.layernorm is not None:
            x = self.layernorm(x)
        return self.dropout(self.output(x, flow, positions=positions, virtual=virtual), flow)
