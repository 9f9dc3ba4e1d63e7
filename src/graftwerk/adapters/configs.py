"""Method configurations, and how the YAML of a stage names one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from graftwerk.adapters.kinds import field_kinds, fits, words_for
from graftwerk.adapters.methods.bn import BnConfig
from graftwerk.adapters.methods.bottleneck import BottleneckConfig
from graftwerk.adapters.methods.hub_lora import HubLoRAConfig, HubMTLLoRAConfig
from graftwerk.adapters.methods.ia3 import IA3Config
from graftwerk.adapters.methods.lora import LoRAConfig
from graftwerk.adapters.methods.prefix import PrefixTuningConfig
from graftwerk.adapters.methods.prompt import PromptTuningConfig, PTuningConfig
from graftwerk.adapters.methods.reft import ReftConfig
from graftwerk.adapters.methods.selective import SelectiveConfig
from graftwerk.adapters.part import MethodSettings, Part
from graftwerk.adapters.slots import Site
from graftwerk.errors import UserError

__all__ = [
    "METHODS",
    "BnConfig",
    "BottleneckConfig",
    "HubLoRAConfig",
    "HubMTLLoRAConfig",
    "IA3Config",
    "LoRAConfig",
    "MethodConfig",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "ReftConfig",
    "SelectiveConfig",
    "UnionConfig",
    "method_from_config",
    "method_of",
    "methods_from_config",
    "schemes",
    "settings_of",
]


@dataclass(frozen=True, kw_only=True)
class UnionConfig(MethodSettings):
    """Several methods in one adapter (AdapterHub's `ConfigUnion`), at most one part in a slot."""

    configs: tuple[MethodSettings, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.configs or any(isinstance(config, UnionConfig) for config in self.configs):
            raise UserError("a union needs methods, none of which is a union itself")

    @property
    def columns(self) -> int:
        return sum(config.columns for config in self.configs)

    @property
    def shift(self) -> int:
        return sum(config.shift for config in self.configs)

    @property
    def distances(self) -> str | None:
        return next((c.distances for c in self.configs if c.distances is not None), None)

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens that its methods put before every row."""
        return self.columns

    def create(self, site: Site) -> Part | None:
        """The part of the one method that has one there.

        Raises:
            UserError: where two of them have.
        """
        made = [
            (config, part)
            for config in self.configs
            if config.selects(site) and (part := config.create(site)) is not None
        ]
        if len(made) > 1:
            both = " and ".join(type(config).__name__ for config, _ in made)
            raise UserError(f"a union has one part in a place, but {both} both use {site.name}")
        for config, part in made:
            part.method = config
            return part
        return None

    def tie(self, parts: list[tuple[Site, Part]]) -> None:
        for config in self.configs:
            config.tie([(site, part) for site, part in parts if part.method is config])

    def replaces(self, name: str) -> bool:
        return any(config.replaces(name) for config in self.configs)


# By the name that an adapter file holds.
METHODS: dict[str, Any] = {
    method.__name__: method
    for method in (
        BnConfig,
        BottleneckConfig,
        HubLoRAConfig,
        HubMTLLoRAConfig,
        IA3Config,
        LoRAConfig,
        PTuningConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        ReftConfig,
        SelectiveConfig,
        UnionConfig,
    )
}
# What `model.peft.peft_scheme` may name: the method, and the block of `model.peft` that it reads.
SCHEMES: dict[str, tuple[Any, str]] = {
    "adapter": (BottleneckConfig, "adapter_tuning"),
    "ia3": (IA3Config, "ia3_tuning"),
    "lora": (LoRAConfig, "lora_tuning"),
    "ptuning": (PTuningConfig, "p_tuning"),
    "prefix": (PrefixTuningConfig, "prefix_tuning"),
    "prompt": (PromptTuningConfig, "prompt_tuning"),
    "selective": (SelectiveConfig, "selective_tuning"),
    "qlora": (LoRAConfig, "lora_tuning"),  # on a base in four bits
}
WHOLE = "none"  # the scheme that trains the model itself
FUSION = "fusion"  # the scheme that trains the fusions of the composition
# NeMo's spellings of fields; the others are keys as they are.
SPELLINGS = {
    "dim": "adapter_dim",
    "dropout": "adapter_dropout",
    "parameters": "tunable_base_param_names",
}
# Fields that mean nothing to a scheme's block: no layer, nothing to share, no tokenizer for a text.
_NO_LAYERS = {"layer_selection", "leave_out", "weight_tying", "position_embedding_strategy"}
WITHOUT = {
    "ptuning": _NO_LAYERS,
    "prompt": {*_NO_LAYERS, "prompt_init", "prompt_init_text"},
    "selective": {"weight_tying", "position_embedding_strategy"},
}

MethodConfig = MethodSettings


def method_from_config(model: Any, stage: str) -> tuple[str, MethodConfig]:
    """The only adapter that `methods_from_config` gives.

    Raises:
        UserError: where it gives none, or several.
    """
    methods = methods_from_config(model, stage)
    if len(methods) != 1:
        raise UserError(f"stage {stage!r} trains {len(methods) or 'no'} adapters here, not one")
    return methods[0]


def methods_from_config(model: Any, stage: str) -> list[tuple[str, MethodConfig]]:
    """The adapters that `model` of a learning stage asks for, by name, in the order of the scheme.

    None where the whole model is trained, or only fusions are.

    Raises:
        UserError: for a stage that does not learn, unknown schemes, keys and values.
    """
    if stage in ("training", "fine_tuning"):
        return []
    if stage == "adapter_learning":
        return [("adapter", method_of("adapter", model.get("adapter_tuning"), "model"))]
    if stage == "ia3_learning":
        return [("ia3", method_of("ia3", model.get("ia3_tuning"), "model"))]
    if stage != "peft":
        raise UserError(f"stage {stage!r} trains no adapter")
    peft = model.get("peft") or {}
    return [
        (name, method_of(scheme, peft.get(SCHEMES[scheme][1])))
        for scheme, name in _named(schemes(peft), peft.get("adapter_names"))
    ]


def _named(wanted: Sequence[str], given: Any) -> list[tuple[str, str]]:
    """(scheme, adapter's name) by `adapter_names`: one a scheme, or several of the only one."""
    methods = [scheme for scheme in wanted if scheme != FUSION]
    if given is None:
        return [(scheme, "lora" if scheme == "qlora" else scheme) for scheme in methods]
    names = list(given) if _is_list(given) else [name.strip() for name in str(given).split(",")]
    each = methods * len(names) if len(methods) == 1 else methods
    if len(names) != len(each) or len(set(names)) < len(names) or not names:
        raise UserError(
            f"model.peft.adapter_names={','.join(map(str, names))}: give as many names, each "
            f"another, as peft_scheme={','.join(wanted) or WHOLE} has methods; where it has one, "
            f"as many as adapters are wanted"
        )
    return list(zip(each, map(str, names), strict=True))


def schemes(peft: Mapping[Any, Any]) -> list[str]:
    """The words of `peft_scheme`: one, several joined by commas, or a list; `none` is none.

    Raises:
        UserError: for names that are not known or do not go together.
    """
    given: Any = peft.get("peft_scheme")
    words: Sequence[Any] = given if _is_list(given) else [WHOLE if given is None else given]
    names = [name.strip() for word in words for name in str(word).split(",")]
    key = f"model.peft.peft_scheme={','.join(names)}"
    if not names:
        raise UserError("model.peft.peft_scheme is empty: none trains the whole model")
    for name in names:
        if name not in (*SCHEMES, FUSION, WHOLE):
            known = ", ".join([*SCHEMES, FUSION, WHOLE])
            raise UserError(f"{key}: {name!r} is not known: use some of {known}")
    if len(set(names)) < len(names) or {"lora", "qlora"} <= set(names):
        raise UserError(f"{key}: name each method once, and lora or qlora")
    if WHOLE in names and len(names) > 1:
        raise UserError(f"{key}: none trains the whole model and goes with no other method")
    return [name for name in names if name != WHOLE]


def method_of(
    scheme: str, block: Mapping[Any, Any] | None, section: str = "model.peft"
) -> MethodConfig:
    """A scheme's method by its block of settings, in NeMo's key names.

    Keys that are absent or null have the method's defaults.

    Raises:
        UserError: for keys and values that the method does not know.
    """
    method, name = SCHEMES[scheme]
    own = [field.name for field in fields(method) if field.name not in WITHOUT.get(scheme, ())]
    keys = {SPELLINGS.get(field, field): field for field in own}
    kinds = field_kinds(method)
    given = {key: value for key, value in (block or {}).items() if value is not None}
    for key, value in given.items():
        if key not in keys:
            raise UserError(f"{section}.{name}.{key} is not known: use one of {', '.join(keys)}")
        value = given[key] = tuple(value) if _is_list(value) else value
        if not fits(value, kind := kinds[keys[key]]):
            raise UserError(f"{section}.{name}.{key}={value!r} must be {words_for(kind)}")
    values = {keys[key]: value for key, value in given.items()}
    if scheme == "selective":
        values["parameters"] = tuple(
            p for name in values.get("parameters", ()) for p in _parts(name)
        )
    return method(**values)


def settings_of(method: MethodConfig) -> dict[str, Any]:
    """A method's class name and all its settings as plain values, for a file."""
    name = {"method": type(method).__name__}
    if isinstance(method, UnionConfig):
        return {**name, "configs": [settings_of(config) for config in method.configs]}
    return {**name, **asdict(method)}


def _parts(name: str) -> tuple[str, ...]:
    """Patterns for a plain name: of all parameters that have it between two dots, as in NeMo."""
    if any(mark in name for mark in "*?["):
        return (name,)
    return (name, f"{name}.*", f"*.{name}", f"*.{name}.*")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
