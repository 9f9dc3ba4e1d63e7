"""LoRA, IA3, VeRA, DoRA and MTL-LoRA as AdapterHub has them.

The formulas are those of its library, with what is peculiar to it: a gate stands in for
`alpha / r`, DoRA divides by the lengths of W + B A without the scale and scales the bias too,
VeRA's two vectors are whole matrices. Parameters have its names. NeMo's and peft's LoRA is
`methods.lora`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.methods.gate import Gate, note_gate
from graftwerk.adapters.methods.lora import SLOTS
from graftwerk.adapters.methods.projection import Projection
from graftwerk.adapters.part import Collectives, Layout, MethodSettings, Part, share_parameters
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError

INITS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # how A and B are born
    "lora": (lambda a: nn.init.kaiming_uniform_(a, a=math.sqrt(5)), nn.init.zeros_),
    "bert": (lambda a: nn.init.normal_(a, std=0.02), lambda b: nn.init.normal_(b, std=0.02)),
    "ia3": (nn.init.ones_, nn.init.ones_),
    "vera": (nn.init.kaiming_uniform_, nn.init.kaiming_uniform_),
}


@dataclass(frozen=True, kw_only=True)
class HubLoRAConfig(MethodSettings):
    """A part for each slot that `places` names; W [out, in] is its projection, s = alpha / r.

    Trainable parameters a slot: LoRA `r (in + out)`; DoRA `out` more; IA3 (`scale`) `out`; VeRA
    `r^2 + out^2`; a gate `in + 1` more.

    Args:
        places: names of slots (`methods.lora.SLOTS`): `fc1` is what makes the MLP's inner features,
            `up` and `gate` its halves in a gated MLP, `fc2` what makes its result.
        output_places: those of `places` that are AdapterHub's "output"; others of an MLP are its
            "intermediate". It tells apart where gates are recorded, nothing else.
        composition_mode: `add`: `output + s B A input`; `scale` (IA3): `alpha B * output`.
        scaled_places: slots without parameters that give `alpha * output` in `scale` mode: what
            AdapterHub's library does with the rest of GPT-2's fused projection.
        dropout: of the input of A, in training.
        init_weights: how A and B are born. `lora`: A kaiming-uniform with a = sqrt 5, B zero;
            `bert`: both normal, deviation 0.02; `ia3`: ones; `vera`: both kaiming-uniform.
        use_gating: a scalar for each example in the place of s (of alpha).
        use_dora: `m / |W + B A| * (output + s B A input)`, lengths row by row.
        vera_d, vera_b: VeRA, where one of the two is set: `s b B d A`, with A and B random, frozen
            and shared by all slots of one shape; d [r, r] and b [out, out] start as these on the
            diagonal.

    Raises:
        UserError: for values that are not known or do not go together.
    """

    places: tuple[str, ...] = ("query", "value")
    output_places: tuple[str, ...] = ("fc2",)
    scaled_places: tuple[str, ...] = ()
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    composition_mode: Literal["add", "scale"] = "add"
    init_weights: Literal["lora", "bert", "ia3", "vera"] = "lora"
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named = (*self.places, *self.output_places, *self.scaled_places)
        if unknown := [place for place in named if place not in SLOTS]:
            raise UserError(f"places: {unknown[0]!r} is not known: use some of {', '.join(SLOTS)}")
        if not self.places:
            raise UserError(f"places is empty: name some of {', '.join(SLOTS)}")
        if self.composition_mode not in ("add", "scale"):
            raise UserError(f"composition_mode={self.composition_mode!r}: use 'add' or 'scale'")
        if self.init_weights not in INITS:
            raise UserError(f"init_weights={self.init_weights!r}: use one of {', '.join(INITS)}")
        if self.r < 1:
            raise UserError(f"r={self.r}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: must be from 0 up to below 1")
        if self.composition_mode == "scale":
            self._check_scale()
        elif self.scaled_places:
            raise UserError("scaled_places goes with composition_mode='scale': unset it")
        if self.weight_tying and self.use_dora:
            raise UserError(
                "use_dora=True learns the length of each layer's own rows, which layers cannot "
                "share: set weight_tying=False"
            )

    def _check_scale(self) -> None:
        key = "composition_mode='scale'"
        if self.r != 1:
            raise UserError(f"{key} has one vector a slot: set r=1, not {self.r}")
        if self.dropout or self.use_dora or self.vera:
            raise UserError(f"{key} goes with no dropout, use_dora, vera_d or vera_b: unset them")
        if self.init_weights == "vera":
            raise UserError(f"{key} has no A: init_weights is 'ia3', 'bert' or 'lora'")

    @property
    def vera(self) -> bool:
        """Whether A and B are frozen and something smaller is trained."""
        return self.vera_d is not None or self.vera_b is not None

    @property
    def scale(self) -> float:
        """What updates are multiplied with; in `scale` mode the vector."""
        return self.alpha if self.composition_mode == "scale" else self.alpha / self.r

    def location(self, place: str) -> str:
        """AdapterHub's name of a place, under which its gates are recorded."""
        if place in self.output_places:
            return "output_lora"
        return "intermediate_lora" if place in ("fc1", "gate", "up", "fc2") else "selfattn_lora"

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        if site.name in self.scaled_places and site.name not in self.places:
            return HubScale(self.scale)
        if site.name not in self.places:
            return None
        if self.composition_mode == "scale":
            return HubIA3(site, self)
        return HubVeRA(site, self) if self.vera else HubLoRA(site, self)

    def tie(self, parts: list[tuple[Site, Part]]) -> None:
        super().tie(parts)
        owners: dict[tuple[int, int], HubVeRA] = {}
        for site, part in parts:
            if isinstance(part, HubVeRA):
                owner = owners.setdefault((site.in_features, site.out_features), part)
                if owner is not part:
                    share_parameters(owner.shared, part.shared)


