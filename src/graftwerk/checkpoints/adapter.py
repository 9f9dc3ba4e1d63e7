"""Adapter files: our folder of YAML and safetensors, and NeMo's tar of YAML and a torch dict.

A path that ends in `.nemo` gets NeMo's form, any other our folder; reading tells them apart by what
is there. Both hold adapter weights and settings only, never the base; on a model with a head for
labels the adapter's own head too.
"""

import io
import os
import shutil
import tarfile
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
from graftwerk.checkpoints.settings import SETTINGS_LIMIT, parse_settings, read_settings
from graftwerk.checkpoints.torch_files import load_mapped
from graftwerk.errors import UserError

CONFIG, WEIGHTS = "adapter_config.yaml", "adapter.safetensors"
NEMO_CONFIG, NEMO_WEIGHTS = "./model_config.yaml", "./model_weights.ckpt"


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
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    if isinstance(dim := getattr(method, "dim", 0), int) and dim > largest:
        raise UserError(f"{path}: dim={dim} is more than any of its weights has")
    if name in model.adapters:
        raise UserError(f"{path}: the model has an adapter {name!r} already: give another name")
    try:
        model.add_adapter(name, method, head=head is not None)
        model.load_adapter_state(name, state)
    except Exception as error:
        model.adapters.setdefault(name, method)  # parts that were made before the error go too
        model.delete_adapter(name)
        said = str(error).partition("\n")[0]
        raise UserError(f"{path}: {said}") from None
    return name


def method_of(config: dict[str, Any], path: str | Path) -> MethodConfig:
    """The method that a file's settings describe."""
    if not isinstance(config.get("method"), str) or config["method"] not in METHODS:
        raise UserError(
            f"{path}: method {config.get('method')!r} is not known: one of {', '.join(METHODS)}"
        )
    method = METHODS[config["method"]]
    settings = {}
    for key, field in method.__dataclass_fields__.items():
        value = config.get(key, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if not _alike(value, field.default):
            raise UserError(f"{path}: {key}={config[key]!r} is no value that can be used")
        settings[key] = value
    return method(**settings)


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a field's default: numbers, text, names."""
    if default is None:  # text, or numbers of layers
        layers = isinstance(value, tuple) and all(type(number) is int for number in value)
        return value is None or isinstance(value, str) or layers
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    if isinstance(default, int | float) and not isinstance(default, bool):
        return isinstance(value, int | float) and isinstance(value, bool) is False
    return isinstance(value, type(default))


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of an adapter file; nothing is unpickled but tensors."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no adapter at {path}")
    read = _read_folder if path.is_dir() else _read_nemo
    try:
        config, state = read(path)
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no adapter that can be read: {error}") from None
    if "name" not in config:
        raise UserError(f"{path}: its settings name no adapter")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: its weights must be tensors by name")
    return config, state


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return read_settings(path / CONFIG), load_file(path / WEIGHTS)


def _read_nemo(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config, weights = (os.path.normpath(name) for name in (NEMO_CONFIG, NEMO_WEIGHTS))
    with open_tar(path) as files:
        settings = parse_settings(files.read(config, SETTINGS_LIMIT), f"{path}: {config}")
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
