"""Which classes a configuration may name, and making them.

`_target_` in a file is text from somewhere. A class that is not on the list is refused by name, and
nothing is imported to find that out. `allow_target` puts a class on the list.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import activation

C = TypeVar("C", str, type[Any])

_STRATEGIES = ("ResidualAddAdapterStrategy", "ReturnResultAdapterStrategy")
_LAYERS = ("Dropout", "Identity", "LayerNorm", "Linear", "RMSNorm", *activation.__all__)

# What `_target_` says -> the class, or where it is: "module:name", imported when it is first used.
_ALLOWED: dict[str, type | str] = {
    "graftwerk.nemo.adapter_modules.LinearAdapter": "graftwerk.nemo.adapter_modules:LinearAdapter",
    # NeMo's own paths, so that its configurations and files name our classes.
    "nemo.collections.common.parts.adapter_modules.LinearAdapter": (
        "graftwerk.nemo.adapter_modules:LinearAdapter"
    ),
    **{
        f"{module}.{name}": f"graftwerk.adapters.strategies:{name}"
        for name in _STRATEGIES
        for module in (
            "graftwerk.adapters.strategies",
            "graftwerk.nemo.adapter_mixin_strategies",
            "nemo.core.classes.mixins.adapter_mixin_strategies",
        )
    },
    **{f"torch.nn.{name}": getattr(nn, name) for name in _LAYERS},
    **{f"{getattr(nn, name).__module__}.{name}": getattr(nn, name) for name in _LAYERS},
}


def class_path(cls: type) -> str:
    """The text that names a class in a configuration."""
    return f"{cls.__module__}.{cls.__qualname__}"


def allow_target(cls_or_path: C) -> C:
    """Lets configurations name a class, given as itself or by its path; returns what it was given.

    Works as a decorator. A path is imported when a configuration first names it, never before.

    Raises:
        ValueError: for what is neither a class nor `package.module.Class`.
    """
    if isinstance(cls_or_path, str):
        module, _, name = cls_or_path.rpartition(".")
        if not module or not all(part.isidentifier() for part in cls_or_path.split(".")):
            raise ValueError(f"allow_target({cls_or_path!r}): give package.module.Class")
        _ALLOWED[cls_or_path] = f"{module}:{name}"
    elif inspect.isclass(cls_or_path):
        _ALLOWED[class_path(cls_or_path)] = cls_or_path
    else:
        raise ValueError(f"allow_target({cls_or_path!r}): give a class or its path")
    return cls_or_path


def find_target(path: object) -> type:
    """The class that a configuration names.

    Raises:
        ValueError: for one that is not on the list (nothing was imported), or is no class.
    """
    if not isinstance(path, str) or path not in _ALLOWED:
        raise ValueError(
            f"_target_ {path!r} is not on the list of classes that a configuration may name, and "
            f"was not imported; if you trust it, call graftwerk.nemo.allow_target({path!r}) first"
        )
    found = _ALLOWED[path]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(importlib.import_module(module), name, None)
        if not inspect.isclass(found):
            raise ValueError(f"_target_ {path!r} is allowed, but {module} has no such class")
        _ALLOWED[path] = found
    return found


def instantiate(config: Mapping[str, Any], **kwargs: Any) -> Any:
    """Makes what a configuration describes: `_target_` names the class, the rest are arguments.

    Values that have a `_target_` of their own are made first. `kwargs` win over the configuration.

    Raises:
        ValueError: for a class that is not allowed, or arguments that it does not take.
    """
    check_targets(config)
    return _made(dict(config) | kwargs)


def check_targets(config: Any) -> None:
    """Looks every `_target_` of a configuration up, before anything is made.

    Raises:
        ValueError: for one that is not allowed.
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            find_target(config["_target_"])
        for value in config.values():
            check_targets(value)
    elif isinstance(config, list | tuple):
        for value in config:
            check_targets(value)


def _made(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_made(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    arguments = {key: _made(item) for key, item in value.items() if key != "_target_"}
    if "_target_" not in value:
        return arguments
    cls: Callable[..., Any] = find_target(value["_target_"])
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(inspect.signature(cls).parameters)
        raise ValueError(f"{value['_target_']}: {error}; it takes {takes}") from None
    return cls(**arguments)
