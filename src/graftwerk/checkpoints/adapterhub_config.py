"""AdapterHub's configuration dictionaries as methods of ours, both ways.

A dictionary's `architecture` names a row of `ARCHITECTURES`: our method, the keys that ours spells
otherwise, and those that say only how weights begin. All other keys are fields of the method. Where
LoRA lies is said by four keys there and by the names of slots here, and depends on the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from graftwerk.adapters.configs import MethodConfig, UnionConfig
from graftwerk.adapters.kinds import field_kinds, fits, words_for
from graftwerk.adapters.methods.bn import BnConfig
from graftwerk.adapters.methods.hub_lora import HubLoRAConfig, HubMTLLoRAConfig
from graftwerk.adapters.methods.prefix import PrefixTuningConfig
from graftwerk.adapters.methods.prompt import PromptTuningConfig
from graftwerk.adapters.methods.reft import ReftConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.part import MethodSettings
from graftwerk.checkpoints.adapterhub_names import form_of, model_type_of
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

UNION = "union"
OWN = {each.name for each in fields(MethodSettings)} - {"leave_out"}  # it has no words for these
# Keys of the oldest files that say nothing of what is computed.
IDLE = {"attention_type", "new_attention_norm"}
UNIFORM = 0.5  # the bound of a prompt's new vectors
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version


@dataclass(frozen=True)
class Architecture:
    """One kind of dictionary.

    Args:
        method: our class.
        renamed: its fields by the keys that are spelled otherwise.
        begin: keys that matter only for new weights, with what is written.
        absent: fields that a dictionary leaves out where they have this value.
        fixed: fields of ours for which there is no key, with the value that is meant.
        silent: fields of ours for which there is no key: they matter only for new weights, or say
            in which form weights are held.
        said: settings of all our methods that this one's keys can say, by `convert`.
        convert: more that a dictionary says of the method's fields, and `revert` back.
    """

    method: type[MethodConfig]
    renamed: Mapping[str, str] = field(default_factory=dict)
    begin: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    convert: Callable[[dict[str, Any], TransformerConfig, str], None] | None = None
    revert: Callable[[dict[str, Any], TransformerConfig], None] | None = None


# ---- where LoRA lies


def lora_places(model: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """The slots of q, k, v, `intermediate_lora` and `output_lora` on a model.

    A LLaMA's two MLP places are the other way round: the library wraps `down_proj` as intermediate
    and `up_proj` as output. A gated T5 has its first at `wi_1`.
    """
    cross = model.architecture == "t5"
    names = {"q": "query", "k": "key", "v": "value"}
    places = {k: (name, f"cross_{name}") if cross else (name,) for k, name in names.items()}
    swapped = model_type_of(model) in ("llama", "mistral")
    inside = "up" if model.gated else "fc1"
    places["intermediate_lora"] = ("fc2",) if swapped else (inside,)
    places["output_lora"] = ("up",) if swapped else ("fc2",)
    return places


LORA_KEYS = ("selfattn_lora", "intermediate_lora", "output_lora")
MATRICES = ("q", "k", "v")


def _read_places(values: dict[str, Any], model: TransformerConfig, where: str) -> None:
    attention, *rest = LORA_KEYS
    flags = {key: values.pop(key, key == attention) for key in LORA_KEYS}
    letters = values.pop("attn_matrices", ["q", "v"])
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UserError(f"{where}: {', '.join(LORA_KEYS)} must each be true or false")
    if not isinstance(letters, list | tuple) or any(letter not in MATRICES for letter in letters):
        raise UserError(f"{where}: attn_matrices={letters!r}: a list of {', '.join(MATRICES)}")
    slots = lora_places(model)
    used = [*(letters if flags[attention] else ()), *(key for key in rest if flags[key])]
    values["places"] = tuple(dict.fromkeys(slot for key in used for slot in slots[key]))
    values["output_places"] = slots["output_lora"]
    values["scaled_places"] = _scaled_rest(values, letters if flags[attention] else (), model)


def _scaled_rest(
    values: Mapping[str, Any], letters: Sequence[str], model: TransformerConfig
) -> tuple[str, ...]:
    """What of GPT-2's one projection has no part of an IA3 and is multiplied with alpha with it."""
    alone = values.get("composition_mode", "add") != "scale" or values.get("use_gating", False)
    if alone or not letters or model_type_of(model) != "gpt2":
        return ()
    if values.get("alpha", HubLoRAConfig.alpha) == 1:
        return ()
    slots = lora_places(model)
    return tuple(slot for key in MATRICES if key not in letters for slot in slots[key])


