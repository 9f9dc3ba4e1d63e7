"""The modules of a `transformers` model that adapters of peft lie at, and our slots there.

Both follow from the table by which the model's family is read: a module of theirs is one of our
projections, or some rows of one.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import Rows, Site, slots_of
from graftwerk.checkpoints.families import FAMILIES, Family
from graftwerk.checkpoints.huggingface import family_of
from graftwerk.checkpoints.layout import Entry, Heads, Transposed
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

PREFIX = "base_model.model."
# Of each projection of ours the slot behind all of its rows, and those behind the rows of each
# module, where it joins several.
SLOTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear_qkv": ("qkv", ("query", "key", "value")),
    "linear_q": ("query", ()),
    "linear_kv": ("", ("key", "value")),
    "linear_proj": ("output", ()),
    "linear_fc1": ("fc1", ("gate", "up")),
    "linear_fc2": ("fc2", ()),
}


@dataclass(frozen=True)
class Module:
    """A linear layer of theirs: the projection of ours that holds it, and the slot behind it.

    `index` is its place among the modules of `entry`, which the projection joins.
    """

    name: str
    linear: str
    slot: str
    entry: Entry
    index: int

    @property
    def owner(self) -> str:
        """The sublayer of ours, such as `decoder.layers.0.mlp`."""
        return self.linear.rpartition(".")[0]

    @property
    def conv(self) -> bool:
        """Whether their weight is [in, out], as that of GPT-2's Conv1D."""
        return is_conv(self.entry)

    def ours(self, rows: Tensor) -> Tensor:
        """A tensor [out, ...] of their output's features in the order of the slot's."""
        if len(self.entry.names) > 1:
            return rows
        turned = rows.t() if self.conv and rows.ndim > 1 else rows
        return self.entry.reshape.join(self.entry.reshape.parts([turned]))


def is_conv(entry: Entry) -> bool:
    """Whether the file's weight is [in, out]."""
    how = entry.reshape
    return isinstance(how, Transposed) or (isinstance(how, Heads) and how.transposed)


