"""AdapterDrop as a callback, for Lightning's Trainer and for that of `transformers`."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import transformers
from torch import nn

from graftwerk.adapterhub.adapter_methods import AdapterMethods
from graftwerk.errors import UserError
from graftwerk.training.adapter_drop import LayerChoice


class AdapterDropCallback(pl.Callback):
    """Leaves layers without adapters in each training step; validation has them all.

    Args:
        layers: these layers always, or up to so many of the first ones, as chance says.
        seed: of chance.
    """

    def __init__(self, layers: int | Sequence[int], seed: int = 0):
        self.choice = LayerChoice(layers, seed)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        _skip(_model_in(pl_module), self.choice.at(trainer.global_step))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _skip(_model_in(pl_module), ())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _skip(_model_in(pl_module), ())


class AdapterDropTrainerCallback(transformers.TrainerCallback):
    """The same for `transformers.Trainer`.

    Args:
        layers: these layers always, or up to so many of the first ones, as chance says.
        seed: of chance.
    """

    def __init__(self, layers: int | Sequence[int], seed: int = 0):
        self.choice = LayerChoice(layers, seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _skip(_model_in(kwargs["model"]), self.choice.at(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _skip(_model_in(kwargs["model"]), ())  # an evaluation may come next


def _model_in(module: nn.Module) -> AdapterMethods:
    for inner in module.modules():
        if isinstance(inner, AdapterMethods):
            return inner
    raise UserError("AdapterDrop: there is no model of graftwerk.adapterhub in what is trained")


def _skip(model: AdapterMethods, layers: Sequence[int]) -> None:
    model.base.set_active(model.base.active, layers)
