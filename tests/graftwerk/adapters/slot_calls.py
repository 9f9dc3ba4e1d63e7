"""Slots made by hand, to try one part in: what flows through them, and its gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graftwerk.adapters.part import Layout, MethodSettings, Part
from graftwerk.adapters.slots import Flow, Record, Rows, Site, SlotCall
from tests.graftwerk.tiny import shake

IN, OUT = 6, 8
# A projection [2 OUT, IN] of which the slot has the second half.
UP = Site("up", 2, IN, OUT, "column", rows=Rows("linear", (1, 2, -1), 1, 2))
WHOLE = Site("fc2", 2, IN, OUT, "row", rows=Rows("linear"))
Weights = dict[str, Tensor]


def sublayer(site: Site = UP, bias: bool = True) -> nn.Module:
    """The owner of a slot's projection, in double precision."""
    torch.manual_seed(5)
    outputs = OUT * (2 if site is UP else 1)
    return nn.ModuleDict({"linear": nn.Linear(IN, outputs, bias=bias)}).double()


def part_of(config: MethodSettings, site: Site = UP, owner: nn.Module | None = None) -> Part:
    """A part of adapter `a`, every weight away from its birth value, in double precision."""
    torch.manual_seed(1)
    part = config.create(site)
    assert part is not None
    config.tie([(site, part)])
    part.attach(owner or sublayer(site))
    part.adapter, part.site = "a", site
    shake(part.double(), 2)
    return part


def call_of(
    rows: int = 3, length: int = 5, site: Site = UP, record: Record | None = None, seed: int = 0
) -> SlotCall:
    """Random double input and output of a slot, leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)

    def made(features: int) -> Tensor:
        return torch.randn(rows, length, features, generator=generator).double().requires_grad_()

    output = made(site.out_features)
    return SlotCall(output, Flow(record=record), made(site.in_features))


def check_gradients(
    part: Part, call: SlotCall, formula: Callable[[Weights, Tensor, Tensor | None], Tensor]
) -> None:
    """A part gives what `formula(weights, output, input)` gives, with the same gradients to 1e-8.

    Those of all its weights, of the slot's output and of its input.
    """
    result = part(call)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(9)).double()
    weights = {name: w.detach().clone().requires_grad_() for name, w in part.named_parameters()}
    flows = [t for t in (call.output, call.input) if t is not None]
    copies = [t.detach().clone().requires_grad_() for t in flows]
    expected = formula(weights, copies[0], copies[1] if len(copies) > 1 else None)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    trained = {name: w for name, w in part.named_parameters() if w.requires_grad}
    own = torch.autograd.grad(result, [*flows, *trained.values()], upstream, allow_unused=True)
    leaves = [*copies, *(weights[name] for name in trained)]
    wanted = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for name, mine, theirs in zip(["output", "input", *trained], own, wanted, strict=False):
        assert (mine is None) == (theirs is None), name
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8, msg=name)


def share(tensor: Tensor, layout: Layout | None, rank: int, ranks: int = 2) -> Tensor:
    """A rank's share of a tensor: of each block along the split dimension, the rank's piece."""
    if layout is None or layout.dim is None:
        return tensor
    blocks = tensor.chunk(layout.blocks, layout.dim)
    return torch.cat([block.chunk(ranks, layout.dim)[rank] for block in blocks], layout.dim)