def _write_places(values: dict[str, Any], model: TransformerConfig) -> None:
    left, slots = list(values.pop("places")), lora_places(model)
    del values["output_places"]
    order = sorted(
        (key for key in slots if set(slots[key]) <= set(left)),
        key=lambda k: left.index(slots[k][0]),
    )
    unsaid = set(left) - {slot for key in order for slot in slots[key]}
    if unsaid:
        raise UserError(
            f"AdapterHub's LoRA cannot be at {', '.join(sorted(unsaid))} of this model: it has "
            f"{', '.join(slot for each in slots.values() for slot in each)}"
        )
    letters = [key for key in order if key in MATRICES]
    scaled, meant = values.pop("scaled_places"), _scaled_rest(values, letters, model)
    if set(scaled) != set(meant):
        raise UserError(
            f"AdapterHub's IA3 cannot say scaled_places={list(scaled)}: with alpha="
            f"{values['alpha']} it means {list(meant)} on this model"
        )
    values["attn_matrices"] = letters or ["q", "v"]
    values |= {key: key in order for key in LORA_KEYS}
    values["selfattn_lora"] = bool(letters)


# ---- the others


def _read_bottleneck(values: dict[str, Any], model: TransformerConfig, where: str) -> None:
    """Spellings of files before version 3: other cases, and the invertible adapter's two in one."""
    lower = {name.lower(): name for name in (each.name for each in fields(BnConfig))}
    for key in [key for key in values if key.lower() in lower and key not in lower.values()]:
        values[lower[key.lower()]] = values.pop(key)
    if "invertible_adapter" in values:
        inverse = values.pop("invertible_adapter") or {}
        if not isinstance(inverse, dict):
            raise UserError(f"{where}: invertible_adapter={inverse!r}: keys and values")
        values["inv_adapter"] = inverse.get("block_type")
        values["inv_adapter_reduction_factor"] = inverse.get("reduction_factor")


def _read_prefix(values: dict[str, Any], model: TransformerConfig, where: str) -> None:
    flat = values.pop("flat", False)
    if not isinstance(flat, bool):
        raise UserError(f"{where}: flat={flat!r}: true or false")
    values["reparametrise"] = not flat
    values["relative_positions"] = "keys"
    values["init_std"] = 1.0
    if model.architecture == "bert":  # it has no other stack: the library does not ask
        values["encoder_prefix"] = True


def _write_prefix(values: dict[str, Any], model: TransformerConfig) -> None:
    values["flat"] = not values.pop("reparametrise")
    relative = values.pop("relative_positions")
    if relative != "keys" and model.position_embedding_type == "relative":
        raise UserError(
            f"AdapterHub's prefixes move a T5's keys back: they cannot say relative_positions="
            f"{relative!r}"
        )


def _read_prompt(values: dict[str, Any], model: TransformerConfig, where: str) -> None:
    values.setdefault("prompt_init", "random_uniform")
    if values["prompt_init"] not in ("random_uniform", "from_string"):
        raise UserError(
            f"{where}: prompt_init={values['prompt_init']!r}: random_uniform, from_string"
        )
    if values.pop("random_uniform_scale", UNIFORM) != UNIFORM:
        raise UserError(f"{where}: random_uniform_scale must be {UNIFORM}")


def _write_prompt(values: dict[str, Any], model: TransformerConfig) -> None:
    if values["prompt_init"] == "normal":  # said of vectors that are born already
        values["prompt_init"] = "random_uniform"


def _read_reft(values: dict[str, Any], model: TransformerConfig, where: str) -> None:
    layers = values.pop("layers", "all")
    if layers != "all" and not fits(layers, tuple[int, ...]):
        raise UserError(f"{where}: layers={layers!r}: 'all', or a list of layers from 0")
    if values.pop("output_reft", True) is not True:
        raise UserError(f"{where}: output_reft=false: ReFT has no other place than behind a layer")
    values["orthogonal_base"] = True
    if layers != "all":
        values["layer_selection"] = tuple(layer + 1 for layer in layers)


def _write_reft(values: dict[str, Any], model: TransformerConfig) -> None:
    chosen = values.pop("layer_selection")
    values["layers"] = "all" if chosen is None else [layer - 1 for layer in chosen]
    values["output_reft"] = True


