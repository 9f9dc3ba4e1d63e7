"""Whether plain values, of files and configurations, are of the kind that an annotation names."""

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def field_kinds(owner: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    return get_type_hints(owner)


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a kind: an annotation made of the usual words.

    A whole number is a `float` too, `True` is no number, and every number is finite. A list stands
    for a `tuple`.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(each, inner[0]) for each in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    if kind in (None, NoneType):
        return value is None
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < math.inf
    return type(value) is kind


def words_for(kind: Any) -> str:
    """What an annotation allows, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(words_for(each) for each in inner)
    if origin is Literal:
        return " or ".join(repr(each) for each in inner)
    if origin is tuple:
        return f"a list ({words_for(inner[0])} each)"
    if origin is not None and issubclass(origin, Mapping):
        return f"a map to {words_for(inner[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind, "null" if kind in (None, NoneType) else str(kind))
