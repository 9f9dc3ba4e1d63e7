"""The one transformer layer that builds every model, with its slots.

Shapes: B batch, S new tokens, K tokens seen (S and those in the cache), E encoder states,
h hidden_size, d head size. Nothing here knows of parallelism: sizes that tensor parallelism splits
are read off the weights.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.slots import (
    Flow,
    JoinSlot,
    LayerSlot,
    PrefixSlot,
    Rows,
    Site,
    Slot,
    Split,
    widen,
)
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.positions import FAR, RelativePosition, neighbours, rotate, runs_of

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


@dataclass
class Context:
    """What all layers of one forward pass share.

    `mask` [B or 1, 1, S, K] is True where a query sees a key; None: plain causal attention if
    `causal`, else everything is seen. `window_mask` is that of layers with a window, None where no
    text is longer. `scores` [1, heads, S, K] are added before the softmax (relative positions).
    `positions` [B or 1, S]. `rotary` is (cos, sin), each [B or 1, S, 1, rotary size]. `cache` holds
    keys and values between passes. `states` [B, E, h] are the encoder's, seen where `states_mask`
    [B, 1, 1 or S, E] is True. `flow` is what slots are told, `source_flow` those that read encoder
    states. `relative` is the table that made `scores`. `documents` [B, tokens] or `end` [B, K] say
    which text each token is of, as in the models' arguments; neither: a row is one. `runs` are the
    columns of all rows, one row after the other, in runs that do not see each other: how many, and
    the mask within them, None where it is plain causal; None: rows are not taken apart.
    """

    positions: Tensor
    flow: Flow = field(default_factory=Flow)
    source_flow: Flow = field(default_factory=Flow)
    mask: Tensor | None = None
    causal: bool = False
    window_mask: Tensor | None = None
    scores: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    cache: KeyValueCache | None = None
    states: Tensor | None = None
    states_mask: Tensor | None = None
    relative: RelativePosition | None = None
    documents: Tensor | None = None
    end: Tensor | None = None
    runs: list[tuple[int, Tensor | None]] | None = None

    def widened(self, n: int) -> "Context":
        """The context of a batch that is repeated `n` times.

        Another object: gradient checkpointing runs the layers below a second time, with theirs.
        """
        positions = widen(self.positions, n)
        assert positions is not None
        rotary = self.rotary
        if rotary is not None and rotary[0].shape[0] > 1:
            rotary = torch.cat([rotary[0]] * n), torch.cat([rotary[1]] * n)
        return replace(
            self,
            positions=positions,
            flow=widened(self.flow, n),
            source_flow=widened(self.source_flow, n),
            mask=widen(self.mask, n),
            window_mask=widen(self.window_mask, n),
            rotary=rotary,
            states=repeated(self.states, n),
            states_mask=widen(self.states_mask, n),
            documents=widen(self.documents, n),
            end=widen(self.end, n),
            runs=None if self.runs is None else self.runs * n,
        )

    def seen(self, windowed: bool) -> tuple[Tensor | None, bool]:
        """What `scaled_dot_product_attention` is given: the mask (or scores), and `is_causal`."""
        mask, causal = self.mask, self.causal
        if windowed and self.window_mask is not None:
            mask, causal = self.window_mask, False
        if self.scores is not None:
            assert not causal, "scores come with a mask"
            return (self.scores if mask is None else _masked(self.scores, mask)), False
        return mask, causal

    def neighbours(self, columns: int) -> tuple[Tensor, Tensor]:
        """How many tokens of its text stand before and behind what is in each of the last columns,
        both [B or 1, columns]; virtual tokens are far from any."""
        tokens = self.flow.offset + columns
        if self.documents is not None:
            texts = self.documents
        elif self.end is not None:
            index = torch.arange(self.end.shape[1], device=self.end.device)
            texts = self.end.masked_fill(self.end <= index, -1)[:, len(index) - tokens :]
        else:
            texts = torch.zeros(1, tokens, dtype=torch.int64, device=self.positions.device)
        before, behind = neighbours(texts)
        ahead = max(columns - tokens, 0)
        before = F.pad(before, (ahead, 0), value=FAR)[:, -columns:]
        behind = F.pad(behind, (ahead, 0), value=FAR)[:, -columns:]
        if self.documents is None and self.end is not None and self.mask is not None:
            # In a tree a text's tokens do not stand together: those before one are what it sees.
            virtual = self.mask.shape[3] - columns - self.flow.offset
            depth = self.mask[:, 0].sum(-1) - 1 - virtual
            before = depth.masked_fill(depth < 0, FAR)
        return before, behind


def runs_within(end: Tensor, mask: Tensor) -> list[tuple[int, Tensor | None]] | None:
    """A context's `runs`, by `end` [B, S] and its mask; None where that takes nothing apart."""
    runs = runs_of(end)
    if len(runs) == len(end):
        return None
    found: list[tuple[int, Tensor | None]] = []
    for row, start, stop in runs:
        chain = bool((end[row, start:stop] >= stop).all())
        within = mask[row : row + 1, :, start:stop, start:stop]
        found.append((stop - start, None if chain else within))
    return found


