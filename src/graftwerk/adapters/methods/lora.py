"""LoRA: a low-rank update beside a frozen projection (Hu et al. 2021, arXiv:2106.09685, 4.1)."""

from dataclasses import dataclass

from torch import Tensor, nn

from graftwerk.adapters.part import Layout, MethodSettings, Part, PartLinear, initialise
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError

# NeMo's target names and the slots that they stand for.
TARGETS = {
    "attention_qkv": ("qkv",),
    "attention_dense": ("output",),
    "mlp_fc1": ("fc1",),
    "mlp_fc2": ("fc2",),
}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(MethodSettings):
    """`output + alpha / dim * B A x`; `alpha` 0 means `dim`. Fused QKV shares one A for q, k and v.

    Trainable parameters of `attention_qkv`: `dim (h + (heads + 2 groups) kv_channels)` a layer.
    """

    dim: int = 32
    alpha: float = 0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("attention_qkv",)
    column_init_method: str = "xavier"
    row_init_method: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        for target in self.target_modules:
            if target not in TARGETS:
                raise UserError(
                    f"model.lora_tuning.target_modules: {target!r} is not known: "
                    f"use one of {', '.join(TARGETS)}"
                )

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        if any(site.name in TARGETS[target] for target in self.target_modules):
            return LoRA(site.in_features, site.out_features, self)
        return None


class LoRA(Part):
    """`output + scale * linear_out(linear_in(dropout(input)))`; [..., in] and [..., out]."""

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig):
        super().__init__()
        self.scale = (config.alpha or config.dim) / config.dim
        self.linear_in = PartLinear(in_features, config.dim, bias=False)
        self.linear_out = PartLinear(config.dim, out_features, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        key = "model.lora_tuning."
        initialise(self.linear_in.weight, config.column_init_method, f"{key}column_init_method")
        initialise(self.linear_out.weight, config.row_init_method, f"{key}row_init_method")

    def forward(self, call: SlotCall) -> Tensor:
        assert call.input is not None, "LoRA needs a slot of a projection"
        return call.output + self.scale * self.linear_out(self.linear_in(self.dropout(call.input)))

    def layouts(self, site: Site) -> dict[str, Layout]:
        if site.split == "column":  # A sees the whole input, each rank makes its rows of B A x
            return {
                "linear_in.weight": Layout(partial_grad=True),
                "linear_out.weight": Layout(dim=0, blocks=site.blocks),
            }
        if site.split == "row":  # each rank's A x is a summand, joined by the base's one all-reduce
            return {
                "linear_in.weight": Layout(dim=1),
                "linear_out.weight": Layout(partial_grad=True),
            }
        return {}
