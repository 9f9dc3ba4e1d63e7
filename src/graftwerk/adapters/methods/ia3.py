"""IA3: learned vectors that scale keys, values and the MLP's inner activation.

Liu et al. 2022, arXiv:2205.05638, section 3.3. Keys and values are scaled after their projection
and before rotary positions, the inner activation before the second MLP projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwerk.adapters.part import Layout, MethodSettings, Part
from graftwerk.adapters.slots import Site, SlotCall

PLACES = ("keys", "values", "cross_keys", "cross_values", "mlp_inner")


@dataclass(frozen=True, kw_only=True)
class IA3Config(MethodSettings):
    """Trainable parameters: `2 kv_channels num_query_groups + ffn_hidden_size` a layer.

    A layer with cross-attention has twice as many for keys and values.
    """

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        return Scale(site.out_features) if site.name in PLACES else None


class Scale(Part):
    """`scalers * output`, one learned factor a feature, all ones at birth."""

    unmergeable = None

    def __init__(self, features: int):
        super().__init__()
        self.scalers = nn.Parameter(torch.ones(features))

    def forward(self, call: SlotCall) -> Tensor:
        return call.output * self.scalers.to(call.output.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * self.scalers[:, None]

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias * self.scalers

    def layouts(self, site: Site) -> dict[str, Layout]:
        return {"scalers": Layout(dim=0, blocks=site.blocks)} if site.split == "column" else {}
