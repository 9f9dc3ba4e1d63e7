"""The base of all parts."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.ranks import ALONE, Ranks
from graftwerk.adapters.slots import Site, SlotCall
from graftwerk.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How one parameter lies over tensor-parallel ranks.

    `dim`: the dimension that is split; None: every rank holds the whole. `blocks`: the dimension
    is this many runs, each split apart. `partial_grad`: each rank's gradient of a whole parameter
    is one summand, to be added up before clipping. `size`: of the whole dimension, where the shares
    may differ by one; 0: all are alike.
    """

    dim: int | None = None
    blocks: int = 1
    partial_grad: bool = False
    size: int = 0


@dataclass(frozen=True)
class Collectives:
    """What tensor-parallel ranks add up in a forward and in a backward pass: one word for each
    all-reduce, with the shape of what it carries."""

    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()


class Part(nn.Module, ABC):
    """What one adapter does in one slot: `forward(call) -> output`, of the shape of `call.output`.

    Weights may be wider than the activations (float32 beside bfloat16): a part computes in the type
    of its input. `unmergeable` says why a part cannot be merged into the base's weights, if so;
    `unsuited` why it has no meaning in a block of a composition, by the block's name. `whole_row`:
    what it does at a token depends on tokens behind it; `whole_text`: on all tokens of its text.
    `adapter` and `site` are set when it is added to a model. `ranks` are those that
    split the slot's input, so that its output on each is a summand of the whole; alone in all slots
    whose output is no sum.
    """

    unmergeable: str | None = "it computes what the weights of a projection cannot hold"
    unsuited: ClassVar[dict[str, str]] = {}
    whole_row: bool = False
    whole_text: bool = False
    adapter: str = ""
    site: Site
    ranks: Ranks = ALONE
    method: Any = None  # of a union's methods the one that made it

    @abstractmethod
    def forward(self, call: SlotCall) -> Tensor:
        """The slot's new output."""

    def unfreeze(self) -> None:
        """Makes trainable what is trained."""
        self.requires_grad_(True)

    def attach(self, sublayer: nn.Module) -> None:
        """Gives a new part the sublayer that owns its slot, in case it reads the base's weights.

        Over several devices the part has its share already, as the sublayer has.
        """

    def place(self, index: int, count: int) -> None:
        """Tells a part that shares its weights in which of `count` layers it is."""

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in] of a projection that does what it and the part do together.

        Where the slot's output feeds a projection: that one's weight, transposed.
        """
        raise NotImplementedError(self.unmergeable)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The bias [out] of that projection."""
        return bias

    def layouts(self, site: Site) -> dict[str, Layout]:
        """The layout of each parameter that is not simply held whole, in a slot at this site."""
        return {}

    def collectives(self, site: Site, sequence: bool = False) -> Collectives:
        """What the part itself sends in a slot at this site where features are split.

        Nothing, for a method whose layouts say all. `sequence`: between sublayers, rows are split.
        """
        return Collectives()


POSITION_STRATEGIES = ("add", "concat", "mlpconcat", "biasadd")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What every method's configuration can say (NeMo's `layer_selection` and `weight_tying`).

    Args:
        layer_selection: layers that get parts, numbered from 1 over the whole model; None: all.
            What lies before the first layer is no layer: it is always selected.
        leave_out: layers without parts, numbered from 0 (AdapterHub's `leave_out`).
        weight_tying: the parts of all layers of a stack at one place share their weights.
        position_embedding_strategy: how a tied part learns which layer it is in
            (`methods.tied.LayerPosition`); None: not at all.

    Raises:
        UserError: for a strategy that is not known, has nothing to tell apart, or that the method
            cannot use.
    """

    takes_position: ClassVar[bool] = False  # whether the method's parts can be told their layer

    layer_selection: tuple[int, ...] | None = None
    leave_out: tuple[int, ...] = ()
    weight_tying: bool = False
    position_embedding_strategy: str | None = None

    def __post_init__(self) -> None:
        strategy = self.position_embedding_strategy
        if strategy is None:
            return
        key = f"position_embedding_strategy={strategy!r}"
        if strategy not in POSITION_STRATEGIES:
            raise UserError(f"{key}: use null or one of {', '.join(POSITION_STRATEGIES)}")
        if not self.takes_position:
            method = type(self).__name__.removesuffix("Config")
            raise UserError(f"{key}: {method} has no use for it, adapters and LoRA have: set null")
        if not self.weight_tying:
            raise UserError(f"{key} tells tied layers apart: set weight_tying=True, or null here")

    def places_asked(self) -> str:
        """Where the method's parts are to go, for an error where there is no such place."""
        return f"{type(self).__name__} with layer_selection={self.layer_selection}"

    @property
    def columns(self) -> int:
        """Virtual tokens that the method puts before every row."""
        return getattr(self, "virtual_tokens", 0)

    @property
    def shift(self) -> int:
        """By how much the positions of a row's own tokens move back."""
        return self.columns

    @property
    def distances(self) -> str | None:
        """What a T5's table of distances says of the method's prefixes, if it has any."""
        return None

    def selects(self, site: Site) -> bool:
        """Whether the method may have a part at a site."""
        chosen = self.layer_selection
        if site.layer < 0 or site.name == "lm_input":
            return True
        return site.layer not in self.leave_out and (chosen is None or site.layer + 1 in chosen)

    def create(self, site: Site) -> Part | None:
        """The part for a slot at this site, or None where the method has none."""
        raise NotImplementedError

    def replaces(self, name: str) -> bool:
        """Whether the adapter has its own copy of this parameter of the base."""
        return False

    def tie(self, parts: list[tuple[Site, Part]]) -> None:
        """Lets parts share parameters, once all of them are made."""
        if not self.weight_tying:
            return
        groups: dict[tuple[str, str], list[Part]] = {}
        for site, part in parts:
            groups.setdefault((site.name, site.stack), []).append(part)
        for group in groups.values():
            for index, part in enumerate(group):
                part.place(index, len(group))
                if part is not group[0]:
                    share_parameters(group[0], part)


def share_parameters(owner: nn.Module, other: nn.Module) -> None:
    """Makes `other`, a module of the same form, use the parameters of `owner`."""
    for name, parameter in owner.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(path), leaf, parameter)


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
