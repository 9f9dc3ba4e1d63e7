"""An adapter of AdapterHub's under our names: its method and weights, as they are on a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.configs import MethodConfig, UnionConfig, settings_of
from graftwerk.adapters.methods.bn import BnConfig
from graftwerk.adapters.methods.hub_lora import HubLoRAConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import Site, slots_of
from graftwerk.checkpoints.adapter_form import AdapterFile, SavedAdapter
from graftwerk.checkpoints.adapter_shapes import shapes_of
from graftwerk.checkpoints.adapterhub_config import (
    ARCHITECTURES,
    OLD_ACTIVATIONS,
    UNION,
    method_of,
)
from graftwerk.checkpoints.adapterhub_files import ADAPTER, HubPart, read_adapterhub
from graftwerk.checkpoints.adapterhub_names import (
    ALIKE,
    FAMILIES,
    OLD_NAMES,
    HubFamily,
    HubTable,
    form_of,
    hub_table,
    model_type_of,
    split_key,
)
from graftwerk.errors import UserError

MENDED = (1, 1)  # LoRA of versions before was trained without alpha / r


def read_adapter_file(path: str | Path) -> AdapterFile:
    """The adapters of a folder, or of a folder of folders, for `load_adapters`."""
    files = [adapter_file(part, path) for part in read_adapterhub(path, [ADAPTER]).adapters]
    if not files:
        raise UserError(f"{path} holds no adapter")
    saved = [adapter for file in files for adapter in file.adapters]

    def fit(model: AdapterModel) -> list[SavedAdapter]:
        return [adapter for file in files for adapter in file.on(model).adapters]

    return AdapterFile(saved, dict(files[0].extra), fit)


def adapter_file(
    part: HubPart,
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    leave_out: Sequence[int] = (),
) -> AdapterFile:
    """An adapter of a folder as `load_adapters` takes it; the arguments of `load_adapterhub`."""
    config = _mended(part) | dict(changes or {})

    def fit(model: AdapterModel) -> list[SavedAdapter]:
        where = f"{path}: {ADAPTER.config}"
        check_model(model, part, path)
        method = method_of(config, model, where)
        tensors = without_root(family_of(model), part.tensors)
        table, shapes = _table(model, method, part.name, where)
        state = cut(table, tensors, shapes, f"{path}: the weights of adapter {part.name!r}")
        if leave_out:
            sites = sites_of(model)
            method = _leaving_out(method, leave_out)
            state = {
                k: v for k, v in state.items() if method.selects(sites[split_key(k, sites)[0]])
            }
        return [SavedAdapter(part.name, settings_of(method), state)]

    base = part.about.get("model_name")
    told = SavedAdapter(part.name, _rough(config), part.tensors)
    return AdapterFile([told], {} if base is None else {"base": base}, fit)


def _rough(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a method without a model: its class, and its virtual tokens."""
    kind, members = config.get("architecture"), config.get("configs")
    if kind == UNION and isinstance(members, list):
        known = [each for each in members if isinstance(each, Mapping)]
        return {"method": UnionConfig.__name__, "configs": [_rough(each) for each in known]}
    row = ARCHITECTURES.get(kind) if isinstance(kind, str | None) else None
    name = str(kind) if row is None else row.method.__name__
    length = config.get("prompt_length")
    return {"method": name} | ({"virtual_tokens": length} if kind == "prompt_tuning" else {})


def _mended(part: HubPart) -> dict[str, Any]:
    """The configuration of a file, with what older versions of the library meant by it."""
    config, about = dict(part.config), part.about
    version = about.get("version")
    if version is None and isinstance(config.get("non_linearity"), str):
        config["non_linearity"] = OLD_ACTIVATIONS.get(
            config["non_linearity"], config["non_linearity"]
        )
    if isinstance(version, str) and version.startswith("adapters."):
        numbers = [int(n) for n in version.removeprefix("adapters.").split(".")[:2] if n.isdigit()]
        if config.get("architecture") == "lora" and tuple(numbers) < MENDED and "r" in config:
            config["alpha"] = config["r"]
    inverse = any("invertible" in name for name in part.tensors)
    if about.get("type") == "text_task" and not inverse:  # it named one and had none
        config |= {"inv_adapter": None, "inv_adapter_reduction_factor": None}
        config.pop("invertible_adapter", None)
    return config


