"""NeMo's names of adapters' weights, and how tensor parallelism cut them.

From NeMo 1.20 to 2.0: `AdapterName`, the mixins' places, and the layers inside an adapter.
"""

import re
from collections.abc import Iterable

from graftwerk.checkpoints.nemo_config import Variant
from graftwerk.checkpoints.nemo_shards import LAYER
from graftwerk.checkpoints.nemo_tables import CLASSIC, T5, Split

# A slot of a layer, and the module of a layer of NeMo's: the owner of adapters, and the adapter.
PLACES = {
    "attention_output": ("", "adapter_1"),
    "mlp_output": ("", "adapter_2"),
    "self_attention.qkv": ("self_attention", "lora_kqv_adapter"),
    "self_attention.query": ("self_attention", "lora_unfused_kqv_adapter.q_adapter"),
    "self_attention.key": ("self_attention", "lora_unfused_kqv_adapter.k_adapter"),
    "self_attention.value": ("self_attention", "lora_unfused_kqv_adapter.v_adapter"),
    "self_attention.output": ("self_attention", "lora_dense_attention_adapter"),
    "self_attention.keys": ("self_attention", "key_infused_adapter"),
    "self_attention.values": ("self_attention", "value_infused_adapter"),
    "cross_attention.output": ("inter_attention", "lora_dense_attention_adapter"),
    "cross_attention.keys": ("inter_attention", "key_infused_adapter"),
    "cross_attention.values": ("inter_attention", "value_infused_adapter"),
    "mlp.fc1": ("mlp", "lora_hto4h_adapter"),
    "mlp.gate": ("mlp", "lora_unfused_hto4h_adapter.gate_adapter"),
    "mlp.up": ("mlp", "lora_unfused_hto4h_adapter.up_adapter"),
    "mlp.fc2": ("mlp", "lora_4htoh_adapter"),
    "mlp.inner": ("mlp", "mlp_infused_adapter"),
}
# NeMo has it in a T5's cross-attention too, where nothing calls it.
DEAD = "inter_attention.adapter_layer.lora_kqv_adapter."
SCHEMES = (  # the method of an adapter, by how its name begins
    ("adapter_1.", "adapter"),
    ("adapter_2.", "adapter"),
    ("key_infused_adapter.", "ia3"),
    ("value_infused_adapter.", "ia3"),
    ("mlp_infused_adapter.", "ia3"),
    ("lora_", "lora"),
    ("ptuning_adapter.", "ptuning"),
)
STACKS: dict[Variant, dict[str, str]] = {
    "classic": {"decoder": f"{CLASSIC}.encoder"},
    "mcore": {"decoder": "model.decoder"},
    "t5": {side: f"{T5}.{T5}.{side}.model" for side in ("encoder", "decoder")},
}
PROMPTS: dict[Variant, str] = {"classic": CLASSIC, "mcore": "model.embedding", "t5": T5}
PROMPT = "embedding.output."  # the slot in which a prompt lies
MARK = ".adapter_layer."


def variant_of(names: Iterable[str]) -> Variant | None:
    """Whose names these are; None where they are no names of NeMo's GPT or T5."""
    starts: dict[str, Variant] = {
        f"{CLASSIC}.": "classic",
        f"{T5}.": "t5",
        "model.decoder.": "mcore",
        "model.embedding.": "mcore",
        "model.output_layer.": "mcore",
    }
    found: set[Variant | None] = set()
    for name in names:
        found.add(next((starts[start] for start in starts if name.startswith(start)), None))
    return found.pop() if len(found) == 1 else None


def to_nemo(key: str, variant: Variant) -> str | None:
    """NeMo's name of a weight of ours; None where NeMo has no such place."""
    if key.startswith(PROMPT):
        leaf = key.removeprefix(PROMPT)
        leaf = "embedding.weight" if leaf == "embedding" else leaf
        return f"{PROMPTS[variant]}{MARK}ptuning_adapter.{leaf}"
    layer = re.fullmatch(r"(encoder|decoder)\.(layers\.\d+)\.(.+)", key)
    stack = STACKS[variant].get(layer[1]) if layer else None
    if layer is None or stack is None:
        return None
    for slot, (owner, adapter) in PLACES.items():
        if layer[3].startswith(f"{slot}."):
            start = f"{stack}.{layer[2]}" + (f".{owner}" if owner else "")
            return f"{start}{MARK}{adapter}{layer[3].removeprefix(slot)}"
    return None


def from_nemo(name: str, variant: Variant) -> str | None:
    """Our name of a weight of NeMo's; None for what is no weight of a method that we have."""
    before, _, adapter = name.partition(MARK)
    if before == PROMPTS[variant] and adapter.startswith("ptuning_adapter."):
        leaf = adapter.removeprefix("ptuning_adapter.")
        return PROMPT + ("embedding" if leaf == "embedding.weight" else leaf)
    layer = re.fullmatch(r"(.+)\.(layers\.\d+)((?:\.\w+)?)", before)
    sides = {theirs: ours for ours, theirs in STACKS[variant].items()}
    if layer is None or layer[1] not in sides:
        return None
    for slot, (owner, theirs) in PLACES.items():
        if layer[3].removeprefix(".") == owner and adapter.startswith(f"{theirs}."):
            return f"{sides[layer[1]]}.{layer[2]}.{slot}{adapter.removeprefix(theirs)}"
    return None


def scheme_of(name: str) -> str | None:
    """The method that a weight of NeMo's is of; None for an adapter that we do not have."""
    _, mark, adapter = name.partition(MARK)
    if not mark:
        return "selective"
    return next((scheme for start, scheme in SCHEMES if adapter.startswith(start)), None)


def first_layers(names: Iterable[str]) -> dict[str, str]:
    """For each name of a layer's tensor that of the lowest layer at the same place."""
    lowest: dict[str, tuple[int, str]] = {}
    places: dict[str, str] = {}
    for name in names:
        if layer := LAYER.fullmatch(name):
            place, number = f"{layer[1]}*{layer[3]}", int(layer[2])
            places[name] = place
            lowest[place] = min(lowest.get(place, (number, name)), (number, name))
    return {name: lowest[place][1] for name, place in places.items()}


def adapter_split(name: str, qkv: tuple[int, ...], fc1: tuple[int, ...]) -> Split | None:
    """How a weight of an adapter of NeMo's is cut over tensor-parallel ranks.

    `qkv` and `fc1`: the runs of the projections that LoRA's last product joins.
    """
    adapter = name.partition(MARK)[2]
    module, _, kind = adapter.rpartition(".")
    adapter, _, leaf = module.rpartition(".")
    if kind == "scalers":
        return Split(0)
    if adapter == "ptuning_adapter":
        if leaf == "first":
            return Split(0)
        return Split(1) if leaf == "second" and kind == "weight" else None
    if leaf == "linear_in":
        rows = adapter in ("lora_dense_attention_adapter", "lora_4htoh_adapter")
        return Split(1 if rows else 0)
    if leaf != "linear_out":
        return None
    if not adapter.startswith("lora_"):
        return Split(1)
    return Split(0, {"lora_kqv_adapter": qkv, "lora_hto4h_adapter": fc1}.get(adapter, (1,)))
