"""Tokens that a row costs, on real questions."""

import numpy as np
import pytest

from graftwerk.data.packing_report import PackingReport
from graftwerk.data.sampler import Mixture, StepSampler
from graftwerk.data.trees import Groups, SortedRows
from tests.graftwerk.data.rows import packed, plain


@pytest.mark.parametrize(
    ("size", "step_rows", "tokens", "trees"), [(1024, 128, 52, 25), (1024, 8, 70, 2.5)]
)
def test_squads_questions_cost_a_fraction_where_paragraphs_are_shared(
    questions, size, step_rows, tokens, trees
):
    groups = Groups.of(SortedRows.of([questions.arrays(n).tokens for n in range(1190)]), size)
    sampler = StepSampler(1190, step_rows, seed=1, groups=groups)
    batches = packed(questions, size, share=True, micro_batch_size=8)
    report = PackingReport.of(batches, sampler, groups.of_rows)
    assert len(groups) == 240
    assert report.padded == pytest.approx(321.9, rel=0.02)
    assert report.packed == pytest.approx(186.9, rel=0.02)
    assert report.shared == pytest.approx(tokens, rel=0.05)
    assert report.trees == pytest.approx(trees, rel=0.1)


def test_padded_and_row_wise_rows_are_drawn_from_the_same_mixture():
    rows = plain([4] * 30 + [12] * 30)
    mixture = Mixture([30, 30], [0.9, 0.1])
    sampler = StepSampler(60, 6, seed=1, mixture=mixture)
    batches = packed(rows, 12, micro_batch_size=2)
    report = PackingReport.of(batches, sampler, np.arange(60))
    assert report.packed == pytest.approx(0.9 * 4 + 0.1 * 12)
    assert report.packed <= report.padded < 7  # drawn alike it would be above 9
