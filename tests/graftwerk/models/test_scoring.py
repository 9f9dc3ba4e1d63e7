"""Where many positions are labelled, their logits are made and scored in runs."""

from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from graftwerk.adapters import LoRAConfig, Parallel
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
SELECT = torch.tensor([0, 3, 3, 5, 8, 9, 11, 16])
LABELS = torch.arange(8) * 3


def learned(model, at_once, copies=1):
    """Losses, gradients, and the most logits that were scored at one time."""
    sizes, labels = [], LABELS.repeat(copies)

    def score(logits, part):
        sizes.append(logits.numel())
        return F.cross_entropy(logits, labels[part], reduction="none")

    model.zero_grad()
    with patch("graftwerk.models.scoring.AT_ONCE", at_once):
        losses = model(TOKENS, select=SELECT, score=score)
        losses.sum().backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sizes


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_learn_what_all_logits_at_once_do(shape):
    model = tiny_gpt(SHAPES[shape]).double().requires_grad_(True)
    words = model.config.vocab_size
    whole, gradients, _ = learned(model, 1 << 26)
    logits = model(TOKENS, select=SELECT)
    torch.testing.assert_close(whole, F.cross_entropy(logits, LABELS, reduction="none"))
    losses, found, sizes = learned(model, 3 * words + 1)
    assert sizes == [3 * words, 3 * words, 2 * words] + 3 * [pytest.approx(3 * words, abs=words)]
    torch.testing.assert_close(losses, whole, atol=0, rtol=1e-12)
    torch.testing.assert_close(found, gradients, atol=1e-12, rtol=1e-9)


def test_runs_of_several_copies_of_a_batch_are_in_their_order():
    model = tiny_gpt(SHAPES["llama"])
    for seed, name in enumerate("ab"):
        model.add_adapter(name, LoRAConfig(dim=2))
        for _, _, part in model.parts(name):
            shake(part, seed)
    model.double().freeze_base()
    model.set_active(Parallel("a", "b"))
    whole, gradients, _ = learned(model, 1 << 26, copies=2)
    losses, found, _ = learned(model, 5 * model.config.vocab_size, copies=2)
    torch.testing.assert_close(losses, whole, atol=0, rtol=1e-12)
    torch.testing.assert_close(found, gradients, atol=1e-12, rtol=1e-9)


def test_no_more_logits_are_kept_for_the_backward_pass():
    model = tiny_gpt(SHAPES["llama"])
    model.add_adapter("a", LoRAConfig(dim=2))
    model.train_only(["a"])
    model.set_active("a")
    kept = []

    def note(tensor):
        kept.append(tensor.shape)
        return tensor

    words = model.config.vocab_size
    score = lambda logits, part: F.cross_entropy(logits, LABELS[part], reduction="none")  # noqa: E731
    for at_once, wide in ((1 << 26, True), (2 * words, False)):
        kept.clear()
        with (
            patch("graftwerk.models.scoring.AT_ONCE", at_once),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            model(TOKENS, select=SELECT, score=score)
        assert any(shape[-1:] == (words,) for shape in kept) is wide
