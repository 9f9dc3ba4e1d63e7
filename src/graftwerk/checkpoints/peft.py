"""Adapter folders of Hugging Face's peft: `adapter_config.json` with `peft_type`, and weights.

Where an adapter lies is told by the names of its weights. The settings are asked for what changes
numbers; a setting that we do not know must be off.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graftwerk.adapters.configs import (
    IA3Config,
    LoRAConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    settings_of,
)
from graftwerk.adapters.methods.hub_lora import HubLoRAConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.adapter_form import AdapterFile, SavedAdapter
from graftwerk.checkpoints.adapterhub_files import read_json
from graftwerk.checkpoints.base import cast, replace_path
from graftwerk.checkpoints.peft_lora import (
    LEAVES,
    Weights,
    methods_in,
    read_ia3,
    read_lora,
    union_of,
    write_ia3,
    write_lora,
)
from graftwerk.checkpoints.peft_modules import (
    PREFIX,
    Modules,
    config_of,
    modules_for,
    modules_of,
    usable_name,
)
from graftwerk.checkpoints.peft_prompts import (
    PROMPTS,
    TENSOR,
    prompt_settings,
    read_prompt,
    write_prompt,
)
from graftwerk.checkpoints.tensors import SafeTensors, TensorSource
from graftwerk.checkpoints.torch_files import TorchFiles
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BARE_PREFIX = "base_model."  # of modules beside a prompt
TYPES = ("LORA", "IA3", *PROMPTS)
# Settings that change no number of a trained adapter, or that the reader of the type asks for.
# Any other that is neither absent nor off may change what is computed.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
    "alpha_pattern", "bias", "lora_alpha", "r", "rank_pattern", "use_dora", "use_rslora",
    "encoder_dropout", "encoder_hidden_size", "encoder_num_layers",
    "encoder_reparameterization_type", "init_weights", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "num_virtual_tokens", "prefix_projection",
    "prompt_tuning_init", "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs",
    "tokenizer_name_or_path",
}  # fmt: skip
TASKS = {"gpt": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
HEADS = {
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "tagging",
    "QUESTION_ANS": "question_answering",
    "FEATURE_EXTRACTION": None,
}


# ---- reading


def is_peft(folder: Path) -> bool:
    """Whether a folder is one of peft's. AdapterHub's has a file of the same name."""
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def read_peft(folder: Path) -> AdapterFile:
    """The adapter of a folder; `AdapterFile.on` gives it under our names.

    Raises:
        UserError: where it is damaged, or of a kind that we do not have.
    """
    path = folder / CONFIG
    settings = read_json(path)
    kind = settings.get("peft_type")
    if kind not in TYPES:
        raise UserError(f"{path}: peft_type={kind!r} is not known: one of {', '.join(TYPES)}")
    check_settings(settings, path)
    source = open_weights(folder)
    with source:
        tensors = {name: source.read(name).clone() for name in sorted(source.names)}
    name = usable_name(folder.resolve().name)
    base = settings.get("base_model_name_or_path")
    head = HEADS.get(str(settings.get("task_type"))) if settings.get("modules_to_save") else None
    beside = {} if head is None else {"head": head}
    if kind in PROMPTS:
        rough = prompt_settings(settings, path)
    else:
        rough = {"method": (IA3Config if kind == "IA3" else LoRAConfig).__name__}

    def fit(model: AdapterModel) -> list[SavedAdapter]:
        method, state = _fitted(model, folder, settings, tensors, head)
        return [SavedAdapter(name, {**settings_of(method), **beside}, state)]

    extra = {} if base is None else {"base": base}
    return AdapterFile([SavedAdapter(name, {**rough, **beside}, tensors)], extra, fit)


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raises a UserError for a setting that may change numbers in a way that we do not know."""
    off = (None, False, "", {}, [])
    for key, value in settings.items():
        if key not in HARMLESS and value not in off:
            raise UserError(f"{path}: {key}={value!r} is not supported: only null or False is")


