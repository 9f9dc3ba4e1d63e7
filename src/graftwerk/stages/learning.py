"""The stages that train: a whole model (`training`, `fine_tuning`), or adapters on a frozen base.

The method is data: a stage's name and its `model` section say what is trained; the way is the same.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.checkpoints.base_path import base_of
from graftwerk.checkpoints.leftovers import remove_leftovers
from graftwerk.checkpoints.resume import (
    DamagedCheckpoint,
    newest_checkpoint,
    put_aside,
    read_checkpoint,
)
from graftwerk.checkpoints.shards import check_space
from graftwerk.data.datamodule import AnswerDataModule
from graftwerk.data.jsonl import write_json
from graftwerk.errors import Exit, UserError
from graftwerk.models import GPT
from graftwerk.parallel import fsdp
from graftwerk.parallel.compiled import compile_layers, compiles
from graftwerk.parallel.mesh import Mesh
from graftwerk.parallel.placement import Placement
from graftwerk.parallel.recompute import recompute
from graftwerk.training.best_of_each import BestOfEach, best_of
from graftwerk.training.goal import Goal
from graftwerk.training.learner import (
    Learner,
    build_learner,
    open_base,
    start_of,
    tokenizer_of,
)
from graftwerk.training.loggers import build_loggers, check_loggers
from graftwerk.training.module import LearningModule, TrainingSettings
from graftwerk.training.optim import DEFAULTS
from graftwerk.training.peers import Peers
from graftwerk.training.profile import Profile
from graftwerk.training.progress import Progress
from graftwerk.training.result import (
    check_whole,
    is_nemo,
    point_path,
    told,
    write_points,
    write_result,
)
from graftwerk.training.stopping import Interrupted
from graftwerk.training.summary import peak_memory, show
from graftwerk.training.sweep import check_sweep
from graftwerk.training.trainer import (
    CheckpointCallbacks,
    Steps,
    build_trainer,
    check_trainer,
    device_of,
)
from graftwerk.training.world import World, model_parallel_sizes


def run(stage: str, cfg: DictConfig) -> int:
    """Runs a learning stage; returns the exit code: 0 done, 75 stopped in time and to go on later.

    Args:
        stage: `training`, `fine_tuning`, `peft`, `adapter_learning` or `ia3_learning`.
        cfg: the stage's resolved configuration (`run`, `trainer`, `exp_manager`, `model`).

    Raises:
        UserError: for input that a person can mend, before anything is written.
    """
    world = World.from_environment()
    try:
        with Peers(world):
            return _run(stage, cfg, world)
    except Interrupted as reason:
        world.say(f"stopped by {reason} before the first step")
        return Exit.REQUEUE


def _run(stage: str, cfg: DictConfig, world: World) -> int:
    check(stage, cfg, world)
    device = device_of(cfg.trainer, world)
    compiles(cfg.model, device)  # says what is wrong before anything is read
    mesh = world.mesh(cfg.model, device)
    base = open_base(stage, cfg.model)
    tokenizer = tokenizer_of(cfg.model, base)
    goal = Goal.of(cfg.model, stage)
    if base is not None and goal.whole:
        check_whole(base.config, tokenizer, Path(str(cfg.model.nemo_path)))
    data = AnswerDataModule(
        cfg.model,
        tokenizer,
        rank=mesh.data.rank,
        world_size=mesh.data.size,
        seed=cfg.model.seed,
        accumulate=cfg.trainer.get("accumulate_grad_batches") or 1,
        shape=None if base is None else base.config,
        virtual_tokens=goal.virtual_tokens,
        device=device,
        leads=world.local_rank == 0,
        say=world.say if world.rank == 0 else None,
    )
    for name, report in data.report.items():
        world.say(f"{name}: {report}")
    learner = build_learner(stage, cfg, base, tokenizer, device, goal, mesh)
    for line in data.arrange(learner.model):
        world.say(line)
    return train(stage, cfg, learner, data, world, device, mesh=mesh)


def train(
    stage: str,
    cfg: DictConfig,
    learner: Learner,
    data: AnswerDataModule,
    world: World,
    device: torch.device,
    build: Callable[..., pl.Trainer] = build_trainer,
    mesh: Mesh | None = None,
) -> int:
    """The run itself, from the checkpoint to go on from to the result; returns `run`'s exit code.

    `build` gives the Trainer, by the arguments of `build_trainer`.
    """
    folder = log_folder(cfg)
    steps = Steps.of(cfg.trainer, data.steps_per_epoch)
    result = Path(str(cfg.model.nemo_path))
    if world.rank == 0:
        remove_leftovers(folder)
        remove_leftovers(folder / "checkpoints")
        points = [point_path(result, point.name).name for point in learner.sweep]
        remove_leftovers(result.parent, (result.name, *points))
    resumed = find_resume(cfg.exp_manager, cfg.trainer, folder / "checkpoints", world)
    module, trainer, callbacks = assemble(
        stage, cfg, learner, data, steps, world, device, folder, resumed, build, mesh
    )
    check_room(module, callbacks, folder, result)
    if resumed is not None:
        _say_resumed(world, resumed, steps)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed.path if resumed else None)
    except Interrupted as reason:
        return _interrupted(world, reason, callbacks.last.path, trainer.global_step)
    val_loss = restore_best(cfg.exp_manager, module, trainer, callbacks)
    counts, step = sizes(module, learner), trainer.global_step
    points = {} if callbacks.each is None else callbacks.each.found(step)
    module.placement.make_whole()
    if world.rank == 0:
        summary = finish(stage, cfg, learner, module, data, device, step, val_loss, counts, points)
        write_json(folder / "summary.json", summary)
        show(summary)
    return Exit.DONE


# ---- before anything is read


def check(stage: str, cfg: DictConfig, world: World) -> None:
    """Raises a UserError for what the configuration alone shows to be wrong."""
    model = cfg.model
    if not model.get("nemo_path"):
        raise UserError("model.nemo_path is missing: it says where the result is written")
    world.check(cfg.trainer.get("devices") or 1, cfg.trainer.get("num_nodes") or 1)
    check_trainer(cfg.trainer, cfg.exp_manager)
    check_loggers(cfg.exp_manager)
    log_folder(cfg)
    if model.get("use_fsdp"):
        tensor, pipeline = model_parallel_sizes(model)
        fsdp.check(world.size, tensor, pipeline, Goal.of(model, stage).whole)
    if stage == "training":
        if not is_nemo(Path(str(model.nemo_path))):
            return
        raise UserError(
            f"model.nemo_path={model.nemo_path}: stage training writes a folder; leave out `.nemo`"
        )
    base_of(model)
    if Goal.of(model, stage).sweep:
        check_sweep(cfg)
    if Goal.of(model, stage).whole and (start := start_of(model)):
        raise UserError(
            f"model.restore_path={start}: the whole model is trained, from the weights of "
            f"model.language_model_path: name them there, and set restore_path to null"
        )


def check_room(
    module: LearningModule, callbacks: CheckpointCallbacks, folder: Path, path: Path
) -> None:
    """Raises a UserError where checkpoints and result would not find room on the disk.

    A checkpoint has each trained weight and two numbers of the optimizer's beside it; of a sweep
    the best weights too.
    """
    weights = sum(parameter.nbytes for parameter in module.trained.values())
    there = sum(file.lstat().st_size for file in (folder / "checkpoints").glob("*.ckpt"))
    each = (4 if module.settings.sweep else 3) * weights
    check_space(folder, weights + each * callbacks.most_files() - there)
    check_space(path, weights)


def log_folder(cfg: DictConfig) -> Path:
    """Where metrics, checkpoints and the summary go: `explicit_log_dir`, else `exp_dir/name`."""
    manager = cfg.exp_manager
    if manager.get("explicit_log_dir"):
        return Path(manager.explicit_log_dir)
    if manager.get("exp_dir"):
        return Path(manager.exp_dir) / (manager.get("name") or "default")
    raise UserError("exp_manager.explicit_log_dir or exp_manager.exp_dir must name a folder")


# ---- the run


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that this run goes on from."""

    path: Path
    step: int


