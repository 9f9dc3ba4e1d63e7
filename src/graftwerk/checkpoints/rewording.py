"""An adapter under the name of another library's method, where both compute the same.

NeMo's and peft's LoRA and IA3 are methods of ours beside those of AdapterHub; what they say in
common can be said in either's words. Weights of a projection that one of them has whole are cut
where the other has its rows apart.
"""

from dataclasses import replace

import torch
from torch import Tensor

from graftwerk.adapters.configs import IA3Config, LoRAConfig, MethodConfig
from graftwerk.adapters.methods.hub_lora import HubLoRAConfig
from graftwerk.adapters.methods.ia3 import Scale
from graftwerk.adapters.methods.lora import CROSS, LoRA
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import Site, slots_of
from graftwerk.errors import UserError

# AdapterHub's slots for those of IA3: of a gated MLP the second half is scaled, which scales its
# inner features.
HUB_SCALES = {
    "keys": "key", "values": "value", "cross_keys": "cross_key", "cross_values": "cross_value",
    "mlp_inner": "up",
}  # fmt: skip
# Slots of NeMo's targets, by its variant; on a T5 with those of cross-attention.
TARGETS = {
    "nemo": {"attention_qkv": {"qkv"}, "attention_dense": {"output"}, "mlp_fc1": {"fc1"}},
    "canonical": {
        "attention_qkv": {"query", "key", "value"},
        "attention_dense": {"output"},
        "mlp_fc1": {"gate", "up"},
    },
}
ACROSS = {"attention_qkv": set(CROSS), "attention_dense": {"cross_output"}}


def say_as_adapterhub(model: AdapterModel, name: str) -> None:
    """Gives an adapter of LoRA or IA3 the method that AdapterHub has for it; others stay.

    Raises:
        UserError: for what AdapterHub has no words for.
    """
    method = model.adapters[name]
    sites = {path: slot.site for path, slot in slots_of(model).items()}
    if isinstance(method, LoRAConfig):
        if method.dora or method.weight_tying:
            what = "this DoRA: its own has no scale in the lengths" if method.dora else "tied LoRA"
            raise UserError(f"adapter {name!r}: AdapterHub has no words for {what}")
        new, state = _hub_lora(model, name, method, sites)
    elif isinstance(method, IA3Config):
        new, state = _hub_ia3(model, name, method, sites)
    else:
        return
    head = model.head_of(name)
    state |= {} if head is None else {k: v.detach() for k, v in head.state_dict().items()}
    model.delete_adapter(name)
    model.add_adapter(name, new, head=head is not None)
    model.load_adapter_state(name, state)


def _hub_lora(
    model: AdapterModel, name: str, method: LoRAConfig, sites: dict[str, Site]
) -> tuple[MethodConfig, dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    places: dict[str, None] = {}
    for path, _, part in model.parts(name):
        assert isinstance(part, LoRA)
        a, b = part.linear_in.weight.detach(), part.linear_out.weight.detach()
        for slot, rows in _cut(path, b, sites).items():
            places[sites[slot].name] = None
            state |= {f"{slot}.lora_A": a, f"{slot}.lora_B": rows}
    new = HubLoRAConfig(
        places=tuple(places),
        r=method.dim,
        alpha=method.scale * method.dim,
        dropout=method.dropout,
        leave_out=_left_out(method, sites),
    )
    return new, state


def _cut(path: str, rows: Tensor, sites: dict[str, Site]) -> dict[str, Tensor]:
    """Rows of a slot by the slots behind shares of them, where there are such."""
    own, owner = sites[path].rows, path.rpartition(".")[0]
    assert own is not None
    shares = {
        slot: site.rows
        for slot, site in sites.items()
        if slot.rpartition(".")[0] == owner
        and site.rows is not None
        and site.feeds is None
        and site.rows.linear == own.linear
        and site.rows != own
        and site.name not in ("keys", "values", "cross_keys", "cross_values")
    }
    if own.shape != (1, 1, -1) or not shares:
        return {path: rows}
    return {slot: share.of(rows).flatten(0, 2).contiguous() for slot, share in shares.items()}


def _hub_ia3(
    model: AdapterModel, name: str, method: IA3Config, sites: dict[str, Site]
) -> tuple[MethodConfig, dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    places: dict[str, None] = {}
    for path, slot, part in model.parts(name):
        assert isinstance(part, Scale)
        owner, place = path.rpartition(".")[0], HUB_SCALES.get(slot.site.name, slot.site.name)
        leaf = place.removeprefix("cross_")
        if f"{owner}.{leaf}" not in sites:
            raise UserError(
                f"adapter {name!r}: AdapterHub's IA3 scales the MLP before its activation: it has "
                f"no words for {path} without a gate"
            )
        for target, rows in _cut(f"{owner}.{leaf}", part.scalers.detach()[:, None], sites).items():
            places[sites[target].name] = None
            state[f"{target}.lora_B"] = rows
    return HubLoRAConfig(
        places=tuple(places),
        r=1,
        alpha=1,
        composition_mode="scale",
        init_weights="ia3",
        leave_out=_left_out(method, sites),
    ), state


def _left_out(method: MethodConfig, sites: dict[str, Site]) -> tuple[int, ...]:
    layers = {site.layer for site in sites.values() if site.name == "prefix"}
    chosen = {layer for layer in layers if method.selects(replace_layer(sites, layer))}
    return tuple(sorted(layers - chosen))


def replace_layer(sites: dict[str, Site], layer: int) -> Site:
    """Any site of a layer."""
    return next(site for site in sites.values() if site.layer == layer)


def nemo_words(method: MethodConfig, cross: bool) -> MethodConfig:
    """LoRA at slots as NeMo's targets name them; the method itself where none does.

    Args:
        cross: whether the model has cross-attention.
    """
    if not isinstance(method, LoRAConfig):
        return method
    left = set(method.target_modules)
    for variant, targets in TARGETS.items():
        named = {**targets, "mlp_fc2": {"fc2"}}
        wide = {t: slots | (ACROSS.get(t, set()) if cross else set()) for t, slots in named.items()}
        chosen = [target for target, slots in wide.items() if slots <= left]
        if left == set().union(*(wide[target] for target in chosen)):
            return replace(method, target_modules=tuple(chosen), variant=variant)
    return method


def cast_parts(model: AdapterModel, name: str, dtype: torch.dtype | None) -> None:
    """Holds an adapter's weights in another type; None: as they are."""
    if dtype is not None:
        for _, _, part in model.parts(name):
            part.to(dtype)
