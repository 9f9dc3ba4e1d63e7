"""The YAML settings of checkpoints and adapters, which may come from strangers."""

from pathlib import Path
from typing import Any

import yaml

from graftwerk.errors import UserError

SETTINGS_LIMIT = 1 << 22  # bytes of a settings file; the longest of NeMo's have some 20 kB
BRACKETS_LIMIT = 2_000  # the parser's time grows with the square of those that nothing closes
VALUES_LIMIT = 100_000  # with those that an alias repeats


def read_settings(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: where it cannot be read, or is none.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(SETTINGS_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return parse_settings(content, str(path))


def parse_settings(content: bytes, where: str) -> dict[str, Any]:
    """The keys and values of YAML text; `where` names it in errors.

    Raises:
        UserError: for text that is no YAML, holds no keys, or is too large.
    """
    if len(content) > SETTINGS_LIMIT:
        raise UserError(f"{where} has more than {SETTINGS_LIMIT} bytes: it holds no settings")
    if content.count(b"[") + content.count(b"{") > BRACKETS_LIMIT:
        raise UserError(f"{where} has more than {BRACKETS_LIMIT} brackets: it holds no settings")
    try:
        values = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{where} cannot be read: {said}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold keys and values")
    if _count(values, {}) > VALUES_LIMIT:
        raise UserError(f"{where}: its aliases repeat values more than {VALUES_LIMIT} times")
    return values


def _count(value: Any, known: dict[int, float]) -> float:
    """How many values a printed copy would have: an alias is one object, printed many times."""
    inside = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")  # what holds itself has no end
        known[id(value)] = 1 + sum(_count(item, known) for item in inside)
    return known[id(value)]
