"""`MegatronTrainerBuilder`: the Trainer that the sections `trainer` and `exp_manager` describe."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from graftwerk.data.datamodule import AnswerDataModule
from graftwerk.errors import Exit, UserError
from graftwerk.nemo.config import read_config, result_path
from graftwerk.stages import learning
from graftwerk.training.loggers import check_loggers
from graftwerk.training.peers import Peers
from graftwerk.training.result import check_whole
from graftwerk.training.stopping import Interrupted
from graftwerk.training.trainer import (
    Steps,
    build_trainer,
    check_trainer,
    device_of,
    validation_interval,
)
from graftwerk.training.world import World

if TYPE_CHECKING:
    from graftwerk.nemo.models import MegatronSFTModel

STAGE = "peft"  # what files and summaries call the run


class MegatronTrainer(pl.Trainer):
    """Lightning's Trainer, which fits a `MegatronSFTModel` as the learning stages do.

    Data, steps, loggers and checkpoints are known only once there is a model: `fit` sets them up.
    """

    def __init__(self, config: DictConfig, world: World, device: torch.device, **settings: Any):
        self.config, self.world, self.run_device = config, world, device
        super().__init__(**settings)
        self.of_the_run: list[Callback] = []  # callbacks of the last fit

    def fit(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Trains, and writes the adapters (or the whole model, where it has none).

        Goes on from the run's own checkpoint where `exp_manager.resume_if_exists` says so. Exits
        the process as a stage does, with 75, where the run has to stop before its end.

        Raises:
            UserError: for data and settings that do not fit, before anything is written.
        """
        from graftwerk.nemo.models import MegatronSFTModel

        if not isinstance(model, MegatronSFTModel):
            return super().fit(model, *args, **kwargs)
        if args or kwargs:
            raise TypeError(
                "fit(model) alone: rows come from model.data, a checkpoint to go on from is "
                "trainer.resume_from_checkpoint"
            )
        try:
            with Peers(self.world):
                code = self._learn(model)
        except Interrupted:  # before the first step
            code = Exit.REQUEUE
        self.strategy.barrier()  # the result is there for every process
        if model.mesh.model_parallel and code == Exit.DONE:
            model.restore_result(self.result)
        model.eval()
        if code != Exit.DONE:
            raise SystemExit(code)
        return None

    def _learn(self, model: "MegatronSFTModel") -> int:
        folder = learning.log_folder(self.config)
        if not model.cfg.data.get("train_ds"):
            raise UserError("model.data.train_ds.file_names is empty: name the files to train on")
        names = list(model.model.adapters)
        cfg = OmegaConf.merge(self.config, {"model": model.cfg})
        assert isinstance(cfg, DictConfig)
        name = self.config.exp_manager.name
        self.result = result_path(cfg.model, folder, name, adapters=bool(names))
        cfg.model.nemo_path = self.result
        if not names:
            check_whole(model.base.config, model.tokenizer, Path(cfg.model.nemo_path))
        data = AnswerDataModule(
            cfg.model,
            model.tokenizer,
            rank=model.mesh.data.rank,
            world_size=model.mesh.data.size,
            seed=cfg.model.seed,
            accumulate=cfg.trainer.get("accumulate_grad_batches") or 1,
            shape=model.base.config,
            virtual_tokens=model.model.virtual_tokens,
            device=self.run_device,
        )
        lines = [f"{key}: {report}" for key, report in data.report.items()]
        lines += data.arrange(model.model)
        if self.world.rank == 0:
            print(*lines, sep="\n", flush=True)
        stage = STAGE if names else "fine_tuning"
        placed = self.world, self.run_device, self._prepared, model.mesh
        return learning.train(stage, cfg, model.learner(), data, *placed)

    def _prepared(
        self,
        cfg: DictConfig,
        *,
        steps: Steps,
        validates: bool,
        callbacks: list[Callback],
        loggers: list[Logger],
        folder: Path,
        **known: Any,
    ) -> pl.Trainer:
        """This Trainer, with what `build_trainer` would have given it for the run."""
        self.fit_loop.epoch_loop.max_steps = -1 if steps.total is None else steps.total
        own = [callback for callback in self.callbacks if callback not in self.of_the_run]
        self.callbacks = [*own, *callbacks]  # what keeps checkpoints comes last
        self.of_the_run = callbacks
        self.loggers = loggers
        if validates:
            interval = validation_interval(cfg.trainer, steps.per_epoch)
            self.val_check_interval = interval.get("val_check_interval", 1.0)
            self.check_val_every_n_epoch = interval["check_val_every_n_epoch"]
        return self


class MegatronTrainerBuilder:
    """Makes the Trainer of a configuration in NeMo's keys.

    Args:
        config: `trainer`, `exp_manager`, `model`: a `DictConfig` or a plain mapping.

    Raises:
        UserError: for keys and values that are not known or do not go together.
    """

    def __init__(self, config: Mapping[Any, Any]):
        self.config = read_config(config)

    def create_trainer(self, callbacks: list[Callback] | None = None) -> MegatronTrainer:
        """The Trainer; each process makes its own.

        Args:
            callbacks: further ones of Lightning's.
        """
        config, world = self.config, World.from_environment()
        world.check(config.trainer.devices, config.trainer.num_nodes)
        check_trainer(config.trainer, config.exp_manager)
        check_loggers(config.exp_manager)
        device = device_of(config.trainer, world)
        manager = config.exp_manager
        folder = manager.get("explicit_log_dir") or manager.get("exp_dir") or "."
        made = build_trainer(
            config,
            world=world,
            device=device,
            steps=Steps(1, None),
            validates=False,
            callbacks=list(callbacks or []),
            loggers=[],
            folder=Path(folder),
            kind=partial(MegatronTrainer, config, world, device),
        )
        assert isinstance(made, MegatronTrainer)
        return made