def open_weights(folder: Path) -> TensorSource:
    """The weights of a folder of peft's.

    Raises:
        UserError: where there are none, or they are damaged.
    """
    if (folder / WEIGHTS).is_file():
        return SafeTensors([folder / WEIGHTS])
    if (folder / PICKLED).is_file():
        return TorchFiles([folder / PICKLED])
    raise UserError(f"{folder}: there are no weights: {WEIGHTS} or {PICKLED} is missing")


def _fitted(
    model: AdapterModel,
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    head: str | None,
) -> tuple[MethodConfig, dict[str, Tensor]]:
    prompt = settings["peft_type"] in PROMPTS
    own = {key: tensor for key, tensor in tensors.items() if not (prompt and key == TENSOR)}
    weights, whole = _sorted(own, BARE_PREFIX if prompt else PREFIX)
    modules = modules_for(model, [*weights, *whole], folder)
    if prompt:
        if weights:
            raise UserError(f"{folder}: {min(weights)} is not read beside a prompt")
        method, state = read_prompt(model, settings, tensors, folder)
        methods = [method]
    elif settings["peft_type"] == "IA3":
        methods, state = read_ia3(modules, weights, folder)
    else:
        methods, state = read_lora(modules, settings, weights, folder)
    copies, kept = _copies(modules, whole, head, folder)
    methods += [SelectiveConfig(parameters=tuple(copies))] if copies else []
    if not methods:
        raise UserError(f"{folder}: it holds no weights of an adapter")
    return union_of(methods), {**state, **copies, **kept}


def _sorted(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Weights, Weights]:
    """Weights of the adapter, and of whole modules (`modules_to_save`), by module and leaf."""
    adapter: Weights = {}
    whole: Weights = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        leaf = next((leaf for leaf in LEAVES if name.endswith(f".{leaf}")), None)
        if leaf is not None:
            adapter.setdefault(name.removesuffix(f".{leaf}"), {})[leaf] = tensor
        else:
            module, _, leaf = name.replace(".modules_to_save.", ".").rpartition(".")
            whole.setdefault(module, {})[leaf] = tensor
    return adapter, whole


