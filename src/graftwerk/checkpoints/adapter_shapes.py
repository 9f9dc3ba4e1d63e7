"""What a method would make for a model, without making it."""

import torch

from graftwerk.adapters.configs import MethodConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import slots_of


def shapes_of(model: AdapterModel, method: MethodConfig) -> dict[str, torch.Size]:
    """The tensors in the parts that a method would make for a model, by `adapter_state`'s names.

    Reckoned without memory, so that no size in a stranger's settings costs any.
    """
    slots = {path: slot for path, slot in slots_of(model).items() if method.selects(slot.site)}
    with torch.device("meta"):
        made = {path: method.create(slot.site) for path, slot in slots.items()}
        parts = {path: part for path, part in made.items() if part is not None}
        method.tie([(slots[path].site, part) for path, part in parts.items()])
    shapes: dict[str, torch.Size] = {}
    seen: set[int] = set()  # what parts share is kept under the first name
    for path, part in parts.items():
        for key, tensor in part.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                shapes[f"{path}.{key}"] = tensor.shape
    return shapes
