"""LoRA, DoRA and IA3 of peft: their weights at modules of `transformers`, ours in slots.

One part here may be several modules there (our fused projections), or several parts one module
(GPT-2's fused one): then their products lie one after the other, the sum of their ranks.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.configs import IA3Config, LoRAConfig, MethodConfig, UnionConfig
from graftwerk.adapters.kinds import fits, words_for
from graftwerk.adapters.methods.hub_lora import HubIA3, HubLoRA, HubScale
from graftwerk.adapters.methods.ia3 import PLACES, Scale
from graftwerk.adapters.methods.lora import SLOTS, DoRA, LoRA
from graftwerk.adapters.part import Part
from graftwerk.checkpoints.peft_modules import PREFIX, Module, Modules
from graftwerk.errors import UserError

Weights = dict[str, dict[str, Tensor]]  # module -> leaf -> tensor
A, B, MAGNITUDE, VECTOR = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "ia3_l"
LEAVES = (A, B, MAGNITUDE, f"{MAGNITUDE}.weight", VECTOR)
# Ways to begin that leave the base as it is. Others (pissa, olora, ...) take a share out of it.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


# ---- reading


@dataclass(frozen=True)
class Update:
    """What peft says of one module's LoRA."""

    rank: int
    alpha: float
    dora: bool


def read_lora(
    modules: Modules, settings: Mapping[str, Any], weights: Weights, path: Path
) -> tuple[list[MethodConfig], dict[str, Tensor]]:
    """Our methods and weights of a LoRA's.

    Raises:
        UserError: for what we have no part for.
    """
    check_lora(settings, path)
    state: dict[str, Tensor] = {}
    found: dict[Module, Update] = {}
    for name, leaves in weights.items():
        module = _at(modules, name, path)
        if A not in leaves or B not in leaves:
            raise UserError(f"{path}: {name} has only one of {A} and {B}")
        a, b = leaves[A], leaves[B]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise UserError(f"{path}: {name}: {list(a.shape)} and {list(b.shape)} are no LoRA")
        magnitude = leaves.get(MAGNITUDE, leaves.get(f"{MAGNITUDE}.weight"))
        found[module] = Update(a.shape[0], _alpha(settings, name), magnitude is not None)
        state[f"{module.slot}.linear_in.weight"] = a
        state[f"{module.slot}.linear_out.weight"] = _reordered(module, b, path)
        if magnitude is not None:
            state[f"{module.slot}.magnitude"] = _reordered(module, magnitude.flatten(), path)
    return _methods(modules, settings, found), state


def check_lora(settings: Mapping[str, Any], path: Path) -> None:
    """Raises a UserError for settings by which LoRA computes something that ours does not."""
    if settings.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias={settings['bias']!r}: biases that were trained with a LoRA are not "
            f"read; bias='none' is"
        )
    if settings.get("init_lora_weights", True) not in INITS:
        raise UserError(
            f"{path}: init_lora_weights={settings['init_lora_weights']!r} changes the base's "
            f"weights: convert it in peft first (`path_initial_model_for_weight_conversion`)"
        )
    kinds = {
        "rank_pattern": dict[str, int] | None,
        "alpha_pattern": dict[str, float] | None,
        "lora_alpha": float,
        "lora_dropout": float,
        "use_rslora": bool,
    }
    for key, kind in kinds.items():
        if key in settings and not fits(settings[key], kind):
            raise UserError(f"{path}: {key}={settings[key]!r} must be {words_for(kind)}")
    patterns = (*(settings.get("rank_pattern") or {}), *(settings.get("alpha_pattern") or {}))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError):
            raise UserError(f"{path}: {pattern!r} is no pattern of names") from None