class Modules:
    """The modules of a model as one family of `transformers` names them.

    `named` are all modules with weights, `linear` those that adapters can lie at.
    """

    def __init__(self, family: Family, model: AdapterModel):
        self.family, self.model = family, model
        self.config = config_of(model)
        self.table = family.table(self.config)
        self.sites: dict[str, Site] = {path: s.site for path, s in slots_of(model).items()}
        self.linear: dict[str, Module] = {}
        self.named: set[str] = set()
        for ours, entry in self.table.items():
            path, _, kind = ours.rpartition(".")
            owner, _, leaf = path.rpartition(".")
            self.named |= {name.rpartition(".")[0] for name in entry.names}
            if kind != "weight" or leaf not in SLOTS or owner not in {*_owners(self.sites)}:
                continue
            whole, each = SLOTS[leaf]
            for index, name in enumerate(entry.names):
                slot = f"{owner}.{whole if len(entry.names) == 1 else each[index]}"
                module = name.removesuffix(".weight")
                self.linear[module] = Module(module, path, slot, entry, index)

    def find(self, name: str) -> Module | None:
        """A module by its name, with the root of the bare model or without."""
        return self.linear.get(name) or self.linear.get(f"{self.family.root}.{name}")

    def parameters(self, names: Iterable[str]) -> dict[str, Entry]:
        """Our parameters that some modules of theirs, with those within them, are made into.

        Raises:
            UserError: where one is joined with those of a module that is not among them.
        """
        own = tuple(f"{self.full(name)}." for name in names)
        found = {
            ours: entry
            for ours, entry in self.table.items()
            if any(name.startswith(own) for name in entry.names)
        }
        for ours, entry in found.items():
            if alone := [name for name in entry.names if not name.startswith(own)]:
                raise UserError(
                    f"{ours} is one parameter here: it cannot be kept whole without {alone[0]}"
                )
        return found

    def holds(self, module: str) -> bool:
        """Whether there is such a module with weights, or one above such."""
        return self._has(self.full(module))

    def full(self, module: str) -> str:
        """The name of a module with the root of the bare model, which a file may leave out."""
        return module if self._has(module) else f"{self.family.root}.{module}"

    def _has(self, module: str) -> bool:
        return any(name == module or name.startswith(f"{module}.") for name in self.named)

    def rows(self, linear: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor [out, ...] of all features of a projection of ours, by module of theirs."""
        entry = self.table[f"{linear}.weight"]
        parts = entry.reshape.split(tensor)
        if is_conv(entry):
            parts = [part.t() if part.ndim > 1 else part for part in parts]
        return dict(zip(self.names_of(linear), parts, strict=True))

    def names_of(self, linear: str) -> list[str]:
        """The modules that a projection of ours joins."""
        return [name.removesuffix(".weight") for name in self.table[f"{linear}.weight"].names]

    def spread(self, slot: str, tensor: Tensor, fill: float = 0.0) -> Tensor:
        """A tensor [out, ...] of a slot's features among those of its whole projection."""
        rows = self.sites[slot].rows
        assert rows is not None, "the slot is behind a projection"
        features = self.features(self.linear_of(slot))
        whole = tensor.new_full((features, *tensor.shape[1:]), fill)
        view = rows.of(whole)
        view.copy_(tensor.unflatten(0, view.shape[:3]))
        return whole

    def features(self, linear: str) -> int:
        """Outputs of a projection of ours."""
        module = self.model.get_submodule(linear)
        assert isinstance(module, nn.Linear)
        return module.out_features

    def linear_of(self, slot: str) -> str:
        """The path of the projection that a slot is behind."""
        rows = self.sites[slot].rows
        assert isinstance(rows, Rows), "the slot is behind a projection"
        return f"{slot.rpartition('.')[0]}.{rows.linear}"

    def layers(self, place: str) -> set[int]:
        """The layers that have a slot of this name."""
        return {site.layer for site in self.sites.values() if site.name == place}

    def shorten(self, wanted: Mapping[str, bool]) -> dict[str, str]:
        """The shortest endings that choose exactly the modules `wanted`, as peft compares names.

        Modules of which the values differ get no ending in common.
        """
        short: dict[str, str] = {}
        for name, kind in wanted.items():
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                end = ".".join(parts[-count:])
                alike = {m for m in self.named if m == end or m.endswith(end)}
                if all(wanted.get(module) == kind for module in alike):
                    break
            short[name] = end
        return short


def _owners(sites: Iterable[str]) -> Iterable[str]:
    return {path.rpartition(".")[0] for path in sites}


def config_of(model: AdapterModel) -> TransformerConfig:
    """The form of a model that has slots."""
    config = getattr(model, "config", None)
    if not isinstance(config, TransformerConfig):
        raise UserError("adapters of peft fit the models of graftwerk.checkpoints.load_base alone")
    return config


def modules_for(model: AdapterModel, names: Iterable[str], path: Path | str) -> Modules:
    """The modules of a model under the names of a family that has all of `names`.

    Raises:
        UserError: where none has, with the first name that the nearest family lacks.
    """
    wanted = sorted(set(names))
    config = config_of(model)
    nearest: tuple[int, Family, str] | None = None
    for family in FAMILIES.values():
        try:
            family_of(config, family.model_type)
        except UserError:
            continue
        modules = Modules(family, model)
        lost = [name for name in wanted if not (modules.find(name) or modules.holds(name))]
        if not lost:
            return modules
        if nearest is None or len(lost) < nearest[0]:
            nearest = len(lost), family, lost[0]
    if nearest is None:
        raise UserError(
            f"{path}: adapters of peft need a base that transformers knows, and no family there "
            f"has this model's form"
        )
    raise UserError(
        f"{path}: it has weights for {nearest[2]}, where no adapter can lie on this model (as "
        f"transformers' {nearest[1].model_type} names it): is it made for another one?"
    )


def modules_of(model: AdapterModel) -> Modules:
    """The modules of a model under the names that writing it for `transformers` gives them.

    Raises:
        UserError: where no family can hold the model.
    """
    return Modules(family_of(config_of(model)), model)


def usable_name(text: str) -> str:
    """A name for an adapter, made of that of its file."""
    name = re.sub(r"[^\w-]", "_", text)
    usable = name.replace("-", "_").isidentifier() and not hasattr(torch.nn.ModuleDict, name)
    return name if usable else f"adapter_{name}"
