"""Which checkpoints a stage's `model` section names: its base, and the adapter to go on from."""

from collections.abc import Mapping
from typing import Any

from graftwerk.errors import UserError

# Our name (and the published launcher's), then that of NeMo's PEFT scripts.
NAMES = ("language_model_path", "restore_from_path")


def base_of(model: Mapping[Any, Any]) -> str:
    """The base: a path or a Hub name.

    It is `language_model_path`, or `restore_from_path`, which means the same; where neither is
    given, it is `restore_path`.

    Raises:
        UserError: where the first two differ, or all three are missing.
    """
    named = {key: str(model[key]) for key in NAMES if model.get(key)}
    if len(set(named.values())) > 1:
        said = " and ".join(f"model.{key}={value}" for key, value in named.items())
        raise UserError(f"{said} both name the base and differ: set one of them to null")
    base = next(iter(named.values()), None) or model.get("restore_path")
    if not base:
        raise UserError("model.language_model_path is missing: it names the base model")
    return str(base)


def adapter_of(model: Mapping[Any, Any]) -> str | None:
    """The adapter file from which training goes on; None where `restore_path` is unset or the base.

    Raises:
        UserError: as `base_of`.
    """
    base_of(model)
    path = model.get("restore_path")
    return str(path) if path and any(model.get(key) for key in NAMES) else None