def _alpha(settings: Mapping[str, Any], name: str) -> float:
    """peft's `lora_alpha` of a module: the first pattern that the end of its name fits."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return settings.get("lora_alpha", 8)


def _at(modules: Modules, name: str, path: Path) -> Module:
    module = modules.find(name)
    if module is None:
        raise UserError(f"{path}: no adapter can lie at {name} on this model")
    return module


def _reordered(module: Module, tensor: Tensor, path: Path) -> Tensor:
    try:
        return module.ours(tensor).contiguous()
    except (RuntimeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{path}: {module.name} does not fit this model: {said}") from None


def _methods(
    modules: Modules, settings: Mapping[str, Any], found: Mapping[Module, Update]
) -> list[MethodConfig]:
    """One configuration for the places and layers that are alike."""
    layers: dict[tuple[Update, str], set[int]] = {}
    for module, update in found.items():
        site = modules.sites[module.slot]
        layers.setdefault((update, site.name), set()).add(site.layer)
    alike: dict[tuple[Update, tuple[int, ...] | None], list[str]] = {}
    for (update, place), chosen in layers.items():
        everywhere = chosen == modules.layers(place)
        numbers = None if everywhere else tuple(sorted(number + 1 for number in chosen))
        alike.setdefault((update, numbers), []).append(place)
    return [
        LoRAConfig(
            dim=update.rank,
            alpha=update.alpha,
            dropout=settings.get("lora_dropout", 0.0),
            target_modules=tuple(sorted(places)),
            rank_stabilised=settings.get("use_rslora", False),
            dora=update.dora,
            layer_selection=numbers,
        )
        for (update, numbers), places in alike.items()
    ]


def read_ia3(
    modules: Modules, weights: Weights, path: Path
) -> tuple[list[MethodConfig], dict[str, Tensor]]:
    """Our methods and weights of an IA3's: [1, in] scales what goes into a module, else [out, 1].

    What goes into the projection behind attention are the values, weighed: they are scaled there.

    Raises:
        UserError: for a vector at a place where we have no slot.
    """
    found = {_at(modules, name, path): leaves[VECTOR] for name, leaves in weights.items()}
    for module, vector in found.items():
        if vector.ndim != 2 or 1 not in vector.shape:
            raise UserError(f"{path}: {module.name}: {list(vector.shape)} is no IA3 vector")
    twice = {m.owner for m, v in found.items() if m.linear.endswith("linear_proj") and _enters(v)}
    state: dict[str, Tensor] = {}
    layers: dict[str, set[int]] = {}
    for module, vector in found.items():
        if _enters(vector):
            slot, values = _entrance(modules, module, path), vector.flatten()
        else:
            plain = module.owner in twice and module.slot.endswith(".value")
            ends = {".key": ".keys"} if plain else {".key": ".keys", ".value": ".values"}
            _, dot, leaf = module.slot.rpartition(".")
            slot = f"{module.owner}{ends.get(dot + leaf, dot + leaf)}"
            values = _reordered(module, vector.flatten(), path)
        state[f"{slot}.scalers"] = values.contiguous()
        site = modules.sites[slot]
        layers.setdefault(site.name, set()).add(site.layer)
    alike: dict[tuple[int, ...] | None, list[str]] = {}
    for place, chosen in layers.items():
        everywhere = chosen == modules.layers(place)
        numbers = None if everywhere else tuple(sorted(number + 1 for number in chosen))
        alike.setdefault(numbers, []).append(place)
    order = (*PLACES, *SLOTS)
    return [
        IA3Config(places=tuple(sorted(places, key=order.index)), layer_selection=numbers)
        for numbers, places in alike.items()
    ], state


def _enters(vector: Tensor) -> bool:
    """Whether an IA3 vector scales what goes into its module."""
    return vector.shape[0] == 1 < vector.shape[1]


def _entrance(modules: Modules, module: Module, path: Path) -> str:
    """The slot in front of a module."""
    leaf, config = module.linear.rpartition(".")[2], modules.config
    if leaf == "linear_fc2":
        return f"{module.owner}.inner"
    if leaf == "linear_proj" and config.num_query_groups == config.num_attention_heads:
        return f"{module.owner}.values"
    raise UserError(
        f"{path}: IA3 scales what goes into {module.name}, where there is no slot: inputs can be "
        f"scaled before the second projection of the MLP, and behind attention without grouped "
        f"queries"
    )


# ---- writing


@dataclass
class Share:
    """What one part adds to a projection of ours, spread over all features of that one.

    a [r, in], b [out, r], covered [out]: the features that the part has; magnitude [out] of a DoRA.
    """

    a: Tensor
    b: Tensor
    scale: float
    covered: Tensor
    magnitude: Tensor | None


def write_lora(
    modules: Modules, parts: Mapping[str, Part], method: MethodConfig, path: str | Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's settings and weights of LoRA parts by the paths of their slots.

    Raises:
        UserError: for what peft's LoRA cannot say.
    """
    shares: dict[str, list[Share]] = {}
    for slot, part in parts.items():
        for name, share in _dealt(modules, slot, _share(modules, slot, part, path)):
            shares.setdefault(name, []).append(share)
    stabilised = all(getattr(one, "rank_stabilised", False) for one in methods_in(method))
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Update] = {}
    for name, own in shares.items():
        leaves = _joined(name, own, path)
        rank = leaves[A].shape[0]
        alpha = own[0].scale * (math.sqrt(rank) if stabilised else rank)
        updates[name] = Update(rank, _plain(alpha), MAGNITUDE in leaves)
        tensors |= {f"{PREFIX}{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    dora = any(update.dora for update in updates.values())
    if dora and not all(update.dora for update in updates.values()):
        raise UserError(f"{path}: peft has DoRA at all modules of an adapter, or at none")
    rank = most(update.rank for update in updates.values())
    alpha = most(update.alpha for update in updates.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(getattr(one, "dropout", 0.0) for one in methods_in(method)),
        "target_modules": sorted(set(modules.shorten(dict.fromkeys(updates, True)).values())),
        "rank_pattern": {re.escape(n): u.rank for n, u in updates.items() if u.rank != rank},
        "alpha_pattern": {re.escape(n): u.alpha for n, u in updates.items() if u.alpha != alpha},
        "use_rslora": stabilised,
        "use_dora": dora,
        "fan_in_fan_out": any(modules.linear[name].conv for name in updates),
        "bias": "none",
        "init_lora_weights": True,
    }, tensors


def union_of(methods: Sequence[MethodConfig]) -> MethodConfig:
    """One method, or a union of several."""
    return methods[0] if len(methods) == 1 else UnionConfig(configs=tuple(methods))


def methods_in(method: MethodConfig) -> tuple[MethodConfig, ...]:
    """The methods of a union, or the one."""
    return method.configs if isinstance(method, UnionConfig) else (method,)


def most(values: Iterable[Any]) -> Any:
    """The value that comes most often."""
    return Counter(values).most_common(1)[0][0]


def _plain(number: float) -> float:
    """A number without the last digits of a product, and without a fraction that is 0."""
    rounded = float(f"{number:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def _share(modules: Modules, slot: str, part: Part, path: str | Path) -> Share:
    """A part's update, spread over its whole projection."""
    magnitude = None
    if isinstance(part, LoRA) and part.position is None:
        a, b, scale = part.linear_in.weight, part.linear_out.weight, part.scale
        magnitude = part.magnitude.detach() if isinstance(part, DoRA) else None
    elif type(part) is HubLoRA and part.gate is None and part.m is None:
        a, b, scale = part.lora_A, part.lora_B, part.scale
    else:
        raise UserError(
            f"{path}: peft has no words for {type(part).__name__} at {slot}: it has LoRA without "
            f"gates and position embeddings, and DoRA with the scale in its lengths"
        )
    covered = modules.spread(slot, torch.ones(len(b), dtype=torch.bool))
    return Share(
        a.detach().cpu(),
        modules.spread(slot, b.detach().cpu()),
        scale,
        covered,
        None if magnitude is None else modules.spread(slot, magnitude.cpu()),
    )


def _dealt(modules: Modules, slot: str, share: Share) -> Iterable[tuple[str, Share]]:
    """A share by modules of theirs; those that it does not touch are left out."""
    linear = modules.linear_of(slot)
    b, covered = modules.rows(linear, share.b), modules.rows(linear, share.covered)
    length = {} if share.magnitude is None else modules.rows(linear, share.magnitude)
    for name in b:
        if covered[name].any():
            own = Share(share.a, b[name], share.scale, covered[name], length.get(name))
            yield name, own


def _joined(name: str, shares: list[Share], path: str | Path) -> dict[str, Tensor]:
    """The one LoRA of a module that adds what its shares add, whose scale is that of the first."""
    first = shares[0]
    if first.magnitude is not None and (len(shares) > 1 or not first.covered.all()):
        raise UserError(
            f"{path}: peft's DoRA is at all of {name}, and this one at some of its rows only"
        )
    scaled = [
        share.b if share.scale == first.scale else share.b * (share.scale / first.scale)
        for share in shares
    ]
    leaves = {A: torch.cat([share.a for share in shares]), B: torch.cat(scaled, 1)}
    if first.magnitude is not None:
        leaves[MAGNITUDE] = first.magnitude
    return {leaf: tensor.contiguous() for leaf, tensor in leaves.items()}


def write_ia3(
    modules: Modules, parts: Mapping[str, Part], path: str | Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's settings and weights of IA3 parts by the paths of their slots.

    Raises:
        UserError: for what peft's IA3 cannot say.
    """
    vectors: dict[str, Tensor] = {}
    enters: dict[str, bool] = {}
    for slot, part in parts.items():
        values, site = _vector(part, slot, path).cpu(), modules.sites[slot]
        owner = slot.rpartition(".")[0]
        if site.feeds is not None or _is_behind(modules, slot, parts):
            linear = f"{owner}.{site.feeds or 'linear_proj'}"
            (name,) = modules.names_of(linear)
            found = {name: values[None].contiguous()}
        else:
            linear = modules.linear_of(slot)
            covered = modules.spread(slot, torch.ones(len(values), dtype=torch.bool))
            touched = modules.rows(linear, covered)
            spread = modules.rows(linear, modules.spread(slot, values, fill=1.0))
            found = {
                n: rows[:, None].contiguous() for n, rows in spread.items() if touched[n].any()
            }
        for name, vector in found.items():
            if enters.setdefault(name, _enters(vector)) != _enters(vector):
                raise UserError(
                    f"{path}: peft scales what goes into {name} or what comes out of it"
                )
            vectors[name] = vectors[name] * vector if name in vectors else vector
    short = modules.shorten(enters)
    return {
        "peft_type": "IA3",
        "target_modules": sorted(set(short.values())),
        "feedforward_modules": sorted({short[name] for name, enter in enters.items() if enter}),
        "fan_in_fan_out": any(modules.linear[name].conv for name in enters),
        "init_ia3_weights": True,
    }, {f"{PREFIX}{name}.{VECTOR}": vector for name, vector in vectors.items()}


def _is_behind(modules: Modules, slot: str, parts: Mapping[str, Part]) -> bool:
    """Whether a vector of values is the one that peft has before the projection behind attention.

    It is where another scales the values as they are made.
    """
    owner, _, leaf = slot.rpartition(".")
    config = modules.config
    alike = config.num_query_groups == config.num_attention_heads
    return leaf == "values" and alike and bool(parts.keys() & {f"{owner}.value", f"{owner}.qkv"})


def _vector(part: Part, slot: str, path: str | Path) -> Tensor:
    """What an IA3 part multiplies its slot's output with."""
    if isinstance(part, Scale):
        return part.scalers.detach()
    if isinstance(part, HubScale):
        return torch.full((part.site.out_features,), float(part.scale))
    if not isinstance(part, HubIA3) or part.gate is not None:
        raise UserError(f"{path}: peft has no words for {type(part).__name__} at {slot}")
    return part.scale * part.lora_B.detach().squeeze(1)
