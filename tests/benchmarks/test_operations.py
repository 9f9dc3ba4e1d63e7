"""Counted operations, and their calls run again alone."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.operations import Operations, alone, group_of, traced


def step(x: torch.Tensor, weight: torch.Tensor) -> None:
    F.linear(F.linear(x, weight), weight.T).sum().backward()


@pytest.fixture
def counted() -> Operations:
    """Of [10, 4] through a frozen matrix [6, 4] and back, twice: a product each way."""
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(6, 4)
    with Operations() as counted:
        step(x, weight)
        step(x, weight)
    return counted


def test_products_are_counted_each_way_but_for_frozen_weights(counted: Operations):
    assert counted.flops == 2 * 4 * (2 * 10 * 4 * 6)


def test_attention_is_counted_as_wide_as_its_rows():
    query = torch.randn(2, 3, 16, 8)
    with Operations() as counted:
        F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert counted.flops == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_calls_run_again_with_the_shapes_and_strides_that_they_had(counted: Operations):
    again = Operations()
    with again:
        found = alone(counted.calls, "cpu")
    assert again.calls.keys() == counted.calls.keys()
    assert sum(call["calls"] * call["flops"] for call in found) == counted.flops
    assert {call["product"] for call in found} >= {"[10, 4] [4, 6]T", "[10, 6] [6, 4]"}
    assert all(call["seconds"] > 0 for call in found)


def test_attention_with_a_mask_runs_again():
    query, mask = torch.randn(1, 2, 8, 4, requires_grad=True), torch.ones(8, 8).tril().bool()
    with Operations() as counted:
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask).sum().backward()
    assert {call["product"] for call in alone(counted.calls, "cpu")} == {"attention"}


def test_a_trace_tells_products_from_what_lies_between_operators():
    x, weight = torch.randn(400, 300, requires_grad=True), torch.randn(500, 300)
    found: dict[str, float] = {}
    with traced(found, "cpu"):
        step(x, weight)
    assert found["matrix products"] > 0
    assert found["between operators"] > 0


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::gelu_backward", "activations, elementwise"),
        ("aten::_fused_adamw_", "activations, elementwise"),
        ("aten::_log_softmax", "loss"),
        ("aten::copy_", "copies"),
        ("aten::view", "other operators"),
    ],
)
def test_an_operator_is_known_by_its_name(operator: str, group: str):
    assert group_of(operator) == group
