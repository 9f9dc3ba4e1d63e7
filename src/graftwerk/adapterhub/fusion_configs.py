"""AdapterHub's configurations of fusions, which are the engine's own under its names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from graftwerk.adapters.fusion import FusionConfig
from graftwerk.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdapterFusionConfig(FusionConfig):
    """The engine's `FusionConfig`, with AdapterHub's ways to make one."""

    @staticmethod
    def load(config: Mapping[str, Any] | FusionConfig | str | None, **changes: Any) -> FusionConfig:
        """A configuration by name ("dynamic", "static"), by its dictionary, or the default.

        Raises:
            UserError: for a name or a key that is not known.
        """
        if isinstance(config, str):
            values = asdict(FusionConfig.named(config))
        elif isinstance(config, FusionConfig):
            values = asdict(config)
        else:
            values = dict(config or {})
        values |= changes
        known = [field.name for field in fields(FusionConfig)]
        for key in values:
            if key not in known:
                raise UserError(f"a fusion has no key {key!r}: use one of {', '.join(known)}")
        return FusionConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that AdapterHub's files hold."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DynamicAdapterFusionConfig(AdapterFusionConfig):
    """With a value matrix, held near the identity."""


@dataclass(frozen=True, kw_only=True)
class StaticAdapterFusionConfig(AdapterFusionConfig):
    """Without a value matrix."""

    value: bool = False
    regularization: bool = False
    value_initialized: bool = False
