"""Normalizations against torch's own, there and back."""

import pytest
import torch
from torch import nn

from graftwerk.models.norms import RMSNorm


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (2, 3, 4, 6)])
def test_rms_norm_and_its_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(6, eps=1e-3).double(), nn.RMSNorm(6, eps=1e-3).double()
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    x.requires_grad_()
    found = []
    for norm in (ours, theirs):
        made = norm(x)
        found.append((made, *torch.autograd.grad(made, (x, norm.weight), grad)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_of_rms_norm_are_those_of_differences() -> None:
    norm = RMSNorm(5, eps=1e-2).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight)
    )


def test_rms_norm_of_half_precision_is_torchs() -> None:
    ours, theirs = RMSNorm(6, eps=1e-3).bfloat16(), nn.RMSNorm(6, eps=1e-3).bfloat16()
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert torch.equal(ours(x), theirs(x))


def test_a_frozen_rms_norm_keeps_its_input_alone() -> None:
    norm = RMSNorm(64, eps=1e-5).requires_grad_(False)
    x = torch.randn(8, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert sorted(tensor.numel() for tensor in kept) == [8, 64, 8 * 64]