@dataclass(frozen=True, kw_only=True)
class HubMTLLoRAConfig(HubLoRAConfig):
    """MTL-LoRA (Yang et al. 2024, arXiv:2410.09437): one adapter a task, in a `MultiTask` block.

    `output + s sum_i softmax(weights / weights_sharpness)_i B_i L A input`. Adapters of several
    tasks may share A and B (`adapters.sharing.share_matrices`); L and the weights are each one's
    own. Trainable parameters a slot: `r (in + n out) + n + r`, or `+ r^2` for a `linear` L.

    Args:
        n_up_projection: n, how many B there are.
        task_specific_matrix_type: `singular_values`: L is diagonal; `linear`: a whole matrix. The
            identity at birth.
    """

    n_up_projection: int = 1
    task_specific_matrix_type: Literal["singular_values", "linear"] = "singular_values"
    weights_sharpness: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.composition_mode == "scale" or self.use_dora or self.vera:
            raise UserError("MTL-LoRA is of composition_mode='add', without use_dora and vera_*")
        if self.init_weights not in ("lora", "bert"):
            raise UserError(f"init_weights={self.init_weights!r}: MTL-LoRA knows 'lora' and 'bert'")
        if self.n_up_projection < 1:
            raise UserError(f"n_up_projection={self.n_up_projection}: must be at least 1")
        kinds = ("singular_values", "linear")
        if self.task_specific_matrix_type not in kinds:
            raise UserError(
                f"task_specific_matrix_type={self.task_specific_matrix_type!r}: use one of "
                f"{', '.join(kinds)}"
            )
        if self.weights_sharpness <= 0:
            raise UserError(f"weights_sharpness={self.weights_sharpness}: must be above 0")

    def create(self, site: Site) -> Part | None:
        return HubMTLLoRA(site, self) if site.name in self.places else None


class Gated(Part):
    """What all parts here share: a scale, or in its place a gate."""

    unmergeable = None

    def __init__(self, site: Site, config: HubLoRAConfig):
        super().__init__()
        self.scale = config.scale
        self.location = config.location(site.name)
        self.gate = None
        if config.use_gating:
            self.gate = Gate(site.in_features)
            self.whole_row = self.whole_text = True
            self.unmergeable = "its gate differs from example to example"

    def factor(self, call: SlotCall) -> Tensor | float:
        """The scale, or each example's own, [B, 1 or S, 1]."""
        if self.gate is None:
            return self.scale
        assert call.input is not None, "LoRA needs a slot of a projection"
        gate = self.gate(call.input, call.flow.texts, self.ranks)
        note_gate(self, call, self.location, gate)
        return gate

    def layouts(self, site: Site) -> dict[str, Layout]:
        if self.gate is None:
            return {}
        if site.split == "row":  # its bias joins the whole sum, on every rank
            return {"gate.weight": Layout(dim=1)}
        split = Layout(partial_grad=site.split == "column")
        return {"gate.weight": split, "gate.bias": split}

    def collectives(self, site: Site, sequence: bool = False) -> Collectives:
        if self.gate is None or site.split != "row":
            return Collectives()
        return Collectives(("gate logits [B, S, 1]",), ("gate [B, 1]",))  # a sigmoid in between