SEED = {"init_weights_seed": None}
TYPED = {"init_weights_seed": None, "dtype": None}
LORA = {"begin": TYPED, "convert": _read_places, "revert": _write_places}
# None: a bottleneck, the only one whose dictionaries name no architecture.
ARCHITECTURES: dict[str | None, Architecture] = {
    None: Architecture(BnConfig, convert=_read_bottleneck),
    "lora": Architecture(HubLoRAConfig, **LORA),
    "mtl_lora": Architecture(HubMTLLoRAConfig, **LORA),
    "prefix_tuning": Architecture(
        PrefixTuningConfig,
        renamed={"bottleneck_size": "bottleneck_dim"},
        begin=SEED,
        fixed={"shifts_positions": False},
        silent=("init_std",),
        convert=_read_prefix,
        revert=_write_prefix,
    ),
    "prompt_tuning": Architecture(
        PromptTuningConfig,
        renamed={"prompt_length": "virtual_tokens"},
        begin=SEED,
        fixed={
            "shifts_positions": False,
            "place": "embedding",
            "spare_tokens": 0,
            "leave_out": (),
        },
        silent=("init_std",),
        convert=_read_prompt,
        revert=_write_prompt,
    ),
    "reft": Architecture(
        ReftConfig,
        begin=TYPED,
        absent={"subtract_projection": True},
        fixed={"leave_out": ()},
        silent=("orthogonal_base",),
        said=("layer_selection",),
        convert=_read_reft,
        revert=_write_reft,
    ),
}


def method_of(
    config: Mapping[str, Any], model: AdapterModel, where: str = "adapter configuration"
) -> MethodConfig:
    """The method that a dictionary describes on a model; what it leaves out has its default.

    Args:
        config: the dictionary, as `adapter_config.json` holds it under `config`.
        where: what errors begin with.

    Raises:
        UserError: for an architecture or a key that is not known, and a value of another kind.
    """
    kind = config.get("architecture")
    if kind == UNION:
        members = config.get("configs")
        if not isinstance(members, list | tuple) or not all(
            isinstance(each, Mapping) for each in members
        ):
            raise UserError(f"{where}: a union needs `configs`, a list of configurations")
        return _made(
            UnionConfig, {"configs": tuple(method_of(m, model, where) for m in members)}, where
        )
    row = ARCHITECTURES.get(kind) if isinstance(kind, str | None) else None
    if row is None:
        known = ", ".join([*(str(name) for name in ARCHITECTURES if name), UNION])
        raise UserError(f"{where}: architecture {kind!r} is not known: one of {known}, or none")
    skipped = {"architecture", *row.begin, *IDLE}
    values = {row.renamed.get(key, key): v for key, v in config.items() if key not in skipped}
    given = set(values)
    if row.convert is not None:
        row.convert(values, form_of(model), where)
    derived = set(values) - given
    kinds = field_kinds(row.method)
    hidden = {*OWN, *row.fixed, *row.silent} - derived
    for name, value in values.items():
        if name not in kinds or name in hidden:
            raise UserError(f"{where}: the key {name!r} is not known")
        if not fits(value, kinds[name]):
            raise UserError(f"{where}: {name}={value!r} must be {words_for(kinds[name])}")
    return _made(row.method, {**row.fixed, **values}, where)


def _made(method: type[MethodConfig], values: dict[str, Any], where: str) -> MethodConfig:
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return method(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def hub_config(method: MethodConfig, model: AdapterModel) -> dict[str, Any]:
    """The dictionary of a method on a model; the other way round of `method_of`.

    Raises:
        UserError: for a method, a setting or a place that AdapterHub has no words for.
    """
    if isinstance(method, UnionConfig):
        _refuse_own(method, None)
        return {"architecture": UNION, "configs": [hub_config(m, model) for m in method.configs]}
    found = [(name, row) for name, row in ARCHITECTURES.items() if row.method is type(method)]
    if not found:
        kinds = ", ".join(row.method.__name__ for row in ARCHITECTURES.values())
        raise UserError(
            f"AdapterHub has no words for {type(method).__name__}: it has {kinds} and unions"
        )
    name, row = found[0]
    _refuse_own(method, row)
    names = {ours: theirs for theirs, ours in row.renamed.items()}
    values = {
        names.get(each.name, each.name): _plain(getattr(method, each.name))
        for each in fields(method)
        if each.name not in {*OWN, *row.fixed, *row.silent} or each.name in row.said
    }
    if row.revert is not None:
        row.revert(values, form_of(model))
    for key, default in row.absent.items():
        if values[key] == default:
            del values[key]
    return {**({"architecture": name} if name else {}), **row.begin, **values}


def _refuse_own(method: MethodConfig, row: Architecture | None) -> None:
    """Raises for a setting that has no key and is not what is meant without one."""
    meant = {each.name: each.default for each in fields(MethodSettings) if each.name in OWN}
    meant |= {} if row is None else row.fixed
    for name, value in meant.items():
        if getattr(method, name) != value and (row is None or name not in row.said):
            raise UserError(f"AdapterHub's files cannot say {name}={getattr(method, name)!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
