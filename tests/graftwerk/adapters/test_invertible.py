"""Invertible adapters: NICE on the embeddings, and its inverse before the words."""

import pytest
import torch

from graftwerk.adapters import Fuse, Stack
from graftwerk.adapters.fusion import FusionConfig
from graftwerk.adapters.methods.bn import BnConfig
from graftwerk.adapters.methods.invertible import Nice
from graftwerk.adapters.slots import Flow, SlotCall
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_prompts import make, run
from tests.graftwerk.tiny import shake

INVERTIBLE = BnConfig(inv_adapter="nice", leave_out=tuple(range(9)))  # nothing in the layers


@pytest.mark.parametrize("features", [8, 9])
def test_a_part_and_its_gradients_are_those_of_the_formula(features):
    part = Nice(features, "relu", 2, inverse=False).double()
    shake(part)
    w = dict(part.named_parameters())
    half = features // 2
    x = torch.randn(2, 3, features, dtype=torch.float64, requires_grad=True)

    def network(name: str, y: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("bsi,di->bsd", y, w[f"{name}.0.weight"]) + w[f"{name}.0.bias"]
        inner = inner.clamp(min=0)
        return torch.einsum("bsd,od->bso", inner, w[f"{name}.2.weight"]) + w[f"{name}.2.bias"]

    first = x[..., :half] + network("F", x[..., half:])
    second = x[..., half:] + network("G", first)
    want = torch.cat([first, second], -1)
    given = part(SlotCall(x, Flow()))
    torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-10)
    leaves = [x, *w.values()]
    gradients = torch.autograd.grad(given.sin().sum(), leaves)
    for one, other in zip(gradients, torch.autograd.grad(want.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    part.inverse = True
    torch.testing.assert_close(part(SlotCall(given, Flow())), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "halves"), [("gpt2", (16, 16)), ("t5", (16, 16))])
def test_the_two_places_share_one_set_of_weights(shape, halves):
    model = make(shape, a=INVERTIBLE)
    inside = halves[0] * 8 + 8 + 8 * halves[1] + halves[1]
    model.freeze_base()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * inside
    assert len(model.adapter_state("a")) == 8
    parts = {slot.site.name: part for _, slot, part in model.parts("a")}
    assert not parts["embedding"].inverse
    assert parts["lm_input"].inverse
    assert parts["embedding"].F[0].weight is parts["lm_input"].F[0].weight


def test_weights_are_normal_and_biases_zero_at_birth():
    part = Nice(800, "relu", 2, inverse=False)
    assert part.F[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert part.G[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not part.F[0].bias.any()


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5", "bert"])
@torch.no_grad()
def test_the_words_are_read_from_states_that_went_back(shape):
    """Embeddings that the adapter's inverse has changed, and words that its own direction has,
    cancel it."""
    model = make(shape, a=INVERTIBLE)
    base = run(model)
    model.set_active("a")
    assert not torch.allclose(run(model), base, atol=1e-3, equal_nan=True)
    parts = {slot.site.name: part for _, slot, part in model.parts("a")}
    first = next(iter(parts.values()))
    handles = []

    def undone(part: Nice, args, result):
        other = Nice(32, "relu", 2, not part.inverse)
        other.load_state_dict(part.state_dict())
        return other(SlotCall(result, Flow()))

    handles = [part.register_forward_hook(undone) for part in parts.values()]
    torch.testing.assert_close(run(model), base, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert first.F[0].weight.abs().max() > 0.05


@torch.no_grad()
def test_a_stack_takes_back_its_invertible_adapters_from_the_last_to_the_first():
    model = make("gpt2", a=INVERTIBLE, b=INVERTIBLE)
    model.set_active(Stack("a", "b"))
    flow = model.flow()
    x = torch.randn(2, 3, 32)
    there = model.embedding.output(x, flow)
    assert not torch.allclose(there, x, atol=1e-2)
    torch.testing.assert_close(model.lm_input(there, flow), x, rtol=1e-5, atol=1e-5)


def test_a_fusion_of_invertible_adapters_is_refused_with_the_reason():
    config = BnConfig(inv_adapter="nice")
    model = make("gpt2", a=config, b=config)
    model.add_fusion(("a", "b"), FusionConfig())
    with pytest.raises(UserError, match="invertible"):
        model.set_active(Fuse("a", "b"))
