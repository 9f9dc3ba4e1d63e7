"""The Lightning Trainer that the `trainer` and `exp_manager` sections describe.

Lightning refuses some of these keys under manual optimization (`gradient_clip_val`,
`accumulate_grad_batches`, `resume_from_checkpoint`): the module, the data module and the stage
carry them out, and they never reach it.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.loggers import Logger

from graftwerk.checkpoints.resume import LAST, CheckpointFiles
from graftwerk.errors import UserError
from graftwerk.parallel.strategy import ManyDevices, OneDevice
from graftwerk.training.best_of_each import BestOfEach
from graftwerk.training.callbacks import Bar, LastCheckpoint, Lines, TopCheckpoints
from graftwerk.training.world import World

MONITORS = ("val_loss", "train_loss")
PRECISIONS = {
    "32": torch.float32,
    "32-true": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}
CHECKPOINT_KEYS = (
    "monitor",
    "mode",
    "save_top_k",
    "filename",
    "save_last",
    "save_best_model",
    "save_nemo_on_train_end",
    "every_n_train_steps",
    "model_parallel_size",
)


@dataclass(frozen=True)
class Steps:
    """The length of a run in optimizer steps. `total` None: until `max_time`."""

    per_epoch: int
    total: int | None

    @classmethod
    def of(cls, trainer: DictConfig, per_epoch: int) -> "Steps":
        """From `max_epochs`, `max_steps` and `limit_train_batches`.

        Raises:
            UserError: where nothing ends the run, or nothing begins it.
        """
        limit = trainer.get("limit_train_batches")
        if isinstance(limit, int) and not isinstance(limit, bool):
            per_epoch = min(per_epoch, limit)
        elif limit is not None:
            per_epoch = int(per_epoch * limit)
        if per_epoch < 1:
            raise UserError(f"trainer.limit_train_batches={limit} leaves no step to train")
        epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
        bounds = [steps] if steps is not None and steps >= 0 else []
        bounds += [epochs * per_epoch] if epochs is not None and epochs >= 0 else []
        if not bounds and trainer.get("max_time") is None:
            raise UserError("nothing ends the run: set trainer.max_epochs, max_steps or max_time")
        return cls(per_epoch, min(bounds) if bounds else None)


def precision_of(trainer: DictConfig, device: torch.device) -> torch.dtype:
    """The type of `trainer.precision`: bfloat16 or float32; `auto`: which the device prefers."""
    name = str(trainer.get("precision", 32))
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if name.startswith("16"):
        raise UserError(
            f"trainer.precision={name}: float16 is not supported, its gradients would have to be "
            f"scaled; use bf16 or 32"
        )
    if name not in PRECISIONS:
        raise UserError(
            f"trainer.precision={name!r} is not known: use one of {', '.join(PRECISIONS)}, auto"
        )
    return PRECISIONS[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16; others are slower by it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AVX-512 BF16, which every CPU with AMX has too. Torch has no public word for it.
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def device_of(trainer: DictConfig, world: World) -> torch.device:
    """This process's device by `trainer.accelerator`: cpu, gpu (cuda), or auto."""
    accelerator = trainer.get("accelerator", "auto")
    if accelerator not in ("cpu", "gpu", "cuda", "auto"):
        raise UserError(f"trainer.accelerator={accelerator!r} is not known: use cpu, gpu or auto")
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if not visible:
        raise UserError(
            f"trainer.accelerator={accelerator}, but torch finds no GPU on this machine: set "
            f"trainer.accelerator: cpu, or check the driver and CUDA_VISIBLE_DEVICES"
        )
    if visible > 1 and world.local_rank >= visible:
        raise UserError(
            f"trainer.devices={trainer.devices}, but this machine shows {visible} GPUs: lower it"
        )
    return torch.device("cuda", world.local_rank if visible > 1 else 0)


