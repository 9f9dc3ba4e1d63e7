"""Where AdapterHub's files keep what an adapter has, by model family.

A family is a table: for each stack of layers the module that stands for a slot of ours. What hangs
on the module follows from the slot: `.adapters.A.` behind a sublayer, `.loras.A.` at a projection,
`.prefix_tuning.` before an attention, `reft_layer.refts.A.` behind a layer. Slots that share a
module (GPT-2's queries, keys and values) share its tensors, one behind the other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import Site
from graftwerk.checkpoints.huggingface import family_of
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

SUBLAYERS = ("attention_output", "cross_attention_output", "mlp_output")
PREFIXES = ("prefix", "cross_prefix")
# What a prefix's parameters are called there; those of its gate lie elsewhere.
PREFIX_LEAVES = {
    "encoder.embedding": "wte.weight",
    "encoder.linear_in.weight": "control_trans.0.weight",
    "encoder.linear_in.bias": "control_trans.0.bias",
    "linear_out.weight": "control_trans.2.weight",
    "linear_out.bias": "control_trans.2.bias",
    "rows": "control_trans",
}
FLAT = "control_trans"  # one row behind the other, in one dimension
PROMPT_LEAVES = ("embedding",)
# How files that are older than `adapters` 1.0 call the modules.
OLD_NAMES = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}


@dataclass(frozen=True)
class HubFamily:
    """The names of one family.

    Args:
        root: what stands before the names where the model has a head.
        rootless: whether only `...AdapterModel` has that root.
        layers: a layer of each stack, with `{}` for its number there.
        modules: of each stack: the module within a layer that stands for a slot.
        prefixes: the kind of prefix of each (stack, slot).
        words: what holds the invertible adapter.
        classes: class names without a head, whose files have no root.
        others: the roots of classes that have another.
    """

    root: str
    layers: Mapping[str, str]
    modules: Mapping[str, Mapping[str, str]]
    prefixes: Mapping[tuple[str, str], str]
    classes: tuple[str, ...]
    rootless: bool = False
    words: str = ""
    others: Mapping[str, str] = field(default_factory=dict)

    def root_of(self, model_class: str) -> str:
        """What stands before the names in a file of this class of models."""
        if model_class in self.classes:
            return ""
        if model_class in self.others:
            return self.others[model_class]
        flexible = model_class.endswith(("AdapterModel", "ModelWithHeads"))
        return "" if self.rootless and not flexible else self.root


def _attention(modules: str, *names: str, cross: str = "") -> dict[str, str]:
    """The modules of queries, keys and values, by a text with `{}` for the name of each."""
    slots = (f"{cross}query", f"{cross}key", f"{cross}value")
    return {slot: modules.format(name) for slot, name in zip(slots, names, strict=True)}


GPT2 = HubFamily(
    root="transformer.",
    layers={"decoder": "h.{}."},
    modules={
        "decoder": {
            "attention_output": "attention_adapters",
            "mlp_output": "output_adapters",
            **_attention("attn.c_{}", "attn", "attn", "attn"),
            "prefix": "attn",
            "fc1": "mlp.c_fc",
            "fc2": "mlp.c_proj",
        }
    },
    prefixes={("decoder", "prefix"): "self_prefix"},
    classes=("GPT2Model",),
)
LLAMA = HubFamily(
    root="model.",
    layers={"decoder": "layers.{}."},
    modules={
        "decoder": {
            "attention_output": "attention_adapters",
            "mlp_output": "output_adapters",
            **_attention("self_attn.{}_proj", *"qkv"),
            "prefix": "self_attn",
            "up": "mlp.up_proj",
            "fc2": "mlp.down_proj",
        }
    },
    prefixes={("decoder", "prefix"): "self_prefix"},
    classes=("LlamaModel", "MistralModel"),
    others={"LlamaForQuestionAnswering": "transformer."},
)
BERT = HubFamily(
    root="bert.",
    layers={"encoder": "encoder.layer.{}."},
    modules={
        "encoder": {
            "attention_output": "attention.output",
            "mlp_output": "output",
            **_attention("attention.self.{}", "query", "key", "value"),
            "prefix": "attention.self",
            "fc1": "intermediate.dense",
            "fc2": "output.dense",
        }
    },
    prefixes={("encoder", "prefix"): "self_prefix"},
    classes=("BertModel",),
)
ROBERTA = replace(BERT, root="roberta.", classes=("RobertaModel", "XLMRobertaModel"))
T5 = HubFamily(
    root="transformer.",
    rootless=True,
    layers={"encoder": "encoder.block.{}.", "decoder": "decoder.block.{}."},
    modules={
        "encoder": {
            "attention_output": "layer.0",
            "mlp_output": "layer.1",
            **_attention("layer.0.SelfAttention.{}", *"qkv"),
            "prefix": "layer.0.SelfAttention",
            "fc1": "layer.1.DenseReluDense.wi",
            "up": "layer.1.DenseReluDense.wi_1",
            "fc2": "layer.1.DenseReluDense.wo",
        },
        "decoder": {
            "attention_output": "layer.0",
            "cross_attention_output": "layer.1",
            "mlp_output": "layer.2",
            **_attention("layer.0.SelfAttention.{}", *"qkv"),
            **_attention("layer.1.EncDecAttention.{}", *"qkv", cross="cross_"),
            "prefix": "layer.0.SelfAttention",
            "cross_prefix": "layer.1.EncDecAttention",
            "fc1": "layer.2.DenseReluDense.wi",
            "up": "layer.2.DenseReluDense.wi_1",
            "fc2": "layer.2.DenseReluDense.wo",
        },
    },
    prefixes={
        ("encoder", "prefix"): "encoder_prefix",
        ("decoder", "prefix"): "self_prefix",
        ("decoder", "cross_prefix"): "cross_prefix",
    },
    classes=("T5Model", "MT5Model"),
    words="encoder.",
)
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "t5": T5,
    "mt5": T5,
    "bert": BERT,
    "roberta": ROBERTA,
}
ALIKE = {"xlm-roberta": "roberta"}  # the same model under another name


def form_of(model: AdapterModel) -> TransformerConfig:
    """The shape of a model."""
    config = getattr(model, "config", None)
    assert isinstance(config, TransformerConfig), "every model of ours has one"
    return config


def model_type_of(config: TransformerConfig) -> str:
    """AdapterHub's name of the family of a model.

    Raises:
        UserError: for a model that its files have no names for.
    """
    kind = family_of(replace(config, head=None, num_labels=0)).model_type
    if kind not in FAMILIES:
        raise UserError(f"AdapterHub's files have no names for a {kind}: {', '.join(FAMILIES)}")
    return kind


# ---- the table of one adapter


@dataclass(frozen=True)
class Joined:
    """One tensor of a file: parameters of ours behind each other along a dimension."""

    keys: tuple[str, ...]
    flat: bool = False

    def join(self, state: Mapping[str, Tensor]) -> Tensor:
        """The file's tensor."""
        parts = [state[key] for key in self.keys]
        if self.flat:
            return torch.cat(parts, 1).flatten()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def cut(self, tensor: Tensor, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Our parameters of the file's tensor, as views; `shapes` are ours."""
        sizes = [shapes[key] for key in self.keys]
        if self.flat:
            tensor = tensor.view(sizes[0][0], -1)
        dim = 1 if self.flat else 0
        if len(sizes) == 1 and not self.flat:
            return {self.keys[0]: tensor}
        return dict(zip(self.keys, tensor.split([s[dim] for s in sizes], dim), strict=True))


@dataclass
class HubTable:
    """Which parameters of ours make which tensor of a file, both ways.

    `copies`: names under which a tensor is in the file once more.
    """

    entries: dict[str, Joined] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def join(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors of ours; copies are the same object."""
        made = {name: entry.join(state) for name, entry in self.entries.items()}
        return made | {copy: made[name] for copy, name in self.copies.items()}

    def cut(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Our parameters of a file's tensors, whose shapes are those that ours come to."""
        state: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            state |= entry.cut(tensors[name], shapes)
        return state


def hub_table(
    family: HubFamily,
    sites: Mapping[str, Site],
    keys: Iterable[str],
    adapter: str,
    shared: Mapping[str, str],
) -> HubTable:
    """The table of an adapter, without the family's root.

    Args:
        sites: every slot of the model by its path, in the order of the forward pass.
        keys: our parameters, as `AdapterModel.adapter_state` names them.
        adapter: the adapter's name in the file.
        shared: what parameters are called that all parts share and the file has once.

    Raises:
        UserError: for a parameter that the files have no name for.
    """
    namer = _Namer(family, first_layers(sites), adapter, shared)
    groups: dict[str, list[str]] = {}
    for key in keys:
        path, leaf = split_key(key, sites)
        groups.setdefault(namer.name(sites[path], leaf), []).append(key)
    for name, group in groups.items():
        if len(group) > 1 and "shared_parameters." in name:
            raise UserError(f"AdapterHub's files hold one {name}, and here there are {len(group)}")
    table = HubTable({name: Joined(tuple(g), name.endswith(FLAT)) for name, g in groups.items()})
    for name in groups:  # the norm before a bottleneck is the first of its layers too
        module, found, leaf = name.rpartition("adapter_norm_before.")
        if found:
            table.copies[f"{module}adapter_down.0.{leaf}"] = name
    base = f"prefix_tuning.prefix_tunings.{adapter}."
    for name in [name for name in groups if name.startswith(base)]:
        for site in sites.values():  # every attention holds all prefixes, whether it has one or not
            if site.name in PREFIXES:
                copy = f"{namer.module(site)}prefix_tuning.pool.{name.partition('.')[2]}"
                table.copies[copy] = name
    return table


def fusion_table(
    family: HubFamily, sites: Mapping[str, Site], keys: Iterable[str], fusion: str
) -> HubTable:
    """The table of a fusion, without the family's root; arguments as in `hub_table`."""
    namer = _Namer(family, first_layers(sites), fusion, {})
    table = HubTable()
    for key in keys:
        path, leaf = split_key(key, sites)
        if leaf == "temperature":
            continue  # AdapterHub keeps it in no file
        table.entries[f"{namer.module(sites[path])}adapter_fusion_layer.{fusion}.{leaf}"] = Joined(
            (key,)
        )
    return table


def split_key(key: str, sites: Mapping[str, Site]) -> tuple[str, str]:
    """`<slot path>.<parameter>` apart.

    Raises:
        UserError: for a parameter that lies in no slot.
    """
    words = key.split(".")
    for end in range(len(words) - 1, 0, -1):
        path = ".".join(words[:end])
        if path in sites:
            return path, ".".join(words[end:])
    raise UserError(f"AdapterHub's files cannot hold {key}: only what adapters have in slots")


def first_layers(sites: Mapping[str, Site]) -> dict[str, int]:
    """The number of the first layer of each stack."""
    first: dict[str, int] = {}
    for site in sites.values():
        if site.layer >= 0:
            first[site.stack] = min(site.layer, first.get(site.stack, site.layer))
    return first


@dataclass(frozen=True)
class _Namer:
    family: HubFamily
    first: Mapping[str, int]
    adapter: str
    shared: Mapping[str, str]

    def name(self, site: Site, leaf: str) -> str:
        """What a parameter of a part at a site is called."""
        adapter = self.adapter
        if leaf in self.shared:
            return f"shared_parameters.{adapter}.{self.shared[leaf]}"
        if site.layer < 0 or site.name == "lm_input":
            if leaf in PROMPT_LEAVES:
                return f"prompt_tuning.prompt_tunings.{adapter}.prompt_embedding.weight"
            return f"{self.family.words}invertible_adapters.{adapter}.{leaf}"
        if site.name == "layer_output":
            return f"{self._layer(site)}reft_layer.refts.{adapter}.{leaf}"
        if site.name in PREFIXES:
            if leaf in PREFIX_LEAVES:
                kind = self.family.prefixes[site.stack, site.name]
                leaf = PREFIX_LEAVES[leaf]
                return f"prefix_tuning.prefix_tunings.{adapter}.{kind}.{leaf}"
            return f"{self.module(site)}prefix_tuning.prefix_gates.{adapter}.{leaf[5:]}"
        group = "adapters" if site.name in SUBLAYERS else "loras"
        return f"{self.module(site)}{group}.{adapter}.{leaf}"

    def _layer(self, site: Site) -> str:
        return self.family.layers[site.stack].format(site.layer - self.first[site.stack])

    def module(self, site: Site) -> str:
        """The module that stands for a slot, with a point behind."""
        module = self.family.modules[site.stack].get(site.name)
        if module is None:
            raise UserError(f"AdapterHub's files have no name for a part in the slot {site.name}")
        return f"{self._layer(site)}{module}."
