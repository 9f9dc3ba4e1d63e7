"""A composed configuration's missing keys, interpolations and relative paths."""

import os
from typing import Annotated, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launcher_scripts.validate import (
    UNKNOWN,
    FilePath,
    Report,
    default_of,
    fields_of,
    is_required,
    is_schema,
    item_schema,
    members,
    shown,
)


def fill(node: DictConfig, schema: type) -> None:
    """Give every key that is left out its default, in lists of mappings too."""
    for name, (expected, field) in fields_of(schema).items():
        inner = next((option for option in members(expected) if is_schema(option)), None)
        item_type = item_schema(expected)
        if name not in node:
            if not is_required(field):
                node[name] = default_of(field)
            continue
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        value = node[name]
        if inner is not None and isinstance(value, DictConfig):
            fill(value, inner)
        elif item_type is not None and isinstance(value, ListConfig):
            for item in value:
                if isinstance(item, DictConfig):
                    fill(item, item_type)


def resolved(cfg: Any, key: str, shown_key: str, report: Report) -> Any:
    """The plain value at a dotted key, each leaf resolved apart so that all faults are reported."""
    node: Any = cfg
    *parents, last = key.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or last not in node:
        return None
    return _resolve(node, last, shown_key, report)


def _resolve(node: Any, key: Any, name: str, report: Report) -> Any:
    try:
        value = node[key]
    except MissingMandatoryValue:
        report(name, "is ???: it must be given")
        return UNKNOWN
    except OmegaConfBaseException as error:
        reason = " ".join(str(error.msg or error).split()).split(" full_key:")[0]
        raw = OmegaConf.to_container(node, resolve=False)
        text = raw[key] if isinstance(raw, dict | list) else key
        report(name, f"{shown(text)} cannot be resolved: {reason}")
        return UNKNOWN
    if isinstance(value, DictConfig):
        return {k: _resolve(value, k, f"{name}.{k}", report) for k in value}
    if isinstance(value, ListConfig):
        return [_resolve(value, i, f"{name}.{i}", report) for i in range(len(value))]
    return value


def keys_of(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all mappings below; items of lists share the key of the list."""
    if isinstance(node, ListConfig):
        items = node._iter_ex(resolve=False)
        return [key for item in items for key in keys_of(item, prefix)]
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return []
    found = []
    for key, value in node.items_ex(resolve=False):
        name = f"{prefix}.{key}" if prefix else str(key)
        found += [name, *keys_of(value, name)]
    return found


def absolute(cfg: Any, key: str, value: Any, expected: Any) -> bool:
    """Make relative paths absolute, in place: a job does not run where its user typed.

    Returns whether any was relative.
    """
    options = members(expected)
    if any(get_origin(option) is Literal and value in get_args(option) for option in options):
        return False
    for option in options:
        if get_origin(option) is Annotated and isinstance(value, str):
            rules = [rule for rule in get_args(option)[1:] if isinstance(rule, FilePath)]
            if rules and not rules[0].names_repository(value):
                path = os.path.abspath(os.path.expanduser(value))
                if path != value:
                    OmegaConf.update(cfg, key, plain_text(path))
                    return True
        elif is_schema(option) and isinstance(value, dict):
            known = fields_of(option)
            inside = [(f"{key}.{k}", v, known[k][0]) for k, v in value.items() if k in known]
            return any([absolute(cfg, *part) for part in inside])
        elif get_origin(option) is list and isinstance(value, list):
            inner = get_args(option)[0]
            return any([absolute(cfg, f"{key}.{i}", v, inner) for i, v in enumerate(value)])
    return False


def absolute_source(part: DictConfig, plain: dict[str, Any]) -> None:
    """A custom data set's source is a path where there is such a file, else a name of the Hub."""
    source = plain["source"]
    for name, value in source.items() if isinstance(source, dict) else [(None, source)]:
        if isinstance(value, str) and os.path.exists(os.path.expanduser(value)):
            path = plain_text(os.path.abspath(os.path.expanduser(value)))
            if name is None:
                part.source = path
            else:
                OmegaConf.update(part, f"source.{name}", path)


def plain_text(text: str) -> str:
    """Text that OmegaConf takes as it is."""
    return text.replace("${", "\\${")


def inert_keys(schema: Any, value: Any, key: str) -> list[str]:
    """Keys of `value` that are accepted and change nothing."""
    found = []
    for name, (expected, field) in fields_of(schema).items():
        child = f"{key}.{name}"
        if not isinstance(value, dict) or name not in value:
            continue
        if field.metadata.get("inert"):
            found.append(child)
        for option in members(expected):
            items = value[name] if isinstance(value[name], list) else [value[name]]
            inner = get_args(option)[0] if get_origin(option) is list else option
            if is_schema(inner):
                found += [k for item in items for k in inert_keys(inner, item, child)]
    return list(dict.fromkeys(found))


def short(key: str) -> str:
    """A dotted key without its stage."""
    return key.split(".", 1)[1]