class HubLoRA(Gated):
    """`output + s B A dropout(input)`; [..., in] and [..., out]; with `m` as DoRA."""

    def __init__(self, site: Site, config: HubLoRAConfig):
        super().__init__(site, config)
        self.dropout = Dropout(config.dropout, of="input")
        self.make(site, config)
        self.m: nn.ParameterDict | None = None
        if config.use_dora:
            self.projection = Projection(site, "use_dora")
            self.m = nn.ParameterDict({"weight": torch.empty(site.out_features, 1)})

    def make(self, site: Site, config: HubLoRAConfig) -> None:
        """Makes the parameters of the update."""
        begin_a, begin_b = INITS[config.init_weights]
        self.lora_A = nn.Parameter(begin_a(torch.empty(config.r, site.in_features)))
        self.lora_B = nn.Parameter(begin_b(torch.empty(site.out_features, config.r)))

    def attach(self, sublayer: nn.Module) -> None:
        if self.m is not None:
            self.projection.attach(sublayer)
            if not self.projection.here:
                return
            weight = self.projection.weight().detach().float()
            lengths = self.projection.lengths(torch.zeros_like(weight), self.ranks)
            with torch.no_grad():
                self.m["weight"].copy_(lengths[:, None])

    def forward(self, call: SlotCall) -> Tensor:
        assert call.input is not None, "LoRA needs a slot of a projection"
        x = self.dropout(call.input, call.flow)
        output = call.output + self.factor(call) * self.inner(x)
        return output if self.m is None else self.gain().to(output.dtype) * output

    def inner(self, x: Tensor) -> Tensor:
        """`matrix() x`, the short way: [..., in] -> [..., out]."""
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def matrix(self) -> Tensor:
        """The update of the weight before it is scaled, [out, in]."""
        return self.lora_B @ self.lora_A

    def gain(self) -> Tensor:
        """DoRA's `m / |W + B A|`, [out]; the length has a gradient, unlike the paper's."""
        assert self.m is not None
        if torch.is_grad_enabled():
            length = self.projection.lengths(self.matrix(), self.ranks)
        else:
            made_of = tuple(self.parameters())
            length = self.projection.kept_lengths(made_of, self.matrix, self.ranks)
        return self.ranks.joined(self.m["weight"].squeeze(1) / length)

    def merged_weight(self, weight: Tensor) -> Tensor:
        merged = weight + self.scale * self.matrix()
        return merged if self.m is None else self.gain()[:, None] * merged

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias if self.m is None else self.gain() * bias

    def layouts(self, site: Site) -> dict[str, Layout]:
        if site.split == "replicated":
            return {}
        gains = {}
        if self.m is not None and site.split == "column":
            gains["m.weight"] = Layout(dim=0, blocks=site.blocks)
        return super().layouts(site) | gains | self.matrix_layouts(site)

    def collectives(self, site: Site, sequence: bool = False) -> Collectives:
        own = super().collectives(site, sequence)
        if self.m is None or site.split != "row":
            return own
        return Collectives((*own.forward, "lengths [out]"), (*own.backward, "gain [out]"))

    def matrix_layouts(self, site: Site) -> dict[str, Layout]:
        """Those of A and B, as NeMo's LoRA has them."""
        if site.split == "column":
            split = {"lora_A": Layout(partial_grad=True)}
            return split | {"lora_B": Layout(dim=0, blocks=site.blocks)}
        return {"lora_A": Layout(dim=1), "lora_B": Layout(partial_grad=True)}


