"""The best weights of each adapter of a sweep, by its own validation loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from graftwerk.training.copies import owner_of
from graftwerk.training.module import LearningModule


def best_of(found: Mapping[str, tuple[int, float | None]]) -> tuple[str, float | None]:
    """The name and loss of the best of what `BestOfEach.found` gives; the first without losses."""
    name = min(found, key=lambda name: _or_infinite(found[name][1]))
    return name, found[name][1]


def _or_infinite(loss: float | None) -> float:
    return float("inf") if loss is None else loss


class BestOfEach(pl.Callback):
    """Follows the validation losses of the copies of a batch; keeps the best weights of each.

    What it holds is part of each checkpoint, whole tensors under global names.

    Args:
        module: with the adapters.
        names: of the adapters, as `val_loss_of_<name>` has them.
        keeps: whether the weights of the best validation stay, or those of the last.
    """

    def __init__(self, module: LearningModule, names: Sequence[str], keeps: bool):
        self.module, self.keeps = module, keeps
        self.owned = {name: [p for p in module.everywhere if owner_of(p) == name] for name in names}
        self.weights: dict[str, Tensor] = {}  # of trained parameters here, each at its own step
        self.validated: dict[str, tuple[int, float]] = {}  # (step, loss), the best or the last

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for name, owned in self.owned.items():
            loss = float(trainer.callback_metrics[f"val_loss_of_{name}"])
            before = self.validated.get(name, (0, float("inf")))[1]
            if not self.keeps:
                self.validated[name] = trainer.global_step, loss
            elif loss < before:  # what is no number is never the best
                self.validated[name] = trainer.global_step, loss
                trained = self.module.trained
                self.weights |= {p: trained[p].detach().clone() for p in owned if p in trained}

    def restore(self) -> None:
        """Puts the best weights of each adapter back."""
        with torch.no_grad():
            for name, tensor in self.weights.items():
                self.module.trained[name].copy_(tensor)

    def found(self, step: int) -> dict[str, tuple[int, float | None]]:
        """By adapter the step of its weights, once they are restored, and their validation loss.

        None where these weights have not been validated, or to no number.
        """
        known: dict[str, tuple[int, float | None]] = {name: (step, None) for name in self.owned}
        return known | {
            name: (at, loss)
            for name, (at, loss) in self.validated.items()
            if (self.keeps or at == step) and loss < float("inf")
        }

    def state_dict(self) -> dict[str, Any]:
        # All processes of a replica save at once.
        placement, everywhere = self.module.placement, self.module.everywhere
        weights = dict(self.weights)
        if self.module.mesh.model_parallel:
            known = [p for name in self.validated for p in self.owned[name]] if self.keeps else []
            weights = placement.gathered(weights, {p: everywhere[p] for p in known})
        return {"weights": weights, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated = {name: tuple(found) for name, found in state_dict["validated"].items()}
        trained = self.module.trained
        self.weights = {
            name: self.module.placement.share(tensor, trained[name]).to(trained[name].device)
            for name, tensor in state_dict["weights"].items()
            if name in trained
        }
