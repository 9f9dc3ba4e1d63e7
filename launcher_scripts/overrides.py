"""The command line's `key=value` words: read one by one, each key held against the schema.

Hydra stops at its first bad word. Here every word is looked at before anything is composed, so that
one run names all mistakes.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from launcher_scripts.notices import (
    ABSENT_KEYS,
    ABSENT_STAGES,
    FOREIGN_KEYS,
    RENAMED_STAGES,
    one_line,
    stage_hint,
)
from launcher_scripts.schema import CLUSTERS, PREP_KINDS, STAGE_SCHEMAS, Root
from launcher_scripts.validate import (
    Report,
    closest,
    fields_of,
    is_schema,
    leaves,
    members,
    nearest,
)


def read(words: Iterable[str], known: Sequence[str], report: Report) -> list[Override]:
    """Parse each word by Hydra's grammar; report those that are none.

    A value that the grammar cannot read, such as a path with parentheses, is taken as text.
    """
    parser = OverridesParser.create()
    overrides = []
    for word in words:
        try:
            overrides.append(parser.parse_override(word))
        except HydraException as error:
            key, _, value = word.partition("=")
            if value and value[0] not in "[{'\"":
                with suppress(HydraException):
                    overrides.append(parser.parse_override(f"{key}={quoted(value)}"))
                    continue
            if "=" not in word:
                hint = f"; did you mean stages={word}?" if word in known else ""
                report(word, f"is no key=value{hint}")
            else:
                reason = one_line(error).split(" See https")[0]
                report(word, f"cannot be read: {reason}; put special characters in quotes")
    return overrides


def quoted(text: str) -> str:
    """Text as a value of Hydra's grammar, where a quote and the backslashes before it escape."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def check_sweep(override: Override, report: Report) -> bool:
    """Report a value that stands for several where only one run was asked for."""
    if not override.is_sweep_override():
        return True
    value = override.get_value_string()
    if override.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
        what = f"is several values; write [{value}] for a list, or add --multirun to run each"
    else:
        what = "is a sweep; add --multirun to run each value"
    report(override.get_key_element(), f"{value} {what}")
    return False


def check_key(override: Override, stages: Sequence[str], report: Report) -> bool:
    """Report a key that no schema has."""
    key = override.key_or_group
    head, *rest = key.split(".")
    if override.is_hydra_override() or head.endswith("_config") or head in ABSENT_KEYS:
        return True
    if head in STAGE_SCHEMAS:
        schemas = list(PREP_KINDS.values()) if head == "data_prep" else [STAGE_SCHEMAS[head]]
    elif head == "cluster":
        schemas = list(CLUSTERS.values())
    elif head in fields_of(Root):
        expected = fields_of(Root)[head][0]
        problem = _walk(expected, rest, head) if rest else None
        return _reported(problem, report)
    else:
        report(key, f"no such key{_root_hint(head, rest, stages)}")
        return False
    problems = [_walk(schema, rest, head) for schema in schemas]
    return _reported(None if None in problems else problems[0], report)


def _reported(problem: tuple[str, str] | None, report: Report) -> bool:
    if problem is not None:
        report(*problem)
    return problem is None


def _walk(expected: Any, segments: Sequence[str], key: str) -> tuple[str, str] | None:
    """Follow `segments` down from a type; (dotted key, what is wrong) where the way ends."""
    top = key
    root = expected
    for index, segment in enumerate(segments):
        child = f"{key}.{segment}"
        options = [_base(option) for option in members(_base(expected))]
        schema = next((option for option in options if is_schema(option)), None)
        container = next((o for o in options if get_origin(o) in (list, dict)), None)
        if schema is not None:
            if segment not in fields_of(schema):
                full = ".".join([key, *segments[index:]])
                return full, f"no such key{_hint(segment, schema, key, root, top)}"
            expected = fields_of(schema)[segment][0]
        elif container is not None and (get_origin(container) is dict or segment.isdigit()):
            expected = get_args(container)[-1]
        else:
            return child, f"no such key: {key} holds no keys"
        key = child
    return None


def _base(expected: Any) -> Any:
    return get_args(expected)[0] if get_origin(expected) is Annotated else expected


def _hint(name: str, schema: type, key: str, root: Any, top: str) -> str:
    """The nearest sibling; else our name for it; else the key of that name elsewhere."""
    if closest(name, fields_of(schema), 0.75) is None and name not in FOREIGN_KEYS:
        for leaf, _, _ in leaves(root, top):
            if leaf.rsplit(".", 1)[-1] == name:
                return f"; did you mean {leaf}?"
    return nearest(name, fields_of(schema), key)


def _root_hint(name: str, rest: Sequence[str], stages: Sequence[str]) -> str:
    if name in RENAMED_STAGES or name in ABSENT_STAGES:
        return f"; {stage_hint(name, STAGE_SCHEMAS)}"
    if name in FOREIGN_KEYS:
        return f"; {FOREIGN_KEYS[name]}"
    known = [*fields_of(Root), *STAGE_SCHEMAS, "cluster", "experiment"]
    near = closest(name, known, 0.7)
    if near is not None:
        return f"; did you mean {'.'.join([near, *rest])}?"
    path = ".".join([name, *rest])
    for stage in sorted(STAGE_SCHEMAS, key=lambda stage: stage not in stages):
        for leaf, _, _ in leaves(STAGE_SCHEMAS[stage], stage):
            if leaf.endswith(f".{path}"):
                return f"; did you mean {leaf}?"
    return f"; allowed here: {', '.join(known)}"


def forced(override: Override) -> str:
    """The override as a word that sets its key whether or not the composed YAML has it.

    A number given as a time limit is minutes; it stays text, since YAML files that hold a bare
    12:00:00 turn it into a number and are told to quote it.
    """
    assert override.input_line is not None
    if override.is_delete():
        return override.input_line
    value = override.input_line.split("=", 1)[1]
    if override.key_or_group.endswith(".time_limit") and value.strip().isdigit():
        value = f'"{value.strip()}"'
    return f"++{override.key_or_group}={value}"
