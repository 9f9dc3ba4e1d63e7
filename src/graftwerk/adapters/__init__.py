"""Adapters: methods, slots and compositions. Imports no model."""

from graftwerk.adapters.composition import Composition, Parallel, Stack
from graftwerk.adapters.configs import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    method_from_config,
    methods_from_config,
)
from graftwerk.adapters.model import AdapterModel

__all__ = [
    "AdapterModel",
    "BottleneckConfig",
    "Composition",
    "IA3Config",
    "LoRAConfig",
    "MethodConfig",
    "PTuningConfig",
    "Parallel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SelectiveConfig",
    "Stack",
    "method_from_config",
    "methods_from_config",
]
