"""The base of all parts."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How one parameter lies over tensor-parallel ranks.

    `dim`: the dimension that is split; None: every rank holds the whole. `blocks`: the dimension
    is this many runs, each split apart. `partial_grad`: each rank's gradient of a whole parameter
    is one summand, to be added up before clipping.
    """

    dim: int | None = None
    blocks: int = 1
    partial_grad: bool = False


class Part(nn.Module, ABC):
    """What one adapter does in one slot: `forward(call) -> output`, of the shape of `call.output`.

    Weights may be wider than the activations (float32 beside bfloat16): a part computes in the type
    of its input.
    """

    @abstractmethod
    def forward(self, call: SlotCall) -> Tensor:
        """The slot's new output."""

    def layouts(self, site: Site) -> dict[str, Layout]:
        """The layout of each parameter that is not simply held whole, in a slot at this site."""
        return {}


POSITION_STRATEGIES = (None, "add", "concat", "mlpconcat", "biasadd")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What every method's configuration can say (NeMo's `layer_selection` and `weight_tying`).

    Args:
        layer_selection: layers that get parts, numbered from 1 over the whole model; None: all.
            What lies before the first layer is no layer: it is always selected.
        weight_tying: the parts of all layers at one place share their weights.
        position_embedding_strategy: how a tied part learns which layer it is in.
    """

    layer_selection: tuple[int, ...] | None = None
    weight_tying: bool = False
    position_embedding_strategy: str | None = None

    def __post_init__(self) -> None:
        if self.position_embedding_strategy not in POSITION_STRATEGIES:
            known = ", ".join(str(name) for name in POSITION_STRATEGIES)
            raise UserError(
                f"position_embedding_strategy={self.position_embedding_strategy!r}: one of {known}"
            )

    def selects(self, site: Site) -> bool:
        """Whether the method may have a part at a site."""
        chosen = self.layer_selection
        return chosen is None or site.layer < 0 or site.layer + 1 in chosen

    def create(self, site: Site) -> Part | None:
        """The part for a slot at this site, or None where the method has none."""
        raise NotImplementedError

    def replaces(self, name: str) -> bool:
        """Whether the adapter has its own copy of this parameter of the base."""
        return False

    def tie(self, parts: list[tuple[Site, Part]]) -> None:
        """Lets parts share parameters, once all of them are made."""
        if self.weight_tying:
            first: dict[str, Part] = {}
            for site, part in parts:
                if (owner := first.setdefault(site.name, part)) is not part:
                    share_parameters(owner, part)


def share_parameters(owner: nn.Module, other: nn.Module) -> None:
    """Makes `other` use the parameters of `owner`, wherever it has one of that name."""
    for name, parameter in owner.named_parameters():
        path, _, leaf = name.rpartition(".")
        try:
            module = other.get_submodule(path)
        except AttributeError:
            continue
        if leaf in module._parameters:
            setattr(module, leaf, parameter)


class PartLinear(nn.Linear):
    """A linear layer that computes in the type of its input, whatever its weights' type."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


INIT_METHODS: dict[str, Any] = {
    # The names and numbers of NeMo's `_get_init_fn`; "uniform" is torch's own default for Linear.
    "xavier": nn.init.xavier_normal_,
    "normal": partial(nn.init.normal_, mean=0.0, std=0.2),
    "kaiming": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "uniform": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "zero": nn.init.zeros_,
}


def initialise(weight: Tensor, method: str, key: str) -> None:
    """Fills a weight by a named method; `key` is the configuration key for the error."""
    if method not in INIT_METHODS:
        raise UserError(f"{key}={method!r} is not known: use one of {', '.join(INIT_METHODS)}")
    with torch.no_grad():
        INIT_METHODS[method](weight)
