"""The mixin that lets any `torch.nn.Module` hold adapters (NeMo's names and behaviour).

The mixin has no constructor and no state of its own: `adapter_layer`, `adapter_cfg` and
`adapter_name` come into being with the first adapter. A module without adapters pays nothing.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graftwerk.adapters.strategies import AbstractAdapterStrategy
from graftwerk.adapters.targets import class_path, find_target, instantiate

AdapterConfig = DictConfig | Mapping[str, Any] | nn.Module | Any  # Any: a dataclass


def read_config(cfg: AdapterConfig) -> nn.Module | dict[str, Any]:
    """An adapter's configuration as plain values, a copy; a ready module as it is.

    Interpolations are resolved. The documentation's `__target__` becomes `_target_`.

    Raises:
        ValueError: for what is no configuration, or has values that no file can hold.
    """
    if isinstance(cfg, nn.Module):
        return cfg
    dataclass = is_dataclass(cfg) and not isinstance(cfg, type)
    config = _plain(cfg, "cfg") if dataclass or isinstance(cfg, Mapping | DictConfig) else None
    if not isinstance(config, dict):
        raise ValueError(
            f"cfg is a {type(cfg).__name__}: give a DictConfig, a dataclass such as "
            f"LinearAdapterConfig(...), or a ready torch.nn.Module"
        )
    if "__target__" in config:
        target = config.pop("__target__")
        if config.setdefault("_target_", target) != target:
            raise ValueError("cfg has both _target_ and __target__, and they differ: keep one")
    if "_target_" not in config:
        raise ValueError(f"cfg names no _target_ class; its keys are {', '.join(map(str, config))}")
    return config


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, DictConfig | ListConfig):
        try:
            container = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise ValueError(f"{where}: {str(error).partition(chr(10))[0]}") from None
        return _plain(container, where)
    if isinstance(value, AbstractAdapterStrategy):
        return value.as_config()
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value == "???":  # OmegaConf's word for a value that is still to come
        raise ValueError(f"{where} is missing")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{where} is of type {type(value).__name__}, which no configuration can hold: "
        f"give plain values, or a configuration with a _target_"
    )


def described(config: nn.Module | dict[str, Any]) -> dict[str, Any]:
    """What a model's configuration keeps of an adapter, `enabled` included.

    A ready module is asked by `as_config()`; of one that has none only `enabled` is kept, and a
    model that holds it cannot be written to a file.
    """
    if isinstance(config, nn.Module):
        ask: Any = getattr(config, "as_config", None)
        config = {} if ask is None else dict(_plain(ask(), "as_config()"))
    return {**config, "enabled": config.get("enabled", True)}


class AdapterModuleMixin:
    """Adapters for any `torch.nn.Module`: `class MyModule(torch.nn.Module, AdapterModuleMixin)`.

    An adapter is a module whose output has the shape of its input, and that holds an
    `adapter_strategy`, which joins the two. An adapter that is born with zeros changes nothing.

    `adapter_layer`: ModuleDict, adapters by name. `adapter_cfg`: DictConfig, their configurations;
    below a model it is `model.cfg.adapters` itself. `adapter_name`: the one added last.
    Names may be plain (`a`) or carry the module that the adapter belongs to (`encoder:a`).
    """

    adapter_global_cfg_key = "global_cfg"
    adapter_metadata_cfg_key = "adapter_meta_cfg"

    adapter_layer: nn.ModuleDict
    adapter_cfg: DictConfig
    adapter_name: str

    def add_adapter(self, name: str, cfg: AdapterConfig, **kwargs: Any) -> None:
        """Adds an adapter, enabled unless the configuration says `enabled: False`.

        It is put where this module's weights are, in the mode (training or not) of this module.

        Args:
            name: one that no other adapter of this module has.
            cfg: a DictConfig or dataclass with `_target_`, or a ready module, which is used as it
                is: given to two modules, they share it.
            kwargs: arguments for `_target_` that win over those of `cfg`, such as things that no
                configuration can hold. They are not kept: whoever restores gives them again.

        Raises:
            ValueError: for a name that is taken, reserved or unusable; a `_target_` that is not
                allowed, or not of the accepted types; arguments that it does not take.
        """
        config = read_config(cfg)
        self.check_supported_adapter_type_(config)
        _, adapter_name = self.resolve_adapter_module_name_(name)
        if adapter_name in getattr(self, "adapter_layer", ()):
            have = ", ".join(self.adapter_layer)
            raise ValueError(f"an adapter {adapter_name!r} exists already; this module has {have}")
        check_name(adapter_name, self.adapter_global_cfg_key)
        entry = described(config)
        if isinstance(config, nn.Module):
            if kwargs:
                raise ValueError(f"{name}: a ready module takes no arguments ({', '.join(kwargs)})")
            adapter = config
        else:
            config.pop("enabled", None)
            adapter = instantiate(config, **kwargs)
            if not isinstance(adapter, nn.Module):
                raise ValueError(f"_target_ {config['_target_']!r} makes no torch.nn.Module")
        if not hasattr(self, "adapter_layer"):
            self.adapter_layer = nn.ModuleDict()
        if getattr(self, "adapter_cfg", None) is None:
            self.adapter_cfg = OmegaConf.create({})
        self.adapter_layer[adapter_name] = self._moved_here(adapter)
        self.adapter_name = adapter_name
        with open_dict(self.adapter_cfg):
            self.adapter_cfg[adapter_name] = OmegaConf.create(entry)

    def _moved_here(self, adapter: nn.Module) -> nn.Module:
        assert isinstance(self, nn.Module)
        own = next(self.parameters(), next(self.buffers(), None))
        return (adapter if own is None else adapter.to(own.device)).train(self.training)

    def is_adapter_available(self) -> bool:
        """Whether there is any adapter, enabled or not."""
        return len(getattr(self, "adapter_layer", None) or ()) > 0

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        """Enables or disables one adapter, or all of them (`name` None).

        Raises:
            ValueError: where there is no adapter, or the name is the reserved one.
            KeyError: for a name that no adapter has.
        """
        if not self.is_adapter_available():
            raise ValueError("no adapter to enable or disable: add one first")
        self._write_enabled(name, enabled)

    def _write_enabled(self, name: str | None, enabled: bool) -> None:
        known = [key for key in self.adapter_cfg if key != self.adapter_global_cfg_key]
        if name is not None:
            _, adapter_name = self.resolve_adapter_module_name_(name)
            if adapter_name == self.adapter_global_cfg_key:
                raise ValueError(f"{name!r} is reserved for settings: no adapter has that name")
            if adapter_name not in known:
                raise KeyError(unknown(name, known))
            known = [adapter_name]
        with open_dict(self.adapter_cfg):
            for key in known:
                self.adapter_cfg[key]["enabled"] = enabled

    def get_enabled_adapters(self) -> list[str]:
        """Names of the adapters that take part, in the order of addition, without their module."""
        if not self.is_adapter_available():
            return []
        types = tuple(self.get_accepted_adapter_types()) or nn.Module
        return [
            name
            for name in map(str, self.adapter_cfg)
            if name != self.adapter_global_cfg_key
            and name in self.adapter_layer
            and self.adapter_cfg[name].get("enabled", True)
            and isinstance(self.adapter_layer[name], types)
        ]

    def get_adapter_module(self, name: str) -> nn.Module | None:
        """The adapter of that name (`a` or `encoder:a`), or None."""
        _, adapter_name = self.resolve_adapter_module_name_(name)
        if adapter_name not in (getattr(self, "adapter_layer", None) or ()):
            return None
        return self.adapter_layer[adapter_name]

    def get_adapter_cfg(self, name: str) -> DictConfig | None:
        """The configuration of the adapter of that name (`a` or `encoder:a`), or None."""
        _, adapter_name = self.resolve_adapter_module_name_(name)
        cfg = getattr(self, "adapter_cfg", None)
        return None if cfg is None else cfg.get(adapter_name)

    def set_accepted_adapter_types(self, adapter_types: Iterable[type | str]) -> None:
        """Says which adapter classes this module takes: classes, or their paths.

        Raises:
            ValueError: for what is no class of modules, or a path that is not allowed.
        """
        types = set()
        for kind in adapter_types:
            cls = find_target(kind) if isinstance(kind, str) else kind
            if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
                raise ValueError(
                    f"accepted adapter type {kind!r} is no subclass of torch.nn.Module"
                )
            types.add(cls)
        self._accepted_adapter_types = types

    def get_accepted_adapter_types(self) -> set[type]:
        """The classes that this module takes; empty: all."""
        return getattr(self, "_accepted_adapter_types", set())

    def check_supported_adapter_type_(
        self, adapter_cfg: AdapterConfig, supported_adapter_types: Iterable[type] | None = None
    ) -> None:
        """Checks that a configuration makes an adapter of a type that this module takes.

        Raises:
            ValueError: where it does not.
        """
        if supported_adapter_types is None:
            supported_adapter_types = self.get_accepted_adapter_types()
        types = tuple(supported_adapter_types)
        if not types:
            return
        config = read_config(adapter_cfg)
        made = type(config) if isinstance(config, nn.Module) else find_target(config["_target_"])
        if not issubclass(made, types):
            accepted = ", ".join(sorted(class_path(kind) for kind in types))
            raise ValueError(f"{class_path(made)} is no accepted adapter type here: {accepted}")

    def unfreeze_enabled_adapters(self, freeze_batchnorm: bool = True) -> None:
        """Makes the enabled adapters of this module and the modules in it trainable.

        To be called after everything was frozen.

        Args:
            freeze_batchnorm: stop every batch norm from training and from counting averages, so
                that with all adapters disabled the module gives exactly what it gave before. Batch
                norms within the enabled adapters go on.
        """
        assert isinstance(self, nn.Module)
        if freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.requires_grad_(False).eval()
                    module.track_running_stats = False
        for module in self.modules():
            if isinstance(module, AdapterModuleMixin) and hasattr(module, "adapter_layer"):
                for name in module.get_enabled_adapters():
                    _unfreeze(module.adapter_layer[name])

    def forward_enabled_adapters(self, input: Any) -> Any:
        """Runs the enabled adapters one after the other, in the order of addition.

        Raises:
            AttributeError: for an adapter without an `adapter_strategy`.
        """
        for name in self.get_enabled_adapters():
            adapter = self.adapter_layer[name]
            strategy = getattr(adapter, "adapter_strategy", None)
            if strategy is None:
                raise AttributeError(
                    f"adapter {name!r} has no adapter_strategy: set it on "
                    f"{class_path(type(adapter))}, for example to ResidualAddAdapterStrategy()"
                )
            input = self.forward_single_enabled_adapter_(
                input, adapter, adapter_name=name, adapter_strategy=strategy
            )
        return input

    def forward_single_enabled_adapter_(
        self,
        input: Tensor,
        adapter_module: nn.Module,
        *,
        adapter_name: str,
        adapter_strategy: AbstractAdapterStrategy,
    ) -> Any:
        """One adapter's step of `forward_enabled_adapters`, for a subclass to change."""
        return adapter_strategy(input, adapter_module, module=self)

    def resolve_adapter_module_name_(self, name: str) -> tuple[str, str]:
        """(module, adapter) of a name: `encoder:a` is split at its first `:`.

        Of a plain name the module is the one that the configuration remembers, or `''`.
        """
        if ":" in name:
            module_name, _, adapter_name = name.partition(":")
            return module_name, adapter_name
        found: Any = getattr(self, "adapter_cfg", None)
        for key in (self.adapter_global_cfg_key, self.adapter_metadata_cfg_key, "modules", name):
            found = None if found is None else found.get(key)
        return found or "", name


