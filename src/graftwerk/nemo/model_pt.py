"""A small ModelPT: a LightningModule with a configuration, saved and restored whole."""

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import LightningModule
from torch import Tensor

from graftwerk.adapters.targets import class_path, find_target
from graftwerk.checkpoints.archive import open_tar
from graftwerk.checkpoints.settings import SETTINGS_LIMIT, parse_settings, read_settings
from graftwerk.checkpoints.torch_files import load_mapped
from graftwerk.errors import UserError
from graftwerk.nemo.model_mixin import AdapterModelPTMixin

M = TypeVar("M", bound="ModelPT")
SETTINGS, WEIGHTS = "model_config.yaml", "model_weights.ckpt"


class ModelPT(LightningModule):
    """The base of a model that is built from a configuration and trained by Lightning.

    `cfg` is a copy of the configuration, interpolations resolved; a key that it does not have
    cannot be set by mistake.
    `freeze()` and `unfreeze()` are Lightning's: all weights, and evaluation or training mode.
    """

    def __init__(self, cfg: DictConfig | dict[str, Any], trainer: Any = None):
        super().__init__()
        values: Any = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(cfg)
        self._cfg: DictConfig = OmegaConf.create(OmegaConf.to_container(values, resolve=True))  # type: ignore
        OmegaConf.set_struct(self._cfg, True)
        if trainer is not None:
            self.trainer = trainer

    @property
    def cfg(self) -> DictConfig:
        """The model's configuration, the adapters' in `cfg.adapters`."""
        return self._cfg

    @property
    def num_weights(self) -> int:
        """How many numbers are trained: those of parameters that are not frozen."""
        return sum(weight.numel() for weight in self.parameters() if weight.requires_grad)

    def save_to(self, save_path: str | Path) -> None:
        """Writes the whole model, adapters included: a tar of configuration and weights.

        Raises:
            ValueError: for an adapter that could not be made again; nothing is written.
        """
        if isinstance(self, AdapterModelPTMixin) and "adapters" in self.cfg:
            for name in self.cfg.adapters:
                if name != self.adapter_global_cfg_key:
                    self.check_describable(str(name))
        values: Any = OmegaConf.to_container(self.cfg, enum_to_str=True)
        path = Path(save_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.mkdir()
        try:
            settings = yaml.safe_dump({**values, "target": class_path(type(self))}, sort_keys=False)
            (partial / SETTINGS).write_text(settings)
            state = {key: _on_cpu(value) for key, value in self.state_dict().items()}
            torch.save(state, partial / WEIGHTS)
            with tarfile.open(partial / "model.nemo", "w") as tar:
                for name in (SETTINGS, WEIGHTS):
                    tar.add(partial / name, f"./{name}")
            os.replace(partial / "model.nemo", path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def restore_from(
        cls: type[M],
        restore_path: str | Path,
        override_config_path: str | Path | DictConfig | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
    ) -> Any:
        """The model of a file of `save_to`, its adapters enabled as they were.

        Args:
            restore_path: the file.
            override_config_path: a configuration, or the path of one, in place of the file's.
            map_location: the device; None: the CPU.
            strict: whether each weight must be in the file and in the model.
            return_config: return the configuration alone.
            trainer: for the model's constructor.

        Raises:
            UserError: where the file cannot be read, or its weights do not fit.
            ValueError: called on `ModelPT` itself, for a class that is not allowed.
        """
        path = Path(restore_path)
        if not path.is_file():
            raise UserError(f"no model at {path}")
        with open_tar(path) as files:
            where = f"{path}: {SETTINGS}"
            if isinstance(override_config_path, DictConfig):
                cfg = override_config_path
            elif override_config_path is not None:
                cfg = _config(read_settings(Path(override_config_path)), override_config_path)
            else:
                settings = parse_settings(files.read(SETTINGS, SETTINGS_LIMIT), where)
                cfg = _config(settings, where)
            if return_config:
                return cfg
            model = cls._class_of(cfg)(cfg=cfg, trainer=trainer)
            if isinstance(model, AdapterModelPTMixin) and not model.is_adapter_available():
                model.setup_adapters()  # for a constructor that does not
            state = load_mapped(files, WEIGHTS)
            try:
                model.load_state_dict(state, strict=strict)
            except (RuntimeError, TypeError, AttributeError) as error:
                said = " ".join(str(error).split())
                raise UserError(f"{path}: the weights do not fit: {said}") from None
        return model.to(map_location or "cpu")

    @classmethod
    def _class_of(cls: type[M], cfg: DictConfig) -> type[M]:
        """The class to build: this one, or on `ModelPT` itself the one that the file names."""
        if cls is not ModelPT:
            return cls
        named = find_target(cfg.get("target"))
        if not issubclass(named, ModelPT):
            raise ValueError(f"target {class_path(named)} is no ModelPT")
        return named  # type: ignore[return-value]


def _config(settings: dict[str, Any], where: str | Path) -> DictConfig:
    try:
        return OmegaConf.create(settings)
    except OmegaConfBaseException as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{where} is no configuration: {said}") from None


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
