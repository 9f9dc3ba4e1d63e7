"""A sweep in one pass: adapters of one method, side by side over one frozen trunk.

`model.peft.sweep` is a list of points, each a mapping of what differs: settings of the method's
block, `lr` and `weight_decay` of the optimizer, the `seed` of the first weights, a `name`. A
mapping of lists is the grid of all their values.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from graftwerk.adapters.configs import FUSION, SCHEMES, MethodConfig, method_of, schemes
from graftwerk.errors import UserError

KEY = "model.peft.sweep"
OF_OPTIMIZER = ("lr", "weight_decay")
_NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


@dataclass(frozen=True)
class Point:
    """One adapter of a sweep.

    Args:
        name: of the adapter, and the end of its file's name.
        method: its block of settings, with what the point changes.
        optim: keys of `model.optim` that it has for itself.
        seed: of its first weights.
        differs: what it was given, but for its name.
    """

    name: str
    method: MethodConfig
    optim: Mapping[str, float]
    seed: int
    differs: Mapping[str, Any]


def points_of(model: Mapping[Any, Any]) -> tuple[Point, ...]:
    """The points of the `model` section of stage `peft`; none where it sweeps nothing.

    Raises:
        UserError: for keys and values that are not known or do not go together.
    """
    peft = model.get("peft") or {}
    given = peft.get("sweep")
    if given is None:
        return ()
    wanted = schemes(peft)
    for key in ("adapter_names", "composition"):
        if peft.get(key) is not None:
            raise UserError(f"model.peft.{key} says what {KEY} says too: set one of them to null")
    if len(wanted) != 1 or wanted[0] in (FUSION, "selective"):
        raise UserError(
            f"{KEY} varies one method whose adapters stand side by side: model.peft.peft_scheme "
            f"is {','.join(wanted) or 'none'}; name one of "
            f"{', '.join(scheme for scheme in SCHEMES if scheme != 'selective')}"
        )
    scheme = wanted[0]
    block = dict(peft.get(SCHEMES[scheme][1]) or {})
    each = _listed(given)
    points = tuple(
        _point(f"{KEY}.{n}", own, scheme, f"{scheme}_{n + 1}", block, model.get("seed") or 0)
        for n, own in enumerate(each)
    )
    names = [point.name for point in points]
    if len(points) < 2:
        raise UserError(f"{KEY} must have two points or more, not {len(points)}; null: no sweep")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{KEY}: two points are called {twice}: give each another name")
    return points


def _listed(given: Any) -> list[Mapping[str, Any]]:
    """The points as mappings: those of a list, or all of a grid, its last key running fastest."""
    if isinstance(given, DictConfig | ListConfig):
        given = OmegaConf.to_container(given, resolve=True)
    if isinstance(given, Mapping) and all(isinstance(values, list) for values in given.values()):
        return [dict(zip(given, v, strict=True)) for v in itertools.product(*given.values())]
    if not isinstance(given, list) or not all(isinstance(own, Mapping) for own in given):
        raise UserError(f"{KEY} must be a list of mappings, or one mapping of keys to lists")
    return given


def _point(
    key: str, own: Mapping[str, Any], scheme: str, name: str, block: dict[str, Any], seed: int
) -> Point:
    differs = dict(own)
    name = str(differs.pop("name", None) or name)
    if _NAME.fullmatch(name) is None:
        raise UserError(f"{key}.name={name!r} must be a name of letters, digits, _ and -")
    changed = {k: v for k, v in differs.items() if k not in (*OF_OPTIMIZER, "seed")}
    try:
        method = method_of(scheme, {**block, **changed})
    except UserError as error:
        raise UserError(
            f"{key}: {error}; or one of name, {', '.join(OF_OPTIMIZER)}, seed"
        ) from None
    optim = {k: differs[k] for k in OF_OPTIMIZER if differs.get(k) is not None}
    for k, value in optim.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (k == "lr" and value == 0):
            least = "above 0" if k == "lr" else "from 0 on"
            raise UserError(f"{key}.{k}={value!r} must be a number {least}")
    seed = seed if differs.get("seed") is None else differs["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"{key}.seed={seed!r} must be a whole number from 0 on")
    return Point(name, method, optim, seed, differs)


def check_sweep(cfg: DictConfig) -> None:
    """Raises a UserError for what of a stage's sections would mix the points of a sweep."""
    sched = cfg.model.optim.get("sched") or {}
    if sched.get("name") == "ReduceLROnPlateau":
        raise UserError(
            f"model.optim.sched.name=ReduceLROnPlateau watches one loss for all, and {KEY} has a "
            f"loss for each point: use another schedule"
        )
    params = cfg.exp_manager.get("checkpoint_callback_params") or {}
    monitor, mode = params.get("monitor") or "val_loss", params.get("mode") or "min"
    if params.get("save_best_model") and (monitor, mode) != ("val_loss", "min"):
        raise UserError(
            f"exp_manager.checkpoint_callback_params: monitor={monitor}, mode={mode}: {KEY} keeps "
            f"the best of each point by its own val_loss: use val_loss and min, or set "
            f"save_best_model to False"
        )
