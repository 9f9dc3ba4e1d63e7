"""Prefix tuning: trained keys and values before those of every attention.

Li and Liang 2021, arXiv:2101.00190. With `reparametrise` (their section 4.3) a network that all
layers share makes them; its last projection is each layer's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwerk.adapters.part import Layout, MethodSettings, Part, PartLinear, share_parameters
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(MethodSettings):
    """`prefix_length` p keys and values a layer.

    h is the hidden size, kv the features of all keys, b the bottleneck. Parameters: without
    `reparametrise` 2 p kv a layer; with it p h + h b + b once for all layers, and 2 kv (b + 1) a
    layer.
    """

    prefix_length: int = 30
    bottleneck_dim: int = 512
    reparametrise: bool = True
    dropout: float = 0.0
    init_std: float = 0.02
    cross_prefix: bool = True  # before the encoder states of a T5's decoder too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_length < 1:
            raise UserError(f"model.prefix_tuning.prefix_length={self.prefix_length}: at least 1")

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        places = ("prefix", "cross_prefix") if self.cross_prefix else ("prefix",)
        return Prefix(site, self) if site.name in places else None

    def tie(self, parts: list[tuple[Site, Part]]) -> None:
        super().tie(parts)
        first: dict[str, Part] = {}
        for site, part in parts:  # one network for all layers of a kind
            owner = first.setdefault(f"{site.name} {site.stack}", part)
            if self.reparametrise and owner is not part:
                share_parameters(owner.get_submodule("encoder"), part.get_submodule("encoder"))


class Encoder(nn.Module):
    """What all layers share: p vectors of the hidden size through a linear layer and tanh."""

    def __init__(self, hidden_size: int, config: PrefixTuningConfig):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.prefix_length, hidden_size))
        nn.init.normal_(self.embedding, std=config.init_std)
        self.linear_in = nn.Linear(hidden_size, config.bottleneck_dim)

    def forward(self) -> Tensor:
        """[p, b]."""
        return torch.tanh(self.linear_in(self.embedding))


class Prefix(Part):
    """Appends p rows [key; value] of 2 kv features to those that are there already."""

    def __init__(self, site: Site, config: PrefixTuningConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = self.linear_out = None
        if config.reparametrise:
            self.encoder = Encoder(site.in_features, config)
            self.linear_out = PartLinear(config.bottleneck_dim, site.out_features)
        else:
            self.rows = nn.Parameter(torch.empty(config.prefix_length, site.out_features))
            nn.init.normal_(self.rows, std=config.init_std)

    def forward(self, call: SlotCall) -> Tensor:
        if self.encoder is not None and self.linear_out is not None:
            rows = self.linear_out(self.encoder())
        else:
            rows = self.rows
        rows = self.dropout(rows).to(call.output.dtype)
        return torch.cat([call.output, rows.expand(call.output.shape[0], -1, -1)], 1)

    def layouts(self, site: Site) -> dict[str, Layout]:
        """Split with the heads that they serve: keys apart from values."""
        if self.linear_out is None:
            return {"rows": Layout(dim=1, blocks=2)}
        shared = ("embedding", "linear_in.weight", "linear_in.bias")
        return {
            **{f"encoder.{name}": Layout(partial_grad=True) for name in shared},
            "linear_out.weight": Layout(dim=0, blocks=2),
            "linear_out.bias": Layout(dim=0, blocks=2),
        }