class HubVeRA(HubLoRA):
    """`output + s b B d A dropout(input)` (Kopiczko et al. 2023, arXiv:2310.11454)."""

    def make(self, site: Site, config: HubLoRAConfig) -> None:
        begin_a, begin_b = INITS[config.init_weights]
        self.shared = nn.ParameterDict(
            {
                "lora_A": begin_a(torch.empty(config.r, site.in_features)),
                "lora_B": begin_b(torch.empty(site.out_features, config.r)),
            }
        )
        self.shared.requires_grad_(False)
        self.vera_D = nn.Parameter(torch.eye(config.r) * (config.vera_d or 0.0))
        self.vera_B = nn.Parameter(torch.eye(site.out_features) * (config.vera_b or 0.0))

    def unfreeze(self) -> None:
        super().unfreeze()
        self.shared.requires_grad_(False)

    def inner(self, x: Tensor) -> Tensor:
        for weight in self.factors():
            x = F.linear(x, weight.to(x.dtype))
        return x

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, d, B and b, as they act on what is here of the input."""
        down = self.ranks.share(self.shared["lora_A"], 1)  # all slots hold it whole
        return down, self.vera_D, self.shared["lora_B"], self.vera_B

    def matrix(self) -> Tensor:
        down, inner, up, outer = self.factors()
        return outer @ up @ inner @ down

    def matrix_layouts(self, site: Site) -> dict[str, Layout]:
        outer = Layout(dim=0, blocks=site.blocks)
        if site.split == "row":
            outer = Layout(partial_grad=True)
        return {"vera_D": Layout(partial_grad=True), "vera_B": outer}


class HubMTLLoRA(HubLoRA):
    """`output + s sum_i p_i B_i L A dropout(input)`, p the softmax of `weights / sharpness`."""

    def make(self, site: Site, config: HubLoRAConfig) -> None:
        assert isinstance(config, HubMTLLoRAConfig)
        begin_a, begin_b = INITS[config.init_weights]
        count, r = config.n_up_projection, config.r
        self.lora_A = nn.Parameter(begin_a(torch.empty(r, site.in_features)))
        self.lora_B = nn.Parameter(begin_b(torch.empty(count, site.out_features, r)))
        self.task_specific = TaskMatrix(r, config.task_specific_matrix_type)
        self.weights = nn.Parameter(torch.ones(count))
        self.sharpness = config.weights_sharpness

    def joined(self) -> Tensor:
        """`sum_i p_i B_i L`, [out, r]."""
        shares = (self.weights / self.sharpness).softmax(0)
        return self.task_specific(torch.einsum("n,nor->or", shares, self.lora_B))

    def inner(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.joined().to(x.dtype))

    def matrix(self) -> Tensor:
        return self.joined() @ self.lora_A

    def matrix_layouts(self, site: Site) -> dict[str, Layout]:
        whole = Layout(partial_grad=True)
        own = {"task_specific.values": whole, "weights": whole}
        if site.split == "column":
            return own | {"lora_A": whole, "lora_B": Layout(dim=1, blocks=site.blocks)}
        return own | {"lora_A": Layout(dim=1), "lora_B": whole}


class TaskMatrix(nn.Module):
    """L [r, r], or its diagonal [r]; the identity at birth. B [out, r] -> B L."""

    def __init__(self, rank: int, kind: str):
        super().__init__()
        self.values = nn.Parameter(
            torch.ones(rank) if kind == "singular_values" else torch.eye(rank)
        )

    def forward(self, up: Tensor) -> Tensor:
        # As AdapterHub's, a whole matrix is that of `x @ L`: transposed.
        return up * self.values if self.values.ndim == 1 else up @ self.values.T


class HubIA3(Gated):
    """`alpha B * output`, one learned factor a feature [out, 1], the bias scaled with the rest."""

    def __init__(self, site: Site, config: HubLoRAConfig):
        super().__init__(site, config)
        self.lora_B = nn.Parameter(INITS[config.init_weights][1](torch.empty(site.out_features, 1)))

    def forward(self, call: SlotCall) -> Tensor:
        return call.output * (self.factor(call) * self.lora_B.squeeze(1).to(call.output.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * (self.scale * self.lora_B)

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias * (self.scale * self.lora_B.squeeze(1))

    def layouts(self, site: Site) -> dict[str, Layout]:
        rows = Layout(partial_grad=site.split == "row")
        if site.split == "column":
            rows = Layout(dim=0, blocks=site.blocks)
        return super().layouts(site) | {"lora_B": rows}


class HubScale(Part):
    """`alpha * output`, without parameters; the bias is scaled with the rest."""

    unmergeable = None

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, call: SlotCall) -> Tensor:
        return self.scale * call.output

    def merged_weight(self, weight: Tensor) -> Tensor:
        return self.scale * weight

    def merged_bias(self, bias: Tensor) -> Tensor:
        return self.scale * bias
