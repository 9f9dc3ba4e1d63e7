"""Adapters written in NeMo's container: with NeMo's names where NeMo can say it, else with ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwerk.adapters.configs import SCHEMES, SPELLINGS, LoRAConfig, MethodConfig, PTuningConfig
from graftwerk.adapters.methods.lora import GROUPS, NEMO
from graftwerk.adapters.methods.prompt import PTuning
from graftwerk.adapters.model import AdapterModel
from graftwerk.checkpoints.adapter_form import (
    FORMAT,
    SavedAdapter,
    SavedFusion,
    joined,
    settings_of,
)
from graftwerk.checkpoints.adapter_names import PROMPT, to_nemo
from graftwerk.checkpoints.nemo import write_container
from graftwerk.checkpoints.nemo_config import Layout, Variant, from_config, to_config
from graftwerk.checkpoints.nemo_tables import nemo_table
from graftwerk.checkpoints.torch_writer import TorchWriter
from graftwerk.errors import UserError
from graftwerk.models.config import TransformerConfig

# The settings that NeMo has, by scheme. Others must be as they are by default.
SAYABLE = {
    "adapter": (
        "type", "dim", "dropout", "norm_position", "norm_type", "column_init_method",
        "row_init_method", "layer_selection", "weight_tying", "position_embedding_strategy",
    ),
    "ia3": ("layer_selection",),
    "lora": (
        "target_modules", "dim", "alpha", "dropout", "dropout_position", "variant",
        "column_init_method", "row_init_method", "layer_selection", "weight_tying",
        "position_embedding_strategy",
    ),
    "ptuning": ("virtual_tokens", "bottleneck_dim", "embedding_dim", "init_std"),
    "selective": ("parameters",),
}  # fmt: skip


@dataclass
class Said:
    """What a container holds; `aliases` are second names of tensors."""

    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


class _NotSaid(Exception):
    """NeMo has no words for something of these adapters, which it names."""


def write_nemo_adapters(
    path: Path,
    model: AdapterModel,
    saved: Sequence[SavedAdapter],
    extra: Mapping[str, Any],
    fusions: Sequence[SavedFusion] = (),
    strict: bool = False,
) -> None:
    """Writes adapters and fusions of a model as a `.nemo` file.

    Raises:
        UserError: where it is to be `strict`, for what NeMo has no words for.
    """
    try:
        if fusions:
            raise _NotSaid(f"the fusion {fusions[0].name}")
        said = _in_nemo_words(model, saved, extra)
        said.values[FORMAT] = {"adapters": [settings_of(adapter) for adapter in saved], **extra}
    except _NotSaid as reason:
        if strict:
            raise UserError(f"NeMo has no words for {reason}") from None
        said = Said(*joined(saved, extra, fusions))

    def put(writer: TorchWriter) -> None:
        writer.add_all(said.tensors)
        for name, of in said.aliases.items():
            writer.alias(name, of)

    write_container(path, said.values, {}, put)


def _in_nemo_words(
    model: AdapterModel, saved: Sequence[SavedAdapter], extra: Mapping[str, Any]
) -> Said:
    config: Any = getattr(model, "config", None)
    variant, values = _architecture(config)
    said = Said(values)
    schemes = {method.__name__: scheme for scheme, (method, _) in reversed(SCHEMES.items())}
    peft: dict[str, Any] = {"peft_scheme": ""}
    for adapter in saved:
        kind, method = adapter.config["method"], model.adapters[adapter.name]
        scheme = schemes.get(kind, "")
        if scheme not in SAYABLE:
            raise _NotSaid(f"{kind} (adapter {adapter.name!r})")
        block = SCHEMES[scheme][1]
        if block in peft:
            raise _NotSaid(f"two adapters of one method ({kind})")
        if "head" in adapter.config:
            raise _NotSaid(f"the head of adapter {adapter.name!r}")
        peft["peft_scheme"] += f",{scheme}" if peft["peft_scheme"] else scheme
        peft[block] = _block(scheme, method, variant)
        if scheme == "selective":
            modules = _add_parameters(said, adapter, config, variant)
            peft[block]["tunable_base_param_names"] = modules
        else:
            _add_parts(said, model, adapter, method, variant)
    values["peft"] = peft
    if isinstance(extra.get("base"), str):
        values["restore_from_path"] = extra["base"]
    return said


def _architecture(config: TransformerConfig) -> tuple[Variant, dict[str, Any]]:
    """The names that NeMo has for a base, and its keys; newer names come first."""
    names: dict[Variant, bool] = {"mcore": True, "classic": False}
    reason = ""
    if config.architecture == "t5":
        names = {"t5": False}
    for variant, mcore in names.items():
        try:
            return variant, from_config(config, mcore)
        except UserError as error:
            reason = f"this model: {error}"
    raise _NotSaid(reason)


def _block(scheme: str, method: MethodConfig, variant: Variant) -> dict[str, Any]:
    """A method's settings under NeMo's keys."""
    block: dict[str, Any] = {}
    for each in fields(method):
        value = getattr(method, each.name)
        if each.name in SAYABLE[scheme]:
            value = list(value) if isinstance(value, tuple) else value
            block[SPELLINGS.get(each.name, each.name)] = value
        elif value != each.default and each.name != "rank_stabilised":  # part of alpha, below
            raise _NotSaid(f"{each.name}={value!r} of {type(method).__name__}")
    if isinstance(method, LoRAConfig):
        if not {*NEMO, *GROUPS}.issuperset(method.target_modules):
            raise _NotSaid(f"LoRA at {', '.join(method.target_modules)} alone")
        block["alpha"] = method.scale * method.dim
    for key in ("column_init_method", "row_init_method"):
        if block.get(key) == "uniform":  # the same numbers
            block[key] = "kaiming"
    if method.position_embedding_strategy is not None:
        raise _NotSaid("the tables of position_embedding_strategy")
    if variant == "t5" and (method.layer_selection is not None or method.weight_tying):
        raise _NotSaid("layer_selection and weight_tying on a T5")  # it has both for a GPT only
    return block


def _add_parts(
    said: Said, model: AdapterModel, adapter: SavedAdapter, method: MethodConfig, variant: Variant
) -> None:
    for key, tensor in adapter.state.items():
        said.tensors[_name(key, method, model, variant)] = tensor
    if method.weight_tying:  # NeMo keeps the copies that share a tensor too
        first: dict[int, str] = {}
        for path, _, part in model.parts(adapter.name):
            for leaf, value in part.state_dict(keep_vars=True).items():
                name = _name(f"{path}.{leaf}", method, model, variant)
                if (owner := first.setdefault(id(value), name)) != name:
                    said.aliases[name] = owner
    if isinstance(method, PTuningConfig):
        part = next(part for _, _, part in model.parts(adapter.name))
        assert isinstance(part, PTuning)
        table = to_nemo(f"{PROMPT}inference_table", variant)
        said.tensors[str(table)] = part.vectors().detach()


def _name(key: str, method: MethodConfig, model: AdapterModel, variant: Variant) -> str:
    name, config = to_nemo(key, variant), getattr(model, "config")  # noqa: B009 - every model's
    if name is None:
        raise _NotSaid(f"an adapter at {key}")
    if isinstance(method, LoRAConfig):
        # Its classic layers have no LoRA apart, and gate and up are two where they are not fused.
        fc1, apart = ".mlp.fc1." in key, method.variant == "canonical"
        if apart and (variant != "mcore" or fc1):
            raise _NotSaid(f"LoRA with a part of its own at {key}")
        if fc1 and variant == "t5" and config.gated:
            raise _NotSaid(f"LoRA on the first projection of a gated T5's MLP, {key}")
    return name


def _add_parameters(
    said: Said, adapter: SavedAdapter, config: TransformerConfig, variant: Variant
) -> list[str]:
    """Parameters of the base under NeMo's names; the modules that they are all parameters of."""
    layout = Layout(variant, config.vocab_size)
    _, layout = to_config(said.values, Path("model_config.yaml"), layout, config.vocab_size)
    table = nemo_table(config, layout)
    written: dict[str, Tensor] = {}
    for key, tensor in adapter.state.items():
        if key not in table:
            raise _NotSaid(f"the parameter {key}")
        entry = table[key]
        written |= zip(entry.names, entry.reshape.split(tensor), strict=True)
    modules = {name.rpartition(".")[0] for name in written}
    all_of_them = {
        name for entry in table.values() for name in entry.names
        if name.rpartition(".")[0] in modules
    }  # fmt: skip
    if lost := sorted(all_of_them - written.keys()):  # NeMo names modules, never a parameter
        raise _NotSaid(f"a part of a module: {lost[0]} is not tuned with the rest of it")
    said.tensors |= written
    return sorted(module.partition(".")[2] for module in modules)
