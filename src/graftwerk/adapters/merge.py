"""Active adapters merged into the base's weights, and the base got back to the bit."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from graftwerk.adapters.composition import BLOCKS, Stack, below, names
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.part import Part
from graftwerk.adapters.slots import Rows, Site, slots_of
from graftwerk.errors import UserError

Change = Callable[[Tensor], Tensor]


class Merge:
    """The base's weights with a model's active adapters in them.

    Weights are made one at a time, when they are read; `put` sets them all in place of the base's.
    They are computed in float32 at least and rounded once, to the type of the base.
    """

    def __init__(self, model: AdapterModel):
        """Plans the merge of `model.active`; nothing changes.

        Raises:
            UserError: where nothing is active, adapters are side by side, one cannot be merged, or
                the base is quantised.
        """
        self.model, self.active = model, model.active
        self.base = dict(model.base_parameters())
        self.originals: dict[str, nn.Parameter] = {}
        self.changes: dict[str, list[Change]] = {}
        _check(model)
        rows, columns = [], []
        for path, site, part in _active_parts(model):
            (rows if site.rows is not None else columns).append((path, site, part))
        for path, site, part in rows:  # in the order of the forward pass
            assert site.rows is not None
            linear = f"{path.rpartition('.')[0]}.{site.rows.linear}"
            self._change(f"{linear}.weight", _in_rows(site.rows, part.merged_weight))
            if type(part).merged_bias is not Part.merged_bias:
                self._change(f"{linear}.bias", _in_rows(site.rows, part.merged_bias))
        for path, site, part in columns:  # they scale what the updates read too
            name = f"{path.rpartition('.')[0]}.{site.feeds}.weight"
            self._change(name, lambda weight, part=part: part.merged_weight(weight.T).T)

    def _change(self, name: str, change: Change) -> None:
        self.changes.setdefault(name, []).append(change)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """One weight of the merged model, by its name in a model without adapters."""
        parameter = self._current(name).detach()
        if name not in self.changes:
            return parameter
        wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        for change in self.changes[name]:
            wide = change(wide)
        return wide.to(parameter.dtype).contiguous()

    def _current(self, name: str) -> nn.Parameter:
        """The parameter that computes at the moment: the base's or an active adapter's own."""
        leaf = name.removeprefix("head.")
        heads = [head for adapter in names(self.active) if (head := self.model.head_of(adapter))]
        if leaf != name and heads:
            return heads[-1].get_parameter(f"head.{leaf}")
        base = self.base[name if name in self.base else f"head.own.{leaf}"]
        replaced = [self.model.replacements.of(adapter).get(name) for adapter in names(self.active)]
        return next((copy for copy in replaced if copy is not None), base)

    def put(self) -> None:
        """Sets the merged weights in place and switches adapters off.

        Raises:
            UserError: where they are in place already.
        """
        if self.originals:
            raise UserError(f"{self.active} is merged already")
        merged = {}
        for name, parameter in self.base.items():
            value = self.read(name.replace("head.own.", "head.", 1))
            if value.data_ptr() != parameter.data_ptr():
                merged[name] = value
        self.model.set_active(None)
        for name, value in merged.items():
            self.originals[name] = _set(self.model, name, value)

    def undo(self) -> None:
        """Puts the very parameters back that were there, and switches the adapters on again."""
        self.model.set_active(None)
        for name, parameter in self.originals.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, parameter)
        self.originals = {}
        self.model.set_active(self.active)


def merge(model: AdapterModel) -> Merge:
    """Merges a model's active adapters into its weights; `.undo()` of the result takes them out.

    Raises:
        UserError: as `Merge`.
    """
    merged = Merge(model)
    merged.put()
    return merged


def _check(model: AdapterModel) -> None:
    if model.active is None:
        raise UserError("no adapter is active: there is nothing to merge")
    if below(model.active, *(block for block in BLOCKS.values() if block is not Stack)):
        raise UserError(f"{model.active}: adapters side by side cannot be merged into one base")
    for name in names(model.active):
        for _, _, part in model.parts(name):
            if part.unmergeable is not None:
                method = type(model.adapters[name]).__name__.removesuffix("Config")
                raise UserError(
                    f"adapter {name!r} ({method}) cannot be merged: {part.unmergeable}; LoRA, "
                    f"DoRA, IA3 and selective tuning can"
                )
    if any(not parameter.is_floating_point() for _, parameter in model.base_parameters()):
        raise UserError("a quantised base takes no merge: load it without `quantize`")


def _active_parts(model: AdapterModel) -> Iterator[tuple[str, Site, Part]]:
    """(slot path, site, part) in the order in which they compute."""
    for path, slot in slots_of(model).items():
        for name in names(model.active):
            if name in slot.adapter_layer:
                part = slot.adapter_layer[name]
                assert isinstance(part, Part)
                yield path, slot.site, part


def _in_rows(rows: Rows, change: Change) -> Change:
    """The change of a slot's rows as one of the whole tensor, in place."""

    def apply(tensor: Tensor) -> Tensor:
        view = rows.of(tensor)
        view.copy_(change(view.flatten(0, 2)).unflatten(0, view.shape[:3]))
        return tensor

    return apply


def _set(model: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """Sets a parameter by name, with all that its predecessor remembered; returns that one."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    before = getattr(module, leaf)
    parameter = nn.Parameter(value, requires_grad=before.requires_grad)
    vars(parameter).update(vars(before))
    setattr(module, leaf, parameter)
    return before
