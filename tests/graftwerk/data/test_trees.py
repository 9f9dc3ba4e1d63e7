"""Rows that begin alike share tokens: the same loss and gradients, and who shuffles with whom."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.adapters import LoRAConfig
from graftwerk.data import trees as trees_module
from graftwerk.data.sampler import Mixture, StepSampler
from graftwerk.data.trees import Groups, SortedRows, trees
from tests.graftwerk.data.rows import (
    Rows,
    adapted,
    assert_same,
    forests,
    learned,
    losses,
    packed,
    padded,
)


def sorted_rows(rows):
    return SortedRows.of([rows.arrays(number).tokens for number in range(len(rows))])


def beginnings(rows):
    """All that rows begin with, each once: the nodes of their tree."""
    return {tuple(tokens[: n + 1]) for tokens, _ in rows for n in range(len(tokens))}


@settings(max_examples=40)
@given(forests())
def test_rows_are_sorted_and_know_what_they_share(rows):
    found = sorted_rows(rows)
    tokens = [rows.rows[number][0] for number in found.order]
    assert sorted(found.order) == list(range(len(rows)))
    for (one, other), common in zip(pairwise(tokens), found.common[1:], strict=True):
        assert one[:common] == other[:common]
        assert one[common : common + 1] != other[common : common + 1] or common == len(one)
    for start in range(len(rows)):
        for stop in range(start + 1, len(rows) + 1):
            held = [rows.rows[number] for number in found.order[start:stop]]
            assert found.tokens(start, stop) == len(beginnings(held))


@settings(max_examples=40)
@given(forests(), st.integers(1, 12))
def test_rows_that_are_sorted_in_runs_keep_beginnings_together(rows, at_once):
    whole = sorted_rows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees_module, "TOKENS_AT_ONCE", at_once)
        found = sorted_rows(rows)
    assert sorted(found.order) == list(range(len(rows)))
    assert found.added[-1] == whole.added[-1] == len(beginnings(rows.rows))
    assert sorted(found.common) == sorted(whole.common)
    for (one, other), common in zip(pairwise(found.order), found.common[1:], strict=True):
        assert rows.rows[one][0][:common] == rows.rows[other][0][:common]


@settings(max_examples=50)
@given(forests(), st.integers(1, 6), st.integers(1, 3))
def test_trees_fit_hold_each_row_once_and_repeat_as_little_as_can_be(rows, more, minimum):
    size = max(len(tokens) for tokens, _ in rows.rows) + more
    found = sorted_rows(rows)
    runs = trees(found, size, minimum)
    assert [row for run in runs for row in range(*run)] == list(range(len(rows)))
    assert all(found.tokens(*run) <= size for run in runs)
    # No two that are neighbours and share enough would fit into one.
    for (start, middle), (_, stop) in pairwise(runs):
        assert found.common[middle] < minimum or found.tokens(start, stop) > size


def test_a_tree_that_is_too_large_is_cut_where_its_rows_have_least_in_common():
    system = list(range(1, 9))
    contexts = [[*system, 20 + n, 21 + n, 22 + n, 23 + n] for n in range(0, 12, 4)]
    rows = Rows([([*context, 50 + n], []) for context in contexts for n in range(3)])
    found = sorted_rows(rows)
    assert trees(found, 29, 1) == [(0, 9)]
    assert trees(found, 28, 1) == [(0, 3), (3, 9)]
    assert trees(found, 20, 1) == [(0, 3), (3, 6), (6, 9)]


@settings(max_examples=20)
@given(forests(), st.integers(1, 30), st.sampled_from(["gpt2", "llama"]))
def test_random_trees_learn_as_padded_rows(rows, more, shape):
    size = max(len(tokens) for tokens, _ in rows.rows) + more
    model = adapted(shape, a=LoRAConfig(dim=3, target_modules=("all",)))
    model.set_active("a")
    expected = learned(model, padded(rows)[rows.step])
    batches = packed(rows, size, share=True, minimum=1)[rows.step]
    assert sum(len(batch.labels) for batch in batches) == sum(
        len(labels) for _, labels in rows.rows
    )
    assert sum(batch.num_rows for batch in batches) == len(rows)
    assert_same(learned(model, batches), expected)


def test_a_tree_lies_depth_first_and_tokens_see_their_ancestors():
    rows = Rows(
        [
            ([1, 2, 3, 4], [(2, 9), (3, 8)]),
            ([1, 2, 5], [(1, 7), (2, 8)]),
            ([1, 2], [(1, 6)]),
            ([1, 2, 3, 4], [(2, 9)]),
        ]
    )
    (batch,) = packed(rows, 8, share=True, minimum=1)[rows.step]
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.end.tolist() == [[5, 5, 4, 4, 5]]
    pairs = sorted(zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True))
    assert pairs == [(1, 6), (1, 7), (2, 9), (2, 9), (3, 8), (4, 8)]


@settings(max_examples=40)
@given(forests())
def test_a_token_sees_its_row_up_to_itself_and_nothing_else(rows):
    (batch,) = packed(rows, 400, share=True, minimum=1, micro_batch_size=99)[rows.step]
    index = torch.arange(batch.tokens.shape[1])
    for tokens, end in zip(batch.tokens, batch.end, strict=True):
        sees = (index[None] <= index[:, None]) & (index[:, None] < end[None])
        texts = {tuple(tokens[row].tolist()) for row in sees}
        assert texts - {(0,)} <= beginnings(rows.rows)  # (0,): padding sees itself
    held = {
        tuple(tokens[(index <= n) & (n < end)].tolist())
        for tokens, end in zip(batch.tokens, batch.end, strict=True)
        for n in index
    }
    assert beginnings(rows.rows) <= held


@settings(max_examples=25)
@given(forests(), st.integers(0, 40))
def test_another_label_moves_no_other_rows_loss(rows, chosen):
    labelled = [number for number, (_, labels) in enumerate(rows.rows) if labels]
    if not labelled:
        return
    number = labelled[chosen % len(labelled)]
    model = adapted("llama", a=LoRAConfig(dim=3))
    model.set_active("a")

    def each(rows):
        return losses(model, rows, packed(rows, 400, share=True, minimum=1, micro_batch_size=99))

    tokens, labels = rows.rows[number]
    changed = [(position, (token + 1) % 61) for position, token in labels]
    before = each(rows)
    after = each(Rows([(tokens, changed) if n == number else r for n, r in enumerate(rows.rows)]))
    assert before[number] != after[number]
    assert all(before[n] == after[n] for n in before if n != number)


def test_no_rows_make_no_trees_and_no_groups():
    nothing = SortedRows.of([])
    assert trees(nothing, 8) == []
    assert len(Groups.of(nothing, 8)) == 0


@settings(max_examples=60)
@given(forests(), st.integers(0, 6), st.integers(1, 3))
def test_groups_hold_each_row_once_and_fit_into_a_packed_row(rows, more, minimum):
    size = max(len(tokens) for tokens, _ in rows.rows) + more
    groups = Groups.of(sorted_rows(rows), size, minimum)
    order = groups.shuffled(np.random.default_rng(0)).tolist()
    assert sorted(order) == list(range(len(rows)))
    kept = [
        groups.rows[start : start + n].tolist()
        for start, n in zip(groups.starts, groups.sizes, strict=True)
    ]
    for group in kept:
        assert len(beginnings([rows.rows[number] for number in group])) <= size
        place = order.index(group[0])
        assert order[place : place + len(group)] == group  # on end, wherever they come


def test_what_all_rows_begin_with_binds_none_and_paragraphs_stay_together():
    system = list(range(1, 21))
    rows = [[*system, *[20 + c] * 18, 40 + n] for c in range(4) for n in range(3)]
    found = SortedRows.of([np.array(row, np.int32) for row in rows])
    assert len(Groups.of(found, size=200)) == 1
    groups = Groups.of(found, size=60)
    assert sorted(sorted(groups.rows[s : s + 3].tolist()) for s in groups.starts) == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11],
    ]  # fmt: skip
    assert len(Groups.of(found, size=40)) == 12


def test_each_epoch_shuffles_groups_anew_and_a_stopped_one_goes_on_where_it_was():
    rows = np.array([3, 1, 4, 0, 5, 2, 6])
    groups = Groups(rows, [0, 3, 4, 6])
    order = [StepSampler(7, 2, seed=5, groups=groups).order(epoch).tolist() for epoch in range(9)]
    assert len({tuple(epoch) for epoch in order}) > 3
    assert all(sorted(epoch) == list(range(7)) for epoch in order)
    for epoch in order:
        place = epoch.index(3)
        assert epoch[place : place + 3] == [3, 1, 4]
    whole = StepSampler(7, 2, seed=5, groups=groups)
    steps = [step for _ in range(3) for step in whole]
    resumed = StepSampler(7, 2, seed=5, groups=groups)
    resumed.set_consumed(resumed.samples_after(2))  # within the first group or behind it
    assert [step for _ in range(2) for step in resumed] == steps[2:8]


def test_groups_of_mixed_sources_stay_in_their_source():
    groups = [Groups(np.array([2, 0, 1]), [0, 2]), Groups(np.array([0, 1]), [0])]
    mixture = Mixture([3, 2], [3, 2], groups)
    order = mixture.order(0, 1, True).tolist()
    assert sorted(order) == [0, 1, 2, 3, 4]
    first = [row for row in order if row < 3]
    assert first in ([2, 0, 1], [1, 2, 0])
    assert [row for row in order if row > 2] == [3, 4]


def test_a_hundred_thousand_rows_are_grouped_in_seconds():
    import time

    random = np.random.default_rng(0)
    contexts = random.integers(0, 50000, (2000, 120), np.int32)
    ends = random.integers(0, 50000, (10, 2000, 20), np.int32)
    rows = [np.concatenate(pair) for part in ends for pair in zip(contexts, part, strict=True)]
    start = time.process_time()
    groups = Groups.of(SortedRows.of(rows), 1024)
    assert time.process_time() - start < 2.0  # of a fifth of them; 0.3 s on a core alone
    assert set(groups.sizes.tolist()) == {10}
