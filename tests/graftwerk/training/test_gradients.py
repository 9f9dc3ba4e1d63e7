"""The flat gradient buffer and the loss, by their formulas."""

import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter

from graftwerk.data.dataset import Batch
from graftwerk.training.gradients import GradientBucket
from graftwerk.training.loss import label_losses
from graftwerk.training.module import LearningModule, TrainingSettings, step_seed
from tests.graftwerk.tiny import SHAPES, tiny_gpt


def bucket() -> tuple[list[Parameter], GradientBucket]:
    parameters = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(3))]
    return parameters, GradientBucket({"matrix": parameters[0], "vector": parameters[1]}, 2)


def test_backward_adds_into_the_flat_buffer():
    parameters, grads = bucket()
    for _ in range(2):
        (3 * parameters[0].sum() + (parameters[1] * torch.arange(3.0)).sum()).backward()
    assert grads.gradients.tolist() == [6, 6, 6, 6, 0, 2, 4]
    assert grads.sums.tolist() == [0, 0]


def test_clipping_scales_all_gradients_by_their_common_norm():
    _, grads = bucket()
    grads.gradients.copy_(torch.tensor([3.0, 0, 0, 0, 4.0, 0, 0]))
    grads.sums.fill_(7)
    assert grads.clip(2.5).item() == pytest.approx(5)
    assert grads.gradients.tolist() == pytest.approx([1.5, 0, 0, 0, 2, 0, 0], rel=1e-5)
    assert grads.sums.tolist() == [7, 7]


def test_a_norm_under_the_limit_stays():
    _, grads = bucket()
    grads.gradients.fill_(0.1)
    before = grads.gradients.clone()
    grads.clip(100.0)
    assert torch.equal(grads.gradients, before)


def test_the_loss_is_the_weighted_sum_of_negative_log_likelihoods():
    """A label that occurs twice counts twice; uniform logits cost log V each."""
    logits = torch.zeros(3, 8, dtype=torch.bfloat16)
    loss = label_losses(logits, torch.tensor([1, 1, 5]), torch.tensor([1.0, 2.0, 0.5])).sum()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3.5 * math.log(8))


def test_no_labels_cost_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    logits = torch.zeros(0, 8, requires_grad=True)
    loss = label_losses(logits, empty, torch.zeros(0)).sum()
    loss.backward()
    assert loss.item() == 0


def test_a_module_scores_many_labels_in_runs():
    model = tiny_gpt(SHAPES["llama"]).requires_grad_(True)
    module = LearningModule(model, TrainingSettings({}, 1, 1))
    at, weights = torch.arange(6), torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 3.0])
    batch = Batch(torch.arange(6)[None], None, None, at, (at + 1) % 6, weights)
    expected = label_losses(model(**batch.inputs()), batch.labels, weights)
    with (
        patch("graftwerk.models.scoring.AT_ONCE", 4 * model.config.vocab_size),
        patch("graftwerk.training.module.label_losses", wraps=label_losses) as scored,
    ):
        found = module._label_losses(partial(model, **batch.inputs()), batch, None)
    assert [len(call.args[0]) for call in scored.call_args_list] == [4, 2]
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)


def test_every_step_of_every_rank_has_a_seed_of_its_own():
    seeds = {step_seed(s, n, r) for s in (0, 1) for n in range(100) for r in range(4)}
    assert len(seeds) == 800
