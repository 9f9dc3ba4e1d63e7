"""`MegatronGPTSFTModel` and `MegatronT5SFTModel`: a base, its adapters, and what the Trainer asks.

A model here holds the engine's (`model`), the configuration (`cfg`) and the tokenizer. Training is
the stages' own: `trainer.fit(model)` of a Trainer that `MegatronTrainerBuilder` made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from graftwerk.adapters import SelectiveConfig, Stack
from graftwerk.adapters.configs import schemes
from graftwerk.checkpoints.base import open_checkpoint
from graftwerk.errors import UserError
from graftwerk.models import GPT, T5, TransformerConfig
from graftwerk.nemo.config import answers_apart, read_config
from graftwerk.nemo.peft_config import PEFTConfig, QLoraPEFTConfig
from graftwerk.nemo.predictions import Question, predict, questions_of, sampling_of
from graftwerk.nemo.trainer_builder import MegatronTrainer
from graftwerk.nemo.wanted_adapters import load_wanted
from graftwerk.parallel.placement import Placement
from graftwerk.training.base import Base, revision_of
from graftwerk.training.goal import check_selection
from graftwerk.training.learner import Learner
from graftwerk.training.trainer import precision_of


class MegatronSFTModel(pl.LightningModule):
    """A base model for adapters and fine-tuning; use `restore_from` of one of its two kinds."""

    architecture: ClassVar[str]

    def __init__(self, cfg: DictConfig, base: Base, trainer: MegatronTrainer):
        super().__init__()
        self.automatic_optimization = False  # as it is trained; the Trainer's step counts by it
        self.cfg = cfg
        self.base = base
        self.tokenizer = base.tokenizer()
        self.precision = precision_of(trainer.config.trainer, trainer.run_device)
        self.quantize = "nf4" if "qlora" in schemes(cfg.get("peft") or {}) else None
        self.mesh = trainer.world.mesh(cfg, trainer.run_device)
        self.laid_out = False  # the stages of a pipeline have parted
        self.model = self._load(self.precision, trainer.run_device)
        self.model.requires_grad_(True)

    # ---- from a configuration and a checkpoint

    @classmethod
    def merge_cfg_with(cls, path: str | Path, cfg: Mapping[Any, Any]) -> DictConfig:
        """The shape of the base at a path, and over it `cfg.model`: a model's configuration.

        Args:
            path: of the base: a Hugging Face folder or Hub name, a `.nemo` file, or a folder of
                our own.
            cfg: the whole configuration, as `MegatronTrainerBuilder` gets it.

        Raises:
            UserError: for a key that is not known, and for a base of another architecture.
        """
        config = read_config(cfg)
        shape = cls._shape(path, revision_of(config.model))
        own = {"restore_from_path": str(path)}
        merged = OmegaConf.merge(_plain(shape), config.model, own)
        assert isinstance(merged, DictConfig)
        if cls.architecture == "t5":
            answers_apart(merged)
        return merged

    @classmethod
    def restore_from(
        cls,
        restore_path: str | Path,
        *args: Any,
        model_cfg: DictConfig | None = None,
        override_config_path: DictConfig | None = None,
        trainer: pl.Trainer | None = None,
    ) -> Self:
        """The base at a path, in eval mode, on the Trainer's device and in its precision.

        `model_cfg` and `trainer` may be given by position in either order, or by name;
        `override_config_path` is NeMo's name of the first.

        Raises:
            UserError: where the base is of another shape than `model_cfg` says.
            TypeError: where one of the two is missing, given twice or of another kind.
        """
        configs: list[Any] = [
            given for given in (model_cfg, override_config_path) if given is not None
        ]
        trainers: list[Any] = [] if trainer is None else [trainer]
        for given in args:
            (trainers if isinstance(given, pl.Trainer) else configs).append(given)
        if len(configs) != 1 or len(trainers) != 1:
            raise TypeError("restore_from takes a path, one model_cfg and one trainer")
        config, made_by = configs[0], trainers[0]
        if not isinstance(config, DictConfig) or "architecture" not in config:
            raise TypeError("model_cfg must be what merge_cfg_with returns")
        if not isinstance(made_by, MegatronTrainer):
            raise TypeError(
                "trainer must be what MegatronTrainerBuilder(config).create_trainer() makes"
            )
        revision = revision_of(config)
        shape = _plain(cls._shape(restore_path, revision))
        own = {key: config.get(key) for key in shape}
        for key, value in own.items():
            if value != shape[key]:
                raise UserError(
                    f"model_cfg.{key}={value}, but {restore_path} has {shape[key]}: make model_cfg "
                    f"by merge_cfg_with({str(restore_path)!r}, config)"
                )
        return cls(config, Base.open(str(restore_path), revision), made_by)

    @classmethod
    def _shape(cls, path: str | Path, revision: str | None) -> TransformerConfig:
        with open_checkpoint(path, revision) as checkpoint:
            config = checkpoint.config
        if config.architecture != cls.architecture:
            raise UserError(
                f"{path} is a {config.architecture} model, {cls.__name__} is for {cls.architecture}"
            )
        return config

    def _load(self, dtype: torch.dtype, device: torch.device) -> GPT | T5:
        model = self.base.load(dtype, device, quantize=self.quantize, mesh=self.mesh)
        assert isinstance(model, GPT | T5)
        return model

    # ---- adapters

    def add_adapter(self, peft_cfgs: PEFTConfig | Sequence[PEFTConfig]) -> None:
        """Adds an adapter of each configuration; all are active, and they alone are trained.

        Raises:
            UserError: where the model has such an adapter already, for layers that it does not
                have, and for QLoRA on a base that is not held in 4 bits.
        """
        self._check_open()
        configs = [peft_cfgs] if isinstance(peft_cfgs, PEFTConfig) else list(peft_cfgs)
        if not self.quantize and any(isinstance(config, QLoraPEFTConfig) for config in configs):
            raise UserError(
                "QLoraPEFTConfig needs a base in 4 bits: set model.peft.peft_scheme: qlora before "
                "restore_from"
            )
        for config in configs:
            check_selection(self.base.config, config.method)
        if any(isinstance(config.method, SelectiveConfig) for config in configs):
            self._in_float32()
        torch.manual_seed(self.cfg.seed)
        for config in configs:
            self.model.add_adapter(config.name, config.method)
        self._activate()

    def load_adapters(
        self,
        filepath: str | Path,
        peft_cfgs: PEFTConfig | str | Sequence[PEFTConfig | str] | None = None,
        map_location: Any = None,
    ) -> None:
        """Adds adapters of a file (`.nemo`, our folder, a run's `.ckpt`) and makes them active.

        Args:
            peft_cfgs: which of the file's adapters: names, or configurations, with which the file
                must agree. None: all of them. A `.ckpt` needs the configurations.
            map_location: has no effect: weights go where the model is.

        Raises:
            UserError: where the file does not hold them, or they do not fit the model.
        """
        self._check_open()
        if isinstance(peft_cfgs, PEFTConfig | str):
            peft_cfgs = [peft_cfgs]
        load_wanted(self.model, filepath, peft_cfgs)
        self._activate()

    def _check_open(self) -> None:
        if self.laid_out:
            raise UserError(
                "the model lies on the stages of a pipeline since it predicted: restore it anew "
                "and add all adapters before trainer.predict"
            )

    def _activate(self) -> None:
        names = list(self.model.adapters)
        self.model.set_active(names[0] if len(names) == 1 else Stack(*names))
        self.model.freeze_base()

    # ---- training

    def learner(self) -> Learner:
        """What `trainer.fit` trains: the adapters, or all of a model that has none."""
        names = list(self.model.adapters)
        if not names:
            trained = any(parameter.requires_grad for parameter in self.model.parameters())
            self._in_float32()
            self.model.requires_grad_(trained)
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()  # they may be views of the file
        own_copies = any(isinstance(m, SelectiveConfig) for m in self.model.adapters.values())
        autocast = self.precision == torch.bfloat16 and (not names or own_copies)
        return Learner(self.model, self.tokenizer, names, self.base.path, autocast)

    def restore_result(self, path: str) -> None:
        """The model anew, of what a run over several devices has written: to be run again.

        What one process wrote are whole tensors; the shares of each come from there.
        """
        adapters = list(self.model.adapters)
        kept, device = self.base, self.model.device
        self.base = kept if adapters else Base.open(path)
        self.model = self._load(self.precision, device)
        self.base = kept
        if adapters:
            load_wanted(self.model, path, adapters)
            self._activate()

    def _in_float32(self) -> None:
        """Reads the base anew where it was held in another type: it will be trained itself."""
        if self.quantize:
            raise UserError(
                f"a base in {self.quantize} is not trained itself: add an adapter, or set "
                f"model.peft.peft_scheme to another than qlora"
            )
        parameter = next(self.model.parameters())
        if parameter.dtype == torch.float32:
            return
        wide = self._load(torch.float32, parameter.device)
        for name, method in self.model.adapters.items():
            wide.add_adapter(name, method)
            wide.load_adapter_state(name, self.model.adapter_state(name))
        self.model = wide

    def training_step(self, *args: Any) -> Any:
        """Raises a TypeError: Lightning asks only where another Trainer was to fit this model."""
        raise TypeError("fit this model with what MegatronTrainerBuilder.create_trainer() makes")

    configure_optimizers = training_step

    # ---- prediction

    def predict_dataloader(self) -> DataLoader:
        """The prompts of `data.test_ds`, `micro_batch_size` at a time; a replica has its share."""
        questions = questions_of(
            self.cfg, self.tokenizer, self.base.config, self.model.virtual_tokens
        )
        own = [questions[number] for number in self.mesh.data.share(len(questions))]
        size = self.cfg.micro_batch_size
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        if self.mesh.pipeline.size > 1 and not self.laid_out:
            Placement(self.model, self.mesh)
            self.laid_out = True

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # The layers of other stages are nowhere, and the Trainer moves what is on its device.
        return self if self.mesh.pipeline.size > 1 else super()._apply(fn, recurse)

    def transfer_batch_to_device(
        self, batch: list[Question], device: torch.device, dataloader_idx: int
    ) -> list[Question]:
        return batch  # prompts go to the device as they are decoded

    def predict_step(self, batch: list[Question], batch_idx: int) -> dict[str, list[Any]]:
        """The answers to a batch; see `predictions.predict`."""
        sampling = sampling_of(self.cfg)
        own = next(self.model.parameters()).dtype
        with torch.autocast(self.device.type, self.precision, enabled=own != self.precision):
            return predict(self.model, self.tokenizer, batch, sampling)


class MegatronGPTSFTModel(MegatronSFTModel):
    """GPTs: GPT-2, LLaMA and their kin."""

    architecture = "gpt"


class MegatronT5SFTModel(MegatronSFTModel):
    """T5: rows' prompts go to the encoder, answers are the decoder's."""

    architecture = "t5"


def _plain(shape: TransformerConfig) -> DictConfig:
    """The fields of a shape as YAML would hold them."""
    return OmegaConf.create(asdict(shape))


def _as_it_is(batch: list[Question]) -> list[Question]:
    return batch
