"""Mixins and registry under the names of NeMo's documentation."""

from graftwerk.adapters.access import AccessMixin
from graftwerk.adapters.mixin import AdapterModuleMixin
from graftwerk.adapters.targets import allow_target, class_path, instantiate
from graftwerk.nemo.model_mixin import AdapterModelPTMixin
from graftwerk.nemo.registry import AdapterRegistryInfo, get_registered_adapter, register_adapter

__all__ = [
    "AccessMixin",
    "AdapterModelPTMixin",
    "AdapterModuleMixin",
    "AdapterRegistryInfo",
    "allow_target",
    "class_path",
    "get_registered_adapter",
    "instantiate",
    "register_adapter",
]