class AdapterSlotMixin(AdapterModuleMixin):
    """The mixin of a slot: a model decides what is in it and what of that is active.

    `active` is what the model's composition comes to here, None for nothing; `active_names` are the
    adapters that the composition names, from left to right. The model sets both.
    """

    active: Callable[[Any], Any] | None
    active_names: tuple[str, ...] = ()

    def add_adapter(self, name: str, cfg: AdapterConfig, **kwargs: Any) -> None:
        """Raises a ValueError: an adapter has parts in many slots, so the model adds it."""
        raise ValueError(f"a slot holds one part of an adapter: add {name!r} to the model")

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        """Raises a ValueError: what is active is one expression, held at the model."""
        raise ValueError("what is active in a slot is said at the model: model.set_active(...)")

    def get_enabled_adapters(self) -> list[str]:
        """Names of the adapters that are active and have a part here."""
        return [name for name in self.active_names if name in self.adapter_layer]

    def forward_enabled_adapters(self, input: Any) -> Any:
        """What the active composition makes of a `SlotCall`: the slot's new output."""
        return input.output if self.active is None else self.active(input)


def check_name(name: str, reserved: str) -> None:
    """Checks that an adapter can be called so.

    Raises:
        ValueError: where it cannot.
    """
    if name == reserved:
        raise ValueError(f"{reserved!r} is reserved for settings: choose another adapter name")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter name {name!r}: must not be empty, hold a '.', or be a word of "
            f"torch.nn.ModuleDict such as 'keys' or 'train'"
        )


def unknown(name: str, known: Iterable[Any]) -> str:
    """The line for a name that no adapter has."""
    return f"no adapter is called {name!r}: there is {', '.join(map(str, known)) or 'none'}"


def _unfreeze(adapter: nn.Module) -> None:
    adapter.train()
    unfreeze = getattr(adapter, "adapter_unfreeze", None)
    if callable(unfreeze):
        unfreeze()
    else:
        adapter.requires_grad_(True)
    for module in adapter.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = True
