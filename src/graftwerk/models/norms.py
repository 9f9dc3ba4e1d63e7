"""Normalizations over the last dimension."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from graftwerk.models.config import TransformerConfig


class LayerNorm1P(nn.LayerNorm):
    """Layer norm whose weight is stored less one (NeMo's `layernorm1p`)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    Torch has no kernel of it for processors and composes it of a dozen passes over the states,
    there and back; here there are ten, and nothing but x is kept for the way back.
    """

    def forward(self, x: Tensor) -> Tensor:
        whole = x.dtype in (torch.float32, torch.float64) and x.dtype == self.weight.dtype
        if x.device.type != "cpu" or not whole or torch.compiler.is_compiling():
            return super().forward(x)
        made: Any = _RMSNorm.apply(x, self.weight, self.eps)
        return made


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * x).mul_(inverse).reshape(-1, len(weight)).sum(0)
        if ctx.needs_input_grad[0]:
            of_x = grad * weight
            along = (of_x * x).mean(-1, keepdim=True).mul_(inverse.pow(3)).neg_()
            of_x.mul_(inverse).addcmul_(x, along)
        return of_x, of_weight, None


def make_norm(config: TransformerConfig) -> nn.Module:
    """The normalization that the config names."""
    norms = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm, "layernorm1p": LayerNorm1P}
    return norms[config.normalization](config.hidden_size, eps=config.layernorm_epsilon)
