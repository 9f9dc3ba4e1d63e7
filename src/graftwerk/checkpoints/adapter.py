"""Adapter files: our folder of YAML and safetensors, and NeMo's tar of YAML and a torch dict.

A path that ends in `.nemo` gets NeMo's form, any other our folder; reading tells them apart by what
is there. Both hold adapter weights and settings only, never the base; on a model with a head for
labels the adapter's own head too.
"""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwerk.adapters.configs import METHODS, MethodConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.archive import open_tar
from graftwerk.checkpoints.base import replace_path
from graftwerk.checkpoints.torch_files import load_mapped
from graftwerk.errors import UserError

CONFIG, WEIGHTS = "adapter_config.yaml", "adapter.safetensors"
NEMO_CONFIG, NEMO_WEIGHTS = "./model_config.yaml", "./model_weights.ckpt"
LARGEST_CONFIG = 1 << 20  # bytes; a settings file above this is no settings file


def save_adapter(
    model: AdapterModel, name: str, path: str | Path, extra: dict[str, Any] | None = None
) -> int:
    """Writes an adapter and returns the bytes on disk; beside the path first, then renamed.

    `extra` holds plain values that are kept beside the settings (the base's path, say).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in model.adapter_state(name).items()}
    config = {"name": name, **model.adapter_config(name), **(extra or {})}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".nemo":
            _write_nemo(partial, config, state)
        else:
            partial.mkdir()
            save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
            (partial / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
        size = _size(partial)
        replace_path(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(True)
    return size


def load_adapter(model: AdapterModel, path: str | Path, name: str | None = None) -> str:
    """Adds the adapter of a file to a model, not active, and returns its name.

    Nothing of the model changes where the file does not fit.

    Raises:
        UserError: where the file is missing, damaged, or made for another model.
    """
    config, state = read_adapter(path)
    name = name or str(config["name"])
    method, head = method_of(config, path), config.get("head")
    if head not in (None, model.label_head):
        raise UserError(
            f"{path} holds an adapter with a head for {head}, but the model's head is "
            f"{model.label_head}: load the base with head {head}"
        )
    model.add_adapter(name, method, head=head is not None)
    try:
        model.load_adapter_state(name, state)
    except UserError as error:
        model.delete_adapter(name)
        raise UserError(f"{path}: {error}") from None
    return name


def method_of(config: dict[str, Any], path: str | Path) -> MethodConfig:
    """The method that a file's settings describe."""
    if config.get("method") not in METHODS:
        raise UserError(
            f"{path}: method {config.get('method')!r} is not known: one of {', '.join(METHODS)}"
        )
    method = METHODS[config["method"]]
    settings = {key: config[key] for key in method.__dataclass_fields__ if key in config}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return method(**settings)


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of an adapter file; nothing is unpickled but tensors."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no adapter at {path}")
    read: Callable[[Path], tuple[Any, Any]] = _read_folder if path.is_dir() else _read_nemo
    try:
        config, state = read(path)
    except UserError:
        raise
    except (OSError, KeyError, tarfile.TarError, yaml.YAMLError, SafetensorError) as error:
        raise UserError(f"{path} is no adapter that can be read: {error}") from None
    except Exception as error:  # torch's reader raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(config, dict) or "name" not in config:
        raise UserError(f"{path}: its settings name no adapter")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: its weights must be tensors by name")
    return config, state


def _read_folder(path: Path) -> tuple[Any, Any]:
    return yaml.safe_load((path / CONFIG).read_text()), load_file(path / WEIGHTS)


def _read_nemo(path: Path) -> tuple[Any, Any]:
    config, weights = (os.path.normpath(name) for name in (NEMO_CONFIG, NEMO_WEIGHTS))
    with open_tar(path) as files:
        settings = yaml.safe_load(files.read(config, LARGEST_CONFIG))
        state = load_mapped(files, weights)
        if not isinstance(state, dict):
            raise UserError(f"{path}: its weights must be tensors by name")
        # Copies: the file may be replaced while the adapter is in use.
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    return settings, own


def _write_nemo(path: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    weights = io.BytesIO()
    torch.save(state, weights)
    with tarfile.open(path, "w") as tar:
        for member, content in (
            (NEMO_CONFIG, yaml.safe_dump(config, sort_keys=False).encode()),
            (NEMO_WEIGHTS, weights.getvalue()),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
