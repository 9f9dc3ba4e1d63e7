"""Adapters for a whole model, whose modules hold them, and whose configuration remembers them."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from graftwerk.adapters.mixin import (
    AdapterConfig,
    AdapterModuleMixin,
    check_name,
    described,
    read_config,
    unknown,
)
from graftwerk.adapters.targets import check_targets
from graftwerk.nemo.mixin_files import States, read_adapters, write_adapters
from graftwerk.nemo.registry import get_registered_adapter, rename_target

log = logging.getLogger(__name__)


class AdapterModelPTMixin(AdapterModuleMixin):
    """For a model with a `cfg`: `class MyModel(ModelPT, AdapterModelPTMixin)`.

    Modules of the model that are `AdapterModuleMixin`s hold the adapters. `model.cfg.adapters` has
    the configuration of each, and in `global_cfg` what concerns all: the module that each belongs
    to (`adapter_meta_cfg.modules`), and the user's own keys. The modules share that object.

    A model may override `add_adapter` and `get_enabled_adapters`, call `super()` and hand the call
    on to its modules, as NeMo's models do. Where it does not, the mixin hands it on: `encoder:a`
    goes to `self.encoder`; `a` to `default_adapter_module_name`, and to each of
    `adapter_module_names` for which `global_cfg.<module>_adapter` is true; to every module that
    takes adapters where the model names none.
    """

    cfg: DictConfig

    @property
    def adapter_module_names(self) -> list[str]:
        """Modules that an adapter may be added to; `''` is the default one."""
        return [""]

    @property
    def default_adapter_module_name(self) -> str | None:
        """The module that a plain name goes to, if the model has one."""
        return None

    def check_valid_model_with_adapter_support_(self) -> None:
        """For a model to say that its modules take no adapters: it raises a ValueError."""

    def setup_adapters(self) -> None:
        """Adds all adapters of `cfg.adapters` again. To be called at the end of the constructor."""
        if "adapters" not in self.cfg:
            return
        self.update_adapter_cfg(self.cfg.adapters)
        names = [str(name) for name in self.cfg.adapters if name != self.adapter_global_cfg_key]
        self._restoring_adapters = True
        try:
            for name in names:
                entry = OmegaConf.create(OmegaConf.to_container(self.cfg.adapters[name]))
                self.add_adapter(name=self._full_name(name), cfg=entry)
        finally:
            del self._restoring_adapters

    def add_adapter(self, name: str, cfg: AdapterConfig) -> None:
        """Writes an adapter into `cfg.adapters`; makes it, unless the model overrides this method.

        Raises:
            ValueError: as `AdapterModuleMixin.add_adapter`; the configuration is as it was.
        """
        config = read_config(cfg)
        module_name, adapter_name = self.resolve_adapter_module_name_(name)
        check_name(adapter_name, self.adapter_global_cfg_key)
        if not hasattr(self, "_restoring_adapters") and self._holders(adapter_name):
            raise ValueError(f"an adapter {adapter_name!r} exists already: choose another name")
        check_targets(config)
        had = "adapters" in self.cfg
        before = self.cfg.adapters.get(adapter_name) if had else None
        self._write_entry(adapter_name, module_name, described(config))
        try:
            self.check_valid_model_with_adapter_support_()
            if not self._overrides("add_adapter"):
                for module in self._homes(module_name):
                    module.add_adapter(name, cfg)
        except Exception:
            if before is None:
                self._forget(adapter_name)
            if not had:
                with open_dict(self.cfg):
                    del self.cfg.adapters
            raise

    def _write_entry(self, name: str, module_name: str, entry: dict[str, Any]) -> None:
        with open_dict(self.cfg):
            if "adapters" not in self.cfg:
                self.cfg.adapters = {}
            adapters: Any = self.cfg.adapters
            for key in (self.adapter_global_cfg_key, self.adapter_metadata_cfg_key, "modules"):
                if key not in adapters:
                    adapters[key] = {}
                adapters = adapters[key]
            adapters[name] = module_name
            self.cfg.adapters[name] = entry
            self.update_adapter_cfg(self.cfg["adapters"])

    def _forget(self, name: str) -> None:
        """Takes an adapter that was not finished out of the modules and the configuration."""
        for module in self._holders(name):
            del module.adapter_layer[name]
        with open_dict(self.cfg):
            self.cfg.adapters.pop(name, None)
            self._recorded_modules().pop(name, None)

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(AdapterModelPTMixin, method)

    def _below(self) -> Iterator[AdapterModuleMixin]:
        assert isinstance(self, nn.Module)
        for module in self.modules():
            if module is not self and isinstance(module, AdapterModuleMixin):
                yield module

    def _holders(self, adapter_name: str) -> list[AdapterModuleMixin]:
        return [
            module
            for module in self._below()
            if adapter_name in (getattr(module, "adapter_layer", None) or ())
        ]

    def _recorded_modules(self) -> Any:
        """Adapter -> module, as the configuration has it; empty where there is none."""
        found: Any = self.cfg
        keys = (self.adapter_global_cfg_key, self.adapter_metadata_cfg_key, "modules")
        for key in ("adapters", *keys):
            found = None if found is None else found.get(key)
        return {} if found is None else found

    def _homes(self, module_name: str) -> list[Any]:
        """The modules that an adapter of this module name goes to."""
        names = [name for name in self.adapter_module_names if name]
        if module_name:
            if names and module_name not in names:
                raise ValueError(f"no module is called {module_name!r}: use {', '.join(names)}")
            chosen = [module_name]
        elif names:
            settings = self.cfg.adapters.get(self.adapter_global_cfg_key) or {}
            default = self.default_adapter_module_name
            chosen = [n for n in names if settings.get(f"{n}_adapter", n == default)]
            if default is None and not chosen:
                raise ValueError(
                    f"the model has no default module: name one of {', '.join(names)}, "
                    f"as in {names[0]}:my_adapter"
                )
        else:
            chosen = [""]
        return [home for name in chosen for home in self._takers(name)]

    def _takers(self, path: str) -> list[Any]:
        """The outermost modules at a path that take adapters."""
        assert isinstance(self, nn.Module)
        try:
            top = self.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the model has no module {path!r}") from None
        found = list(_outermost(top if path else list(top.children())))
        if not found:
            what = f"module {path!r}" if path else "model"
            raise ValueError(
                f"the {what} takes no adapters: derive its class, or those of the modules in it, "
                f"from AdapterModuleMixin"
            )
        return found

    def is_adapter_available(self) -> bool:
        """Whether any module holds an adapter, enabled or not."""
        self._share_cfg()
        self.check_valid_model_with_adapter_support_()
        return any(module.is_adapter_available() for module in self._below())

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        """Enables or disables an adapter (`a` or `encoder:a`), or all, in all modules at once.

        Raises:
            AttributeError: where no adapter was added.
            ValueError: for the reserved name.
            KeyError: for a name that no adapter has.
        """
        self._share_cfg()
        self.check_valid_model_with_adapter_support_()
        known = self._known("enabled or disabled")
        if name is not None and self._without_module(name) != self.adapter_global_cfg_key:
            self._check_known(name, known)
        self._write_enabled(name, enabled)

    def get_enabled_adapters(self) -> list[str]:
        """Names of the enabled adapters, in the order of addition, without their module.

        Called by a model that overrides it: an empty list, to be filled from its modules.
        """
        self._share_cfg()
        self.check_valid_model_with_adapter_support_()
        if self._overrides("get_enabled_adapters"):
            return []
        enabled = {name for module in self._below() for name in module.get_enabled_adapters()}
        return [str(name) for name in self.adapter_cfg if name in enabled]

    def get_adapter_module(self, name: str) -> nn.Module | None:
        """The adapter of that name (`a` or `encoder:a`): that of the first module that holds it."""
        _, adapter_name = self.resolve_adapter_module_name_(name)
        if not self._fits(name):
            return None
        holders = self._holders(adapter_name)
        return holders[0].adapter_layer[adapter_name] if holders else None

    def get_adapter_cfg(self, name: str) -> DictConfig | None:
        """The configuration of the adapter of that name (`a` or `encoder:a`), or None."""
        return super().get_adapter_cfg(name) if self._fits(name) else None

    def update_adapter_cfg(self, cfg: DictConfig) -> None:
        """Gives all modules `cfg` (`model.cfg.adapters`) as their `adapter_cfg`, not a copy."""
        self.adapter_cfg = cfg
        for module in self._below():
            module.adapter_cfg = cfg

    def save_adapters(self, filepath: str | Path, name: str | Iterable[str] | None = None) -> None:
        """Writes adapters, not the model, to a file that `torch.load(weights_only=True)` reads.

        Args:
            filepath: usually `something.pt`; written beside and renamed.
            name: one or several of `a` or `encoder:a`; None: all.

        Raises:
            AttributeError: where no adapter was added.
            KeyError: for a name that no adapter has.
            ValueError: for a ready module that does not say its configuration.
        """
        known = self._known("saved")
        names = known.values() if name is None else [name] if isinstance(name, str) else list(name)
        states: States = {}
        config: dict[str, Any] = {}
        for given in names:
            self._check_known(given, known)
            adapter_name = self._without_module(given)
            self.check_describable(adapter_name)
            states[known[adapter_name]] = [
                {f"{adapter_name}.{path}": tensor for path, tensor in state.items()}
                for module in self._holders(adapter_name)
                for state in [module.adapter_layer[adapter_name].state_dict()]
            ]
            config[adapter_name] = _values(self.cfg.adapters[adapter_name])
        settings = _values(self.cfg.adapters[self.adapter_global_cfg_key])
        recorded = settings[self.adapter_metadata_cfg_key]["modules"]
        kept = {key: module for key, module in recorded.items() if key in config}
        settings[self.adapter_metadata_cfg_key]["modules"] = kept
        write_adapters(filepath, states, {self.adapter_global_cfg_key: settings, **config})

    def load_adapters(
        self,
        filepath: str | Path,
        name: str | Iterable[str] | None = None,
        map_location: Any = None,
        strict: bool = True,
    ) -> None:
        """Adds adapters of a file to the model, with their weights. If one fails, none is added.

        Args:
            filepath: what `save_adapters` wrote.
            name: whole names of adapters in the file, `a` or `encoder:a`; None: all.
            map_location: where the file's tensors go first (torch's); the adapters are where their
                modules are.
            strict: whether each weight must be in the file and in the adapter.

        Raises:
            KeyError: for a name that the file does not have.
            ValueError: for a name that the model has already, or where another number of modules
                of the model holds the adapter than the file has weights for.
            RuntimeError: where weights do not fit.
            UserError: where the file cannot be read.
        """
        states, config = read_adapters(filepath, map_location)
        modules = config.get(self.adapter_global_cfg_key) or {}
        for key in (self.adapter_metadata_cfg_key, "modules"):
            modules = modules.get(key) or {} if isinstance(modules, dict) else {}
        names = states if name is None else [name] if isinstance(name, str) else list(name)
        wanted = [_in_file(filepath, given, states, config, modules) for given in names]
        for _, adapter_name in wanted:
            if self._holders(adapter_name):
                raise ValueError(f"{filepath}: the model has an adapter {adapter_name!r} already")
        try:
            for key, adapter_name in wanted:
                self.add_adapter(name=key, cfg=OmegaConf.create(config[adapter_name]))
                self._fill(filepath, key, adapter_name, states[key], strict)
        except Exception:
            if "adapters" in self.cfg:
                for _, adapter_name in wanted:
                    self._forget(adapter_name)
            raise

    def _fill(
        self, path: str | Path, key: str, adapter_name: str, states: list[Any], strict: bool
    ) -> None:
        holders = self._holders(adapter_name)
        if len(holders) != len(states):
            raise ValueError(
                f"{path}: {key!r} has weights for {len(states)} modules, "
                f"but {len(holders)} modules of this model hold it"
            )
        prefix = f"{adapter_name}."
        for module, state in zip(holders, states, strict=True):
            own = {path.removeprefix(prefix): tensor for path, tensor in state.items()}
            try:
                module.adapter_layer[adapter_name].load_state_dict(own, strict=strict)
            except RuntimeError as error:
                said = " ".join(str(error).split())
                raise RuntimeError(f"{path}: {key!r} does not fit: {said}") from None

    def replace_adapter_compatible_modules(
        self, update_config: bool = True, verbose: bool = True
    ) -> None:
        """Gives each immediate child whose class is registered the class that takes adapters.

        Args:
            update_config: write the new class for the old one where `cfg` names it.
            verbose: log each change.
        """
        assert isinstance(self, nn.Module)
        for name, child in self.named_children():
            info = get_registered_adapter(type(child))
            if isinstance(child, AdapterModuleMixin) or info is None:
                continue
            child.__class__ = info.adapter_class
            if update_config:
                rename_target(self.cfg, info.base_class_path, info.adapter_class_path)
            if verbose:
                log.info(f"{name}: {info.base_class_path} is now {info.adapter_class_path}")

    def check_describable(self, adapter_name: str) -> None:
        """Checks that an adapter can be made again from the configuration.

        Raises:
            ValueError: for a ready module that does not say how it was made.
        """
        if "_target_" not in self.cfg.adapters[adapter_name]:
            raise ValueError(
                f"adapter {adapter_name!r} was added as a ready module that does not say how it "
                f"was made, so a file of it could not be loaded: add it by a configuration, or "
                f"give its class as_config(), which returns _target_ and arguments"
            )

    def _share_cfg(self) -> None:
        if "adapters" in self.cfg:
            self.update_adapter_cfg(self.cfg.adapters)
        elif getattr(self, "adapter_cfg", None) is None:
            self.adapter_cfg = OmegaConf.create({})

    def _full_name(self, adapter_name: str) -> str:
        """The name with the module that the adapter was added to."""
        return full_name(self._recorded_modules().get(adapter_name), adapter_name)

    def _known(self, what_for: str) -> dict[str, str]:
        """Names, and names with their module, of all adapters that modules hold, in order."""
        cfg = getattr(self, "cfg", None)
        adapters = (cfg.get("adapters") if cfg is not None else None) or {}
        names = [str(name) for name in adapters if name != self.adapter_global_cfg_key]
        held = {name: self._full_name(name) for name in names if self._holders(name)}
        if not held:
            raise AttributeError(f"no adapter was added to this model: none can be {what_for}")
        return held

    def _without_module(self, name: str) -> str:
        return self.resolve_adapter_module_name_(name)[1]

    def _check_known(self, name: str, known: dict[str, str]) -> None:
        if self._without_module(name) not in known or not self._fits(name):
            raise KeyError(unknown(name, known.values()))

    def _fits(self, name: str) -> bool:
        """Whether the module in a name, if any, is the one that the adapter was added to."""
        module_name, adapter_name = self.resolve_adapter_module_name_(name)
        recorded = self._recorded_modules().get(adapter_name) or ""
        return "" in (module_name, recorded) or module_name == recorded


def full_name(module_name: str | None, adapter_name: str) -> str:
    """`encoder:a`; the plain name where there is no module, if that can be told."""
    if module_name or ":" in adapter_name:
        return f"{module_name or ''}:{adapter_name}"
    return adapter_name


def _outermost(modules: nn.Module | list[nn.Module]) -> Iterator[AdapterModuleMixin]:
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        if isinstance(module, AdapterModuleMixin):
            yield module
        else:
            yield from _outermost(list(module.children()))


def _values(cfg: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def _in_file(
    path: str | Path, name: str, states: States, config: dict[str, Any], modules: dict[str, Any]
) -> tuple[str, str]:
    """(key of the weights, adapter name) of a name that was asked for."""
    module_name, colon, adapter_name = name.partition(":")
    if not colon:
        module_name, adapter_name = modules.get(name), name
    key = full_name(module_name, adapter_name)
    if key not in states or not isinstance(config.get(adapter_name), dict):
        raise KeyError(f"{path}: {unknown(name, states)}")
    return key, adapter_name
