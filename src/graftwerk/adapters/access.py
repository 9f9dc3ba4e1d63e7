"""Tensors that modules put aside during a forward pass, for a loss that sees the whole model."""

from typing import Any

from torch import Tensor, nn


class AccessMixin:
    """For modules with something to add to the loss (NeMo's name and methods).

    `access_cfg`: `compute_adapter_loss: False` keeps an adapter from registering its loss.
    """

    @property
    def access_cfg(self) -> dict[str, Any]:
        """This module's own settings, to be changed in place."""
        return self.__dict__.setdefault("_access_cfg", {"compute_adapter_loss": True})

    def register_accessible_tensor(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor aside; those of one name are kept in order."""
        self.__dict__.setdefault("_registry", {}).setdefault(name, []).append(tensor)

    @staticmethod
    def get_module_registry(module: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
        """What `module` and the modules in it put aside: module path -> name -> tensors."""
        return {
            path: dict(inner.__dict__["_registry"])
            for path, inner in module.named_modules()
            if isinstance(inner, AccessMixin) and inner.__dict__.get("_registry")
        }

    @staticmethod
    def reset_registry(module: nn.Module) -> None:
        """Forgets all of it. To be called once a step: what is put aside keeps its graph alive."""
        for inner in module.modules():
            inner.__dict__.pop("_registry", None)
