"""Strategies under the names of NeMo's documentation."""

from graftwerk.adapters.strategies import (
    AbstractAdapterStrategy,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
    ReturnResultAdapterStrategyConfig,
)

__all__ = [
    "AbstractAdapterStrategy",
    "ResidualAddAdapterStrategy",
    "ResidualAddAdapterStrategyConfig",
    "ReturnResultAdapterStrategy",
    "ReturnResultAdapterStrategyConfig",
]
