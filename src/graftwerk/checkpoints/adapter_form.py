"""What an adapter file of our form holds: settings and weights of adapters and fusions.

The settings of one adapter lie flat, those of several in a list `adapters`, and the keys of their
weights begin with the adapter's name. Fusions lie in a list `fusions` beside it, and the keys of
theirs begin with `fusion:` and the fusion's name, `a,b`. Of many tensors those of layers in a row
are one (`stacked`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwerk.adapters import configs
from graftwerk.adapters.configs import METHODS, MethodConfig, UnionConfig
from graftwerk.adapters.fusion import FusionConfig
from graftwerk.adapters.kinds import field_kinds, fits, words_for
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.reft_rows import with_bases
from graftwerk.checkpoints.stacked import stacked, unstacked
from graftwerk.errors import UserError

FORMAT = "graftwerk"
FUSION = "fusion:"  # no adapter's name has a colon


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter of a file.

    `config` holds the method's class name as `method`, all its settings, and `head` if it has one;
    `state` its weights under the names of `AdapterModel.adapter_state`, but for LoReFT's bases,
    which come back in `AdapterFile.on`.
    """

    name: str
    config: dict[str, Any]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class SavedFusion:
    """One fusion of a file: its name `a,b`, and the weights of `AdapterModel.fusion_state`."""

    name: str
    config: FusionConfig
    state: dict[str, Tensor]


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds; `extra` are values beside the adapters (base, steps, ...).

    A file of another library names modules of its own models. Until a model of ours says where
    those are, `config` tells what can be told without (the method, `virtual_tokens`, `head`) and
    `state` has the file's names; `fit` gives the adapters under ours.
    """

    adapters: list[SavedAdapter]
    extra: dict[str, Any] = field(default_factory=dict)
    fit: Callable[[AdapterModel], list[SavedAdapter]] | None = None
    fusions: list[SavedFusion] = field(default_factory=list)

    def on(self, model: AdapterModel) -> "AdapterFile":
        """The file under the names of ours, with all that a model has of each adapter.

        Raises:
            UserError: where it is made for another model, or holds what ours cannot.
        """
        if self.fit is not None:
            return replace(self, adapters=self.fit(model), fit=None)
        size = getattr(getattr(model, "config", None), "hidden_size", 0)
        whole = [
            replace(each, state=with_bases(each.state, each.config, size)) for each in self.adapters
        ]
        return replace(self, adapters=whole)


def joined(
    saved: Sequence[SavedAdapter], extra: Mapping[str, Any], fusions: Sequence[SavedFusion] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of adapters and fusions as one file of our form holds them."""
    settings = [settings_of(adapter) for adapter in saved]
    if len(saved) == 1 and not fusions:
        return {"format": FORMAT, **settings[0], **extra}, stacked(saved[0].state)
    told: dict[str, Any] = {"format": FORMAT, "adapters": settings}
    state = {f"{a.name}.{key}": value for a in saved for key, value in a.state.items()}
    if fusions:
        told["fusions"] = [{"name": each.name, **asdict(each.config)} for each in fusions]
        state |= {f"{FUSION}{f.name}.{key}": v for f in fusions for key, v in f.state.items()}
    return {**told, **extra}, stacked(state)


def settings_of(adapter: SavedAdapter) -> dict[str, Any]:
    """Its name, method and settings, and the number of its parameters."""
    count = sum(tensor.numel() for tensor in adapter.state.values())
    return {"name": adapter.name, **adapter.config, "trainable_parameters": count}


def apart(path: Path, settings: Mapping[str, Any], state: dict[str, Tensor]) -> AdapterFile:
    """The adapters and fusions of a file of our form; the other way round of `joined`.

    Raises:
        UserError: where settings or weights are not of this form.
    """
    told, extra = listed(path, settings)
    state = unstacked(path, state)
    if "adapters" not in settings:
        ((name, config),) = told
        return AdapterFile([SavedAdapter(name, config, state)], extra)
    fusions = listed_fusions(path, settings)
    shares: dict[str, dict[str, Tensor]] = {name: {} for name, _ in told}
    shares |= {f"{FUSION}{name}": {} for name in fusions}
    for key, tensor in state.items():
        name, _, rest = key.partition(".")
        if name not in shares:
            raise UserError(f"{path}: no adapter in it is called {name!r}, as in {key}")
        shares[name][rest] = tensor
    return AdapterFile(
        [SavedAdapter(n, config, shares[n]) for n, config in told],
        extra,
        fusions=[SavedFusion(n, c, shares[f"{FUSION}{n}"]) for n, c in fusions.items()],
    )


def listed_fusions(path: Path, settings: Mapping[str, Any]) -> dict[str, FusionConfig]:
    """The configuration of each fusion in a file's settings, by name.

    Raises:
        UserError: where a name is missing, or a value cannot be used.
    """
    told: Any = settings.get("fusions", [])
    found: dict[str, FusionConfig] = {}
    for each in told if isinstance(told, list) else [None]:
        name = each.get("name") if isinstance(each, dict) else None
        if not isinstance(name, str) or not all(name.split(",")) or "." in name or name in found:
            raise UserError(f"{path}: fusions must list fusions, each with a name such as a,b")
        assert isinstance(each, dict)
        check_kinds(FusionConfig, each, str(path))
        given = {own.name: each[own.name] for own in fields(FusionConfig) if own.name in each}
        try:
            found[name] = FusionConfig(**given)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return found


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
    if not alike or not (each or settings.get("fusions")):
        raise UserError(f"{path}: its settings name no adapter")
    told = [(str(one["name"]), _own(path, one)) for one in each]
    if len(dict(told)) < len(told):
        raise UserError(f"{path}: two adapters have one name")
    known = {*told[0][1], "head"} if "adapters" not in settings else set()
    beside = {"name", "adapters", "fusions", "format", "trainable_parameters", *known}
    return told, {key: value for key, value in settings.items() if key not in beside}


def _own(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's method with all of its settings, and the kind of its head."""
    head = {"head": settings["head"]} if settings.get("head") is not None else {}
    return {**configs.settings_of(method_of(settings, path)), **head}


def method_class(config: Mapping[str, Any], path: str | Path) -> type[MethodConfig]:
    """The class of the method that a file's settings name."""
    name = config.get("method")
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"{path}: method {name!r} is not known: one of {', '.join(METHODS)}")
    return METHODS[name]


def method_of(config: Mapping[str, Any], path: str | Path) -> MethodConfig:
    """The method that a file's settings describe; what they leave out has its default."""
    method = method_class(config, path)
    if method is UnionConfig:
        return _union_of(config, path)
    check_kinds(method, config, str(path))
    given = {each.name: config[each.name] for each in fields(method) if each.name in config}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return method(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _union_of(config: Mapping[str, Any], path: str | Path) -> MethodConfig:
    each = config.get("configs")
    plain = isinstance(each, list | tuple) and all(isinstance(one, dict) for one in each)
    if not plain or any(one.get("method") == UnionConfig.__name__ for one in each or ()):
        raise UserError(f"{path}: configs must list the methods of a union, none of them a union")
    methods = tuple(method_of(one, path) for one in each or ())
    try:
        return UnionConfig(configs=methods)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_kinds(
    method: type[MethodConfig | FusionConfig], config: Mapping[str, Any], where: str
) -> None:
    """Raises a UserError for a value that is of another kind than its field's type."""
    kinds = field_kinds(method)
    for each in fields(method):
        if each.name in config:
            value = config[each.name]
            if not fits(value, kinds[each.name]):
                needed = words_for(kinds[each.name])
                raise UserError(f"{where}: {each.name}={value!r} must be {needed}")