def check_trainer(trainer: DictConfig, exp_manager: DictConfig) -> None:
    """Raises a UserError for what can be known wrong before anything is read."""
    precision_of(trainer, torch.device("cpu"))
    if trainer.get("logger"):
        raise UserError(
            "trainer.logger must be False: exp_manager makes the loggers "
            "(create_tensorboard_logger, create_wandb_logger)"
        )
    if trainer.get("enable_checkpointing") and not exp_manager.get("create_checkpoint_callback"):
        raise UserError(
            "trainer.enable_checkpointing=True contradicts "
            "exp_manager.create_checkpoint_callback=False: set both to one value"
        )
    params = exp_manager.get("checkpoint_callback_params") or {}
    unknown = set(params) - set(CHECKPOINT_KEYS)
    if unknown:
        raise UserError(
            f"exp_manager.checkpoint_callback_params: {', '.join(sorted(unknown))} is not known; "
            f"allowed: {', '.join(CHECKPOINT_KEYS)}"
        )
    if params.get("monitor", "val_loss") not in MONITORS:
        raise UserError(
            f"exp_manager.checkpoint_callback_params.monitor={params.get('monitor')!r} is not "
            f"known: use one of {', '.join(MONITORS)}"
        )
    if params.get("mode", "min") not in ("min", "max"):
        raise UserError(
            f"exp_manager.checkpoint_callback_params.mode={params.get('mode')!r}: use min or max"
        )
    parse_time(exp_manager.get("max_time_per_run"), "exp_manager.max_time_per_run")
    parse_time(trainer.get("max_time"), "trainer.max_time")
    if (trainer.get("gradient_clip_val") or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val={trainer.gradient_clip_val} is negative")
    for key in ("accumulate_grad_batches", "log_every_n_steps"):
        if trainer.get(key) is not None and trainer[key] < 1:
            raise UserError(f"trainer.{key}={trainer[key]} must be at least 1")


def parse_time(value: Any, key: str) -> timedelta | None:
    """`DD:HH:MM:SS`, as Lightning writes times; shorter forms leave out the front."""
    if value is None:
        return None
    parts = str(value).split(":")
    if len(parts) > 4 or not all(part.isdigit() for part in parts) or len(parts) < 2:
        raise UserError(f"{key}={value!r} is no time: write DD:HH:MM:SS, such as 00:03:45:00")
    days, hours, minutes, seconds = [0] * (4 - len(parts)) + [int(part) for part in parts]
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def validation_interval(trainer: DictConfig, per_epoch: int) -> dict[str, Any]:
    """`trainer.val_check_interval` as Lightning's arguments: a share of an epoch, or steps.

    Steps are counted anew in each epoch, as Lightning does; a number beyond an epoch's is counted
    on over the epochs, where Lightning would refuse it.
    """
    value = trainer.get("val_check_interval", 1.0)
    every = {"check_val_every_n_epoch": trainer.get("check_val_every_n_epoch", 1)}
    if value is None:
        return every
    if (isinstance(value, float) and not 0 < value <= 1) or value <= 0:
        raise UserError(
            f"trainer.val_check_interval={value} must be a share of an epoch (above 0, up to 1.0) "
            f"or a whole number of steps"
        )
    if isinstance(value, int) and value > per_epoch:
        every["check_val_every_n_epoch"] = None
    return {"val_check_interval": value, **every}


@dataclass(frozen=True)
class CheckpointCallbacks:
    """The callbacks that keep checkpoints; `top` is None where nothing is monitored.

    `each` keeps the best weights of the points of a sweep, where one is trained.
    """

    top: TopCheckpoints | None
    last: LastCheckpoint
    each: BestOfEach | None = None

    @classmethod
    def of(
        cls,
        exp_manager: DictConfig,
        folder: Path,
        validates: bool,
        name: str,
        world: World,
    ) -> "CheckpointCallbacks":
        """By `checkpoint_callback_params`; without validation there is no best to keep."""
        limit = parse_time(exp_manager.get("max_time_per_run"), "exp_manager.max_time_per_run")
        seconds = limit.total_seconds() if limit is not None else None
        if not exp_manager.get("create_checkpoint_callback", True):
            return cls(None, LastCheckpoint(None, seconds, world=world))
        params = exp_manager.get("checkpoint_callback_params") or {}
        top = None
        if validates:
            top = TopCheckpoints(
                dirpath=folder,
                filename=params.get("filename") or f"{name}--{{val_loss:.3f}}-{{step}}",
                monitor=params.get("monitor") or "val_loss",
                mode=params.get("mode") or "min",
                save_top_k=params.get("save_top_k", 3),
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            )
        path = folder / LAST if params.get("save_last", True) else None
        every = params.get("every_n_train_steps") or 0
        return cls(top, LastCheckpoint(path, seconds, every, world))

    def list(self) -> list[Callback]:
        return [one for one in (self.each, self.top, self.last) if one is not None]

    def most_files(self) -> int:
        """Checkpoints that lie on the disk at one time, each while the one it replaces is there."""
        top = 0 if self.top is None else max(self.top.save_top_k, 1) + 1
        return top + (0 if self.last.path is None else 3)


def build_trainer(
    cfg: DictConfig,
    *,
    world: World,
    device: torch.device,
    steps: Steps,
    validates: bool,
    callbacks: list[Callback],
    loggers: list[Logger],
    folder: Path,
    kind: Callable[..., pl.Trainer] = pl.Trainer,
) -> pl.Trainer:
    """A Trainer that runs optimizer steps and validations, and is quiet about itself."""
    quieten()
    trainer = cfg.trainer
    every = trainer.get("log_every_n_steps") or 10
    bar: Callback = Bar() if sys.stdout.isatty() else Lines(every)
    if world.size > 1:
        assert world.environment is not None
        strategy: Any = ManyDevices(device, world.environment, world.rank)
        plugins: list[Any] = [CheckpointFiles()]
    else:
        strategy = OneDevice(device)
        plugins = [CheckpointFiles(), LightningEnvironment()]
    optional = {
        key: trainer[key]
        for key in ("limit_val_batches", "limit_train_batches")
        if trainer.get(key) is not None
    }
    if validates:
        optional |= validation_interval(trainer, steps.per_epoch)
    built = kind(
        accelerator="cuda" if device.type == "cuda" else "cpu",
        strategy=strategy,
        devices=1,
        plugins=plugins,
        precision="32-true",  # the module casts; see docs/design.md
        logger=loggers,
        callbacks=[*callbacks, bar],
        max_epochs=trainer.max_epochs if trainer.get("max_epochs") is not None else -1,
        max_steps=steps.total if steps.total is not None else -1,
        log_every_n_steps=every,
        num_sanity_val_steps=trainer.get("num_sanity_val_steps") or 0,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module gives each process its own rows
        max_time=parse_time(trainer.get("max_time"), "trainer.max_time"),
        default_root_dir=folder,
        # What a sharded base gathers in inference mode could not be trained with afterwards.
        inference_mode=not cfg.model.get("use_fsdp"),
        **optional,
    )
    # With several processes Lightning would broadcast and wait once more in each step, to ask about
    # SIGTERM; `LastCheckpoint` asks along with the gradients.
    built.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return built


def quieten() -> None:
    """Silence Lightning's tips and advice; what a user must know, we say ourselves."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\b")
