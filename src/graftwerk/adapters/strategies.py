"""Strategies: how an adapter's output and its input become one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.adapters.access import AccessMixin


class AbstractAdapterStrategy(ABC):
    """A function of (input, adapter); no module: it has no weights."""

    @abstractmethod
    def forward(self, input: Any, adapter: nn.Module, *, module: Any) -> Any:
        """The result, of the shape of `input`.

        Args:
            input: the module's output, or that of the adapter before.
            adapter: the adapter to call.
            module: the `AdapterModuleMixin` that holds it, with all others in `adapter_layer`.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def as_config(self) -> dict[str, Any]:
        """What makes an equal strategy, for a file.

        Raises:
            ValueError: where the class does not say.
        """
        raise ValueError(
            f"the strategy {type(self).__qualname__} cannot be written to a file: "
            f"give the class as_config(), which returns its _target_ and arguments"
        )


class ReturnResultAdapterStrategy(AbstractAdapterStrategy):
    """The adapter's output alone. A list or tuple becomes its arguments, a dict those by name."""

    def forward(self, input: Any, adapter: nn.Module, *, module: Any) -> Any:
        if isinstance(input, list | tuple):
            return adapter(*input)
        if isinstance(input, dict):
            return adapter(**input)
        return adapter(input)

    def as_config(self) -> dict[str, Any]:
        return {"_target_": ReturnResultAdapterStrategyConfig._target_}


@dataclass
class ReturnResultAdapterStrategyConfig:
    """Settings of `ReturnResultAdapterStrategy`."""

    _target_: str = "graftwerk.adapters.strategies.ReturnResultAdapterStrategy"


class ResidualAddAdapterStrategy(AbstractAdapterStrategy):
    """`input + adapter(input)`.

    Args:
        stochastic_depth: in training, the probability with which a forward pass leaves the adapter
            out: one draw for the whole batch, and what is kept is divided by 1 - p (Huang et al.
            2016).
        l2_lambda: in training, `l2_lambda * mean over the batch of sum((input - result)^2)` is
            registered with the adapter as `adapter_loss`; `AccessMixin.get_module_registry` has it.

    Raises:
        ValueError: for a probability outside of [0, 1].
    """

    def __init__(self, stochastic_depth: float = 0.0, l2_lambda: float = 0.0):
        self.stochastic_depth, self.l2_lambda = stochastic_depth, l2_lambda
        self._check()

    def _check(self) -> None:
        if not 0 <= self.stochastic_depth <= 1:
            raise ValueError(f"stochastic_depth={self.stochastic_depth}: must be from 0 to 1")

    def forward(self, input: Tensor, adapter: nn.Module, *, module: Any) -> Tensor:
        output = self.compute_output(input, adapter, module=module)
        if module.training and self.stochastic_depth != 0:
            output = self.apply_stochastic_depth(output, input, adapter, module=module)
        result = input + output
        self.compute_auxiliary_losses(result, input, adapter, module=module)
        return result

    def compute_output(self, input: Tensor, adapter: nn.Module, *, module: Any) -> Tensor:
        """The adapter's output; a subclass may call it in another way."""
        return adapter(input)

    def apply_stochastic_depth(
        self, output: Tensor, input: Tensor, adapter: nn.Module, *, module: Any
    ) -> Tensor:
        """The output, or zeros."""
        self._check()  # the attribute may have been set since
        keep = 1 - self.stochastic_depth
        draw = torch.empty([1] * output.ndim, dtype=output.dtype, device=output.device)
        draw.bernoulli_(keep)
        return output * (draw / keep if keep > 0 else draw)

    def compute_auxiliary_losses(
        self, output: Tensor, input: Tensor, adapter: nn.Module, *, module: Any
    ) -> None:
        """Registers the L2 loss, in training of a trainable adapter.

        Raises:
            ValueError: where the adapter has no place for it.
        """
        if not (module.training and self.l2_lambda > 0):
            return
        if not isinstance(adapter, AccessMixin):
            raise ValueError(
                f"l2_lambda={self.l2_lambda}: the adapter {type(adapter).__qualname__} must be an "
                f"AdapterModuleUtil, which registers the loss; or set it to 0"
            )
        if adapter.access_cfg.get("compute_adapter_loss", True) and any(
            parameter.requires_grad for parameter in adapter.parameters()
        ):
            distance = (input - output).square().reshape(len(input), -1).sum(dim=-1).mean()
            adapter.register_accessible_tensor("adapter_loss", self.l2_lambda * distance)

    def as_config(self) -> dict[str, Any]:
        return {
            "_target_": ResidualAddAdapterStrategyConfig._target_,
            "stochastic_depth": self.stochastic_depth,
            "l2_lambda": self.l2_lambda,
        }


@dataclass
class ResidualAddAdapterStrategyConfig:
    """Settings of `ResidualAddAdapterStrategy`."""

    stochastic_depth: float = 0.0
    l2_lambda: float = 0.0
    _target_: str = "graftwerk.adapters.strategies.ResidualAddAdapterStrategy"
