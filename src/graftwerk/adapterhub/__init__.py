"""AdapterHub's documented Python surface over this engine.

`from graftwerk.adapterhub import AutoAdapterModel`; each name is imported when it is first asked
for.
"""

import importlib
from typing import Any

# Module of this package -> the names that it has.
_MODULES = {
    "auto": (
        "AutoAdapterModel",
        "AutoModelWithHeads",
        "BertAdapterModel",
        "BertModelWithHeads",
        "GPT2AdapterModel",
        "GPT2ModelWithHeads",
        "LlamaAdapterModel",
        "RobertaAdapterModel",
        "RobertaModelWithHeads",
        "T5AdapterModel",
        "T5ModelWithHeads",
    ),
    "callbacks": ("AdapterDropCallback", "AdapterDropTrainerCallback"),
    "composition": (
        "Average",
        "BatchSplit",
        "Fuse",
        "MultiTask",
        "Parallel",
        "Split",
        "Stack",
    ),
    "config_strings": ("ADAPTER_CONFIG_MAP", "DEFAULT_ADAPTER_CONFIG", "AdapterConfig"),
    "configs": (
        "AdapterPlusConfig",
        "BnConfig",
        "CompacterConfig",
        "CompacterPlusPlusConfig",
        "DiReftConfig",
        "DoRAConfig",
        "DoubleSeqBnConfig",
        "DoubleSeqBnInvConfig",
        "DvoRAConfig",
        "HoulsbyConfig",
        "HoulsbyInvConfig",
        "IA3Config",
        "LoRAConfig",
        "LoReftConfig",
        "MTLLoRAConfig",
        "MultiTaskConfig",
        "NoReftConfig",
        "ParBnConfig",
        "ParallelConfig",
        "PfeifferConfig",
        "PfeifferInvConfig",
        "PrefixTuningConfig",
        "PromptTuningConfig",
        "ReftConfig",
        "SeqBnConfig",
        "SeqBnInvConfig",
        "VeraConfig",
    ),
    "context": ("AdapterSetup",),
    "fusion_configs": (
        "AdapterFusionConfig",
        "DynamicAdapterFusionConfig",
        "StaticAdapterFusionConfig",
    ),
    "outputs": ("AdapterModelOutput", "MultiHeadOutput"),
    "trainer": ("AdapterTrainer",),
    "unions": ("ConfigUnion", "MAMConfig", "UniPELTConfig"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
