"""The LightningModule: one training step is one optimizer step, whatever lies inside it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from graftwerk.adapters.fusion import Fusion
from graftwerk.adapters.slots import Slot
from graftwerk.data.dataset import Batch
from graftwerk.errors import UserError
from graftwerk.parallel.pipeline import Answer
from graftwerk.parallel.placement import Placement
from graftwerk.parallel.vocabulary import Vocabulary, split_logits
from graftwerk.training.adapter_drop import LayerChoice
from graftwerk.training.copies import by_copy, by_owner, for_copies, names_of_copies, owner_of
from graftwerk.training.gradients import GradientBucket
from graftwerk.training.loggers import MetricsCSV
from graftwerk.training.loss import label_losses
from graftwerk.training.optim import build_optimizer
from graftwerk.training.schedules import build_schedule
from graftwerk.training.sweep import Point
from graftwerk.training.trained_state import TrainedState

# What travels with the gradients, and what validation sums.
LOSS, WEIGHT, ROWS, TOKENS, STOP = range(5)
SUMS = 5


@dataclass(frozen=True)
class TrainingSettings:
    """What the module reads of the stage's configuration.

    Args:
        optim: the `model.optim` section.
        max_steps: optimizer steps of the whole run; None: no end.
        steps_per_epoch: optimizer steps of an epoch, `limit_train_batches` applied.
        gradient_clip_val: the largest norm of all gradients; 0 clips nothing.
        log_every_n_steps: steps between two lines of metrics.
        seed: of what draws from torch's random state.
        rank: of this process among the data-parallel ones.
        autocast: run forward passes under bfloat16 autocast (weights stay float32).
        monitor: the metric that a ReduceLROnPlateau schedule watches.
        drop: the layers in which adapters do nothing, chosen anew for each step.
        sweep: the adapters that have learning rates and decays of their own.
    """

    optim: Mapping[str, Any]
    max_steps: int | None
    steps_per_epoch: int
    gradient_clip_val: float = 0.0
    log_every_n_steps: int = 10
    seed: int = 1234
    rank: int = 0
    autocast: bool = False
    monitor: str = "val_loss"
    drop: LayerChoice | None = None
    sweep: Sequence[Point] = ()


class LearningModule(pl.LightningModule):
    """Trains whatever parameters of `model` require gradients.

    A batch is this process's `list[Batch]` of micro-batches of one optimizer step. Its gradients
    are those of the summed loss; one reduction adds them up over processes together with the label
    weight that divides them. Under a `Parallel` the loss is the sum over its copies of the batch;
    what active fusions add to the loss, they add once a step.

    Dropout follows from the batch's `chance`. What still draws from torch's random state (that of
    attention's weights) finds it set from (seed, step, rank) before each step: it needs no saved
    state and does not depend on when validation ran.
    """

    def __init__(
        self, model: nn.Module, settings: TrainingSettings, placement: Placement | None = None
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.settings = settings
        self.placement = placement or Placement(model)  # type: ignore[arg-type]
        self.mesh = self.placement.mesh
        # What is trained on all stages of a pipeline, and what of it lies on this one.
        self.everywhere = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.everywhere:
            raise UserError("nothing to train: no parameter of the model requires a gradient")
        self.fused = any(".fusion_layer." in name for name in self.everywhere)
        # A fusion's temperature moves with training too.
        moved = {n: b for n, b in model.named_buffers() if ".fusion_layer." in n}
        self.state = TrainedState(self.placement, self.everywhere, moved)
        self.trained = self.state.trained
        self.copies = names_of_copies(getattr(model, "active", None))
        self.diverged: set[str] = set()  # points of a sweep whose numbers are none any more
        self.seconds_before = 0.0  # of the runs that this one goes on from
        self.started = time.monotonic()
        self.reported = False
        self.must_stop: Callable[[], bool] = lambda: False  # asked once a step, of every process
        self.validated: tuple[int, float] | None = None  # the last: (step, loss)
        self.mark: Callable[[str], None] = lambda phase: None  # told what of a step begins

    # ---- set-up

    def configure_optimizers(self) -> Any:
        apart = [
            (point.optim, [p for n, p in self.trained.items() if owner_of(n) == point.name])
            for point in self.settings.sweep
        ]
        optimizer = build_optimizer(self.settings.optim, self.trained.values(), apart)
        schedule = build_schedule(
            self.settings.optim.get("sched"),
            optimizer,
            [float(group["lr"]) for group in optimizer.param_groups],
            self.settings.max_steps,
        )
        scheduler = {"scheduler": schedule, "interval": "step", "monitor": self.settings.monitor}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        self.window = torch.zeros(SUMS, device=self.device)  # sums since the last line of metrics
        self.validation = torch.zeros(SUMS, device=self.device)
        # Loss and weight of each source of validation rows, where there are several.
        names = self._val_names()
        self.by_source = torch.zeros(len(names), 2, device=self.device)
        self.by_adapter = torch.zeros(len(self.copies), device=self.device)
        for logger in self.loggers:
            if isinstance(logger, MetricsCSV):
                logger.add_columns(
                    [f"val_loss_{name}" for name in (*names, *(f"of_{n}" for n in self.copies))]
                )
                logger.add_columns([f"lr_of_{point.name}" for point in self.settings.sweep])
        self.paused = 0.0  # seconds of validation within the window

    def on_train_start(self) -> None:
        self.owned = by_owner(getattr(self.model, "active", None), self.everywhere)
        self.bucket = GradientBucket(self.trained, SUMS, self.owned, self.placement, self.device)
        self.started = self.window_start = time.monotonic()
        self._set_modes()

    def _set_modes(self) -> None:
        # What is frozen computes as it will later; only dropout of what is trained is switched on.
        whole = len(self.everywhere) == len(dict(self.model.named_parameters()))
        self.model.train(whole)
        for module in self.model.modules():
            if isinstance(module, Slot):
                for part in (*module.adapter_layer.values(), *module.fusion_layer.values()):
                    part.train(any(p.requires_grad for p in part.parameters()))
        # By steps, of which there are as many in any layout, not by micro-batches.
        fusions = [m for m in self.model.modules() if isinstance(m, Fusion) and m.training]
        self.cooling = [fusion for fusion in fusions if fusion.config.temperature]
        for fusion in self.cooling:
            fusion.by_step = True

    def transfer_batch_to_device(
        self, batch: list[Batch], device: torch.device, dataloader_idx: int
    ) -> list[Batch]:
        if device.type == "cpu":
            return batch
        return [micro.to(device, non_blocking=True) for micro in batch]

    # ---- training

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        settings, sums = self.settings, self.bucket.sums
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self._seed(step_seed(settings.seed, self.global_step, settings.rank))
        self.bucket.flat.zero_()
        with self._dropped():
            self._backward(batch)
        sums[STOP] += self.must_stop()
        self.mark("communication")
        self.bucket.reduce(partial=[STOP], staged=[LOSS, STOP])
        self.mark("optimizer")
        self.bucket.gradients.div_(sums[WEIGHT])
        norm = self.bucket.clip(settings.gradient_clip_val)
        self.window += sums
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        for fusion in self.cooling:
            fusion.cool()
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau | list | None):
            scheduler.step()
        self.mark("rest")
        # The first step too: something to see at once, and a loss that a checkpoint may monitor.
        if self.global_step % settings.log_every_n_steps == 0 or not self.reported:
            self._report(sums[LOSS] / sums[WEIGHT], norm, rates)

    def _seed(self, seed: int) -> None:
        # `torch.manual_seed` asks every back end; without a GPU that costs more than a small step.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @contextmanager
    def _dropped(self) -> Iterator[None]:
        """Within it adapters do nothing in the layers that this step leaves out."""
        if self.settings.drop is None:
            yield
            return
        model: Any = self.model
        model.set_active(model.active, self.settings.drop.at(self.global_step))
        try:
            yield
        finally:
            model.set_active(model.active)

    def _backward(self, batch: list[Batch]) -> None:
        """The gradients and sums of all micro-batches."""
        sums, pipeline = self.bucket.sums, self.placement.pipeline
        # The backward passes too: where logits are many, they are made anew there.
        with split_logits(self.model) as vocabulary:

            def loss_of(answer: Answer, micro: Batch) -> Tensor:
                loss = self._label_losses(answer, micro, vocabulary).sum()
                sums[LOSS] += loss.detach()
                return loss

            if pipeline is not None:
                with self._precision():
                    pipeline.step(batch, loss_of, self.mark)
            for micro in batch if pipeline is None else ():
                self.mark("forward")
                with self._precision():
                    loss = loss_of(partial(self.model, **micro.inputs()), micro)
                self.mark("backward")
                loss.backward()
        for micro in batch:
            if self.fused:  # a sum over labels, like the rest, which the labels' weight will divide
                more = self.model.fusion_loss() * micro.weights.sum()  # type: ignore[operator]
                if more.requires_grad:
                    more.backward()
                sums[LOSS] += more.detach()
            self._add(sums, micro)

    def _label_losses(self, answer: Answer, micro: Batch, vocabulary: Vocabulary | None) -> Tensor:
        """The weighted loss of each label; of many, no more logits are held than fit.

        `answer`: what the model says to the micro-batch, or what a `score` makes of its logits.
        """
        labels, weights = self._labels(micro)
        if micro.label_positions is None:  # the spans of a BERT
            return label_losses(answer(), labels, weights)

        def score(logits: Tensor, part: slice) -> Tensor:
            return label_losses(logits, labels[part], weights[part], vocabulary)

        return answer(score=score)

    def _labels(self, micro: Batch) -> tuple[Tensor, Tensor]:
        """Labels and weights of all copies of the batch, in the order of the model's rows."""
        copies, spans = max(len(self.copies), 1), micro.label_positions is None
        return for_copies(micro.labels, copies, spans), for_copies(micro.weights, copies, spans)

    def _precision(self) -> AbstractContextManager:
        if self.settings.autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @staticmethod
    def _add(sums: Tensor, micro: Batch) -> None:
        sums[WEIGHT] += micro.weights.sum()
        sums[ROWS] += micro.num_rows
        sums[TOKENS] += micro.num_tokens

    def _report(self, loss: Tensor, norm: Tensor, rates: list[float]) -> None:
        # The only place of a step that waits for the device.
        train_loss, grad_norm, rows, tokens = torch.stack(
            [loss, norm, self.window[ROWS], self.window[TOKENS]]
        ).tolist()
        broken = not np.isfinite(train_loss) or not np.isfinite(grad_norm)
        if broken and not self._others_go_on():
            raise FloatingPointError(
                f"step {self.global_step}: train_loss is {train_loss}, the gradients' norm "
                f"{grad_norm}: lower model.optim.lr, or set trainer.precision: 32"
            )
        now = time.monotonic()
        seconds = max(now - self.window_start - self.paused, 1e-9)
        self.window.zero_()
        self.window_start, self.paused = now, 0.0
        shown = {
            "train_loss": train_loss,
            "samples/s": rows / seconds,
            "tokens/s": tokens / seconds,
        }
        quiet = {"lr": rates[0], "grad_norm": grad_norm}
        own = zip(self.settings.sweep, rates[::2], strict=False)  # two groups a point
        quiet |= {f"lr_of_{point.name}": rate for point, rate in own}
        self._publish(shown, prog_bar=True)
        self._publish(quiet, prog_bar=False)
        self.reported = True
        if self.global_step % self.settings.log_every_n_steps == 0 or self.global_step == 1:
            self._write({**shown, **quiet})

    def _others_go_on(self) -> bool:
        """Whether there is a point of a sweep left whose gradients are numbers; names the others.

        No copy of the batch sees another, so what one point makes of its own stays there.
        """
        norms = zip(self.owned, self.bucket.norms.tolist(), strict=True)
        found = {str(owner_of(names[0])) for names, norm in norms if not np.isfinite(norm)}
        going = self.settings.sweep and 0 < len(found) < len(self.owned)
        for name in sorted(found - self.diverged) if going and self.trainer.is_global_zero else ():
            print(
                f"warning: step {self.global_step}: the gradients of {name} are no numbers any "
                f"more: the other points go on without it",
                flush=True,
            )
        self.diverged |= found
        return bool(going)

    def any_must_stop(self) -> bool:
        """Whether any process had to stop in the last step. One process need not wait for it."""
        if self.trainer.world_size == 1:
            return self.must_stop()
        return bool(self.bucket.sums[STOP].item())

    # ---- validation

    def on_validation_model_zero_grad(self) -> None:
        """Nothing: Lightning would drop the gradients, which are views that stay."""

    def on_validation_start(self) -> None:
        self.validation_start = time.monotonic()
        self.validation.zero_()
        self.by_source.zero_()
        self.by_adapter.zero_()

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        for micro in batch:
            with self._precision(), split_logits(self.model) as vocabulary:
                answer = partial(self.model, **micro.inputs())
                losses = self._label_losses(answer, micro, vocabulary)
            if self.copies:
                each = by_copy(losses, len(self.copies), micro.label_positions is None)
                self.by_adapter += each.detach().sum(1)
                losses = each.sum(0)
            self.validation[LOSS] += losses.sum().detach()
            self._add(self.validation, micro)
            if micro.origins is not None:
                of_label = torch.stack([losses.detach(), micro.weights], dim=1)
                self.by_source.index_add_(0, micro.origins, of_label)

    def on_validation_epoch_end(self) -> None:
        total = self.mesh.data.sum_(self.validation.clone())
        loss = _mean(total[LOSS], total[WEIGHT])
        self._publish({"val_loss": loss}, prog_bar=True)
        parts = self._val_losses() | self._losses_of_copies(total[WEIGHT])
        self._publish(parts, prog_bar=False)
        if self.trainer.sanity_checking:
            return
        self._write({"val_loss": loss, **parts})
        self.validated = (self.global_step, loss)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(self._watched(loss))

    def _val_names(self) -> list[str]:
        """The sources of validation rows, where there are several."""
        data = getattr(self.trainer, "datamodule", None)
        names: list[str] = list(getattr(data, "val_names", ()))
        return names if len(names) > 1 else []

    def _val_losses(self) -> dict[str, float]:
        """`val_loss_<name>` of each of several sources of validation rows."""
        names = self._val_names()
        if not names:
            return {}
        total = self.mesh.data.sum_(self.by_source.clone())
        # A validation that is cut short may not reach a source.
        seen = [(name, row) for name, row in zip(names, total, strict=True) if row[1]]
        return {f"val_loss_{name}": _mean(*row) for name, row in seen}

    def _losses_of_copies(self, weight: Tensor) -> dict[str, float]:
        """`val_loss_of_<adapter>` of each copy of the batch; they add up to the loss."""
        if not self.copies:
            return {}
        total = self.mesh.data.sum_(self.by_adapter.clone())
        each = zip(self.copies, total, strict=True)
        return {f"val_loss_of_{name}": _mean(loss, weight) for name, loss in each}

    def _watched(self, val_loss: float) -> float:
        metrics = {**self.trainer.callback_metrics, "val_loss": val_loss}
        if self.settings.monitor not in metrics:
            raise UserError(
                f"model.optim.sched.monitor={self.settings.monitor!r} is not known: use one of "
                f"{', '.join(metrics)}"
            )
        return float(metrics[self.settings.monitor])

    def on_validation_end(self) -> None:
        self.paused += time.monotonic() - self.validation_start

    # ---- metrics

    def _publish(self, metrics: dict[str, float], prog_bar: bool) -> None:
        # For the bar and for callbacks that monitor; the files get them from `_write`, whose step
        # is the optimizer's also after a resume.
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in metrics.items()}
        self.log_dict(tensors, prog_bar=prog_bar, logger=False, batch_size=1)

    def _write(self, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step=self.global_step)

    @property
    def seconds(self) -> float:
        """Of training and validation, over all the runs that made this state."""
        return self.seconds_before + time.monotonic() - self.started

    def val_loss_at(self, step: int) -> float | None:
        """The validation loss of the weights at a step, where they have been validated."""
        known = self.validated is not None and self.validated[0] == step
        return self.validated[1] if known and self.validated else None

    def _apply(self, fn: Any, recurse: bool = True) -> "LearningModule":
        # Lightning moves a module to its device and back. The model is there already, but for the
        # layers of other stages, which are nowhere.
        return self

    # ---- checkpoints: trained weights only, and where the data stands

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.state.own()

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> None:
        self.state.load(state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["graftwerk"] = {
            "seconds": self.seconds,
            "rows": data.samples_after(data.steps_per_epoch),
            "step_rows": data.step_rows,
            "groups": data.groups,
            "val_loss": self.val_loss_at(self.global_step),
            "sweep": self._points(),
        }

    def _points(self) -> list[tuple[str, dict[str, float]]]:
        """What tells the optimizer's groups apart: they have no names of their own."""
        return [(point.name, dict(point.optim)) for point in self.settings.sweep]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        saved, rows = checkpoint["graftwerk"], data.samples_after(data.steps_per_epoch)
        if (saved["rows"], saved["step_rows"]) != (rows, data.step_rows):
            raise UserError(
                f"the checkpoint to go on from was made with {saved['rows']} rows an epoch and "
                f"{saved['step_rows']} a step, this run has {rows} and {data.step_rows}: put the "
                f"data, model.global_batch_size and trainer.accumulate_grad_batches back, or set "
                f"exp_manager.resume_if_exists: False"
            )
        if saved.get("groups", 0) != data.groups:
            raise UserError(
                "the checkpoint to go on from was made with rows in another order: put "
                "model.data.packed_sequence_size and share_prefixes back as they were, or set "
                "exp_manager.resume_if_exists: False"
            )
        if saved.get("sweep", self._points()) != self._points():
            raise UserError(
                "the checkpoint to go on from was made with other points: put model.peft.sweep "
                "back as it was (points in their order, their lr and weight_decay), or set "
                "exp_manager.resume_if_exists: False"
            )
        self.seconds_before = saved["seconds"]
        if saved["val_loss"] is not None:
            self.validated = (checkpoint["global_step"], saved["val_loss"])
        epochs, steps = divmod(checkpoint["global_step"], self.settings.steps_per_epoch)
        data.set_consumed(epochs * rows + data.samples_after(steps))

    def on_train_epoch_start(self) -> None:
        # An epoch that `limit_train_batches` cuts short leaves the sampler in its middle.
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.global_step == self.current_epoch * self.settings.steps_per_epoch:
            data.set_consumed(self.current_epoch * data.samples_after(data.steps_per_epoch))


def _mean(loss: Tensor, weight: Tensor) -> float:
    return (loss / weight).item() if weight else float("nan")


def step_seed(seed: int, step: int, rank: int) -> int:
    """One 64-bit seed for each step of each process."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
