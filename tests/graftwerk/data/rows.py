"""Rows that tests write down, in the place of a data set read from files."""

import numpy as np
import torch
from hypothesis import strategies as st

from graftwerk.data.dataset import RowArrays
from graftwerk.data.encoding import Example, Label
from graftwerk.data.micro_batches import PackedBatches, PaddedBatches
from graftwerk.data.sampler import Step
from graftwerk.training.loss import label_losses
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt

VOCABULARY = 61


class Rows:
    """Rows of (tokens, [(position, token)]) for a GPT."""

    filler = Example([0])

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        tokens, labels = self.rows[number]
        return Example(list(tokens), [Label(*label) for label in labels])

    def arrays(self, number):
        tokens, labels = self.rows[number]
        labels = np.array(labels, np.int32).reshape(-1, 2)
        return RowArrays(number, np.array(tokens, np.int32), labels, None, None, None)

    def source_of(self, number):
        return number % 3

    @property
    def lengths(self):
        return np.array([[len(tokens)] for tokens, _ in self.rows])

    @property
    def step(self):
        return Step(list(range(len(self))), 0)


def padded(rows, micro_batch_size=3, **how):
    return PaddedBatches(rows, 0, 1, micro_batch_size, **how)


def packed(rows, size, share=False, micro_batch_size=2, **how):
    return PackedBatches(rows, 0, 1, micro_batch_size, room=(size,), share=share, **how)


def adapted(shape="llama", **methods):
    """A tiny model with adapters in their order, all weights away from their values at birth."""
    base = SHAPES[shape] if isinstance(shape, str) else shape
    model = tiny_gpt(base)
    for seed, (name, method) in enumerate(methods.items(), 1):
        model.add_adapter(name, method)
        for _, _, part in model.parts(name):
            shake(part, seed)
    model.freeze_base()
    return model


def learned(model, batches):
    """The summed loss of a step's batches, and the gradients of what is trained."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        copies = batch.labels.repeat(model.width), batch.weights.repeat(model.width)
        loss = label_losses(model(**batch.inputs()), *copies).sum()
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, loss=1e-6, gradient=1e-5):
    """The loss to 1e-6, all gradients to 1e-5 of their norm, and each to ten times that of its own,
    where that is no thousandth of all."""
    assert abs(found[0] - expected[0]) <= loss * max(abs(expected[0]), 1.0)
    assert found[1].keys() == expected[1].keys()
    norms = {n: grad.norm() for n, grad in expected[1].items()}
    apart = {n: (found[1][n] - grad).norm() for n, grad in expected[1].items()}
    whole = torch.stack([*norms.values()]).norm()
    assert torch.stack([*apart.values()]).norm() <= gradient * whole
    assert all(apart[n] <= 10 * gradient * norms[n].clamp(min=1e-3 * whole) for n in norms)


@torch.no_grad()
def losses(model, rows, batches):
    """The loss of each row that has labels, by its number."""
    lines, size = batches.lines(rows.step.rows), batches.micro_batch_size
    found = {}
    for start, batch in zip(range(0, len(lines), size), batches[rows.step], strict=True):
        held = [row for line in lines[start : start + size] for d in line for row in d.rows]
        numbers = [row.number for row in held for _ in row.labels]
        copies = batch.labels.repeat(model.width), batch.weights.repeat(model.width)
        each = label_losses(model(**batch.inputs()), *copies).unflatten(0, (model.width, -1))
        for number, loss in zip(numbers, each.sum(0).tolist(), strict=True):
            found[number] = found.get(number, 0.0) + loss
    return found


def plain(lengths, seed=0):
    """Random rows of these lengths, the last third of each learned."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        tokens = random.integers(1, VOCABULARY, length + 1).tolist()
        first = length - max(length // 3, 1)
        rows.append((tokens[:-1], [(n, tokens[n + 1]) for n in range(first, length)]))
    return Rows(rows)


@st.composite
def forests(draw, depth=5):
    """Rows that walk down random trees: some twice, some the beginning of another."""
    pieces = st.lists(st.integers(1, 4), min_size=1, max_size=4)
    paths = [[]]
    for _ in range(draw(st.integers(1, depth))):
        longer = [[*path, *draw(pieces)] for path in paths for _ in range(draw(st.integers(1, 2)))]
        paths = draw(st.lists(st.sampled_from([*paths, *longer]), min_size=1, max_size=6))
    rows = []
    for path in paths:
        tokens = path or draw(pieces)
        labels = st.tuples(st.integers(0, len(tokens) - 1), st.integers(0, VOCABULARY - 1))
        rows.append((tokens, draw(st.lists(labels, max_size=3))))
    return Rows(rows)


def relabelled(rows, number, token):
    """The rows with another last label of one of them, and another last token."""
    tokens, labels = rows.rows[number]
    changed = ([*tokens[:-1], token], [*labels[:-1], (labels[-1][0], token)])
    return Rows([changed if n == number else row for n, row in enumerate(rows.rows)])
