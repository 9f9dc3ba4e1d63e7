"""NeMo's PEFT configuration classes: one for each method, made from a model's configuration."""

from collections.abc import Mapping
from typing import Any, ClassVar

from graftwerk.adapters.configs import SCHEMES, MethodConfig, method_of


class PEFTConfig:
    """A method and its settings, read from `model_cfg.peft`; the name of its adapter.

    Settings that are left out, and the whole block where it is absent, have the method's defaults.

    Args:
        cfg: what `merge_cfg_with` gives, or anything else with a section `peft`.

    Raises:
        UserError: for keys and values that the method does not know.
    """

    scheme: ClassVar[str]

    def __init__(self, cfg: Mapping[Any, Any]):
        blocks = cfg.get("peft") or {}
        self.name = "lora" if self.scheme == "qlora" else self.scheme
        self.method: MethodConfig = method_of(self.scheme, blocks.get(SCHEMES[self.scheme][1]))

    @property
    def layer_selection(self) -> tuple[int, ...] | None:
        """The layers that get parts, numbered from 1; None: all."""
        return self.method.layer_selection

    @property
    def weight_tying(self) -> bool:
        """Whether layers share the adapter's weights."""
        return self.method.weight_tying

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method})"


class CanonicalAdaptersPEFTConfig(PEFTConfig):
    """Bottlenecks behind attention and MLP: `peft.adapter_tuning`."""

    scheme = "adapter"


class LoraPEFTConfig(PEFTConfig):
    """Low-rank updates beside projections: `peft.lora_tuning`."""

    scheme = "lora"


class QLoraPEFTConfig(LoraPEFTConfig):
    """LoRA on a base in 4 bits, which `restore_from` reads so for `peft.peft_scheme: qlora`."""

    scheme = "qlora"


class IA3PEFTConfig(PEFTConfig):
    """Learned scales of keys, values and the MLP's inner activation: `peft.ia3_tuning`."""

    scheme = "ia3"


class PtuningPEFTConfig(PEFTConfig):
    """A prompt of virtual tokens that a small network makes: `peft.p_tuning`."""

    scheme = "ptuning"


class PromptTuningPEFTConfig(PEFTConfig):
    """A prompt of virtual tokens whose vectors are trained themselves: `peft.prompt_tuning`."""

    scheme = "prompt"


class PrefixTuningPEFTConfig(PEFTConfig):
    """Trained keys and values before those of every attention: `peft.prefix_tuning`."""

    scheme = "prefix"


class SelectivePEFTConfig(PEFTConfig):
    """Some of the base's own parameters: `peft.selective_tuning`."""

    scheme = "selective"


# By `peft.peft_scheme`; none and null train the whole model.
PEFT_CONFIG_MAP: dict[str | None, type[PEFTConfig] | None] = {
    **{
        kind.scheme: kind
        for kind in (
            CanonicalAdaptersPEFTConfig,
            IA3PEFTConfig,
            PtuningPEFTConfig,
            LoraPEFTConfig,
            QLoraPEFTConfig,
            SelectivePEFTConfig,
            PromptTuningPEFTConfig,
            PrefixTuningPEFTConfig,
        )
    },
    "none": None,
    None: None,
}
