"""What an adapter file of our form holds: settings and weights of one adapter or several.

The settings of one lie flat, those of several in a list `adapters`, and the keys of their weights
begin with the adapter's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwerk.adapters.configs import METHODS, MethodConfig
from graftwerk.errors import UserError

FORMAT = "graftwerk"


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter of a file.

    `config` holds the method's class name as `method`, its settings, and `head` where it has one;
    `state` its weights under the names of `AdapterModel.adapter_state`.
    """

    name: str
    config: dict[str, Any]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds; `extra` are values beside the adapters (base, steps, ...)."""

    adapters: list[SavedAdapter]
    extra: dict[str, Any] = field(default_factory=dict)


def joined(
    saved: Sequence[SavedAdapter], extra: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of adapters as one file of our form holds them."""
    settings = [
        {
            "name": adapter.name,
            **adapter.config,
            "trainable_parameters": sum(tensor.numel() for tensor in adapter.state.values()),
        }
        for adapter in saved
    ]
    if len(saved) == 1:
        return {"format": FORMAT, **settings[0], **extra}, saved[0].state
    state = {f"{a.name}.{key}": value for a in saved for key, value in a.state.items()}
    return {"format": FORMAT, "adapters": settings, **extra}, state


def apart(path: Path, settings: Mapping[str, Any], state: Any) -> AdapterFile:
    """The adapters of a file of our form; the other way round of `joined`."""
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: its weights must be tensors by name")
    if "adapters" not in settings:
        if "name" not in settings:
            raise UserError(f"{path}: its settings name no adapter")
        return AdapterFile(*_split(path, settings, state))
    listed = settings["adapters"]
    alike = isinstance(listed, list) and all(
        isinstance(each, dict) and isinstance(each.get("name"), str) for each in listed
    )
    if not alike or not listed:
        raise UserError(f"{path}: adapters must be a list of settings, each with a name")
    shares: dict[str, dict[str, Tensor]] = {each["name"]: {} for each in listed}
    if len(shares) < len(listed):
        raise UserError(f"{path}: two adapters have one name")
    for key, tensor in state.items():
        name, _, rest = str(key).partition(".")
        if name not in shares:
            raise UserError(f"{path}: no adapter in it is called {name!r}, as in {key}")
        shares[name][rest] = tensor
    saved = [_split(path, each, shares[each["name"]])[0][0] for each in listed]
    return AdapterFile(saved, {key: value for key, value in settings.items() if key != "adapters"})


def _split(
    path: Path, settings: Mapping[str, Any], state: dict[str, Tensor]
) -> tuple[list[SavedAdapter], dict[str, Any]]:
    """One adapter, and the settings that are not its own."""
    own = {each.name for each in fields(method_class(settings, path))}
    known = {"method", "head", *own}
    config = {key: value for key, value in settings.items() if key in known}
    extra = {key: value for key, value in settings.items() if key not in {*known, "name"}}
    return [SavedAdapter(str(settings["name"]), config, state)], extra


def method_class(config: Mapping[str, Any], path: str | Path) -> type[MethodConfig]:
    """The class of the method that a file's settings name."""
    name = config.get("method")
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"{path}: method {name!r} is not known: one of {', '.join(METHODS)}")
    return METHODS[name]


def method_of(config: Mapping[str, Any], path: str | Path) -> MethodConfig:
    """The method that a file's settings describe; what they leave out has its default."""
    method = method_class(config, path)
    settings = {}
    for known in fields(method):
        key, default = known.name, known.default
        if default is MISSING and known.default_factory is not MISSING:
            default = known.default_factory()
        value = config.get(key, default)
        value = tuple(value) if isinstance(value, list) else value
        if not _alike(value, default):
            raise UserError(f"{path}: {key}={config.get(key)!r} is no value that can be used")
        settings[key] = value
    try:
        return method(**settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a field's default: numbers, text, names."""
    if default is None:  # a number, text, or numbers of layers
        layers = isinstance(value, tuple) and all(type(number) is int for number in value)
        return value is None or isinstance(value, str | int | float) or layers
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    if isinstance(default, int) and not isinstance(default, bool):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))
