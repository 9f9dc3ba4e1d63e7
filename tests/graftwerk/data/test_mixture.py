"""Several sources in given shares."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.sampler import Mixture, StepSampler, largest_remainders

several = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4)


def of_source(sizes, rows):
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


def test_weights_decide_how_many_rows_of_a_file_are_seen():
    mixture = Mixture([30, 10], [0.25, 0.75])
    order = mixture.order(0, seed=1, shuffle=True)
    assert np.bincount(of_source([30, 10], order)).tolist() == [10, 30]
    assert len(set(order[order < 30])) == 10
    assert Counter(order[order >= 30].tolist()) == dict.fromkeys(range(30, 40), 3)
    assert Mixture([30, 10], [1, 3]).order(0, 1, True).tolist() == order.tolist()


@given(several, st.integers(0, 3), st.booleans())
def test_any_run_of_rows_has_each_sources_share(several, seed, shuffle):
    sizes, weights = zip(*several, strict=True)
    mixture = Mixture(sizes, weights)
    sources = of_source(sizes, mixture.order(1, seed, shuffle))
    total = sum(sizes)
    assert len(sources) == total
    for source in range(len(sizes)):
        seen = np.cumsum(sources == source)
        due = np.arange(1, total + 1) * mixture.counts[source] / total
        assert np.abs(seen - due).max() <= len(sizes)


@given(several, st.integers(0, 3))
def test_epochs_go_through_a_source_pass_by_pass(several, seed):
    sizes, weights = zip(*several, strict=True)
    mixture = Mixture(sizes, weights)
    rows = np.concatenate([mixture.order(epoch, seed, True) for epoch in range(6)])
    for source, (size, start) in enumerate(zip(sizes, np.cumsum([0, *sizes]), strict=False)):
        seen = rows[of_source(sizes, rows) == source]
        for first in range(0, len(seen) - size + 1, size):
            assert sorted(seen[first : first + size]) == list(range(start, start + size))


@given(several, st.integers(1, 60))
def test_whole_numbers_sum_up_and_are_within_one_of_their_share(several, total):
    weights = np.array([weight for _, weight in several]) / sum(w for _, w in several)
    counts = largest_remainders(weights, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, weights, strict=True))


def sampler(seed=3, **more):
    return StepSampler(29, 8, seed, mixture=Mixture([20, 9], [0.4, 0.6]), **more)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_resumed_mixture_goes_on_with_the_very_next_step(shuffle, drop_last):
    how = {"shuffle": shuffle, "drop_last": drop_last}
    whole = sampler(**how)
    everything = [step for _ in range(4) for step in whole]
    for done in range(2 * len(whole)):
        resumed = sampler(**how)
        resumed.set_consumed(resumed.samples_after(done))
        rest = [step for _ in range(2) for step in resumed]
        assert rest == everything[done : done + len(rest)]


def test_a_seed_has_its_own_mixture_and_repeats_it():
    assert list(sampler(seed=1)) == list(sampler(seed=1)) != list(sampler(seed=2))


def test_without_shuffling_each_source_is_in_the_order_of_its_file():
    order = Mixture([4, 2], [1, 1]).order(0, 0, shuffle=False)
    assert order.tolist() == [0, 4, 1, 5, 2, 4]
    assert Mixture([4, 2], [1, 1]).order(1, 0, shuffle=False).tolist() == [3, 5, 0, 4, 1, 5]
