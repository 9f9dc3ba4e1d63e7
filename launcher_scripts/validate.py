"""Plain configuration values against dataclasses: every mistake found, in one line each.

A field's type says what is allowed: `int`, `float`, `bool`, `str`, `None`, `Literal`, `list[T]`,
`dict[str, T]`, a dataclass, unions of these, and `Annotated[T, rule]`, where a rule adds a range,
a pattern or its own words. A field without a default must be given.
"""

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from launcher_scripts.notices import FOREIGN_KEYS

NONE = type(None)
UNKNOWN = object()  # stands for a value that could not be resolved, and is reported already
INERT = {"inert": True}  # metadata of a field that is accepted and cannot change anything here


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`; `above` and `below` leave the end itself out."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def words(self) -> str:
        ends = [
            f"{word} {end:g}"
            for word, end in (
                ("of at least", self.low),
                ("above", self.above),
                ("of at most", self.high),
                ("below", self.below),
            )
            if end is not None
        ]
        return " and ".join(ends)


@dataclass(frozen=True)
class Form:
    """Text that matches a whole regular expression; `words` say so to a person."""

    pattern: str
    words: str

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None


# One organisation or person, one repository; as `graftwerk.checkpoints.hub` has it.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class FilePath:
    """Text that is a path: made absolute, since a job does not run where its user typed.

    With `hub`, a text such as `org/name` where no such path is names a repository of the Hub.
    """

    words: str = "a path"
    hub: bool = False

    def holds(self, value: str) -> bool:
        return bool(value) and "\n" not in value and "\0" not in value

    def names_repository(self, value: str) -> bool:
        """Whether the text is no path at all; a path that stays relative is such a name."""
        looks = HUB_NAME.fullmatch(value) is not None and ".." not in value
        return self.hub and looks and not value.endswith(".nemo") and not os.path.exists(value)


Report = Callable[[str, str], None]  # (dotted key, what is wrong)


@cache
def fields_of(schema: type) -> dict[str, tuple[Any, dataclasses.Field]]:
    """A dataclass's fields by name, each with its resolved type."""
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: (hints[field.name], field) for field in dataclasses.fields(schema)}


def is_schema(expected: Any) -> bool:
    return isinstance(expected, type) and dataclasses.is_dataclass(expected)


def item_schema(expected: Any) -> type | None:
    """The dataclass that items of a list may be, where one of a type's members is such a list."""
    items = next((o for o in members(expected) if get_origin(o) is list), None)
    inside = members(get_args(items)[0]) if items is not None else ()
    return next((option for option in inside if is_schema(option)), None)


def members(expected: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if get_origin(expected) in (Union, types.UnionType):
        return get_args(expected)
    return (expected,)


def check(value: Any, expected: Any, key: str, report: Report) -> None:
    """Report every mistake in `value`, which stands at the dotted `key`."""
    options = members(expected)
    if value is UNKNOWN or any(_fits(value, option) for option in options):
        return
    inner = next((option for option in options if _same_container(value, option)), None)
    if inner is None:
        report(key, f"must be {describe(expected)}, not {shown(value)}{_hint(value, options)}")
    elif is_schema(inner):
        _check_fields(value, inner, key, report)
    else:
        element = get_args(inner)[-1]
        items: Iterable = value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, dict):
            for name in value:
                check(name, get_args(inner)[0], f"{key}.{name}", report)
        for name, item in items:
            check(item, element, f"{key}.{name}", report)


def _check_fields(value: dict[Any, Any], schema: type, key: str, report: Report) -> None:
    fields = fields_of(schema)
    for name, item in value.items():
        child = f"{key}.{name}" if key else str(name)
        if name not in fields:
            report(child, f"no such key{nearest(str(name), fields, key)}")
        else:
            check(item, fields[name][0], child, report)
    for name, (expected, field) in fields.items():
        if name not in value and is_required(field):
            child = f"{key}.{name}" if key else name
            report(child, f"is missing; it must be {describe(expected)}")


def is_required(field: dataclasses.Field) -> bool:
    """Whether the dataclass gives the field no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field) -> Any:
    """A field's default as plain values."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore
    return field.default


def _fits(value: Any, expected: Any) -> bool:
    """Whether `value` is right and needs no look inside."""
    origin = get_origin(expected)
    if origin is Annotated:
        base, *rules = get_args(expected)
        return any(_fits(value, option) for option in members(base)) and all(
            rule.holds(value) for rule in rules
        )
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(expected))
    if expected is Any:
        return True
    if expected is NONE:
        return value is None
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return expected in (str, bool) and isinstance(value, expected)


def _same_container(value: Any, expected: Any) -> bool:
    if isinstance(value, dict):
        return is_schema(expected) or get_origin(expected) is dict
    return isinstance(value, list) and get_origin(expected) is list


def describe(expected: Any) -> str:
    """What a type allows, in words."""
    options = members(expected)
    if len(options) > 1:
        return " or ".join(describe(option) for option in options)
    origin = get_origin(expected)
    if origin is Annotated:
        base, *rules = get_args(expected)
        words = " ".join(rule.words for rule in rules)
        return words if base is str else f"{describe(base)} {words}"
    if origin is Literal:
        choices = [shown(choice) for choice in get_args(expected)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is list:
        return f"a list ({describe(get_args(expected)[0])})"
    if origin is dict or is_schema(expected):
        return "a mapping of keys to values"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(expected, "null")


def shown(value: Any) -> str:
    """A value as YAML writes it, short and on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _hint(value: Any, options: tuple[Any, ...]) -> str:
    choices = {
        choice.lower(): choice
        for option in options
        if get_origin(option) is Literal
        for choice in get_args(option)
        if isinstance(choice, str)
    }
    match = closest(value.lower(), choices) if isinstance(value, str) else None
    return f"; did you mean {choices[match]}?" if match else ""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`; of equally like ones, one of the same letters."""
    known = list(known)
    longer = [other for other in known if len(name) > 2 and other.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    letters = [match for match in near if sorted(match) == sorted(name)]
    return letters[0] if letters else near[0] if near else None


def nearest(name: str, known: Iterable[str], parent: str = "") -> str:
    """What to do about an unknown name: the nearest known one, our name for it, or all of them."""
    known = list(known)
    match = closest(name, known)
    foreign = name if name in FOREIGN_KEYS else closest(name, FOREIGN_KEYS, 0.8)
    if foreign is not None and (name == foreign or match is None):
        return f"; {FOREIGN_KEYS[foreign]}"
    if match is not None:
        return f"; did you mean {parent}{'.' if parent else ''}{match}?"
    return f"; allowed here: {', '.join(known)}" if known else ""


def leaves(schema: Any, key: str = "") -> Iterable[tuple[str, Any, dataclasses.Field | None]]:
    """Every (dotted key, type, field) of a dataclass; list items are looked into under `[]`."""
    for name, (expected, field) in fields_of(schema).items():
        child = f"{key}.{name}" if key else name
        inner = next((option for option in members(expected) if is_schema(option)), None)
        item = item_schema(expected)
        if inner is not None:
            yield from leaves(inner, child)
        if item is not None:
            yield from leaves(item, f"{child}[]")
        if inner is None and item is None:
            yield child, expected, field
