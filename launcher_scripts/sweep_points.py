"""`model.peft.sweep`: the adapters that one run trains side by side, checked before a job is.

The rules are those of `graftwerk.training.sweep`, which a launcher cannot import: it has no torch.
"""

import itertools
from typing import Any

from launcher_scripts.schema import AdapterName, Count, NonNegative, Optim, Peft
from launcher_scripts.validate import Report, check, fields_of, is_schema, members, nearest

UNSWEPT = ("fusion", "none", "selective")  # schemes whose adapters do not stand side by side
VIRTUAL = "virtual_tokens"  # as many in all copies of a batch


def points_in(value: Any) -> list[dict[str, Any]] | None:
    """The points of a list, or of a grid, its last key running fastest; None: neither of them."""
    if isinstance(value, dict) and all(isinstance(each, list) for each in value.values()):
        return [dict(zip(value, v, strict=True)) for v in itertools.product(*value.values())]
    if isinstance(value, list) and all(isinstance(own, dict) for own in value):
        return value
    return None


def names_of(points: list[dict[str, Any]], scheme: str) -> list[str]:
    """What the adapters of points are called."""
    return [str(own.get("name") or f"{scheme}_{n}") for n, own in enumerate(points, 1)]


def swept(peft: dict[str, Any], schemes: list[str]) -> list[str]:
    """The names of the adapters that a sweep trains; none where there is no sweep."""
    return names_of(points_in(peft.get("sweep")) or [], "".join(schemes[:1]))


def point_path(path: str, name: str) -> str:
    """Where a point is written whose sweep's best one is written to a path: beside it."""
    stem = path.removesuffix(".nemo")
    return f"{stem}_{name}{path[len(stem) :]}"


def check_points(
    stage: str, model: dict[str, Any], schemes: list[str], block: str | None, report: Report
) -> list[dict[str, Any]]:
    """Report what is wrong in a sweep; returns `model.peft` as each point has it."""
    key, peft = f"{stage}.model.peft", model["peft"]
    points = points_in(peft["sweep"])
    if points is None:  # which its type has been reported for
        return []
    for other in ("adapter_names", "composition"):
        if peft.get(other) is not None:
            report(f"{key}.{other}", f"{key}.sweep says it too: set one of them to null")
    if len(schemes) > 1 or schemes[0] in UNSWEPT or block is None:
        what = f"varies one method that can stand side by side, not {','.join(schemes)}"
        report(f"{key}.sweep", what)
        return []
    if len(points) < 2:
        report(f"{key}.sweep", f"must have two points or more, not {len(points)}; null: no sweep")
    names = names_of(points, schemes[0])
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        report(f"{key}.sweep", f"two points are called {name}: give each another name")
    known = _keys(block)
    for n, own in enumerate(points):
        _check_point(f"{key}.sweep.{n}", own, known, report)
    if len({own.get(VIRTUAL) for own in points}) > 1:
        report(f"{key}.sweep", f"{VIRTUAL} must be as many for all points: they share rows")
    _check_stage(stage, model, report)
    changed = [{k: v for k, v in own.items() if k in known and k not in _OWN} for own in points]
    plain = peft.get(block) if isinstance(peft.get(block), dict) else {}
    return [{**peft, block: {**plain, **own}} for own in changed]


_OWN: dict[str, Any] = {
    "name": AdapterName,
    "lr": fields_of(Optim)["lr"][0],
    "weight_decay": NonNegative,
    "seed": Count,
}


def _keys(block: str) -> dict[str, Any]:
    """The keys of a point: those of its method's block, and its own."""
    schema = next(one for one in members(fields_of(Peft)[block][0]) if is_schema(one))
    return {**{key: kind for key, (kind, _) in fields_of(schema).items()}, **_OWN}


def _check_point(key: str, own: dict[str, Any], known: dict[str, Any], report: Report) -> None:
    for name, value in own.items():
        if name in known:
            check(value, known[name], f"{key}.{name}", report)
        else:
            report(f"{key}.{name}", f"no such key{nearest(str(name), known, key)}")


def check_kept(stage: str, plain: dict[str, Any], report: Report) -> None:
    """Report where a sweep is to keep the best of its points by something else than their loss."""
    key = "exp_manager.checkpoint_callback_params"
    params: Any = (plain.get("exp_manager") or {}).get("checkpoint_callback_params") or {}
    peft = plain["model"].get("peft")
    if not isinstance(peft, dict) or peft.get("sweep") is None or not params.get("save_best_model"):
        return
    for name, best in (("monitor", "val_loss"), ("mode", "min")):
        if params.get(name) != best:
            what = f"{params.get(name)}: the best of each point is that of its own val_loss: use "
            report(f"{stage}.{key}.{name}", f"{what}{best}, or set save_best_model to False")


def _check_stage(stage: str, model: dict[str, Any], report: Report) -> None:
    """What would mix the points, or could not tell them apart."""
    sched = (model.get("optim") or {}).get("sched") or {}
    if sched.get("name") == "ReduceLROnPlateau":
        what = "watches one loss for all points of model.peft.sweep: use another schedule"
        report(f"{stage}.model.optim.sched.name", f"ReduceLROnPlateau {what}")
    files = (model.get("data") or {}).get("validation_ds")
    if files in (None, []):
        what = "is empty, and model.peft.sweep needs it to tell its points apart"
        report(f"{stage}.model.data.validation_ds", what)
