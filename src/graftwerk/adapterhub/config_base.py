"""What AdapterHub's configurations have in common: they are mappings with its files' keys."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, ClassVar, Self

from graftwerk.errors import UserError

# The class that a dictionary's "architecture" names; None: a bottleneck, which names none.
CLASSES: dict[str | None, type["AdapterConfig"]] = {}


class AdapterConfig(Mapping[str, Any]):
    """The base of all; called itself it makes a `BnConfig`, as the older class of this name did.

    `unsaved` are fields that AdapterHub keeps out of its files, with their default: `to_dict` has
    one only where it is another.
    """

    architecture: str | None = None
    unsaved: ClassVar[Mapping[str, Any]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> "AdapterConfig":
        return object.__new__(CLASSES[None] if cls is AdapterConfig else cls)

    @staticmethod
    def load(config: "Mapping[str, Any] | str", **changes: Any) -> "AdapterConfig":
        """A configuration by its name, string (`"lora[r=16]|seq_bn"`) or dictionary.

        Args:
            changes: fields that get other values; None leaves one as it is.

        Raises:
            UserError: for a name or a key that is not known.
        """
        from graftwerk.adapterhub.config_strings import parse_config

        made = parse_config(config) if isinstance(config, str) else AdapterConfig.from_dict(config)
        changes = {key: value for key, value in changes.items() if value is not None}
        return made.replace(**changes) if changes else made

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AdapterConfig":
        """The configuration that a dictionary of AdapterHub's keys says.

        Raises:
            UserError: for an architecture or a key that is not known.
        """
        if isinstance(config, AdapterConfig):
            return config
        architecture = config.get("architecture")
        if architecture not in CLASSES:
            known = ", ".join(str(name) for name in CLASSES)
            raise UserError(f"architecture {architecture!r} is not known: one of {known}")
        own = CLASSES[architecture]
        return (cls if issubclass(cls, own) else own).of(config)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "AdapterConfig":
        """This class's configuration with a dictionary's values."""
        cls.check(config)
        return cls(**config)

    @classmethod
    def names(cls) -> list[str]:
        """The keys that this configuration has."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Raises a `UserError` for a key that this configuration does not have."""
        for key in values:
            if key not in cls.names():
                known = ", ".join(cls.names())
                raise UserError(f"{cls.__name__} has no key {key!r}: use one of {known}")

    def to_dict(self) -> dict[str, Any]:
        """AdapterHub's dictionary, as its files hold it."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: v for k, v in values.items() if k not in self.unsaved or v != self.unsaved[k]}

    def replace(self, **changes: Any) -> Self:
        """The same configuration with other values in some keys.

        Raises:
            UserError: for a key that is not known.
        """
        self.check(changes)
        return replace(self, **changes)  # type: ignore[type-var]

    def __getitem__(self, key: str) -> Any:
        if key in self.names():
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  (values may be lists)