def find_resume(
    manager: DictConfig, trainer: DictConfig, folder: Path, world: World
) -> Resumed | None:
    """The run's own newest checkpoint; where it has none, `trainer.resume_from_checkpoint`."""
    if manager.get("resume_if_exists"):
        found = newest_checkpoint(folder, lambda line: world.say(f"warning: {line}"))
        if found is not None:
            return Resumed(found[0], found[1]["global_step"])
    given = trainer.get("resume_from_checkpoint")
    if given:
        try:
            return Resumed(Path(given), read_checkpoint(given)["global_step"])
        except DamagedCheckpoint as error:
            raise UserError(
                f"trainer.resume_from_checkpoint={given} cannot be read: {error}"
            ) from None
    if manager.get("resume_if_exists") and not manager.get("resume_ignore_no_checkpoint"):
        raise UserError(
            f"exp_manager.resume_if_exists: {folder} holds no checkpoint; set "
            f"exp_manager.resume_ignore_no_checkpoint: True to start anew"
        )
    if world.rank == 0 and (aside := put_aside(folder)):
        world.say(f"starting anew; earlier checkpoints are now in {aside}")
    return None


def assemble(
    stage: str,
    cfg: DictConfig,
    learner: Learner,
    data: AnswerDataModule,
    steps: Steps,
    world: World,
    device: torch.device,
    folder: Path,
    resumed: Resumed | None,
    build: Callable[..., pl.Trainer] = build_trainer,
    mesh: Mesh | None = None,
) -> tuple[LearningModule, pl.Trainer, CheckpointCallbacks]:
    """Module, trainer and the callbacks that keep checkpoints."""
    sched = cfg.model.optim.get("sched") or {}
    optim: Any = OmegaConf.to_container(cfg.model.optim, resolve=True)
    if compiles(cfg.model, device):
        compile_layers(learner.model, strict=cfg.model.get("compile") is True)
        world.say("layers are compiled: first steps take longer than later ones")
    if cfg.model.get("compile") is False and isinstance(learner.model, GPT):
        learner.model.attention = "sdpa"
    recompute(learner.model, cfg.model.get("activations_checkpoint_granularity"))
    if cfg.model.get("use_fsdp") and mesh is not None:
        fsdp.shard_base(learner.model, mesh, device)
    placement = Placement(learner.model, mesh)
    settings = TrainingSettings(
        optim=optim,
        max_steps=steps.total,
        steps_per_epoch=steps.per_epoch,
        gradient_clip_val=cfg.trainer.get("gradient_clip_val") or 0.0,
        log_every_n_steps=cfg.trainer.get("log_every_n_steps") or 10,
        seed=cfg.model.seed,
        rank=placement.mesh.data.rank,
        autocast=learner.autocast,
        monitor=sched.get("monitor") or "val_loss",
        drop=learner.drop,
        sweep=learner.sweep,
    )
    module = LearningModule(learner.model, settings, placement)
    limit = cfg.trainer.get("limit_val_batches")
    validates = len(data.val_set) > 0 and limit != 0
    if not validates and sched.get("name") == "ReduceLROnPlateau":
        raise UserError(
            "model.optim.sched.name=ReduceLROnPlateau needs validation: give "
            "model.data.validation_ds"
        )
    if not validates and learner.sweep:
        raise UserError(
            "model.peft.sweep needs validation to tell the points apart: give "
            "model.data.validation_ds"
        )
    name = cfg.exp_manager.get("name") or "checkpoint"
    callbacks = CheckpointCallbacks.of(
        cfg.exp_manager, folder / "checkpoints", validates, name, world
    )
    if learner.sweep:
        params = cfg.exp_manager.get("checkpoint_callback_params") or {}
        keeps = callbacks.top is not None and bool(params.get("save_best_model"))
        callbacks = replace(callbacks, each=BestOfEach(module, learner.adapters, keeps))
    watching: list[pl.Callback] = [Progress(folder / "progress.json", stage)]
    if cfg.trainer.get("profile"):
        watching.append(Profile(folder / "profile"))
    trainer = build(
        cfg,
        world=world,
        device=device,
        steps=steps,
        validates=validates,
        callbacks=[*callbacks.list(), *watching],
        loggers=build_loggers(cfg.exp_manager, folder, resumed.step if resumed else 0),
        folder=folder,
    )
    if world.rank == 0:
        _say_setting(learner, module, optim, validates)
    return module, trainer, callbacks


