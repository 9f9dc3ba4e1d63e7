"""Packed rows are taken apart for attention where no token sees across."""

from unittest.mock import patch

import pytest
import torch

from graftwerk.models.positions import runs_of, visibility
from tests.graftwerk.tiny import SHAPES, tiny_gpt


def ends(*lengths: int, padding: int = 0) -> torch.Tensor:
    """`end` of a row of texts, one behind the other, and padding."""
    end: list[int] = []
    for length in lengths:
        end += [len(end) + length] * length
    return torch.tensor([[*end, *range(len(end) + 1, len(end) + 1 + padding)]])


def test_runs_are_cut_between_texts_and_short_ones_joined():
    assert runs_of(ends(5, 6, 2, 1, padding=2), least=4) == [
        (0, 0, 5),
        (0, 5, 11),
        (0, 11, 15),
        (0, 15, 16),
    ]
    assert runs_of(ends(5, 6, 2, 1, padding=2), least=8) == [(0, 0, 5), (0, 5, 13), (0, 13, 16)]
    assert runs_of(ends(5, 6), least=11) == [(0, 0, 11)]


def test_a_tree_is_one_run_and_what_all_see_joins_all():
    tree = torch.tensor([[5, 5, 4, 4, 5, 8, 8, 8]])  # 0 1 are seen by 2 3 and by 4
    assert runs_of(tree, least=1) == [(0, 0, 5), (0, 5, 8)]
    tree[0, 0] = torch.iinfo(torch.int64).max
    assert runs_of(tree, least=1) == [(0, 0, 8)]


def test_no_token_sees_out_of_its_run():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
        end = ends(*lengths, padding=3)
        mask = visibility(end, end.shape[1])[0, 0]
        for least in (1, 10):
            for _, start, stop in runs_of(end, least):
                assert not mask[start:stop, :start].any()
                assert not mask[stop:, start:stop].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_runs_is_that_of_whole_rows(shape):
    model = tiny_gpt(SHAPES[shape]).requires_grad_(True)
    end = torch.cat([ends(5, 7, 4, padding=2), ends(9, 1, 8)])
    end[1, 2:4] = 4  # a tree
    tokens = torch.randint(0, 50, end.shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(18).expand(2, -1) % 9
    found = []
    for least in (1, 18):
        with patch(
            "graftwerk.models.context.runs_of", lambda end, least=least: runs_of(end, least)
        ):
            model.zero_grad()
            logits = model(tokens, positions, end)
            logits.square().mean().backward()
        found.append((logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)
