"""AdapterHub's bottlenecks: every variant that its `BnConfig` can say.

Sequential ones act on a sublayer's result (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al.
2021, arXiv:2005.00247), parallel ones beside the sublayer (He et al. 2022, arXiv:2110.04366).
Adapter+ (Steitz and Roth 2024, arXiv:2406.06820), Compacter and gates (UniPELT, Mao et al. 2022,
arXiv:2110.07577) are settings.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graftwerk.adapters.fusion import LOCATIONS, Start
from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.methods.activations import Activation, check_activation
from graftwerk.adapters.methods.bottleneck import LayerNormOfPart
from graftwerk.adapters.methods.gate import Gate, note_gate
from graftwerk.adapters.methods.invertible import Nice
from graftwerk.adapters.methods.phm import RULE_INITS, W_INITS, PHMLinear
from graftwerk.adapters.part import (
    Collectives,
    MethodSettings,
    Part,
    PartLinear,
    share_parameters,
)
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError

INITS = ("bert", "mam_adapter", "houlsby")


@dataclass(frozen=True, kw_only=True)
class BnConfig(MethodSettings):
    """The fields of AdapterHub's `BnConfig`, under its names.

    Trainable parameters of a part, for hidden size h and bottleneck d = h // reduction_factor:
    `2 h d + d + h`, and `h + 1` with a gate, `2 h` for each norm, 1 or h for trained scaling.
    With `phm_layer` (n, r): `(h + d) (2 r + 1)`, and `2 n^3` where the rule is not shared.

    Args:
        mh_adapter, output_adapter, cross_adapter: whether there are parts behind the attention, the
            MLP and the cross-attention.
        reduction_factor: one number, or one for each layer: `{"0": 2, "default": 16}`.
        original_ln_before: the sublayer's residual is added before the adapter, and normalised in
            post-norm models. Sequential only, as the two that follow.
        residual_before_ln: the adapter's own residual: the sublayer's result (True), what enters
            the adapter (False), or the result and the layer's residual ("post_add").
        adapter_residual_before_ln: it is added before `ln_after`, not behind.
        original_ln_after: behind the adapter the layer's residual is added, and normalised in
            post-norm models.
        ln_before, ln_after: a norm of the adapter's own, before the first and behind the second
            projection.
        init_weights: "bert": normal, std 0.02; "mam_adapter": the second projection is zero;
            "houlsby": normal, std 0.01, cut at 0.02.
        init_weights_seed: every part is born with the numbers of this seed, all alike.
        is_parallel: the adapter acts on the residual stream, not on the sublayer's result.
        scaling: a factor, or "learned" (one) or "channel" (one for each feature).
        use_gating: a trained scalar for each text, the mean over its tokens, scales the update.
        stochastic_depth: how often a row goes without the update, in training.
        phm_layer: projections are `PHMLinear`; `phm_*`, `shared_*`, `factorized_*`, `learn_phm` and
            `hypercomplex_nonlinearity` (how W is born) are theirs.
        inv_adapter: "nice": an invertible adapter on the embeddings.
        inv_adapter_reduction_factor: of it; None: 2.

    Raises:
        UserError: for a value that is not allowed.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    ln_before: bool = False
    ln_after: bool = False
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    use_gating: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    phm_rank: int = 1
    phm_bias: bool = True
    phm_c_init: Literal["normal", "uniform"] = "normal"
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    shared_W_phm: bool = False
    factorized_phm_W: bool = True
    inv_adapter: Literal["nice"] | None = None
    inv_adapter_reduction_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.non_linearity, "non_linearity")
        self._check_choice("init_weights", INITS)
        self._check_choice("phm_c_init", RULE_INITS)
        self._check_choice("hypercomplex_nonlinearity", W_INITS)
        self._check_choice("residual_before_ln", (True, False, "post_add"))
        self._check_choice("inv_adapter", (None, "nice"))
        if not _is_number(self.scaling) and self.scaling not in ("learned", "channel"):
            raise UserError(f"scaling={self.scaling!r}: use a number, 'learned' or 'channel'")
        for key in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}={getattr(self, key)}: must be from 0 to 1")
        for key in ("phm_dim", "phm_rank"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.phm_layer and self.init_weights != "bert":
            raise UserError(
                f"init_weights={self.init_weights!r} with phm_layer=True: its layers are born as "
                f"hypercomplex_nonlinearity says; set init_weights='bert'"
            )
        factors = self.reduction_factor
        for factor in factors.values() if isinstance(factors, Mapping) else (factors,):
            self._check_factor("reduction_factor", factor)
        if self.inv_adapter_reduction_factor is not None:
            self._check_factor("inv_adapter_reduction_factor", self.inv_adapter_reduction_factor)

    def _check_choice(self, key: str, allowed: tuple[object, ...]) -> None:
        if getattr(self, key) not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise UserError(f"{key}={getattr(self, key)!r} is not known: use one of {choices}")

    def _check_factor(self, key: str, factor: object) -> None:
        if not _is_number(factor) or not factor > 0:  # type: ignore[operator]
            raise UserError(f"{key}={getattr(self, key)!r}: must be a number above 0")

    def width(self, site: Site) -> int:
        """The size of the bottleneck at a site.

        Raises:
            UserError: where `reduction_factor` says nothing about the layer.
        """
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            by_layer = {str(layer): value for layer, value in factor.items()}
            factor = by_layer.get(str(site.layer), by_layer.get("default"))
            if factor is None:
                raise UserError(
                    f"reduction_factor has no entry for layer {site.layer}: give it one, or add a "
                    f"'default'"
                )
        return max(1, int(site.out_features // factor))

    def create(self, site: Site) -> Part | None:
        """The part for a slot, or None where the method has none."""
        location = LOCATIONS.get(site.name)
        with _seeded(self.init_weights_seed):
            if location is not None and getattr(self, location):
                kind = ParallelBottleneck if self.is_parallel else SequentialBottleneck
                return kind(site, self)
            if self.inv_adapter is not None and site.name in ("embedding", "lm_input"):
                factor = self.inv_adapter_reduction_factor or 2
                inverse = site.name == "lm_input"
                return Nice(site.out_features, self.non_linearity, factor, inverse)
        return None

    def tie(self, parts: list[tuple[Site, Part]]) -> None:
        super().tie(parts)
        inverted = [part for _, part in parts if isinstance(part, Nice)]
        for part in inverted[1:]:
            share_parameters(inverted[0], part)
        if self.phm_layer:
            self._share([part for _, part in parts if isinstance(part, HubBottleneck)])

    def _share(self, parts: list["HubBottleneck"]) -> None:
        """One rule for all layers, down and up; one W for each of the two."""
        pairs = [
            [layer for layer in part.modules() if isinstance(layer, PHMLinear)] for part in parts
        ]
        for down, up in pairs:
            if self.shared_phm_rule:
                for layer in (down, up):
                    layer.share(pairs[0][0], layer.rules)
            if self.shared_W_phm:
                down.share(pairs[0][0], down.weights)
                up.share(pairs[0][1], up.weights)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers of a seed within; those outside go on as if none had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class HubBottleneck(Part):
    """`scaling * (up(f(down([norm](z)))))`, and what it is joined with; z [B, S, h].

    The update is dropped out, then gated.
    """

    def __init__(self, site: Site, config: BnConfig):
        super().__init__()
        self.site = site
        size, width = site.out_features, config.width(site)
        self.original_ln_before = config.original_ln_before
        self.original_ln_after = config.original_ln_after
        self.residual_before_ln = config.residual_before_ln
        self.adapter_residual_before_ln = config.adapter_residual_before_ln
        self.adapter_norm_before = LayerNormOfPart(size) if config.ln_before else None
        down = PHMLinear(size, width, config) if config.phm_layer else PartLinear(size, width)
        norm = () if self.adapter_norm_before is None else (self.adapter_norm_before,)
        self.adapter_down = nn.Sequential(*norm, down, Activation(config.non_linearity))
        self.adapter_up = (
            PHMLinear(width, size, config) if config.phm_layer else PartLinear(width, size)
        )
        self.scaling: float | nn.Parameter
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(size if config.scaling == "channel" else 1))
        else:
            self.scaling = float(config.scaling)
        self.adapter_norm_after = LayerNormOfPart(size) if config.ln_after else None
        self.gate = Gate(size) if config.use_gating else None
        self.whole_row = self.whole_text = config.use_gating
        self.dropout, self.depth = Dropout(config.dropout), Dropout(config.stochastic_depth)
        if isinstance(down, nn.Linear) and isinstance(self.adapter_up, nn.Linear):
            _initialise(down, self.adapter_up, config.init_weights)
        if self.gate is not None:
            nn.init.zeros_(self.gate.bias)

    def unfreeze(self) -> None:
        super().unfreeze()
        for layer in self.modules():
            if isinstance(layer, PHMLinear):
                for name in layer.rules:
                    layer.get_parameter(name).requires_grad_(layer.learns_rule)

    def collectives(self, site: Site, sequence: bool = False) -> Collectives:
        if self.gate is None or not sequence:
            return Collectives()
        return Collectives(("gate [B, 1]",), ("gate [B, 1]",))  # a mean over split columns

    def begin(self, call: SlotCall, query_before_norm: bool | None = None) -> Start:
        """What goes in, what is added to the update, and a fusion's query."""
        raise NotImplementedError

    def update(self, call: SlotCall, z: Tensor) -> Tensor:
        """What the adapter adds for an input z."""
        update = self.adapter_up(self.adapter_down(z))
        if self.depth.p:  # whole rows; the others grow, so that the mean stays
            update = update * self.depth(update.new_ones(len(z), 1, 1), call.flow, first=0)
        if isinstance(self.scaling, Tensor):
            update = update * self.scaling.to(update.dtype)
        elif self.scaling != 1.0:
            update = update * self.scaling
        update = self.dropout(update, call.flow)
        if self.gate is None:
            return update
        gate = self.gate(z, call.flow.texts, row=call.flow.row)
        note_gate(self, call, LOCATIONS[self.site.name], gate)
        return update * gate

    def finish(self, call: SlotCall, hidden: Tensor) -> Tensor:
        """Says whether the slot still adds the layer's residual, and normalises."""
        call.joined = not self.original_ln_after
        return hidden


class SequentialBottleneck(HubBottleneck):
    """Reads the sublayer's result h, and writes it anew. x is the residual stream.

    Into it goes z = h, or norm(h + x); out comes the update joined with h, z or h + x.
    """

    def begin(self, call: SlotCall, query_before_norm: bool | None = None) -> Start:
        call.drop()
        h, x = call.output, call.residual
        assert x is not None, "a bottleneck needs the slot behind a sublayer"
        z = h
        if self.original_ln_before:
            z = h + x if call.norm is None else call.norm(h + x)
        if self.residual_before_ln == "post_add":
            residual = h + x
        else:
            residual = h if self.residual_before_ln else z
        return Start(z, residual, h if query_before_norm else z)

    def forward(self, call: SlotCall) -> Tensor:
        start = self.begin(call)
        hidden = self.update(call, start.inner)
        norm = self.adapter_norm_after
        if norm is None:
            hidden = hidden + start.residual
        elif self.adapter_residual_before_ln:
            hidden = norm(hidden + start.residual)
        else:
            hidden = norm(hidden) + start.residual
        return self.finish(call, hidden)


class ParallelBottleneck(HubBottleneck):
    """Reads the residual stream x, not normalised, and adds to the sublayer's result."""

    def begin(self, call: SlotCall, query_before_norm: bool | None = None) -> Start:
        call.drop()
        x = call.residual
        assert x is not None, "a bottleneck needs the slot behind a sublayer"
        return Start(x, call.output, x)

    def forward(self, call: SlotCall) -> Tensor:
        start = self.begin(call)
        update = self.update(call, start.inner)
        if self.adapter_norm_after is not None:
            update = self.adapter_norm_after(update)
        return self.finish(call, update + start.residual)


def _initialise(down: nn.Linear, up: nn.Linear, method: str) -> None:
    """Fills the projections as `init_weights` says."""
    for linear in (down, up):
        if method == "bert":
            nn.init.normal_(linear.weight, std=0.02)
        elif method == "houlsby":
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(linear.bias)
    if method == "mam_adapter":
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
