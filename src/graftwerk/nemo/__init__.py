"""NeMo's documented Python surface over this engine.

`from graftwerk.nemo import adapter_mixins, adapter_modules`; each module and name is imported when
it is first asked for.
"""

import importlib
from typing import Any

# Name -> the module of this package that has it.
_HOMES = {
    "AbstractAdapterStrategy": "adapter_mixin_strategies",
    "AdapterModelPTMixin": "adapter_mixins",
    "AdapterModuleMixin": "adapter_mixins",
    "AdapterModuleUtil": "adapter_modules",
    "AdapterRegistryInfo": "adapter_mixins",
    "CanonicalAdaptersPEFTConfig": "peft_config",
    "IA3PEFTConfig": "peft_config",
    "LinearAdapter": "adapter_modules",
    "LinearAdapterConfig": "adapter_modules",
    "LoraPEFTConfig": "peft_config",
    "MegatronGPTSFTModel": "models",
    "MegatronT5SFTModel": "models",
    "MegatronTrainerBuilder": "trainer_builder",
    "ModelPT": "model_pt",
    "PEFTConfig": "peft_config",
    "PEFT_CONFIG_MAP": "peft_config",
    "PrefixTuningPEFTConfig": "peft_config",
    "PromptTuningPEFTConfig": "peft_config",
    "PtuningPEFTConfig": "peft_config",
    "QLoraPEFTConfig": "peft_config",
    "ResidualAddAdapterStrategy": "adapter_mixin_strategies",
    "ResidualAddAdapterStrategyConfig": "adapter_mixin_strategies",
    "ReturnResultAdapterStrategy": "adapter_mixin_strategies",
    "ReturnResultAdapterStrategyConfig": "adapter_mixin_strategies",
    "SelectivePEFTConfig": "peft_config",
    "allow_target": "adapter_mixins",
    "get_registered_adapter": "adapter_mixins",
    "register_adapter": "adapter_mixins",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES.values():
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
