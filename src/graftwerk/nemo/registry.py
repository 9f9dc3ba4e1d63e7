"""Pairs of a class and its subclass that can hold adapters."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from graftwerk.adapters.targets import class_path

_REGISTRY: dict[str, "AdapterRegistryInfo"] = {}


@dataclass(frozen=True)
class AdapterRegistryInfo:
    """A base class, the subclass that takes adapters, and the paths of both."""

    base_class: type
    adapter_class: type

    @property
    def base_class_path(self) -> str:
        """How a configuration names the base class."""
        return class_path(self.base_class)

    @property
    def adapter_class_path(self) -> str:
        """How a configuration names the class with adapters."""
        return class_path(self.adapter_class)


def register_adapter(base_class: type, adapter_class: type) -> None:
    """Says that `adapter_class` is `base_class` with adapters.

    Raises:
        ValueError: for a base that is registered already, or no subclass of it.
    """
    base, adapter = class_path(base_class), class_path(adapter_class)
    if base in _REGISTRY:
        other = _REGISTRY[base].adapter_class_path
        raise ValueError(f"{base} is registered already, with {other}")
    if not issubclass(adapter_class, base_class):
        raise ValueError(f"{adapter} is no subclass of {base}: it cannot stand in for it")
    _REGISTRY[base] = AdapterRegistryInfo(base_class, adapter_class)


def get_registered_adapter(cls: str | type) -> AdapterRegistryInfo | None:
    """The pair of a base class, of a class with adapters, or of the path of either; else None.

    Paths are looked up among what was registered: nothing is imported.
    """
    path = cls if isinstance(cls, str) else class_path(cls)
    if path in _REGISTRY:
        return _REGISTRY[path]
    pairs = (info for info in _REGISTRY.values() if info.adapter_class_path == path)
    return next(pairs, None)


def rename_target(cfg: Any, old: str, new: str) -> None:
    """Writes the class path `new` wherever a configuration names `old` as its `_target_`."""
    if isinstance(cfg, DictConfig):
        for key in list(cfg):
            if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
                continue
            if key in ("target", "_target_") and cfg[key] == old:
                cfg[key] = new
            else:
                rename_target(cfg[key], old, new)
    elif isinstance(cfg, ListConfig):
        for inner in cfg:
            rename_target(inner, old, new)
