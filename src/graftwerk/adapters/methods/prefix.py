"""Prefix tuning: trained keys and values before those of every attention.

Li and Liang 2021, arXiv:2101.00190. With `reparametrise` (their section 4.3) a network that all
layers share makes them; its last projection is each layer's own.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.methods.activations import ACTIVATIONS, check_activation
from graftwerk.adapters.methods.gate import Gate, note_gate
from graftwerk.adapters.part import Layout, MethodSettings, Part, PartLinear, share_parameters
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.adapters.texts import Texts
from graftwerk.errors import UserError

KEY = "model.peft.prefix_tuning."
Relative = Literal["none", "keys", "both"]


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(MethodSettings):
    """`prefix_length` p keys and values a layer.

    h is the hidden size, kv the features of all keys, b the bottleneck. Parameters: without
    `reparametrise` 2 p kv a layer; with it p h + h b + b once for all layers, and 2 kv (b + 1) a
    layer. A gate has h + 1 more a layer, 2 (h + 1) where keys and values have one each.

    Args:
        dropout: of the rows, for each example apart, in training.
        init_std: deviation of what the network reads at birth; without it, of the rows.
        cross_prefix, encoder_prefix: before what a T5's decoder sees of the source, and in its
            encoder. One of the decoder's own attention there always is.
        use_gating: the rows are multiplied with a scalar for each example, of what goes into the
            attention; `shared_gating` False: keys and values with one each.
        non_linearity: the network's, by AdapterHub's names.
        shifts_positions: the row's own tokens stand behind the prefix (peft); False: the prefix
            has no positions.
        relative_positions: what a T5's table of distances says of it. `none`: nothing. `keys`
            (AdapterHub): keys move back by p and queries do not. `both` (peft): both do.
    """

    prefix_length: int = 30
    bottleneck_dim: int = 512
    reparametrise: bool = True
    dropout: float = 0.0
    init_std: float = 0.02
    cross_prefix: bool = True
    encoder_prefix: bool = True
    use_gating: bool = False
    shared_gating: bool = True
    non_linearity: str = "tanh"
    shifts_positions: bool = False
    relative_positions: Relative = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("prefix_length", "bottleneck_dim"):
            if getattr(self, key) < 1:
                raise UserError(f"{KEY}{key}={getattr(self, key)}: at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{KEY}dropout={self.dropout}: must be from 0 up to below 1")
        if self.init_std < 0:
            raise UserError(f"{KEY}init_std={self.init_std}: must not be negative")
        if self.relative_positions not in ("none", "keys", "both"):
            raise UserError(
                f"{KEY}relative_positions={self.relative_positions!r}: use none, keys or both"
            )
        check_activation(self.non_linearity, f"{KEY}non_linearity")

    @property
    def shift(self) -> int:
        return self.prefix_length if self.shifts_positions else 0

    @property
    def distances(self) -> str | None:
        return self.relative_positions

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        wanted = {
            "prefix": self.encoder_prefix or site.stack != "encoder",
            "cross_prefix": self.cross_prefix,
        }
        return Prefix(site, self) if wanted.get(site.name, False) else None

    def tie(self, parts: list[tuple[Site, Part]]) -> None:
        super().tie(parts)
        first: dict[str, Part] = {}
        for site, part in parts:  # one network for all layers of a kind
            owner = first.setdefault(f"{site.name} {site.stack}", part)
            if self.reparametrise and owner is not part:
                share_parameters(owner.get_submodule("encoder"), part.get_submodule("encoder"))
        for _, part in parts:  # a BERT's encoder is all that it has
            if isinstance(part, Prefix) and all(site.stack == "encoder" for site, _ in parts):
                part.place_name = "self_prefix"


class Encoder(nn.Module):
    """What all layers share: p vectors of the hidden size through a linear layer and a function."""

    def __init__(self, hidden_size: int, config: PrefixTuningConfig):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.prefix_length, hidden_size))
        nn.init.normal_(self.embedding, std=config.init_std)
        self.linear_in = nn.Linear(hidden_size, config.bottleneck_dim)
        self.function = ACTIVATIONS[config.non_linearity.lower()]

    def forward(self) -> Tensor:
        """[p, b]."""
        return self.function(self.linear_in(self.embedding))


class Prefix(Part):
    """Puts p rows [key; value] of 2 kv features before those that are there already."""

    unsuited: ClassVar[dict[str, str]] = {
        "Split": "a prefix stands before all tokens of a row",
        "Average": "prefixes are rows of their own, which have no mean",
    }

    def __init__(self, site: Site, config: PrefixTuningConfig):
        super().__init__()
        self.place_name = f"{_KINDS[site.name, site.stack]}_prefix"
        self.dropout = Dropout(config.dropout)
        self.encoder = self.linear_out = self.gate = None
        if config.reparametrise:
            self.encoder = Encoder(site.in_features, config)
            self.linear_out = PartLinear(config.bottleneck_dim, site.out_features)
        else:
            self.rows = nn.Parameter(torch.empty(config.prefix_length, site.out_features))
            nn.init.normal_(self.rows, std=config.init_std)
        if config.use_gating:
            self.gate = Gate(site.in_features, 1 if config.shared_gating else 2)
            self.whole_row = self.whole_text = True

    def made(self) -> Tensor:
        """The rows, [p, 2 kv]."""
        if self.encoder is not None and self.linear_out is not None:
            return self.linear_out(self.encoder())
        return self.rows

    def forward(self, call: SlotCall) -> Tensor:
        rows = self.made().to(call.output.dtype)
        rows = self.dropout(rows.expand(call.output.shape[0], -1, -1), call.flow, first=0)
        if self.gate is not None and call.flow.texts is not None:
            return self._of_each_text(call, rows, call.flow.texts)
        if self.gate is not None:
            rows = rows * self._factors(call)
        if call.seen is not None:
            call.seen = F.pad(call.seen, (rows.shape[1], 0), value=True)
        return torch.cat([rows, call.output], 1)

    def _of_each_text(self, call: SlotCall, rows: Tensor, texts: Texts) -> Tensor:
        """Rows for each text of packed rows, by its own gate; no other text sees them."""
        own = texts.members()
        first = own.int().argmax(1)[..., None]  # a column of each text: they have one gate
        factors = self._factors(call)
        factors = factors.gather(1, first.expand(-1, -1, factors.shape[2]))
        each = (rows[:, None] * factors[:, :, None]).flatten(1, 2)
        seen = own.repeat_interleave(rows.shape[1], 2)
        others = call.output.shape[1]
        if others:
            before = seen.new_ones(1, 1, 1) if call.seen is None else call.seen
            seen = torch.cat([seen, before.expand(*seen.shape[:2], others)], 2)
        call.seen = seen
        return torch.cat([each, call.output], 1)

    def _factors(self, call: SlotCall) -> Tensor:
        """The gates of keys and of values, [B, 1 or S, 2 kv]."""
        assert self.gate is not None
        assert call.input is not None, "a gate reads what comes in"
        gate = self.gate(call.input, call.flow.texts)
        note_gate(self, call, self.place_name, gate)
        size = call.output.shape[-1]
        keys_and_values = gate.expand(-1, -1, 2) if gate.shape[-1] == 1 else gate
        return keys_and_values.repeat_interleave(size // 2, -1)

    def layouts(self, site: Site) -> dict[str, Layout]:
        """Split with the heads that they serve: keys apart from values."""
        partial = Layout(partial_grad=True)
        gates = {} if self.gate is None else {"gate.weight": partial, "gate.bias": partial}
        if self.linear_out is None:
            return gates | {"rows": Layout(dim=1, blocks=2)}
        shared = ("embedding", "linear_in.weight", "linear_in.bias")
        return gates | {
            **{f"encoder.{name}": partial for name in shared},
            "linear_out.weight": Layout(dim=0, blocks=2),
            "linear_out.bias": Layout(dim=0, blocks=2),
        }


# AdapterHub's names of what prefixes stand before.
_KINDS = {
    ("prefix", "encoder"): "encoder",
    ("prefix", "decoder"): "self",
    ("cross_prefix", "decoder"): "cross",
}
