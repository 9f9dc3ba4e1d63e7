"""Adapter modules under the names of NeMo's documentation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from graftwerk.adapters.access import AccessMixin
from graftwerk.adapters.mixin import read_config
from graftwerk.adapters.strategies import (
    AbstractAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
)
from graftwerk.adapters.targets import instantiate

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "hardtanh": nn.Hardtanh,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class AdapterModuleUtil(AccessMixin):
    """What adapter modules have in common: a strategy, and a place for auxiliary losses."""

    adapter_strategy: AbstractAdapterStrategy

    def setup_adapter_strategy(self, adapter_strategy: Any) -> None:
        """Sets `adapter_strategy`: a strategy, its configuration, or None for the default.

        Raises:
            AttributeError: for anything else.
        """
        if adapter_strategy is None:
            adapter_strategy = self.get_default_strategy_config()
        if not isinstance(adapter_strategy, AbstractAdapterStrategy):
            try:
                config = read_config(adapter_strategy)
            except ValueError as error:
                raise AttributeError(f"adapter_strategy: {error}") from None
            adapter_strategy = instantiate(config) if isinstance(config, dict) else config
        if not isinstance(adapter_strategy, AbstractAdapterStrategy):
            kind = type(adapter_strategy).__qualname__
            raise AttributeError(f"adapter_strategy is a {kind}, no AbstractAdapterStrategy")
        self.adapter_strategy = adapter_strategy

    def get_default_strategy_config(self) -> Any:
        """The strategy where none is given."""
        return ResidualAddAdapterStrategyConfig()

    def adapter_unfreeze(self) -> None:
        """Makes the adapter's weights trainable; a subclass may leave some out."""
        assert isinstance(self, nn.Module)
        self.requires_grad_(True)


class LinearAdapter(nn.Module, AdapterModuleUtil):
    """A bottleneck with a layer norm, born with zeros (Houlsby et al. 2019).

    `pre`: norm, down, activation, up. `post`: down, activation, up, norm. What comes last is zero
    at birth, so that the adapter changes nothing. Input and output are [..., in_features].

    Args:
        in_features: size of input and output.
        dim: size of the bottleneck.
        activation: identity, hardtanh, relu, selu, swish, silu or gelu.
        norm_position: `pre` or `post`.
        dropout: probability, on the result, in training.
        adapter_strategy: a strategy or its configuration; None: residual addition.

    Raises:
        ValueError: for an argument that is none of these.
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        activation: str = "swish",
        norm_position: str = "pre",
        dropout: float = 0.0,
        adapter_strategy: AbstractAdapterStrategy | DictConfig | Mapping | Any = None,
    ):
        super().__init__()
        for key, size in (("in_features", in_features), ("dim", dim)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"LinearAdapter: {key}={size!r} must be an integer of at least 1")
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"LinearAdapter: activation={activation!r} is not known: {known}")
        if norm_position not in ("pre", "post"):
            raise ValueError(f"LinearAdapter: norm_position={norm_position!r}: pre or post")
        if not 0 <= dropout <= 1:
            raise ValueError(f"LinearAdapter: dropout={dropout} must be from 0 to 1")
        self.in_features, self.dim, self.activation = in_features, dim, activation
        self.norm_position = norm_position
        bottleneck = [
            nn.Linear(in_features, dim, bias=False),
            ACTIVATIONS[activation](),
            nn.Linear(dim, in_features, bias=False),
        ]
        norm = nn.LayerNorm(in_features)
        layers = [norm, *bottleneck] if norm_position == "pre" else [*bottleneck, norm]
        self.module = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.setup_adapter_strategy(adapter_strategy)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros what comes last."""
        for parameter in self.module[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(x)
        return x if self.dropout is None else self.dropout(x)

    def as_config(self) -> dict[str, Any]:
        """What makes an equal adapter, its weights aside."""
        return {
            "_target_": LinearAdapterConfig._target_,
            "in_features": self.in_features,
            "dim": self.dim,
            "activation": self.activation,
            "norm_position": self.norm_position,
            "dropout": 0.0 if self.dropout is None else self.dropout.p,
            "adapter_strategy": self.adapter_strategy.as_config(),
        }


@dataclass
class LinearAdapterConfig:
    """Settings of `LinearAdapter`."""

    in_features: int
    dim: int
    activation: str = "swish"
    norm_position: str = "pre"
    dropout: float = 0.0
    adapter_strategy: Any = field(default_factory=ResidualAddAdapterStrategyConfig)
    _target_: str = "graftwerk.nemo.adapter_modules.LinearAdapter"
