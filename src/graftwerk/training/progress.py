"""How far a run is, in a small file for whoever looks after it."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from graftwerk.data.jsonl import write_json
from graftwerk.errors import storing


class Progress(Callback):
    """Rank zero writes `progress.json` with each line of metrics, with each validation, at the end.

    Keys: `stage`, `step`, `max_steps` (null: no end), `epoch` (from 1), `train_loss`, `val_loss`
    and `best_val_loss` (null where there is none yet), `seconds_per_step` (of this process,
    validation included), `seconds_left` (null where unknown), `updated` (ISO 8601, UTC).

    Args:
        path: of the file.
        stage: whose run it is.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.losses: dict[str, float | None] = dict.fromkeys(
            ("train_loss", "val_loss", "best_val_loss")
        )
        self.started, self.first_step = time.monotonic(), 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.losses)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.update(state_dict)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            with storing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started, self.first_step = time.monotonic(), trainer.global_step
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 or step == 1:  # type: ignore[attr-defined]
            self.losses["train_loss"] = _metric(trainer, "train_loss")
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = self.losses["val_loss"] = _metric(trainer, "val_loss")
        best = self.losses["best_val_loss"]
        if loss is not None and (best is None or loss < best):
            self.losses["best_val_loss"] = loss
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        # A folder that has vanished is not made anew: a checkpoint will complain of it.
        if not trainer.is_global_zero or not self.path.parent.is_dir():
            return
        module: Any = trainer.lightning_module
        step, per_epoch = trainer.global_step, module.settings.steps_per_epoch
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) / done if done > 0 else None
        total = trainer.max_steps if (trainer.max_steps or 0) > 0 else None
        content = {
            "stage": self.stage,
            "step": step,
            "max_steps": total,
            "epoch": -(-max(step, 1) // per_epoch),
            **self.losses,
            "seconds_per_step": seconds,
            "seconds_left": seconds * (total - step) if seconds and total else None,
            "updated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        write_json(self.path, content)


def _metric(trainer: pl.Trainer, name: str) -> float | None:
    """A metric's last value; what is no number JSON has no word for."""
    value = trainer.callback_metrics.get(name)
    return None if value is None or not value.isfinite() else float(value)
