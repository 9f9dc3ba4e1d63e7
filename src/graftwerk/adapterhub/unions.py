"""Several of AdapterHub's configurations in one adapter."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from graftwerk.adapterhub.config_base import CLASSES, AdapterConfig
from graftwerk.adapterhub.configs import (
    BnConfig,
    LoRAConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from graftwerk.errors import UserError


class ConfigUnion(AdapterConfig):
    """Several methods in one adapter.

    Raises:
        UserError: for a union in it, and for two configurations of one kind at one place.
    """

    architecture: str | None = "union"
    configs: tuple[AdapterConfig, ...]

    def __init__(self, *configs: AdapterConfig):
        if not configs:
            raise UserError("ConfigUnion() needs at least one configuration")
        for config in configs:
            if not isinstance(config, AdapterConfig) or isinstance(config, ConfigUnion):
                raise UserError(f"ConfigUnion: {config!r} is no configuration of a single method")
        for place, config in enumerate(configs):
            for other in configs[:place]:
                _check_apart(other, config)
        self.configs = configs

    @classmethod
    def join(cls, configs: Iterable[AdapterConfig]) -> "ConfigUnion":
        """A union of these, of this class, whatever its own arguments are."""
        union = object.__new__(cls)
        ConfigUnion.__init__(union, *configs)
        return union

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AdapterConfig:
        return cls.join(AdapterConfig.from_dict(each) for each in config["configs"])

    def to_dict(self) -> dict[str, Any]:
        """AdapterHub's dictionary: the dictionaries of its members."""
        return {
            "architecture": self.architecture,
            "configs": [config.to_dict() for config in self.configs],
        }

    def replace(self, **changes: Any) -> Self:
        """The union with these keys changed in every member.

        Raises:
            UserError: for a key that a member does not have.
        """
        return self.join(config.replace(**changes) for config in self.configs)  # type: ignore

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            return self.configs[key]
        if key in ("architecture", "configs"):
            return getattr(self, key)
        number, _, name = key.partition(".")
        if not number.isdigit() or int(number) >= len(self.configs):
            raise KeyError(key)
        return self.configs[int(number)][name]

    def __iter__(self) -> Iterator[str]:
        return (f"{number}.{key}" for number, config in enumerate(self.configs) for key in config)

    def __len__(self) -> int:
        return sum(len(config) for config in self.configs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(config) for config in self.configs)})"


def _check_apart(one: AdapterConfig, other: AdapterConfig) -> None:
    """Raises where two configurations would put a part of one kind in one place."""
    if one.architecture != other.architecture or one.get("leave_out") or other.get("leave_out"):
        return  # with layers left out, the places are known only on a model
    if isinstance(one, BnConfig) and isinstance(other, BnConfig):
        places = ("mh_adapter", "output_adapter", "cross_adapter")
        shared = [place for place in places if one[place] and other[place]]
        if not shared:
            return
        where = ", ".join(shared)
        raise UserError(f"ConfigUnion: two bottlenecks at {where}: a place holds one of a kind")
    raise UserError(
        f"ConfigUnion: two configurations of {one.architecture}: it holds one of a kind"
    )


class MAMConfig(ConfigUnion):
    """A prefix and a parallel bottleneck (Mix-and-Match, He et al. 2021, arXiv:2110.04366)."""

    def __init__(
        self,
        prefix_tuning: PrefixTuningConfig | None = None,
        adapter: BnConfig | None = None,
    ):
        super().__init__(
            prefix_tuning or PrefixTuningConfig(bottleneck_size=800), adapter or ParBnConfig()
        )

    @property
    def prefix_tuning(self) -> AdapterConfig:
        return self.configs[0]

    @property
    def adapter(self) -> AdapterConfig:
        return self.configs[1]


class UniPELTConfig(ConfigUnion):
    """Prefix, bottleneck and LoRA behind learned gates (Mao et al. 2022, arXiv:2110.07577)."""

    def __init__(
        self,
        prefix_tuning: PrefixTuningConfig | None = None,
        adapter: BnConfig | None = None,
        lora: LoRAConfig | None = None,
    ):
        members = (
            prefix_tuning or PrefixTuningConfig(prefix_length=10),
            adapter or SeqBnConfig(),
            lora or LoRAConfig(r=8, alpha=2),
        )
        super().__init__(*(member.replace(use_gating=True) for member in members))


CLASSES["union"] = ConfigUnion