def widened(flow: Flow, n: int) -> Flow:
    """What slots are told of a batch that is repeated `n` times."""
    return flow.of(lambda tensor: repeated(tensor, n))


def repeated(tensor: Tensor | None, n: int) -> Tensor | None:
    """`n` copies of a tensor, one after the other."""
    return None if tensor is None else torch.cat([tensor] * n)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, float("-inf"))


class LayerNorm1P(nn.LayerNorm):
    """Layer norm whose weight is stored less one (NeMo's `layernorm1p`)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def make_norm(config: TransformerConfig) -> nn.Module:
    """The normalization that the config names."""
    norms = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm, "layernorm1p": LayerNorm1P}
    return norms[config.normalization](config.hidden_size, eps=config.layernorm_epsilon)


class Attention(nn.Module):
    """Self-attention with grouped queries; its context says who sees whom.

    `linear_qkv` holds, for each query group, the rows of its query heads, then its key, then its
    value (Megatron's order): [(heads + 2 groups) d, h]. `number` is the layer's among all of the
    model, `layer` that among its stack.
    """

    def __init__(self, config: TransformerConfig, layer: int, number: int, stack: str):
        super().__init__()
        self.layer = layer
        self.head_size = config.kv_channels
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.dropout = config.attention_dropout
        self.scale = attention_scale(config, layer)
        self.rotary_interleaved = config.rotary_interleaved
        windows = config.window_layers
        self.windowed = config.window_size > 0 and (windows is None or layer in windows)
        hidden, query, key = config.hidden_size, config.query_size, config.key_size
        self.linear_qkv = nn.Linear(hidden, query + 2 * key, bias=config.qkv_bias)
        self.linear_proj = nn.Linear(query, hidden, bias=config.bias)
        self.query_layernorm = self.key_layernorm = None
        if config.qk_layernorm:
            self.query_layernorm = nn.RMSNorm(self.head_size, eps=config.layernorm_epsilon)
            self.key_layernorm = nn.RMSNorm(self.head_size, eps=config.layernorm_epsilon)

        def slot(name: str, inputs: int, outputs: int, rows: Rows, split: Split = "column") -> Slot:
            return Slot(Site(name, number, inputs, outputs, split, stack=stack, rows=rows))

        heads = self.heads_per_group
        group = (-1, heads + 2, self.head_size)
        keys = Rows("linear_qkv", group, heads, heads + 1)
        values = Rows("linear_qkv", group, heads + 1, heads + 2)
        self.qkv = slot("qkv", hidden, query + 2 * key, Rows("linear_qkv"))
        self.query = slot("query", hidden, query, Rows("linear_qkv", group, 0, heads))
        self.key = slot("key", hidden, key, keys)
        self.value = slot("value", hidden, key, values)
        self.keys = slot("keys", key, key, keys)
        self.values = slot("values", key, key, values)
        self.prefix = PrefixSlot(Site("prefix", number, hidden, 2 * key, "column", 2, stack))
        self.output = slot("output", query, hidden, Rows("linear_proj"), "row")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        flow = context.flow
        query, key, value = self.project(x, flow)
        key, value = self.keys(key, flow), self.values(value, flow)
        query = query.unflatten(-1, (-1, self.head_size))
        key = key.unflatten(-1, (-1, self.head_size))
        value = value.unflatten(-1, (-1, self.head_size))
        if self.query_layernorm is not None and self.key_layernorm is not None:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        if context.rotary is not None:
            query = rotate(query, context.rotary, self.rotary_interleaved)
            key = rotate(key, context.rotary, self.rotary_interleaved)
        cache = context.cache
        if cache is not None:
            query = cache.spread(query)
            key, value = cache.extend(self.layer, cache.spread(key), cache.spread(value))
        attended = self.attend(query, key, value, x, context)
        if cache is not None:
            attended = cache.gather(attended)
        return self.output(self.linear_proj(attended), flow, attended)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, context: Context
    ) -> Tensor:
        """Queries [B, S, heads, d] over keys and values [B, K, groups, d] -> [B, S, heads d].

        A prefix, which may be made from what goes into the attention, x [B, S, h], is seen too.
        """
        flow = context.flow
        placed = context.relative is None or self.prefix.site.layer not in flow.unplaced
        mask, causal = context.seen(self.windowed) if placed else (context.mask, context.causal)
        if self.prefix.key in flow.actions:
            relative = context.relative if placed else None
            key, value, mask = put_prefix(self.prefix, flow, x, key, value, mask, causal, relative)
            causal = False
        elif context.runs is not None and mask is context.mask:
            return self._attend_runs(query, key, value, context.runs)
        return self._attend(query, key, value, mask, causal)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=self.heads_per_group > 1,
        )
        return attended.transpose(1, 2).flatten(2)

    def _attend_runs(
        self, query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, Tensor | None]]
    ) -> Tensor:
        """Each run by itself: what runs would see of each other is not computed."""
        sizes = [size for size, _ in runs]
        parts = zip(*(x.flatten(0, 1).split(sizes) for x in (query, key, value)), runs, strict=True)
        attended = [
            self._attend(q[None], k[None], v[None], mask, mask is None)
            for q, k, v, (_, mask) in parts
        ]
        return torch.cat(attended, 1).view(*query.shape[:2], -1)

    def project(self, x: Tensor, flow: Flow) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, h] -> queries [B, S, heads d], keys and values [B, S, groups d]."""
        fused = self.qkv(self.linear_qkv(x), flow, x)
        fused = fused.unflatten(-1, (-1, self.heads_per_group + 2, self.head_size))
        query, key, value = fused.split([self.heads_per_group, 1, 1], dim=3)
        return (
            self.query(query.flatten(2), flow, x),
            self.key(key.flatten(2), flow, x),
            self.value(value.flatten(2), flow, x),
        )


class CrossAttention(nn.Module):
    """Attention of a decoder to encoder states.

    `linear_q` [heads d, h]; `linear_kv` holds each group's key, then its value: [2 groups d, h].
    """

    def __init__(self, config: TransformerConfig, layer: int, number: int, stack: str):
        super().__init__()
        self.layer = layer
        self.head_size = config.kv_channels
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.dropout = config.attention_dropout
        self.scale = attention_scale(config, layer)
        hidden, query, key = config.hidden_size, config.query_size, config.key_size
        self.linear_q = nn.Linear(hidden, query, bias=config.qkv_bias)
        self.linear_kv = nn.Linear(hidden, 2 * key, bias=config.qkv_bias)
        self.linear_proj = nn.Linear(query, hidden, bias=config.bias)

        def slot(name: str, inputs: int, outputs: int, rows: Rows, split: Split = "column") -> Slot:
            return Slot(Site(name, number, inputs, outputs, split, stack=stack, rows=rows))

        keys = Rows("linear_kv", (-1, 2, self.head_size), 0, 1)
        values = Rows("linear_kv", (-1, 2, self.head_size), 1, 2)
        self.query = slot("cross_query", hidden, query, Rows("linear_q"))
        self.key = slot("cross_key", hidden, key, keys)
        self.value = slot("cross_value", hidden, key, values)
        self.keys = slot("cross_keys", key, key, keys)
        self.values = slot("cross_values", key, key, values)
        self.prefix = PrefixSlot(Site("cross_prefix", number, hidden, 2 * key, "column", 2, stack))
        self.output = slot("cross_output", query, hidden, Rows("linear_proj"), "row")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        flow = context.flow
        query = self.query(self.linear_q(x), flow, x).unflatten(-1, (-1, self.head_size))
        cache = context.cache
        held = None if cache is None else cache.cross[self.layer]
        if held is None:
            assert context.states is not None, "encoder states are given, or in the cache"
            held = self.project(context.states, context.source_flow)
            if cache is not None:
                cache.cross[self.layer] = held
        attended = self.attend(query, *held, x, context)
        return self.output(self.linear_proj(attended), flow, attended)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, context: Context
    ) -> Tensor:
        """As in `Attention`, over the keys and values of encoder states."""
        flow, mask = context.flow, context.states_mask
        if self.prefix.key in flow.actions:
            key, value, mask = put_prefix(self.prefix, flow, x, key, value, mask, causal=False)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=self.heads_per_group > 1,
        )
        return attended.transpose(1, 2).flatten(2)

    def project(self, states: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
        """Encoder states [B, E, h] -> keys and values, each [B, E, groups, d]."""
        key, value = self.linear_kv(states).unflatten(-1, (-1, 2, self.head_size)).unbind(3)
        key = self.keys(self.key(key.flatten(2), flow, states), flow)
        value = self.values(self.value(value.flatten(2), flow, states), flow)
        return key.unflatten(-1, (-1, self.head_size)), value.unflatten(-1, (-1, self.head_size))


def put_prefix(
    slot: PrefixSlot,
    flow: Flow,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    relative: RelativePosition | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, K, groups, d] with the slot's before them, and a mask that shows them.

    x [B, S, h] is what goes into the attention. The mask holds the scores of `relative`, if that is
    given: they are made anew.
    """
    batch, held, groups, size = key.shape
    made = slot.rows(key.new_empty(batch, 0, 2 * groups * size), flow, x)
    assert made is not None
    rows, seen = made
    length = rows.shape[1]
    rows = rows.unflatten(-1, (2, groups, size))
    if causal:
        mask = torch.ones(held, held, dtype=torch.bool, device=key.device).tril()
    if mask is None and seen is not None:
        mask = torch.ones(1, held, dtype=torch.bool, device=key.device)
    if relative is not None:
        assert mask is not None
        there = torch.ones(1, length, device=key.device).bool() if seen is None else seen
        scores = relative.with_prefix(x.shape[1], held, there, flow.distances)
        mask = scores.masked_fill(F.pad(mask.isneginf(), (length, 0)), float("-inf"))
    elif mask is not None:
        mask = F.pad(mask, (length, 0), value=1 if mask.dtype == torch.bool else 0)
    if seen is not None:
        assert mask is not None
        shown = F.pad(seen, (0, held), value=True)[:, None, None]
        mask = mask & shown if mask.dtype == torch.bool else _masked(mask, shown)
    return torch.cat([rows[:, :, 0], key], 1), torch.cat([rows[:, :, 1], value], 1), mask


def attention_scale(config: TransformerConfig, layer: int) -> float:
    """What scores are multiplied with before the softmax."""
    scale = config.kv_channels**-0.5 if config.normalize_attention_scores else 1.0
    return scale / (layer + 1) if config.scale_by_layer else scale


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
