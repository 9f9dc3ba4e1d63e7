"""Copies of the base's own parameters, which stand in for them while their adapter is active."""

from collections.abc import Mapping

from torch import nn

from graftwerk.adapters.composition import BLOCKS, Composition, Stack, below, names
from graftwerk.errors import UserError


class Replacements(nn.Module):
    """The copies by adapter, and the base's originals while a copy stands in their place.

    The base itself never changes: switched off, every parameter is the original object again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = nn.ModuleDict()
        self.originals: dict[str, nn.Parameter] = {}

    def add(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copies parameters of the base for an adapter."""
        copies = nn.ParameterDict()
        for key, parameter in parameters.items():
            copy = nn.Parameter(parameter.detach().clone())
            vars(copy).update(vars(parameter))  # how it lies over devices
            copies[key.replace(".", "/")] = copy
        self.copies[name] = copies

    def remove(self, name: str) -> None:
        """Forgets an adapter's copies; it is not active."""
        if name in self.copies:
            del self.copies[name]

    def of(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's copies by the names of the base."""
        if name not in self.copies:
            return {}
        held: nn.ParameterDict = self.copies[name]  # type: ignore[assignment]
        return {key.replace("/", "."): value for key, value in held.items()}

    def check(self, composition: Composition | str | None) -> None:
        """Raises a UserError where an adapter with copies is in any block but a `Stack`."""
        blocks = tuple(block for block in BLOCKS.values() if block is not Stack)
        for name in names(composition):
            if name in self.copies and name in below(composition, *blocks):
                raise UserError(
                    f"{composition}: {name} trains parameters of the base itself, which all rows "
                    f"of a batch share: it can be in a Stack only"
                )

    def set_active(self, model: nn.Module, composition: Composition | str | None) -> None:
        """Puts the originals back, then the copies of the active adapters in their place.

        Raises:
            UserError: where two adapters have a copy of the same.
        """
        active = [name for name in names(composition) if name in self.copies]
        wanted: dict[str, nn.Parameter] = {}
        for name in active:
            own = self.of(name)
            if common := wanted.keys() & own.keys():
                raise UserError(f"{composition}: two adapters have their own {min(common)}")
            wanted |= own
        for key, parameter in self.originals.items():
            _put(model, key, parameter)
        self.originals = {key: _put(model, key, parameter) for key, parameter in wanted.items()}


def _put(model: nn.Module, key: str, parameter: nn.Parameter) -> nn.Parameter:
    """Sets a parameter by name and returns the one that was there."""
    owner, _, leaf = key.rpartition(".")
    module = model.get_submodule(owner)
    before = getattr(module, leaf)
    setattr(module, leaf, parameter)
    return before
