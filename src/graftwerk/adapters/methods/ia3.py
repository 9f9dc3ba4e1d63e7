"""IA3: learned vectors that scale keys, values and the MLP's inner activation.

Liu et al. 2022, arXiv:2205.05638, section 3.3. Keys and values are scaled after their projection
and before rotary positions, the inner activation before the second MLP projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwerk.adapters.methods.lora import SLOTS
from graftwerk.adapters.part import Layout, MethodSettings, Part
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError

PLACES = ("keys", "values", "cross_keys", "cross_values", "mlp_inner")


@dataclass(frozen=True, kw_only=True)
class IA3Config(MethodSettings):
    """Trainable parameters: `2 kv_channels num_query_groups + ffn_hidden_size` a layer.

    A layer with cross-attention has twice as many for keys and values.

    Args:
        places: slots whose output is scaled; others than the paper's are for adapters of peft.
    """

    places: tuple[str, ...] = PLACES

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*PLACES, *SLOTS)
        if unknown := [place for place in self.places if place not in known]:
            raise UserError(
                f"model.peft.ia3_tuning.places: {unknown[0]!r} is not known: use some of "
                f"{', '.join(known)}"
            )

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        return Scale(site.out_features) if site.name in self.places else None


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
        if site.split == "column":
            return {"scalers": Layout(dim=0, blocks=site.blocks)}
        return {"scalers": Layout(partial_grad=site.split == "row")}
