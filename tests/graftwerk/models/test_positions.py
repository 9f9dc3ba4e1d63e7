"""Rotary positions against complex numbers, there and back."""

import pytest
import torch

from graftwerk.models.positions import rotate


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [8, 6])
def test_rotation_multiplies_pairs_by_complex_units(interleaved: bool, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(2, 5, 1, size // 2, dtype=torch.float64)
    spread = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    first, second = (
        (x[..., :size:2], x[..., 1:size:2]) if interleaved else x[..., :size].chunk(2, -1)
    )
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    parts = turned.real, turned.imag
    expected = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    expected = torch.cat([expected, x[..., size:]], -1)
    made = rotate(x, (spread.cos(), spread.sin()), interleaved)
    grad = torch.randn_like(made)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(
        torch.autograd.grad(made, x, grad), torch.autograd.grad(expected, x, grad)
    )


def test_rotation_keeps_nothing_of_what_it_turns() -> None:
    x = torch.randn(1, 4, 2, 6, requires_grad=True)
    angles = torch.randn(1, 4, 1, 6)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotate(x, (angles.cos(), angles.sin()), False)
    assert all(tensor.shape[2] == 1 for tensor in kept)
