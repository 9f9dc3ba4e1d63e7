"""Adapters: methods, slots and compositions. Imports no model."""

from graftwerk.adapters.composition import (
    Average,
    BatchSplit,
    Composition,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
    parse,
)
from graftwerk.adapters.configs import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    UnionConfig,
    method_from_config,
    methods_from_config,
)
from graftwerk.adapters.fusion import FusionConfig
from graftwerk.adapters.model import AdapterModel

__all__ = [
    "AdapterModel",
    "Average",
    "BatchSplit",
    "BottleneckConfig",
    "Composition",
    "Fuse",
    "FusionConfig",
    "IA3Config",
    "LoRAConfig",
    "MethodConfig",
    "MultiTask",
    "PTuningConfig",
    "Parallel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SelectiveConfig",
    "Split",
    "Stack",
    "UnionConfig",
    "method_from_config",
    "methods_from_config",
    "parse",
]
