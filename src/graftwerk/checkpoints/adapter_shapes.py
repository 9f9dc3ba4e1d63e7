"""What a method would make for a model, without making it."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graftwerk.adapters.configs import MethodConfig
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import slots_of


class Unfilled(TorchFunctionMode):
    """Within it random numbers fill no tensor.

    On the meta device, where there is nothing to fill, each call would run a decomposition in
    Python, and the first would import torch's compiler.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def shapes_of(model: AdapterModel, method: MethodConfig) -> dict[str, torch.Size]:
    """The tensors in the parts that a method would make for a model, by `adapter_state`'s names.

    Reckoned without memory, so that no size in a stranger's settings costs any.
    """
    slots = {path: slot for path, slot in slots_of(model).items() if method.selects(slot.site)}
    with torch.device("meta"), Unfilled():
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
