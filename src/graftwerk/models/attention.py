"""Attention of a layer, to its own tokens and to encoder states, with its slots.

Shapes: B batch, S new tokens, K tokens seen (S and those in the cache), E encoder states,
h hidden_size, d head size. Sizes that tensor parallelism splits are read off the weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.slots import Flow, PrefixSlot, Rows, Site, Slot, Split
from graftwerk.models.config import TransformerConfig
from graftwerk.models.context import Context, hide
from graftwerk.models.norms import RMSNorm
from graftwerk.models.positions import RelativePosition, rotate


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
            self.query_layernorm = RMSNorm(self.head_size, eps=config.layernorm_epsilon)
            self.key_layernorm = RMSNorm(self.head_size, eps=config.layernorm_epsilon)

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
        unplaced = context.relative is not None and flow.unplaced  # mostly empty: no layer's own
        placed = not unplaced or self.prefix.site.layer not in unplaced
        mask, causal = context.seen(self.windowed) if placed else (context.mask, context.causal)
        if self.prefix.asks in flow.actions:
            relative = context.relative if placed else None
            key, value, mask = put_prefix(self.prefix, flow, x, key, value, mask, causal, relative)
            causal = False
        elif context.blocks is not None and (seen := context.blocks.of(self.windowed)) is not None:
            return context.blocks.attend(query, key, value, seen, self.scale)
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
        flow, mask, blocks = context.flow, context.states_mask, context.states_blocks
        if self.prefix.asks in flow.actions:
            key, value, mask = put_prefix(self.prefix, flow, x, key, value, mask, causal=False)
        elif blocks is not None and blocks.whole is not None:
            return blocks.attend(query, key, value, blocks.whole, self.scale)
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
        there = torch.ones(1, 1, length, device=key.device).bool() if seen is None else seen
        place = None if flow.texts is None else flow.texts.place
        scores = relative.with_prefix(x.shape[1], held, there, flow.distances, place)
        mask = scores.masked_fill(F.pad(mask.isneginf(), (length, 0)), float("-inf"))
    elif mask is not None:
        mask = F.pad(mask, (length, 0), value=1 if mask.dtype == torch.bool else 0)
    if seen is not None:
        assert mask is not None
        shown = F.pad(seen, (0, held), value=True)[:, None]
        mask = mask & shown if mask.dtype == torch.bool else hide(mask, shown)
    return torch.cat([rows[:, :, 0], key], 1), torch.cat([rows[:, :, 1], value], 1), mask


def attention_scale(config: TransformerConfig, layer: int) -> float:
    """What scores are multiplied with before the softmax."""
    scale = config.kv_channels**-0.5 if config.normalize_attention_scores else 1.0
    return scale / (layer + 1) if config.scale_by_layer else scale
