"""LoRA: a low-rank update beside a frozen projection (Hu et al. 2021, arXiv:2106.09685, 4.1).

`dora` splits the projection into the length of each row, which is trained, and its direction, which
LoRA changes (Liu et al. 2024, arXiv:2402.09353).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.methods.projection import Projection
from graftwerk.adapters.methods.tied import LayerPosition
from graftwerk.adapters.part import (
    Collectives,
    Layout,
    MethodSettings,
    Part,
    PartLinear,
    initialise,
)
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError

# NeMo's target names and the slots that they stand for: fused, and with a part of its own each.
CROSS = ("cross_query", "cross_key", "cross_value")
NEMO = {
    "attention_qkv": ("qkv", *CROSS),
    "attention_dense": ("output", "cross_output"),
    "mlp_fc1": ("fc1",),
    "mlp_fc2": ("fc2",),
}
CANONICAL = NEMO | {"attention_qkv": ("query", "key", "value", *CROSS), "mlp_fc1": ("gate", "up")}
VARIANTS = {"nemo": NEMO, "canonical": CANONICAL}
GROUPS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(NEMO),
}
# Slots by their own names, for what lies at some projections only (peft's `target_modules`).
SLOTS = (
    "qkv",
    "query",
    "key",
    "value",
    "output",
    *CROSS,
    "cross_output",
    "fc1",
    "gate",
    "up",
    "fc2",
)
KEY = "model.peft.lora_tuning."


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(MethodSettings):
    """`model.peft.lora_tuning`: `output + scale * B A x`.

    Trainable parameters are `dim (in + out)` a projection: `attention_qkv` has
    `dim (h + (heads + 2 groups) kv_channels)` a layer, as `canonical` `2 dim h` more. DoRA has
    `out` more for each. T5's cross-attention has its own for queries, keys and values.

    Args:
        dim: the rank r.
        alpha: `scale = alpha / dim`; 0 means `dim`.
        rank_stabilised: `scale = alpha / sqrt(dim)` (Kalajdzievski 2023, arXiv:2312.03732).
        dropout_position: `pre` drops out inputs, `post` the update.
        target_modules: of `attention_qkv`, `attention_dense`, `mlp_fc1`, `mlp_fc2`, and
            `attention`, `mlp`, `all` for several; or slots by their own names (`SLOTS`).
        variant: `nemo`: fused projections have one A; `canonical`: q, k, v, gate and up have one
            each.
    """

    takes_position: ClassVar[bool] = True

    dim: int = 32
    alpha: float = 0
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    target_modules: tuple[str, ...] = ("attention_qkv",)
    variant: Literal["nemo", "canonical"] = "nemo"
    column_init_method: str = "xavier"
    row_init_method: str = "zero"
    rank_stabilised: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*NEMO, *GROUPS, *SLOTS)
        if unknown := [target for target in self.target_modules if target not in known]:
            raise UserError(
                f"{KEY}target_modules: {unknown[0]!r} is not known: use some of {', '.join(known)}"
            )
        if not self.target_modules:
            raise UserError(f"{KEY}target_modules is empty: name some of {', '.join(known)}")
        if self.variant not in VARIANTS:
            raise UserError(f"{KEY}variant={self.variant!r}: use 'nemo' or 'canonical'")
        if self.dropout_position not in ("pre", "post"):
            raise UserError(f"{KEY}dropout_position={self.dropout_position!r}: use 'pre' or 'post'")
        if self.dim < 1:
            raise UserError(f"{KEY}adapter_dim={self.dim}: must be at least 1")
        if self.alpha < 0:
            raise UserError(f"{KEY}alpha={self.alpha}: must not be negative; 0 means adapter_dim")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{KEY}adapter_dropout={self.dropout}: must be from 0 up to below 1")
        if self.dora and self.weight_tying:
            raise UserError(
                f"{KEY}dora=True learns the length of each layer's own rows, which layers cannot "
                f"share: set weight_tying=False"
            )

    @property
    def scale(self) -> float:
        """What the update is multiplied with."""
        divisor = math.sqrt(self.dim) if self.rank_stabilised else self.dim
        return (self.alpha or self.dim) / divisor

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        targets = {name for target in self.target_modules for name in GROUPS.get(target, (target,))}
        by_name = VARIANTS[self.variant]
        places = {slot for target in targets for slot in by_name.get(target, (target,))}
        if self.variant == "canonical" and "mlp_fc1" in targets and site.blocks == 1:
            places.add("fc1")  # nothing to take apart
        if site.name not in places:
            return None
        return DoRA(site, self) if self.dora else LoRA(site, self)


class LoRA(Part):
    """`output + scale * linear_out(linear_in(dropout(input)))`; [..., in] and [..., out]."""

    unmergeable = None

    def __init__(self, site: Site, config: LoRAConfig):
        super().__init__()
        self.scale = config.scale
        self.drops_input = config.dropout_position == "pre"
        self.position = None
        if config.position_embedding_strategy is not None:
            self.position = LayerPosition(
                config.position_embedding_strategy, site.in_features, site.out_features, config.dim
            )
            self.unmergeable = "its position embeddings are no part of a weight"
        extra = self.position.extra if self.position is not None else 0
        self.linear_in = PartLinear(site.in_features + extra, config.dim, bias=False)
        self.linear_out = PartLinear(config.dim, site.out_features, bias=False)
        self.dropout = Dropout(config.dropout, of="input" if self.drops_input else "output")
        initialise(self.linear_in.weight, config.column_init_method, f"{KEY}column_init_method")
        initialise(self.linear_out.weight, config.row_init_method, f"{KEY}row_init_method")

    def place(self, index: int, count: int) -> None:
        if self.position is not None:
            self.position.place(index, count)

    def forward(self, call: SlotCall) -> Tensor:
        return call.output + self.update(call)

    def update(self, call: SlotCall) -> Tensor:
        """What is added to the projection's result."""
        x = call.input
        assert x is not None, "LoRA needs a slot of a projection"
        if self.drops_input:
            x = self.dropout(x, call.flow)
        if self.position is not None:
            x = self.position.enter(x)
        update = self.linear_out(self.scale * self.linear_in(x))  # scaled where it is small
        if self.position is not None:
            update = self.position.leave(update)
        return update if self.drops_input else self.dropout(update, call.flow)

    def delta(self) -> Tensor:
        """What `update` adds to the projection's weight, [out, in]."""
        return self.scale * (self.linear_out.weight @ self.linear_in.weight)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def layouts(self, site: Site) -> dict[str, Layout]:
        if site.split == "column":  # A sees the whole input, each rank makes its rows of B A x
            return {
                "linear_in.weight": Layout(partial_grad=True),
                "linear_out.weight": Layout(dim=0, blocks=site.blocks),
                **self._position_layouts(site),
            }
        if site.split == "row":  # each rank's A x is a summand, joined by the base's one all-reduce
            return {
                "linear_in.weight": Layout(dim=1),
                "linear_out.weight": Layout(partial_grad=True),
                **self._position_layouts(site),
            }
        return {}

    def _position_layouts(self, site: Site) -> dict[str, Layout]:
        if self.position is None:
            return {}
        joins = "biasadd" if site.split == "column" else "add"  # features that are split
        if self.position.strategy == joins:
            return {"position.table": Layout(dim=1, blocks=site.blocks if joins != "add" else 1)}
        if site.split == "row":
            raise UserError(
                f"position_embedding_strategy={self.position.strategy!r} on {site.name} does not "
                f"split over devices: use 'add', or set model.tensor_model_parallel_size to 1"
            )
        names = [f"position.{name}" for name, _ in self.position.named_parameters()]
        return {name: Layout(partial_grad=True) for name in names}


