"""Method configurations, and how the YAML of a stage names one."""

from typing import Any

from graftwerk.adapters.methods.bottleneck import BottleneckConfig
from graftwerk.adapters.methods.ia3 import IA3Config
from graftwerk.adapters.methods.lora import LoRAConfig
from graftwerk.adapters.methods.prefix import PrefixTuningConfig
from graftwerk.adapters.methods.prompt import PromptTuningConfig, PTuningConfig
from graftwerk.adapters.methods.selective import SelectiveConfig
from graftwerk.adapters.part import MethodSettings
from graftwerk.errors import UserError

__all__ = [
    "METHODS",
    "BottleneckConfig",
    "IA3Config",
    "LoRAConfig",
    "MethodConfig",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SelectiveConfig",
    "method_from_config",
]

# By the name that an adapter file holds.
METHODS: dict[str, Any] = {
    method.__name__: method
    for method in (
        BottleneckConfig,
        IA3Config,
        LoRAConfig,
        PTuningConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        SelectiveConfig,
    )
}
ADAPTER_TYPES = ("parallel_adapter", "linear_adapter")


MethodConfig = MethodSettings


def method_from_config(model: Any, stage: str) -> tuple[str, MethodConfig]:
    """The adapter name and the method that `model` of a learning stage asks for.

    Raises:
        UserError: for a stage that trains no adapter and for unknown values.
    """
    if stage == "ia3_learning":
        return "ia3", IA3Config()
    if stage != "adapter_learning":
        raise UserError(f"stage {stage!r} trains no adapter")
    tuning = model.adapter_tuning
    if tuning.type not in ADAPTER_TYPES:
        raise UserError(
            f"model.adapter_tuning.type={tuning.type!r}: use one of {', '.join(ADAPTER_TYPES)}"
        )
    return "adapter", BottleneckConfig(
        type=tuning.type,
        dim=tuning.adapter_dim,
        dropout=tuning.adapter_dropout,
        norm_position=tuning.norm_position,
        norm_type=tuning.norm_type,
        column_init_method=tuning.column_init_method,
        row_init_method=tuning.row_init_method,
    )
