"""Packed batches of a T5 and of a BERT: every example is in them, whole, and knows its document."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.data.dataset import RowArrays
from graftwerk.data.encoding import Example
from graftwerk.data.micro_batches import PackedBatches
from graftwerk.data.packed_sizes import Packing
from graftwerk.data.sampler import Step

SIZE = 24


class Pairs:
    """Sources and targets, in which the number of a row stands for it."""

    filler = Example([0], source=[0])

    def __init__(self, lengths):
        self.lengths = lengths

    def arrays(self, number):
        target, source = self.lengths[number]
        tokens = np.full(target, number + 1, np.int32)
        labels = np.stack([np.arange(target), 100 * number + np.arange(target)], 1)
        read = np.full(source, number + 1, np.int32)
        return RowArrays(number, tokens, labels, read, None, None)


class Windows:
    """Rows of a BERT with spans and token types."""

    filler = Example([0], span=(0, 0))

    def __init__(self, lengths):
        self.lengths = lengths

    def arrays(self, number):
        length = self.lengths[number]
        tokens = np.full(length, number + 1, np.int32)
        types = (np.arange(length) >= length // 2).astype(np.int8)
        span = np.array([length // 3, length - 1], np.int32)
        return RowArrays(number, tokens, np.empty((0, 2), np.int32), None, types, span)


def batches(rows, family, room, **how):
    made = PackedBatches(rows, 0, 1, 2, room=room, family=family, **how)
    return made[Step(list(range(len(rows.lengths))), 0)]


pairs = st.lists(st.tuples(st.integers(1, 8), st.integers(1, SIZE)), min_size=1, max_size=10)


@settings(max_examples=50)
@given(pairs, st.booleans())
def test_a_t5s_source_and_target_are_in_one_row_as_one_document(lengths, static):
    found = {}
    for batch in batches(Pairs(lengths), "t5", (10, SIZE), static=static):
        assert batch.tokens.shape[1] <= 10
        assert batch.source.shape[1] <= SIZE
        if static:
            assert (batch.tokens.shape, batch.source.shape) == ((2, 10), (2, SIZE))
        labels = dict(zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True))
        for line in range(len(batch.tokens)):
            for document in range(int(batch.source_documents[line].max()) + 1):
                here = (batch.documents[line] == document).nonzero().flatten()
                read = batch.source[line][batch.source_documents[line] == document]
                (row,) = {*batch.tokens[line][here].tolist(), *read.tolist()}
                assert batch.positions[line][here].tolist() == list(range(len(here)))
                assert set(batch.end[line][here].tolist()) == {int(here[-1]) + 1}
                width = batch.tokens.shape[1]
                own = [labels[line * width + int(column)] for column in here]
                assert own == [100 * (row - 1) + n for n in range(len(here))]
                found[row - 1] = len(here), len(read)
    assert found == dict(enumerate(lengths))


@settings(max_examples=50)
@given(st.lists(st.integers(1, SIZE), min_size=1, max_size=10))
def test_a_bert_finds_its_spans_in_columns_of_the_packed_row(lengths):
    found = {}
    for batch in batches(Windows(lengths), "bert", (SIZE,)):
        assert batch.end is None
        assert batch.label_positions is None
        starts, ends = batch.labels.reshape(2, -1).tolist()
        for (line, document), start, end in zip(batch.spans.tolist(), starts, ends, strict=True):
            here = (batch.documents[line] == document).nonzero().flatten()
            (row,) = set(batch.tokens[line][here].tolist())
            length, first = len(here), int(here[0])
            assert batch.positions[line][here].tolist() == list(range(length))
            types = batch.token_types[line][here].tolist()
            assert types == [int(n >= length // 2) for n in range(length)]
            assert (start - first, end - first) == (length // 3, length - 1)
            found[row - 1] = length
        assert batch.weights.tolist() == [1.0] * len(batch.labels)
    assert found == dict(enumerate(lengths))


def test_ranks_without_rows_of_a_family_get_padding_alone():
    t5 = batches(Pairs([(3, 5)]), "t5", (10, SIZE), rank=1, world_size=2)
    bert = batches(Windows([4]), "bert", (SIZE,), rank=1, world_size=2)
    for (batch,), source in ((t5, True), (bert, False)):
        assert (batch.num_rows, len(batch.labels), len(batch.weights)) == (0, 0, 0)
        assert bool((batch.documents == -1).all())
        assert (batch.source is not None) == source
    assert bert[0].spans.shape == (0, 2)
    assert "spans" in bert[0].inputs()
    assert torch.is_tensor(t5[0].inputs()["documents"])


class Lengths:
    """A data set of which only lengths are known."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.longest = int(self.lengths.max())

    def __len__(self):
        return len(self.lengths)


def test_a_t5s_targets_have_the_room_that_goes_with_full_sources():
    def room(*lengths):
        return Packing(400).room(Lengths(lengths), "train_ds")

    assert room((4, 40), (6, 60)) == (50, 400)  # a tenth of the sources, and a quarter more
    assert room((4, 40), (90, 300), (1, 300)) == (90, 400)  # the longest at least
    assert room((30, 20), (30, 20)) == (400, 400)
