"""The one transformer layer that builds every model, with its slots.

Shapes: B batch, S new tokens, K tokens seen (S and those in the cache), h hidden_size, d head size,
G query groups, q query heads a group. Nothing here knows of parallelism: sizes that tensor
parallelism splits are read off the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.slots import Site, Slot, Split, widen
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
}


@dataclass
class Context:
    """What all layers of one forward pass share.

    `mask` [B or 1, 1, S, K] is True where a query sees a key; None: plain causal attention if
    `causal`, else everything is seen. `rotary` is (cos, sin), each [B or 1, S, 1, d]. `positions`
    [B or 1, S]. `cache` holds keys and values between passes.
    """

    mask: Tensor | None
    causal: bool
    positions: Tensor
    rotary: tuple[Tensor, Tensor] | None
    cache: KeyValueCache | None

    def widen(self, n: int) -> None:
        """Makes it fit a batch that is repeated `n` times."""
        self.mask = widen(self.mask, n)
        positions = widen(self.positions, n)
        assert positions is not None
        self.positions = positions
        if self.rotary is not None and self.rotary[0].shape[0] > 1:
            cos, sin = self.rotary
            self.rotary = torch.cat([cos] * n), torch.cat([sin] * n)


def make_norm(config: TransformerConfig) -> nn.Module:
    """The normalization that the config names."""
    if config.normalization == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


def rotary_angles(positions: Tensor, config: TransformerConfig, dtype: torch.dtype):
    """(cos, sin) of rotary positions, halves split (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Positions [B or 1, S] give [B or 1, S, 1, d]; computed in float32.
    """
    size = config.kv_channels
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / config.rotary_base ** (steps / size)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns [B, S, heads, d] by the angles of its positions."""
    cos, sin = rotary
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def visibility(end: Tensor, queries: int) -> Tensor:
    """The mask [B, 1, S, K] in which query i sees key j iff `j <= i < end[j]`; end [B, K].

    The queries are the last of the K tokens.
    """
    seen = end.shape[1]
    index = torch.arange(seen, device=end.device)
    query = index[seen - queries :, None]
    return ((index <= query) & (query < end[:, None, :]))[:, None]


class Attention(nn.Module):
    """Causal self-attention with grouped queries.

    `linear_qkv` holds, for each query group, the rows of its q heads, then its key, then its value
    (Megatron's order): [(heads + 2 groups) d, h].
    """

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_size = config.kv_channels
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.dropout = config.attention_dropout
        hidden, query, key = config.hidden_size, config.query_size, config.key_size
        self.linear_qkv = nn.Linear(hidden, query + 2 * key, bias=config.qkv_bias)
        self.linear_proj = nn.Linear(query, hidden, bias=config.bias)

        def slot(name: str, inputs: int, outputs: int, split: Split = "column") -> Slot:
            return Slot(Site(name, layer, inputs, outputs, split))

        self.qkv = slot("qkv", hidden, query + 2 * key)
        self.query = slot("query", hidden, query)
        self.key = slot("key", hidden, key)
        self.value = slot("value", hidden, key)
        self.keys = slot("keys", key, key)
        self.values = slot("values", key, key)
        self.output = slot("output", query, hidden, "row")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        query, key, value = self.project(x)
        key, value = self.keys(key), self.values(value)
        query = query.unflatten(-1, (-1, self.head_size))
        key = key.unflatten(-1, (-1, self.head_size))
        value = value.unflatten(-1, (-1, self.head_size))
        if context.rotary is not None:
            query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        if context.cache is not None:
            key, value = context.cache.extend(self.layer, key, value)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=context.mask,
            is_causal=context.causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads_per_group > 1,
        )
        attended = attended.transpose(1, 2).flatten(2)
        return self.output(self.linear_proj(attended), input=attended)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, h] -> queries [B, S, heads d], keys and values [B, S, groups d]."""
        fused = self.qkv(self.linear_qkv(x), input=x)
        fused = fused.unflatten(-1, (-1, self.heads_per_group + 2, self.head_size))
        query, key, value = fused.split([self.heads_per_group, 1, 1], dim=3)
        return (
            self.query(query.flatten(2), input=x),
            self.key(key.flatten(2), input=x),
            self.value(value.flatten(2), input=x),
        )


class MLP(nn.Module):
    """`linear_fc2(activation(linear_fc1(x)))`; gated: `linear_fc1` is [gate; up], [2 ffn, h]."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        wide = 2 * inner if config.gated else inner
        self.linear_fc1 = nn.Linear(hidden, wide, bias=config.bias)
        self.linear_fc2 = nn.Linear(inner, hidden, bias=config.bias)
        self.fc1 = Slot(Site("fc1", layer, hidden, wide, "column", wide // inner))
        self.gate = Slot(Site("gate", layer, hidden, inner, "column")) if config.gated else None
        self.up = Slot(Site("up", layer, hidden, inner, "column")) if config.gated else None
        self.inner = Slot(Site("mlp_inner", layer, inner, inner, "column"))
        self.fc2 = Slot(Site("fc2", layer, inner, hidden, "row"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        inner = self.fc1(self.linear_fc1(x), input=x)
        if self.gate is not None and self.up is not None:
            gate, up = inner.chunk(2, -1)
            inner = self.activation(self.gate(gate, input=x)) * self.up(up, input=x)
        else:
            inner = self.activation(inner)
        inner = self.inner(inner, input=x)
        return self.fc2(self.linear_fc2(inner), input=inner)


class TransformerLayer(nn.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        hidden = config.hidden_size
        self.input_layernorm = make_norm(config)
        self.self_attention = Attention(config, layer)
        self.attention_output = Slot(Site("attention_output", layer, hidden, hidden))
        self.pre_mlp_layernorm = make_norm(config)
        self.mlp = MLP(config, layer)
        self.mlp_output = Slot(Site("mlp_output", layer, hidden, hidden))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        normed = self.input_layernorm(x)
        attended = self.self_attention(normed, context)
        attended = self.attention_output(
            attended,
            input=normed,
            residual=x,
            bias=self.self_attention.linear_proj.bias,
            positions=context.positions,
        )
        x = x + self.dropout(attended)
        normed = self.pre_mlp_layernorm(x)
        changed = self.mlp_output(
            self.mlp(normed),
            input=normed,
            residual=x,
            bias=self.mlp.linear_fc2.bias,
            positions=context.positions,
        )
        return x + self.dropout(changed)
