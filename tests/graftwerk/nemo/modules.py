"""Modules and models that hold adapters, as a user of NeMo's mixins would write them."""

from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.nemo import AdapterModelPTMixin, AdapterModuleMixin, ModelPT, register_adapter

DIM = 6


class Plain(nn.Module):
    """A module without adapters."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))


class Adapted(Plain, AdapterModuleMixin):
    """The same with adapters behind it."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.is_adapter_available():
            self.ran = self.get_enabled_adapters()
            x = self.forward_enabled_adapters(x)
        return x


register_adapter(Plain, Adapted)


class Bare(ModelPT, AdapterModelPTMixin):
    """An encoder and a decoder. The mixin hands every call on."""

    def __init__(self, cfg: Any, trainer: Any = None):
        super().__init__(cfg, trainer=trainer)
        kind = Adapted if cfg.get("adapted", True) else Plain
        self.encoder, self.decoder = kind(), kind()
        self.setup_adapters()

    @property
    def adapter_module_names(self) -> list[str]:
        return ["", "encoder", "decoder"]

    @property
    def default_adapter_module_name(self) -> str:
        return "encoder"

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class HandsOn(Bare):
    """The same, which hands every call on itself, as the documentation asks a model to do."""

    def settings(self) -> Any:
        return self.cfg.adapters.get(self.adapter_global_cfg_key, {})

    def add_adapter(self, name: str, cfg: Any) -> None:
        super().add_adapter(name, cfg)
        module_name, _ = self.resolve_adapter_module_name_(name)
        if module_name == "encoder" or (
            module_name == "" and self.settings().get("encoder_adapter", True)
        ):
            self.encoder.add_adapter(name, cfg)
        if module_name == "decoder" or (
            module_name == "" and self.settings().get("decoder_adapter", False)
        ):
            self.decoder.add_adapter(name, cfg)

    def is_adapter_available(self) -> bool:
        available = super().is_adapter_available()
        return available or any(
            module.is_adapter_available() for module in (self.encoder, self.decoder)
        )

    def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
        super().set_enabled_adapters(name, enabled)
        for module in (self.encoder, self.decoder):
            if module.is_adapter_available():
                module.set_enabled_adapters(name, enabled)

    def get_enabled_adapters(self) -> list[str]:
        names = super().get_enabled_adapters()
        names += self.encoder.get_enabled_adapters()
        return names + self.decoder.get_enabled_adapters()

    def check_valid_model_with_adapter_support_(self) -> None:
        if not isinstance(self.encoder, AdapterModuleMixin):
            raise ValueError("the encoder takes no adapters")


def linear(dim: int = 4, **settings: Any) -> dict[str, Any]:
    """The configuration of a small LinearAdapter."""
    target = "graftwerk.nemo.adapter_modules.LinearAdapter"
    return {"_target_": target, "in_features": DIM, "dim": dim, **settings}


def rows(count: int = 5) -> Tensor:
    """Random input, the same each time."""
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(1))


def disturb(module: nn.Module) -> None:
    """Moves every weight, so that adapters do something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))
