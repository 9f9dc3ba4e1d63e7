"""Lightning's strategies for a model on one device and for one on a mesh of processes.

Both write and read what has no layout: whole tensors under global names. The module gathers and
takes shares; Lightning's own way would keep one stage's.
"""

from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_only
from torch import nn
from torch.optim import Optimizer


class State(Protocol):
    """What checkpoints hold of a LightningModule, of the whole model whatever its layout."""

    def whole(self) -> dict[str, torch.Tensor]: ...

    def of_optimizer(self, optimizer: Optimizer) -> dict[str, Any]: ...

    def load_optimizer(self, optimizer: Optimizer, saved: dict[str, Any]) -> None: ...


class WholeStates(Strategy):
    """Checkpoints without a layout."""

    @property
    def _state(self) -> State:
        return self.lightning_module.state  # type: ignore[return-value,union-attr]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._state.whole()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return self._state.of_optimizer(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self._state.load_optimizer(optimizer, saved)


class OneDevice(WholeStates, SingleDeviceStrategy):
    """A single process."""


class ManyDevices(WholeStates, DDPStrategy):
    """Processes on a mesh: ranks, devices and collectives, without DDP's wrapper.

    The module reduces its gradients by itself. Each process knows its own device only, since srun
    may show it one GPU or all of the node's.
    """

    def __init__(self, device: torch.device, environment: ClusterEnvironment, rank: int):
        super().__init__(parallel_devices=[device], cluster_environment=environment)
        self.device, self.rank = device, rank

    @property
    def root_device(self) -> torch.device:
        return self.device

    def set_world_ranks(self) -> None:
        rank_zero_only.rank = self.rank  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer) -> None:
        """As for one device: there is nothing to wrap.

        DDP's own would overwrite all weights with the first process's wherever it does not fit.
        """
        self.model_to_device()
        Strategy.setup(self, trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model