def _say_setting(learner: Learner, module: LearningModule, optim: dict, validates: bool) -> None:
    count, total = sizes(module, learner)
    print(f"training {count:,} of {total:,} parameters ({count / total:.3%})")
    decay = optim.get("weight_decay", DEFAULTS["weight_decay"])
    if decay and all(p.ndim < 2 for p in module.everywhere.values()):
        print(f"model.optim.weight_decay={decay} has no effect: only vectors are trained")
    if not validates:
        print("no validation: the last weights are written, not the best")
    sys.stdout.flush()


def sizes(module: LearningModule, learner: Learner) -> tuple[int, int]:
    """How many numbers are trained, and how many the whole model has."""
    numel = module.placement.numel
    trained = sum(numel(parameter) for parameter in module.everywhere.values())
    return trained, sum(numel(parameter) for parameter in learner.model.parameters())


def _say_resumed(world: World, resumed: Resumed, steps: Steps) -> None:
    if steps.total is not None and resumed.step >= steps.total:
        world.say(
            f"complete already: {resumed.path} is at step {resumed.step}; writing its result again"
        )
    else:
        world.say(f"going on from step {resumed.step}: {resumed.path}")


def _interrupted(world: World, reason: Interrupted, saved: Path | None, step: int) -> int:
    if saved is None:
        world.say(f"stopped by {reason} at step {step}; no checkpoints are kept, so it is lost")
        return Exit.FAILED
    world.say(f"stopped by {reason} at step {step}: start again to go on from {saved}")
    return Exit.REQUEUE


