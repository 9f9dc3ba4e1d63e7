"""What an adapter file of our form holds: settings and weights of one adapter or several.

The settings of one lie flat, those of several in a list `adapters`, and the keys of their weights
begin with the adapter's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwerk.adapters.configs import METHODS, MethodConfig
from graftwerk.errors import UserError

FORMAT = "graftwerk"


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter of a file.

    `config` holds the method's class name as `method`, all its settings, and `head` if it has one;
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
    settings = [settings_of(adapter) for adapter in saved]
    if len(saved) == 1:
        return {"format": FORMAT, **settings[0], **extra}, saved[0].state
    state = {f"{a.name}.{key}": value for a in saved for key, value in a.state.items()}
    return {"format": FORMAT, "adapters": settings, **extra}, state


def settings_of(adapter: SavedAdapter) -> dict[str, Any]:
    """Its name, method and settings, and the number of its parameters."""
    count = sum(tensor.numel() for tensor in adapter.state.values())
    return {"name": adapter.name, **adapter.config, "trainable_parameters": count}


def apart(path: Path, settings: Mapping[str, Any], state: dict[str, Tensor]) -> AdapterFile:
    """The adapters of a file of our form; the other way round of `joined`.

    Raises:
        UserError: where settings or weights are not of this form.
    """
    told, extra = listed(path, settings)
    if "adapters" not in settings:
        ((name, config),) = told
        return AdapterFile([SavedAdapter(name, config, state)], extra)
    shares: dict[str, dict[str, Tensor]] = {name: {} for name, _ in told}
    for key, tensor in state.items():
        name, _, rest = key.partition(".")
        if name not in shares:
            raise UserError(f"{path}: no adapter in it is called {name!r}, as in {key}")
        shares[name][rest] = tensor
    return AdapterFile([SavedAdapter(n, config, shares[n]) for n, config in told], extra)


def listed(
    path: Path, settings: Mapping[str, Any]
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """(name, method and settings) of each adapter in a file's settings, and what is beside them.

    Raises:
        UserError: where a name or a method is missing or not known.
    """
    each = settings.get("adapters", [settings])
    alike = isinstance(each, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in each
    )
    if not alike or not each:
        raise UserError(f"{path}: its settings name no adapter")
    told = [(str(one["name"]), _own(path, one)) for one in each]
    if len(dict(told)) < len(told):
        raise UserError(f"{path}: two adapters have one name")
    known = {*told[0][1], "head"} if each[0] is settings else set()
    beside = {"name", "adapters", "format", "trainable_parameters", *known}
    return told, {key: value for key, value in settings.items() if key not in beside}


def _own(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's method with all of its settings, and the kind of its head."""
    head = {"head": settings["head"]} if settings.get("head") is not None else {}
    return {"method": settings.get("method"), **asdict(method_of(settings, path)), **head}


def method_class(config: Mapping[str, Any], path: str | Path) -> type[MethodConfig]:
    """The class of the method that a file's settings name."""
    name = config.get("method")
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"{path}: method {name!r} is not known: one of {', '.join(METHODS)}")
    return METHODS[name]


def method_of(config: Mapping[str, Any], path: str | Path) -> MethodConfig:
    """The method that a file's settings describe; what they leave out has its default."""
    method = method_class(config, path)
    check_kinds(method, config, str(path))
    given = {each.name: config[each.name] for each in fields(method) if each.name in config}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return method(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_kinds(method: type[MethodConfig], config: Mapping[str, Any], where: str) -> None:
    """Raises a UserError for a value that is of another kind than its field's default."""
    for each in fields(method):
        if each.name in config:
            value, default = config[each.name], each.default
            if default is MISSING and each.default_factory is not MISSING:
                default = each.default_factory()
            if not _alike(tuple(value) if isinstance(value, list) else value, default):
                raise UserError(f"{where}: {each.name}={value!r} is no value that can be used")


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a field's default: numbers, text, names."""
    if default is None:  # a number, text, or numbers of layers
        layers = isinstance(value, tuple) and all(type(number) is int for number in value)
        return value is None or isinstance(value, str | int | float) or layers
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    if isinstance(default, int | float) and not isinstance(default, bool):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))
