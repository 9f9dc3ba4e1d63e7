"""Adapters of several tasks with LoRA matrices in common (MTL-LoRA, arXiv:2410.09437)."""

from collections.abc import Sequence

from torch import nn

from graftwerk.adapters.methods.hub_lora import HubLoRA
from graftwerk.adapters.model import AdapterModel
from graftwerk.errors import UserError

SHARED = ("lora_A", "lora_B")


def share_matrices(model: AdapterModel, names: Sequence[str], reference: str | None = None) -> None:
    """Gives adapters one A and one B in each slot: those of `reference`, else of the first.

    Training any of them trains what they share. A file of one of them holds it whole; adapters that
    are loaded again are apart until they are shared again.

    Raises:
        UserError: for fewer than two, and adapters that are not AdapterHub's LoRA of one form in
            the same slots.
    """
    if len(set(names)) < 2:
        raise UserError(f"sharing needs two adapters at least, not {', '.join(names) or 'none'}")
    owner = reference or names[0]
    own = _matrices(model, owner)
    for name in names:
        theirs = _matrices(model, name)
        shapes = [
            {slot: [getattr(part, leaf).shape for leaf in SHARED] for slot, part in parts.items()}
            for parts in (own, theirs)
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"adapters {owner!r} and {name!r} lie in different slots, or their matrices are of "
                f"different shapes: they cannot share them"
            )
    for name in names:
        for slot, part in _matrices(model, name).items():
            for leaf in SHARED:
                setattr(part, leaf, getattr(own[slot], leaf))


def _matrices(model: AdapterModel, name: str) -> dict[str, nn.Module]:
    parts = {slot: part for slot, _, part in model.parts(name)}
    if not all(isinstance(part, HubLoRA) and hasattr(part, "lora_A") for part in parts.values()):
        raise UserError(f"adapter {name!r} has parts other than AdapterHub's LoRA: it cannot share")
    return {**parts}
