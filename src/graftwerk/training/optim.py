"""The optimizer that the `optim` section names."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from graftwerk.errors import UserError

# NeMo's names; apex's FusedAdam decays weights apart from the gradient, as AdamW does.
OPTIMIZERS = {"fused_adam": AdamW, "adamw": AdamW, "adam": Adam, "sgd": SGD}
OF_ADAM: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-8}
OF_SGD: dict[str, Any] = {"momentum": 0.0}
DEFAULTS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, **OF_ADAM, **OF_SGD}


def build_optimizer(
    optim: Mapping[str, Any],
    parameters: Iterable[Parameter],
    apart: Sequence[tuple[Mapping[str, float], Sequence[Parameter]]] = (),
) -> Optimizer:
    """The optimizer over parameters, in two groups: matrices decay, vectors do not.

    Both groups are there even if one is empty: a stage of a pipeline may have either alone.
    `apart` splits the parameters, each part with an `lr` or a `weight_decay` of its own, into two
    groups a part.

    Biases, norms and IA3's scales are vectors: decay would pull a scale to 0, away from the 1 at
    which it changes nothing. (NeMo's pre-training leaves biases and norms out too; its adapter
    stages decay all.)

    Args:
        optim: `name`, `lr`, `weight_decay`, Adam's `betas` and `eps`, SGD's `momentum`; absent ones
            take `DEFAULTS`.

    Raises:
        UserError: an unknown name, unknown keys, values out of range.
    """
    name = optim.get("name", "adamw")
    if name not in OPTIMIZERS:
        raise UserError(
            f"model.optim.name={name!r} is not known: use one of {', '.join(OPTIMIZERS)}"
        )
    unknown = set(optim) - set(DEFAULTS) - {"name", "sched"}
    if unknown:
        raise UserError(
            f"model.optim: {', '.join(sorted(unknown))} is not known; allowed: "
            f"name, {', '.join(DEFAULTS)}, sched"
        )
    values = {**DEFAULTS, **{k: optim[k] for k in DEFAULTS if optim.get(k) is not None}}
    _check(values)
    parameters = list(parameters)
    parts = apart or [({}, parameters)]
    groups = [group for own, some in parts for group in _groups({**values, **own}, some)]
    own = {key: values[key] for key in (OF_SGD if name == "sgd" else OF_ADAM)}
    return OPTIMIZERS[name](groups, lr=float(values["lr"]), fused=_can_fuse(parameters), **own)


def _groups(values: Mapping[str, Any], parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    rate = {"lr": float(values["lr"])}
    return [
        {"params": matrices, "weight_decay": values["weight_decay"], **rate},
        {"params": vectors, "weight_decay": 0.0, **rate},
    ]


def _check(values: dict[str, Any]) -> None:
    for key in ("lr", "eps"):
        if not values[key] > 0:
            raise UserError(f"model.optim.{key}={values[key]!r} must be above 0")
    if values["weight_decay"] < 0:
        raise UserError(f"model.optim.weight_decay={values['weight_decay']!r} must not be negative")
    if not 0 <= values["momentum"] < 1:
        raise UserError(f"model.optim.momentum={values['momentum']!r} must be in [0, 1)")
    betas = values["betas"] = tuple(values["betas"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"model.optim.betas={list(betas)!r} must be two numbers in [0, 1)")


def _can_fuse(parameters: list[Parameter]) -> bool:
    # One kernel for all parameters; torch has it for these devices and float types.
    return all(p.device.type in ("cpu", "cuda") and torch.is_floating_point(p) for p in parameters)