class DoRA(LoRA):
    """`bias + magnitude / |W + scale B A| * (W + scale B A) x`, lengths taken row by row.

    The length is a constant to the gradient (section 4.3). At birth `magnitude` is that of W.
    """

    def __init__(self, site: Site, config: LoRAConfig):
        super().__init__(site, config)
        self.projection = Projection(site, f"{KEY}dora")
        self.magnitude = nn.Parameter(torch.empty(site.out_features))

    def attach(self, sublayer: nn.Module) -> None:
        self.projection.attach(sublayer)
        if self.projection.here:
            with torch.no_grad():
                self.magnitude.copy_(self.projection.lengths(self.delta(), self.ranks))

    def forward(self, call: SlotCall) -> Tensor:
        gain = (self.magnitude / self.length()).to(call.output.dtype)
        bias = self.projection.bias() if self.ranks.first else None  # one summand has it
        made = call.output if bias is None else call.output - bias
        return call.output + (gain - 1) * made + gain * self.update(call)

    def length(self) -> Tensor:
        """The length of each row of W + scale B A, [out], without a gradient; kept until one of
        the three changes."""
        return self.projection.kept_lengths(
            (self.linear_in.weight, self.linear_out.weight), self.delta, self.ranks
        )

    def merged_weight(self, weight: Tensor) -> Tensor:
        return (self.magnitude / self.length())[:, None] * super().merged_weight(weight)

    def layouts(self, site: Site) -> dict[str, Layout]:
        split = Layout(partial_grad=True)  # on a row split it scales summands
        if site.split == "column":
            split = Layout(dim=0, blocks=site.blocks)
        return super().layouts(site) | {"magnitude": split}

    def collectives(self, site: Site, sequence: bool = False) -> Collectives:
        return Collectives(("lengths [out]",) if site.split == "row" else ())
