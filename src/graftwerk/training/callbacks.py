"""Callbacks: the checkpoint to go on from, leaving in time, and progress in plain lines."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar

from graftwerk.errors import storing
from graftwerk.training.module import LearningModule
from graftwerk.training.peers import any_of
from graftwerk.training.stopping import Interrupted
from graftwerk.training.world import World


class TopCheckpoints(ModelCheckpoint):
    """The best checkpoints by the monitored metric, saved when a validation ends."""

    def best_path(self) -> Path | None:
        """The best that is still there: a killed run may have removed a file it had noted."""
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(self.best_k_models.items(), key=lambda item: sign * float(item[1]))
        return next((Path(path) for path, _ in ranked if Path(path).is_file()), None)


class LastCheckpoint(Checkpoint):
    """Keeps the newest state in one file, and stops a run in time by raising `Interrupted`.

    Saves when a validation ends (an epoch, without validation), every `every_n_steps`, at the last
    step, and when the run has to stop: after `seconds`, or because `world.stop` says so in any of
    the processes. It is called after `TopCheckpoints`, whose state is part of the file.

    No state is saved between a step and the validation that belongs to it, but where the run has to
    stop within that validation: then the file says so, and the next run begins with it.

    Args:
        path: of the file; None: save nothing.
        seconds: of this process's run, or None.
        every_n_steps: 0: never between validations.
        world: this process among the others.
    """

    def __init__(
        self,
        path: Path | None,
        seconds: float | None = None,
        every_n_steps: int = 0,
        world: World | None = None,
    ):
        self.path = path
        self.every_n_steps = every_n_steps
        self.deadline = time.monotonic() + seconds if seconds is not None else None
        self.world = world or World()
        self.stop = self.world.stop
        self.unvalidated = False  # whether the validation of the step that was saved is still due

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's handler of SIGTERM would broadcast from wherever it interrupts a process.
        trainer._signal_connector.register_signal_handlers = lambda: None
        # Lightning restores the state and runs the loop without asking anyone in between; and it
        # does not run at all where all steps are done.
        loop = trainer.fit_loop
        trainer.fit_loop.run = partial(self._run, trainer, type(loop).run.__get__(loop))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not before the optimizer is there: what is wrong with its keys leaves no folder.
        if self.path is not None and trainer.is_global_zero:
            with storing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)

    def _run(self, trainer: pl.Trainer, steps: Callable[[], None]) -> None:
        if self.unvalidated:
            self.stop.polled = True
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True
            loop._has_run = False  # the loop over steps goes on as from a state saved behind it
        steps()

    def state_dict(self) -> dict[str, Any]:
        return {"unvalidated": self.unvalidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unvalidated = state_dict["unvalidated"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LearningModule)
        pl_module.must_stop = lambda: self._reason() is not None
        self.stop.polled = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        fetcher: Any = trainer.fit_loop._data_fetcher
        if trainer.enable_validation and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            return  # it stops and saves
        step = trainer.global_step
        at_end = trainer.max_steps is not None and 0 < trainer.max_steps <= step
        assert isinstance(pl_module, LearningModule)
        stops = not at_end and pl_module.any_must_stop()
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        if at_end or stops or due:
            self._save(trainer)
        if stops:
            raise Interrupted(self._reason() or "another process")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        if trainer.sanity_checking or not any_of(self._reason() is not None, self.world):
            return
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
        self.unvalidated = True
        self._save(trainer)
        raise Interrupted(self._reason() or "another process")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.unvalidated = False
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path)

    def _reason(self) -> str | None:
        if self.stop.reason is None and self.deadline and time.monotonic() >= self.deadline:
            self.stop.ask("exp_manager.max_time_per_run")
        return self.stop.reason


class Bar(RichProgressBar):
    """Lightning's bar on a terminal, with short numbers and no version."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)  # type: ignore[assignment]
        items.pop("v_num", None)
        return {key: _short(value) for key, value in items.items()}


class Lines(ProgressBar):
    """Progress where standard output is no terminal: a plain line now and then, by rank zero."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.enabled = True
        self.started, self.first_step = time.monotonic(), 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started, self.first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == 1:
            keys = ("train_loss", "lr", "samples/s", "tokens/s")
            self._say(trainer, keys, self._left(trainer, step))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._say(trainer, ("val_loss",), "")

    def _say(self, trainer: pl.Trainer, keys: tuple[str, ...], left: str) -> None:
        if not self.enabled or not trainer.is_global_zero:
            return
        total = f"/{trainer.max_steps}" if (trainer.max_steps or 0) > 0 else ""
        metrics = trainer.callback_metrics
        shown = [f"{key} {_short(float(metrics[key]))}" for key in keys if key in metrics]
        words = [f"step {trainer.global_step}{total}", f"epoch {trainer.current_epoch + 1}", *shown]
        print("  ".join([*words, *([left] if left else [])]), flush=True)

    def _left(self, trainer: pl.Trainer, step: int) -> str:
        done = step - self.first_step
        if done <= 0 or not trainer.max_steps or trainer.max_steps < 0:
            return ""
        seconds = (trainer.max_steps - step) * (time.monotonic() - self.started) / done
        return f"left {time.strftime('%H:%M:%S', time.gmtime(seconds))}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
