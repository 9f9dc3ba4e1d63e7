"""ReFT: what a layer leaves is changed at some positions, in a small subspace.

Wu et al. 2024, arXiv:2404.03592, section 3.2, in the words of AdapterHub: LoReFT has an orthogonal
projection, NoReFT any, DiReFT does not take away what the projection finds already.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.methods.activations import ACTIVATIONS, check_activation
from graftwerk.adapters.part import MethodSettings, Part, PartLinear
from graftwerk.adapters.slots import Flow, Site, SlotCall
from graftwerk.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReftConfig(MethodSettings):
    """`h + R^T (f(W h + b) - R h)` behind each layer, at a text's first and last tokens.

    W and R [r, h], b [r]. Trainable parameters: `2 r h + r` a unit; a unit for the first tokens and
    one for the last, or one for both (`tied_weights`).

    Args:
        prefix_positions, suffix_positions: at how many of the first and of the last tokens of a
            text, padding aside. Where both meet, the last win.
        r: the rank.
        orthogonality: R has orthonormal rows (LoReFT).
        subtract_projection: False: without `- R h` (DiReFT).
        non_linearity: f; None: none.
        dropout: of the whole changed state, in training.
        orthogonal_base: R of LoReFT is made by reflections of a base [h, h] that is kept with the
            weights, as in AdapterHub's files; False: R is a matrix [r, h] made orthonormal.

    Raises:
        UserError: for numbers that are too small, and a function that is not known.
    """

    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool = True
    tied_weights: bool = False
    subtract_projection: bool = True
    non_linearity: str | None = None
    dropout: float = 0.05
    orthogonal_base: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise UserError(f"r={self.r}: must be at least 1")
        if min(self.prefix_positions, self.suffix_positions) < 0:
            raise UserError("prefix_positions and suffix_positions must not be negative")
        if not self.prefix_positions + self.suffix_positions:
            raise UserError("prefix_positions and suffix_positions are both 0: set one of them")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: must be from 0 up to below 1")
        if self.non_linearity is not None:
            check_activation(self.non_linearity, "non_linearity")

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        if site.name != "layer_output":
            return None
        if self.orthogonality and self.r > site.out_features:
            raise UserError(
                f"r={self.r} rows cannot be orthogonal in {site.out_features} features: choose a "
                f"smaller r, or orthogonality=False"
            )
        return Reft(site.out_features, self)


class Reft(Part):
    """Changes [B, S, h] at the tokens that its configuration names."""

    def __init__(self, hidden_size: int, config: ReftConfig):
        super().__init__()
        self.prefix, self.suffix = config.prefix_positions, config.suffix_positions
        self.whole_row = bool(self.suffix)  # the last tokens are such until more come behind them
        count = 1 if config.tied_weights else 2
        self.units = nn.ModuleList(ReftUnit(hidden_size, config) for _ in range(count))

    def forward(self, call: SlotCall) -> Tensor:
        x = out = call.output
        before, behind = neighbours(call)
        if self.prefix:
            out = torch.where(before[..., None] < self.prefix, self.units[0](x, call.flow), out)
        if self.suffix:
            out = torch.where(behind[..., None] < self.suffix, self.units[-1](x, call.flow), out)
        return out


def neighbours(call: SlotCall) -> tuple[Tensor, Tensor]:
    """How many tokens of its text stand before each token and behind it, both [B or 1, S].

    Where the call does not say, a row is one text.
    """
    if call.before is not None and call.behind is not None:
        return call.before, call.behind
    index = torch.arange(call.output.shape[1], device=call.output.device)[None]
    return index, index.flip(1)


class ReftUnit(nn.Module):
    """`h + R^T (f(W h + b) - R h)`; [..., h]. R is `projection`, W and b `learned_source`."""

    def __init__(self, hidden_size: int, config: ReftConfig):
        super().__init__()
        self.learned_source = PartLinear(hidden_size, config.r)
        self.projection = nn.Linear(hidden_size, config.r, bias=False)
        self.orthonormal = config.orthogonality and not config.orthogonal_base
        if config.orthogonality:
            nn.init.orthogonal_(self.projection.weight)
        if config.orthogonality and config.orthogonal_base:
            parametrizations.orthogonal(self.projection)
            reflections = self.projection.get_submodule("parametrizations.weight.0")
            if reflections.base is None:  # on the meta device torch makes none
                reflections.base = torch.empty(hidden_size, hidden_size)
        self.subtract = config.subtract_projection
        name = config.non_linearity or "linear"
        self.function = ACTIVATIONS[name.lower()]
        self.dropout = Dropout(config.dropout)

    def rotation(self) -> Tensor:
        """R, [r, h]."""
        weight = self.projection.weight
        return orthonormal(weight) if self.orthonormal else weight

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        rotation = self.rotation().to(x.dtype)
        source = self.function(self.learned_source(x))
        if self.subtract:
            source = source - F.linear(x, rotation)
        return self.dropout(x + source @ rotation, flow)


def orthonormal(weight: Tensor) -> Tensor:
    """A matrix's rows [r, h], each made orthogonal to those before and of length one."""
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    columns, triangle = torch.linalg.qr(wide.T)
    return (columns * triangle.diagonal().sign()).T


def with_base(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """(`original` [r, h], `base` [h, h]) of which AdapterHub's reflections make R [r, h].

    The base is R's directions and what completes them, as columns; no reflection turns them. Torch
    multiplies each row of R with the whole part of a diagonal of `original`, which weight decay may
    have brought below 1: a row may be zero.
    """
    count, lengths = len(rotation), rotation.norm(dim=1).round()
    order = lengths.eq(0).int().argsort(stable=True)  # zeros last: they bind no column
    columns, triangle = torch.linalg.qr(rotation[order].T, mode="complete")
    base = columns.clone()
    base[:, order] = columns[:, :count] * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    original = torch.zeros_like(rotation)
    original.diagonal().copy_(-lengths)
    return original, base