# ---- the result


def restore_best(
    manager: DictConfig,
    module: LearningModule,
    trainer: pl.Trainer,
    callbacks: CheckpointCallbacks,
) -> float | None:
    """With `save_best_model` puts the best weights back; returns the validation loss of what stays.

    None where these weights have not been validated. Of a sweep, whose points have each their own
    best weights, it is the lowest loss.
    """
    if callbacks.each is not None:
        callbacks.each.restore()
        return best_of(callbacks.each.found(trainer.global_step))[1]
    params = manager.get("checkpoint_callback_params") or {}
    best = callbacks.top.best_path() if callbacks.top is not None else None
    if best is not None and params.get("save_best_model"):
        checkpoint = read_checkpoint(best)
        module.load_state_dict(checkpoint["state_dict"])
        return checkpoint["graftwerk"]["val_loss"]
    return module.val_loss_at(trainer.global_step)


def finish(
    stage: str,
    cfg: DictConfig,
    learner: Learner,
    module: LearningModule,
    data: AnswerDataModule,
    device: torch.device,
    steps: int,
    val_loss: float | None,
    counts: tuple[int, int],
    points: Mapping[str, tuple[int, float | None]] | None = None,
) -> dict[str, Any]:
    """Writes the model or adapter and returns the summary.

    `counts` are those of `sizes`, `points` those that `BestOfEach` has found in a sweep.
    """
    model, path = learner.model, Path(str(cfg.model.nemo_path))
    trained, total = counts
    extra = {"base": learner.base, "stage": stage, "steps": steps}
    sweep = []
    if points:
        files = write_points(learner, path, best_of(points)[0], extra)
        lr, size = cfg.model.optim.get("lr") or DEFAULTS["lr"], sum(files.values())
        sweep = told(learner, lr, points, path, files)
    else:
        size = write_result(learner, path, extra)
    methods = [model.adapter_config(name)["method"] for name in learner.adapters]
    methods += [type(model.fusions[key]).__name__ for key in learner.fusions]
    return {
        "stage": stage,
        "method": ", ".join(methods[:1] if sweep else methods) or None,
        "base": learner.base,
        "adapter": str(path),
        "trainable_parameters": trained,
        "total_parameters": total,
        "steps": steps,
        "seconds": round(module.seconds, 3),
        "seconds_per_step": round(module.seconds / steps, 6) if steps else None,
        "file_bytes": size,
        "peak_memory_bytes": peak_memory(device),
        "val_loss": val_loss,
        "rows": {name: report.as_dict() for name, report in data.report.items()},
        "sweep": sweep or None,
        "packing": None if data.packing_report is None else data.packing_report.as_dict(),
    }
