"""Means of adapters' weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.configs import MethodConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.errors import UserError

STRATEGIES = ("linear", "lora_linear_only_negate_b", "lora_delta_w_svd")
A, B = "lora_A", "lora_B"
State = dict[str, Tensor]


def average(
    model: AdapterModel,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    strategy: str,
    normalize: bool,
    svd_rank: int | None,
) -> tuple[MethodConfig, State]:
    """The method and the weights of a mean of adapters; see `AdapterMethods.average_adapter`.

    Raises:
        UserError: for adapters of different configurations, and a strategy that does not fit.
    """
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise UserError(f"combine_strategy={strategy!r} is not known: one of {known}")
    if not adapters:
        raise UserError("average_adapter: adapter_list is empty: name the adapters to average")
    states = [model.adapter_state(name) for name in adapters]
    method = model.adapters[adapters[0]]
    for name in adapters[1:]:
        if model.adapters[name] != method:
            raise UserError(
                f"average_adapter: {name!r} and {adapters[0]!r} have different configurations"
            )
    shares = shares_of(adapters, weights, normalize, "average_adapter", "adapters")
    if strategy == "linear":
        return method, mean(shares, states)
    if any(key.rpartition(".")[2] not in (A, B) for key in states[0]):
        raise UserError(f"combine_strategy={strategy!r} is for LoRA without gates, DoRA and VeRA")
    if strategy == "lora_linear_only_negate_b":
        sizes = [abs(share) for share in shares]
        return method, {
            key: _sum(sizes if key.endswith(A) else shares, [s[key] for s in states])
            for key in states[0]
        }
    return _by_svd(method, states, shares, svd_rank)


def shares_of(
    names: Sequence[str],
    weights: Sequence[float] | None,
    normalize: bool,
    what: str,
    things: str,
) -> list[float]:
    """What each counts in a mean; a `UserError` names the method `what` and the `things`."""
    given = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(names):
        raise UserError(f"{what}: {len(given)} weights for {len(names)} {things}")
    if weights is None or normalize:
        total = sum(given)
        if not total:
            raise UserError(f"{what}: weights add up to 0: set normalize_weights=False")
        return [weight / total for weight in given]
    return given


def mean(shares: Sequence[float], states: Sequence[State]) -> State:
    """Each tensor's sum over states of the same keys, by shares."""
    return {key: _sum(shares, [state[key] for state in states]) for key in states[0]}


def _sum(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([share * t for share, t in zip(shares, tensors, strict=True)]).sum(0)


def _by_svd(
    method: Any, states: Sequence[State], shares: Sequence[float], rank: int | None
) -> tuple[MethodConfig, State]:
    """The factors of the mean of BA that lie nearest to it (Eckart and Young 1936)."""
    own = method.r
    rank = own if rank is None else rank
    made: State = {}
    for key in (key for key in states[0] if key.endswith(A)):
        other = f"{key.removesuffix(A)}{B}"
        deltas = [state[other].float() @ state[key].float() for state in states]
        u, s, v = torch.linalg.svd(_sum(shares, deltas), full_matrices=False)
        # alpha / r is of the new rank: what it changes is taken out of B.
        made[key], made[other] = v[:rank], u[:, :rank] * s[:rank] * (rank / own)
    return replace(method, r=rank), made
