"""Canonical bottleneck adapters, as NeMo has them (Houlsby et al. 2019, arXiv:1902.00751).

Behind the attention and behind the MLP, each `x + up(swish(down(norm(x))))` on the sublayer's
result before its bias. `parallel_adapter` is NeMo's name for the tensor-parallel bottleneck, not
for a place beside the sublayer.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.fusion import Start
from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.methods.tied import LayerPosition
from graftwerk.adapters.part import MethodSettings, Part, PartLinear, initialise
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError

NORM_TYPES = ("mixedfusedlayernorm", "layernorm")


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodSettings):
    """`model.adapter_tuning` of a learning stage.

    `dim` is the width of the bottleneck. Trainable parameters: `2 (2 h dim + 2 h)` a layer; with
    `weight_tying` that many for each stack of layers, and what `LayerPosition` has.
    """

    takes_position: ClassVar[bool] = True

    type: Literal["parallel_adapter", "linear_adapter"] = "parallel_adapter"
    dim: int = 32
    dropout: float = 0.0
    norm_position: Literal["pre", "post"] = "pre"
    norm_type: str = "mixedfusedlayernorm"
    column_init_method: str = "xavier"
    row_init_method: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "model.adapter_tuning."
        if self.norm_position not in ("pre", "post"):
            raise UserError(f"{key}norm_position={self.norm_position!r}: use 'pre' or 'post'")
        if self.norm_type not in NORM_TYPES:
            raise UserError(
                f"{key}norm_type={self.norm_type!r}: use one of {', '.join(NORM_TYPES)}"
            )
        if self.dim < 1:
            raise UserError(f"{key}adapter_dim={self.dim}: must be at least 1")
        if not 0 <= self.dropout <= 1:
            raise UserError(f"{key}adapter_dropout={self.dropout}: must be from 0 to 1")

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        if site.name in ("attention_output", "mlp_output"):
            return Bottleneck(site.out_features, self)
        return None


class LayerNormOfPart(nn.LayerNorm):
    """Layer norm that computes in the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class Bottleneck(Part):
    """`x + dropout(linear_out(swish(linear_in(layer_norm(x)))))`; x [..., h], bottleneck `dim`.

    With `norm_position: post` the norm comes behind `linear_out`. Zero at birth either way.
    """

    def __init__(self, hidden_size: int, config: BottleneckConfig):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.position = None
        if config.position_embedding_strategy is not None:
            self.position = LayerPosition(
                config.position_embedding_strategy, hidden_size, hidden_size, config.dim
            )
        inputs = hidden_size + (self.position.extra if self.position is not None else 0)
        self.linear_in = PartLinear(inputs, config.dim, bias=False)
        self.linear_out = PartLinear(config.dim, hidden_size, bias=False)
        self.layer_norm = LayerNormOfPart(inputs if self.norm_first else hidden_size, eps=1e-5)
        self.dropout = Dropout(config.dropout)
        self._initialise(config)

    def _initialise(self, config: BottleneckConfig) -> None:
        if config.type == "parallel_adapter":
            key = "model.adapter_tuning."
            initialise(self.linear_in.weight, config.column_init_method, f"{key}column_init_method")
            initialise(self.linear_out.weight, config.row_init_method, f"{key}row_init_method")
        # NeMo's LinearAdapter: torch's initialisation, and zero where it ends
        elif self.norm_first:
            nn.init.zeros_(self.linear_out.weight)
        else:
            nn.init.zeros_(self.layer_norm.weight)

    def place(self, index: int, count: int) -> None:
        if self.position is not None:
            self.position.place(index, count)

    def begin(self, call: SlotCall, query_before_norm: bool | None = None) -> Start:
        """The result before its bias, which is a fusion's query too, and the result."""
        x = call.output if call.bias is None else call.output - call.bias
        return Start(x, call.output, x)

    def update(self, call: SlotCall, z: Tensor) -> Tensor:
        """What the adapter adds for an input z."""
        if self.position is not None:
            z = self.position.enter(z)
        inner = self.layer_norm(z) if self.norm_first else z
        inner = self.linear_out(F.silu(self.linear_in(inner)))
        if not self.norm_first:
            inner = self.layer_norm(inner)
        if self.position is not None:
            inner = self.position.leave(inner)
        return self.dropout(inner, call.flow)

    def finish(self, call: SlotCall, hidden: Tensor) -> Tensor:
        """The slot's output as it is."""
        return hidden

    def forward(self, call: SlotCall) -> Tensor:
        start = self.begin(call)
        return self.finish(call, start.residual + self.update(call, start.inner))
