"""The options, the filters and the draw: against `transformers` and against what defines them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graftwerk.generation.sampling import (
    OptionError,
    Sampling,
    draw,
    keep_top_k,
    keep_top_p,
    penalise,
    uniforms_of,
)

SHARES = st.floats(0.01, 1.0)


@st.composite
def some_logits(draw) -> torch.Tensor:
    """[B, V] from even to peaked; some with equal values, some with tokens that are ruled out."""
    seed, rows, vocabulary = draw(
        st.tuples(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40))
    )
    generator = torch.Generator().manual_seed(seed)
    logits = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(
        rows, vocabulary, generator=generator
    )
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()):
        out = torch.rand(rows, vocabulary, generator=generator) < 0.3
        out[:, 0] = False
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def ids_of(seen: torch.Tensor) -> torch.Tensor:
    """Token ids whose set is `seen` [1, V]."""
    return seen[0].nonzero()[:, 0][None]


@settings(max_examples=60, deadline=None)
@given(some_logits(), st.floats(0.1, 3.0), st.integers(1, 50), SHARES, st.floats(0.5, 2.0))
def test_the_filters_are_those_of_transformers(logits, temperature, k, p, penalty):
    sampling = Sampling(
        greedy=False, temperature=temperature, top_k=k, top_p=p, repetition_penalty=penalty
    )
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(k),
            *([TopPLogitsWarper(p)] if p < 1 else []),
        ]
    )
    for row in logits:
        row = row[None]
        seen = torch.rand(row.shape, generator=torch.Generator().manual_seed(1)) < 0.4
        expected = theirs(ids_of(seen), row.clone())  # pyright: ignore
        torch.testing.assert_close(sampling.filtered(row, seen), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(some_logits(), SHARES)
def test_top_p_leaves_the_fewest_largest_that_hold_the_share(logits, p):
    kept = keep_top_p(logits, p)
    chances = logits.double().softmax(-1)
    for row, chance in zip(kept.isfinite(), chances, strict=True):
        assert row.any()
        inside, outside = chance[row], chance[~row]
        assert inside.sum() >= p - 1e-5
        assert outside.numel() == 0 or inside.min() >= outside.max()
        # Without its smallest it would hold too little.
        assert row.sum() == 1 or inside.sum() - inside.min() <= p + 1e-5


@settings(max_examples=60, deadline=None)
@given(some_logits(), st.integers(1, 60))
def test_top_k_leaves_the_k_largest(logits, k):
    kept = keep_top_k(logits, k)
    for before, after in zip(logits, kept, strict=True):
        there, possible = after.isfinite(), before.isfinite()
        kth = before.sort(descending=True).values[min(k, len(before)) - 1]
        assert torch.equal(there, possible & (before >= kth))
        assert torch.equal(after[there], before[there])


@settings(max_examples=60, deadline=None)
@given(some_logits(), SHARES, st.integers(1, 20), st.randoms())
def test_the_order_of_the_vocabulary_does_not_matter(logits, p, k, random):
    logits = logits + torch.arange(logits.shape[1]) * 1e-3  # equal values have no order
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    for apply in (lambda x: keep_top_p(x, p), lambda x: keep_top_k(x, k)):
        assert torch.equal(apply(logits)[:, order], apply(logits[:, order]))


@settings(max_examples=60, deadline=None)
@given(some_logits(), st.floats(1.0, 3.0))
def test_a_penalty_makes_what_was_seen_less_likely_and_nothing_else(logits, penalty):
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[:, ::2] = True
    after = penalise(logits, seen, penalty)
    assert (after[seen] <= logits[seen]).all()
    assert torch.equal(after[~seen], logits[~seen])


@settings(max_examples=60, deadline=None)
@given(some_logits())
def test_tokens_are_drawn_as_often_as_their_probability_says(logits):
    points = 4000
    uniforms = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    chances = logits.double().softmax(-1)
    for row, chance in zip(logits, chances, strict=True):
        drawn = draw(row.expand(points, -1), uniforms)
        counts = torch.bincount(drawn, minlength=len(row))
        assert (counts - points * chance).abs().max() <= 1  # an interval holds its length
        assert not counts[row.isinf()].any()


def test_the_ends_of_chance_draw_tokens_that_are_possible():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    largest = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0).double())
    assert draw(logits, torch.stack([torch.zeros_like(largest), largest])).tolist() == [1, 2]


def test_chance_is_the_seeds_and_the_rows_alone():
    one = uniforms_of(7, [0, 1, 5], 4)
    assert torch.equal(uniforms_of(7, [5, 1], 3), one[[2, 1], :3])
    assert not torch.equal(uniforms_of(8, [0, 1, 5], 4), one)
    assert len(one.unique()) == one.numel()
    many = uniforms_of(7, range(200), 50)
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(many.mean() - 0.5) < 4 * math.sqrt(1 / 12 / many.numel())
    rows = torch.corrcoef(many)
    assert (rows - torch.eye(200)).abs().max() < 0.75  # no two rows go together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "model.inference.temperature=0.0: give 0.001 to 1000"),
        ({"temperature": math.nan}, "model.inference.temperature=nan: give"),
        ({"temperature": math.inf}, "model.inference.temperature=inf: give"),
        ({"top_k": -1}, "model.inference.top_k=-1: give at least 1, or 0"),
        ({"top_p": 0.0}, "model.inference.top_p=0.0: give more than 0"),
        ({"top_p": 1.5}, "model.inference.top_p=1.5: give"),
        ({"repetition_penalty": -1.0}, "model.inference.repetition_penalty=-1.0: give"),
        ({"tokens_to_generate": 0}, "model.inference.tokens_to_generate=0: give at least 1"),
        ({"min_tokens_to_generate": -1}, "model.inference.min_tokens_to_generate=-1"),
        (
            {"min_tokens_to_generate": 9, "tokens_to_generate": 8},
            "model.inference.min_tokens_to_generate=9: give at most 8",
        ),
        ({"end_strings": ("a", "")}, "model.inference.end_strings="),
        ({"seed": -1}, "model.seed=-1: give"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(OptionError) as raised:
        Sampling(**options)
    assert str(raised.value).startswith(message)


def test_keys_of_a_stage_become_options():
    keys = {"greedy": False, "top_k": 5, "end_strings": ["a", "b"], "compute_logprob": True}
    sampling = Sampling.from_keys(keys, seed=3)
    assert sampling == Sampling(
        greedy=False, top_k=5, end_strings=("a", "b"), compute_logprob=True, seed=3
    )


def test_greedy_says_which_options_it_does_not_look_at():
    assert Sampling(top_k=5, top_p=0.5).idle == ["top_k", "top_p"]
    assert Sampling(repetition_penalty=2.0).idle == []
    assert Sampling(greedy=False, top_k=5).idle == []
