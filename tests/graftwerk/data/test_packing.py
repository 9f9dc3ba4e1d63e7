"""Rows packed into lines: the same loss and gradients as padded, and nobody sees another's."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.adapters import LoRAConfig
from graftwerk.data.packing import Document, alone, first_fit_decreasing
from graftwerk.data.sampler import Step
from tests.graftwerk.data.rows import (
    Rows,
    adapted,
    assert_same,
    learned,
    packed,
    padded,
    plain,
)

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=12)
LORA = LoRAConfig(dim=3, target_modules=("all",))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_every_document_is_in_a_row_that_has_room_and_rows_are_well_filled(sizes):
    documents = [Document([], [], (size,)) for size in sizes]
    rows = first_fit_decreasing(documents, [30])
    assert sorted(d.sizes[0] for row in rows for d in row) == sorted(sizes)
    assert all(sum(d.sizes[0] for d in row) <= 30 for row in rows)
    assert len(rows) <= 11 / 9 * max(-(-sum(sizes) // 30), sum(2 * size > 30 for size in sizes)) + 1


def test_documents_of_two_sizes_find_room_for_both():
    documents = [Document([], [], sizes) for sizes in [(1, 6), (9, 4), (2, 4), (9, 1)]]
    rows = first_fit_decreasing(documents, [10, 10])
    assert [[d.sizes for d in row] for row in rows] == [[(1, 6), (9, 4)], [(2, 4)], [(9, 1)]]


def test_a_shared_beginning_is_computed_once_and_counts_for_each_row():
    beginning, label = list(range(1, 21)), [(20, 7)]
    rows = Rows([([*beginning, 30, 31], label), ([*beginning, 32], label), ([33, 34], [(0, 7)])])
    step = Step([0, 1, 2], 0)
    for batches in (padded(rows)[step], packed(rows, 40)[step], packed(rows, 40, share=True)[step]):
        assert sum(batch.row_tokens for batch in batches) == 22 + 21 + 2
    assert sum(batch.num_tokens for batch in batches) == 22 + 1 + 2


@settings(max_examples=25)
@given(LENGTHS, st.integers(20, 50))
def test_packed_rows_learn_as_padded_ones(lengths, size):
    rows, model = plain(lengths), adapted("gpt2", a=LORA)
    model.set_active("a")
    together = packed(rows, size)[rows.step]
    assert sum(batch.num_rows for batch in together) == len(lengths)
    assert sum(batch.num_tokens for batch in together) == sum(lengths)
    assert_same(learned(model, together), learned(model, padded(rows)[rows.step]))


def test_rows_stand_one_behind_the_other_with_positions_of_their_own():
    (batch,) = packed(plain([3, 2, 2]), 5)[Step([0, 1, 2], 0)]
    assert batch.tokens.shape == (2, 5)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.end.tolist() == [[3, 3, 3, 5, 5], [2, 2, 3, 4, 5]]
    assert batch.label_positions.tolist() == [2, 4, 6]


@settings(max_examples=25)
@given(LENGTHS, st.sampled_from([2, 3, 4]))
def test_any_number_of_ranks_sees_the_same_packed_rows(lengths, world_size):
    rows = plain(lengths)
    lines = packed(rows, 24).lines(rows.step.rows)
    how = {"micro_batch_size": 1, "seed": 7}
    one = packed(rows, 24, **how)[Step(rows.step.rows, 40)]
    parts = [
        packed(rows, 24, **how, rank=rank, world_size=world_size)[Step(rows.step.rows, 40)]
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    dealt = [part[n] for n in range(len(parts[0])) for part in parts]
    for found, expected in zip(dealt, one, strict=False):
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.end, expected.end)
        assert torch.equal(found.chance, expected.chance)
    fillers = dealt[len(one) :]
    assert all((b.num_rows, b.num_tokens, len(b.labels)) == (0, 0, 0) for b in fillers)
    assert len(one) == len(lines) <= len(lengths)


def test_static_batches_have_the_shape_of_full_rows_and_learn_the_same():
    rows, model = plain([7, 5, 9, 3, 6]), adapted("llama", a=LORA)
    model.set_active("a")
    batches = packed(rows, 16, micro_batch_size=3, static=True)[rows.step]
    assert {tuple(batch.tokens.shape) for batch in batches} == {(3, 16)}
    assert_same(learned(model, batches), learned(model, padded(rows)[rows.step]))


def test_a_packed_row_may_be_longer_than_a_table_of_positions():
    rows, model = plain([40] * 3), adapted("gpt2", a=LORA)
    model.set_active("a")
    batches = packed(rows, 130, micro_batch_size=1, static=True)[rows.step]
    assert batches[0].tokens.shape[1] > model.config.max_position_embeddings
    assert_same(learned(model, batches), learned(model, padded(rows)[rows.step]))


def test_labels_know_which_source_they_are_from():
    rows = plain([7, 5, 9, 3])
    (batch,) = packed(rows, 32, named=True)[rows.step]
    (line,) = packed(rows, 32).lines(rows.step.rows)
    numbers = [row.number for document in line for row in document.rows for _ in row.labels]
    assert batch.origins.tolist() == [number % 3 for number in numbers]


def test_a_step_of_256_rows_of_1000_tokens_is_packed_in_milliseconds():
    import time

    rows = plain([1000] * 256)
    held = [rows.arrays(number) for number in range(256)]
    rows.arrays = held.__getitem__
    batches = packed(rows, 4096, micro_batch_size=4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        batches[rows.step]
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # 7 ms alone on a core
    assert len(first_fit_decreasing(alone(held), [4096])) == 64
    assert np.all([row.number < 256 for row in held])