def _leaving_out(method: MethodConfig, layers: Sequence[int]) -> MethodConfig:
    if isinstance(method, UnionConfig):
        return replace(method, configs=tuple(_leaving_out(m, layers) for m in method.configs))
    return replace(method, leave_out=tuple(sorted({*method.leave_out, *layers})))


# ---- the table of an adapter on a model


def family_of(model: AdapterModel) -> HubFamily:
    """The names of a model's family."""
    return FAMILIES[model_type_of(form_of(model))]


def sites_of(model: AdapterModel) -> dict[str, Site]:
    return {path: slot.site for path, slot in slots_of(model).items()}


def _table(
    model: AdapterModel, method: MethodConfig, name: str, where: str
) -> tuple[HubTable, dict[str, torch.Size]]:
    """The table of an adapter that is not made yet, and the shapes of its parameters."""
    try:
        shapes = shapes_of(model, method)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{where}: it cannot be made on this model: {said}") from None
    return table_of(model, method, name, shapes), shapes


def table_of(
    model: AdapterModel, method: MethodConfig, name: str, keys: Mapping[str, Any]
) -> HubTable:
    """The table of an adapter whose parameters are called `keys`."""
    return hub_table(family_of(model), sites_of(model), keys, name, shared_names(method))


def shared_names(method: MethodConfig) -> dict[str, str]:
    """What parameters are called that the library holds once for the whole model."""
    made: dict[str, str] = {}
    for each in method.configs if isinstance(method, UnionConfig) else (method,):
        if isinstance(each, HubLoRAConfig) and each.vera:
            made |= {f"shared.{leaf}": leaf for leaf in ("lora_A", "lora_B")}
        if not isinstance(each, BnConfig) or not each.phm_layer:
            continue
        down = f"adapter_down.{int(each.ln_before)}"
        if each.shared_phm_rule:
            rules = ("phm_rule", "phm_rule_left", "phm_rule_right")
            made |= {f"{module}.{rule}": rule for module in (down, "adapter_up") for rule in rules}
        if each.shared_W_phm:
            for module, side in ((down, "down"), ("adapter_up", "up")):
                made |= {f"{module}.W{end}": f"W_{side}{end}" for end in ("", "_left", "_right")}
    return made


def cut(
    table: HubTable, tensors: Mapping[str, Tensor], shapes: Mapping[str, Any], what: str
) -> dict[str, Tensor]:
    """Our parameters of a file's tensors, if they are those that ours come to.

    Raises:
        UserError: naming what is missing, unknown, of another shape, or two for one.
    """
    with torch.device("meta"):
        wanted = {key: torch.empty(shape) for key, shape in shapes.items()}
    asked = table.join(wanted)
    mistakes = [f"missing {name}" for name in table.entries if name not in tensors]
    mistakes += [f"unknown {name}" for name in tensors if name not in asked]
    mistakes += [
        f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in asked.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if not mistakes:
        mistakes = [
            f"{copy} is not what {name} is"
            for copy, name in table.copies.items()
            if copy in tensors and not same(tensors[copy], tensors[name])
        ]
    if mistakes:
        more = f"; and {len(mistakes) - 3} more" if len(mistakes) > 3 else ""
        if all(mistake.startswith("missing shared_parameters.") for mistake in mistakes):
            more += " (the library leaves these out for a T5 without its own heads: save the "
            more += "adapter from a T5AdapterModel)"
        raise UserError(f"{what} do not fit this model: {'; '.join(sorted(mistakes)[:3])}{more}")
    return table.cut(tensors, shapes)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    return one is other or torch.equal(one, other)


def without_root(family: HubFamily, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under names without the root, and without what older files have in them."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for root in (family.root, *family.others.values()):
            name = name.removeprefix(root)
        words = name.split(".")
        made[".".join(OLD_NAMES.get(word, word) for word in words)] = tensor
    return made


def check_model(model: AdapterModel, part: HubPart, path: str | Path) -> None:
    """Raises a `UserError` where a file says that it is made for another kind or size of model."""
    form = form_of(model)
    kind, size = part.about.get("model_type"), part.about.get("hidden_size")
    ours = model_type_of(form)
    kind = ALIKE.get(kind, kind) if isinstance(kind, str) else None
    same_names = kind is None or FAMILIES.get(kind) is FAMILIES[ours]
    if not same_names:
        raise UserError(f"{path}: {part.name!r} is made for a {kind}, and this model is a {ours}")
    if isinstance(size, int) and size != form.hidden_size:
        raise UserError(
            f"{path}: {part.name!r} is made for hidden_size {size}, and this model has "
            f"{form.hidden_size}"
        )
