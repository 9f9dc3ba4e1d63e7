"""The `.pt` files of `save_adapters`: weights by adapter name, and `__cfg__`, plain values.

`torch.load(weights_only=True)` reads ours. NeMo's own hold `__cfg__` as a pickled DictConfig; it is
read through torch's allow-list, to which the inert classes of OmegaConf are added. Nothing else is
ever unpickled.
"""

import os
import re
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf, nodes
from omegaconf.base import ContainerMetadata, Metadata
from torch import Tensor

from graftwerk.adapters.strategies import (
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategyConfig,
)
from graftwerk.errors import UserError
from graftwerk.nemo.adapter_modules import LinearAdapterConfig

CONFIG = "__cfg__"
_ALLOWED: list[Any] = [
    DictConfig,
    ListConfig,
    ContainerMetadata,
    Metadata,
    nodes.AnyNode,
    nodes.BooleanNode,
    nodes.FloatNode,
    nodes.IntegerNode,
    nodes.StringNode,
    Any,
    defaultdict,
    dict,
    list,
    int,
    float,
    str,
    bool,
]

# Types of settings that were given as dataclasses, under our path and NeMo's.
_THEIRS = {
    "graftwerk.nemo.adapter_modules": "nemo.collections.common.parts.adapter_modules",
    "graftwerk.adapters.strategies": "nemo.core.classes.mixins.adapter_mixin_strategies",
}
for _cls in (
    LinearAdapterConfig,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategyConfig,
):
    _ALLOWED += [_cls, (_cls, f"{_THEIRS[_cls.__module__]}.{_cls.__name__}")]

States = dict[str, list[dict[str, Tensor]]]  # of each adapter, that of each module that holds it


def write_adapters(path: str | Path, states: States, config: dict[str, Any]) -> None:
    """Writes beside the path and renames. Tensors are copies on the CPU."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        name: [
            {key: tensor.detach().cpu().clone() for key, tensor in state.items()} for state in held
        ]
        for name, held in states.items()
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        torch.save({**content, CONFIG: config}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_adapters(path: str | Path, map_location: Any = None) -> tuple[States, dict[str, Any]]:
    """Weights by adapter, and the configuration, as `save_adapters` wrote them.

    Raises:
        UserError: where the file is missing or damaged, or holds anything but tensors and settings.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no adapter file at {path}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no file of save_adapters: torch.save writes a zip")
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and codecs raise their own kinds
        said = _reason(error)
        raise UserError(f"{path} is no file of save_adapters that can be read: {said}") from None
    config: Any = content.pop(CONFIG, None) if isinstance(content, dict) else None
    if isinstance(config, DictConfig):
        try:
            config = OmegaConf.to_container(config, resolve=False)
        except Exception as error:  # a DictConfig from a file can lack any of its parts
            raise UserError(f"{path}: {CONFIG} cannot be read: {_reason(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: {CONFIG} is missing: save_adapters writes the settings there")
    _check(path, content, config)
    return content, config


def _check(path: Path, content: dict[Any, Any], config: dict[Any, Any]) -> None:
    for name, states in content.items():
        alike = isinstance(name, str) and isinstance(states, list)
        if not alike or not all(_is_state(state) for state in states):
            raise UserError(f"{path}: {name!r} must be a list of tensors by name")
    _check_literal(path, config)


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )


def _check_literal(path: Path, value: Any) -> None:
    """A file's settings are values: an interpolation would read this machine's environment."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(f"{path}: {CONFIG} has the key {key!r}, which is no text")
            _check_literal(path, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_literal(path, inner)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{path}: {CONFIG} holds {value!r}: write the value itself")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise UserError(f"{path}: {CONFIG} holds a {type(value).__name__}, which is no setting")


def _reason(error: Exception) -> str:
    """What was refused, out of torch's long message."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it holds a {refused[1]}, which is neither a tensor nor a setting"
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
