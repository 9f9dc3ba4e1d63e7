"""Heads that adapters bring: which one answers, what is trained, what is saved."""

import pytest
import torch

from graftwerk.adapters import BottleneckConfig, IA3Config, Parallel, Stack
from graftwerk.models import BERT
from tests.graftwerk.tiny import shake
from tests.graftwerk.tiny_families import bert_shape

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def model() -> BERT:
    """Two adapters with heads of their own, one without."""
    torch.manual_seed(0)
    made = BERT(bert_shape(20, "question_answering")).eval()
    shake(made)
    made.add_adapter("a", BottleneckConfig(dim=4))
    made.add_adapter("b", IA3Config())
    made.add_adapter("headless", IA3Config(), head=False)
    for seed, name in enumerate("ab"):
        head = made.head_of(name)
        assert head is not None
        shake(head, seed + 1)
    return made.requires_grad_(False)


def scores(model: BERT, active) -> torch.Tensor:
    model.set_active(active)
    return model(TOKENS)


def expected(model: BERT, name: str) -> torch.Tensor:
    """An adapter's head on the hidden states, computed by hand."""
    model.set_active(name)
    state = model.adapter_state(name)
    x = model.hidden_states(TOKENS) @ state["head.out_proj.weight"].T + state["head.out_proj.bias"]
    return x.permute(2, 0, 1).flatten(0, 1)


def test_the_active_adapters_head_answers(model: BERT):
    own = scores(model, None)
    for name in "ab":
        torch.testing.assert_close(scores(model, name), expected(model, name))
    assert not torch.allclose(scores(model, "b"), own)
    assert torch.allclose(scores(model, "headless"), own, atol=1e-5)  # IA3 at birth
    assert torch.equal(scores(model, None), own)


def test_the_last_head_of_a_stack_answers(model: BERT):
    alone = scores(model, "b")
    # Bottlenecks are born as nothing, so the stack's states are b's.
    torch.testing.assert_close(scores(model, Stack("a", "b")), alone)
    torch.testing.assert_close(scores(model, Stack("b", "headless")), alone)


def test_each_child_of_a_parallel_has_its_own_head(model: BERT):
    found = scores(model, Parallel("a", "b", "headless")).view(2, 3, 2, 6)
    for place, name in enumerate(["a", "b", "headless"]):
        alone = scores(model, name).view(2, 2, 6)
        torch.testing.assert_close(found[:, place], alone)


def test_freezing_leaves_heads_of_adapters_trainable_and_no_other(model: BERT):
    model.freeze_base()
    heads = {n: p.requires_grad for n, p in model.named_parameters() if n.startswith("head.")}
    assert {n.split(".")[1:3][-1] for n, trained in heads.items() if trained} == {"a", "b"}
    assert not any(trained for n, trained in heads.items() if n.startswith("head.own."))


def test_a_state_holds_the_head_and_gives_it_back(model: BERT):
    state = {key: value.clone() for key, value in model.adapter_state("b").items()}
    assert {key for key in state if key.startswith("head.")} == {
        "head.out_proj.weight",
        "head.out_proj.bias",
    }
    assert not any(key.startswith("head.") for key in model.adapter_state("headless"))
    before = scores(model, "b")
    head = model.head_of("b")
    assert head is not None
    shake(head, 9)
    assert not torch.equal(scores(model, "b"), before)
    model.load_adapter_state("b", state)
    assert torch.equal(scores(model, "b"), before)


def test_a_model_without_its_adapters_is_as_it_was(model: BERT):
    names = set(dict(BERT(model.config).named_parameters()))
    own = scores(model, None)
    for name in ("a", "b", "headless"):
        model.delete_adapter(name)
    assert set(dict(model.named_parameters())) == names
    assert torch.equal(model(TOKENS), own)


def test_a_head_on_a_bfloat16_base_is_float32(model: BERT):
    for name in ("a", "b", "headless"):
        model.delete_adapter(name)
    model.bfloat16().add_adapter("c", IA3Config())
    head = model.head_of("c")
    assert head is not None
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert scores(model, "c").dtype == torch.float32
    assert scores(model, None).dtype == torch.bfloat16


def test_a_head_for_words_stays_the_bases():
    made = BERT(bert_shape(20, "masked_lm")).eval()
    made.add_adapter("a", IA3Config())
    assert made.head_of("a") is None
    assert not any(key.startswith("head.") for key in made.adapter_state("a"))
    made.set_active("a")
    assert made(TOKENS).shape == (2, 6, 20)