def _copies(
    modules: Modules, whole: Weights, head: str | None, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By our names, parameters of the base that were trained too, and those of a label head."""
    given = {modules.full(name): leaves for name, leaves in whole.items()}
    copies: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for ours, entry in modules.parameters(whole).items():
        parts: list[Tensor] = []
        for name in entry.names:
            module, _, leaf = name.rpartition(".")
            if leaf not in given.get(module, {}):
                raise UserError(f"{folder}: {module} has no {leaf}")
            parts.append(given[module][leaf])
        tensor = entry.reshape.join(entry.reshape.parts(parts))
        labels = head is not None and ours.startswith("head.")
        (kept if labels else copies)[ours] = tensor
    return copies, kept


# ---- writing


def save_peft(
    model: AdapterModel,
    name: str,
    path: str | Path,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an adapter as peft reads it; beside the path first, renamed when it is whole.

    Args:
        base: what `base_model_name_or_path` says.
        dtype: of the written weights; None: as they are.

    Raises:
        UserError: for what peft cannot say, before anything is written.
    """
    settings, tensors = peft_form(model, name, path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        written = {key: cast(tensor, dtype).contiguous() for key, tensor in tensors.items()}
        save_file(written, partial / WEIGHTS, metadata={"format": "pt"})
        told = {"base_model_name_or_path": base, "inference_mode": True, **settings}
        (partial / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        replace_path(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def peft_form(
    model: AdapterModel, name: str, path: str | Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What peft's folder of an adapter holds: settings and weights.

    Raises:
        UserError: for what peft cannot say.
    """
    where = f"{path}: adapter {name!r}"
    method, parts = model.adapters[name], {slot: part for slot, _, part in model.parts(name)}
    methods = [one for one in methods_in(method) if not isinstance(one, SelectiveConfig)]
    kinds = {_kind(one) for one in methods}
    if len(kinds) != 1 or None in kinds:
        said = " and ".join(type(one).__name__ for one in methods_in(method))
        raise UserError(f"{where}: peft has no adapter that is a {said}")
    if kinds == {"prompt"}:
        if len(methods) > 1:
            raise UserError(f"{where}: peft has one prompt in an adapter, not {len(methods)}")
        settings, tensors = write_prompt(model, methods[0], parts, where)
        modules = None
    else:
        modules = modules_of(model)
        if kinds == {"ia3"}:
            settings, tensors = write_ia3(modules, parts, where)
        else:
            settings, tensors = write_lora(modules, parts, method, where)
    whole = {key: p.detach().cpu() for key, p in model.replacements.of(name).items()}
    head = model.head_of(name)
    if head is not None:
        whole |= {key: value.detach().cpu() for key, value in head.state_dict().items()}
    if whole:
        prefix = BARE_PREFIX if modules is None else PREFIX
        names, kept = _whole_modules(modules or modules_of(model), whole, prefix)
        settings, tensors = settings | {"modules_to_save": names}, tensors | kept
    bare = config_of(model).architecture == "bert" and config_of(model).head is None
    if modules is not None and bare:
        settings, tensors = _without_root(modules.family.root, settings, tensors)
    return settings | {"task_type": _task(config_of(model))}, tensors


def _kind(method: MethodConfig) -> str | None:
    """Which of peft's adapters a method is; None: it has none such."""
    if isinstance(method, LoRAConfig):
        return "lora"
    if isinstance(method, HubLoRAConfig):
        return "ia3" if method.composition_mode == "scale" else "lora"
    if isinstance(method, IA3Config):
        return "ia3"
    prompts = (PromptTuningConfig, PTuningConfig, PrefixTuningConfig)
    return "prompt" if isinstance(method, prompts) else None


def _task(config: TransformerConfig) -> str | None:
    """peft's `task_type` of a model; a model for masked words has none."""
    if config.architecture in TASKS:
        return TASKS[config.architecture]
    return next((task for task, head in HEADS.items() if head == config.head), None)


def _whole_modules(
    modules: Modules, whole: Mapping[str, Tensor], prefix: str
) -> tuple[list[str], dict[str, Tensor]]:
    """Modules that are saved whole, and their weights, those that stayed the base's too."""
    base = dict(modules.model.base_parameters())
    names = {
        module
        for ours in whole
        for theirs in modules.table[ours].names
        for module in [theirs.rpartition(".")[0]]
    }
    # The heads that peft saves whole by itself.
    names = {name.partition(".")[0] if name.startswith("classifier.") else name for name in names}
    tensors: dict[str, Tensor] = {}
    for ours, entry in modules.table.items():
        if any(theirs.startswith(f"{name}.") for theirs in entry.names for name in names):
            value = whole.get(ours)
            value = base[_own_head(ours, base)].detach().cpu() if value is None else value
            for theirs, part in zip(entry.names, entry.reshape.split(value), strict=True):
                if any(theirs.startswith(f"{name}.") for name in names):
                    tensors[f"{prefix}{theirs}"] = part.contiguous()
    return sorted(names), tensors


def _own_head(name: str, base: Mapping[str, Tensor]) -> str:
    return name if name in base else name.replace("head.", "head.own.", 1)


def _without_root(
    root: str, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Names as the bare model has them."""
    start, literal = f"{PREFIX}{root}.", re.escape(f"{root}.")
    bare = {
        f"{PREFIX}{key.removeprefix(start)}" if key.startswith(start) else key: tensor
        for key, tensor in tensors.items()
    }
    for key in ("rank_pattern", "alpha_pattern"):
        if key in settings:
            settings[key] = {name.removeprefix(literal): n for name, n in settings[key].items()}
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        if key in settings:
            settings[key] = [name.removeprefix(f"{root}.") for name in settings[key]]
    return settings, bare
