"""Optimizers by name, and what decays."""

import pytest
import torch
from torch.nn import Parameter

from graftwerk.errors import UserError
from graftwerk.training.optim import build_optimizer


@pytest.fixture
def parameters() -> list[Parameter]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(3, 4)), Parameter(torch.randn(4))]


@pytest.mark.parametrize("name", ["fused_adam", "adamw"])
def test_adamw_by_the_formula_of_its_paper(name, parameters):
    """One step of Loshchilov and Hutter 2019, algorithm 2: vectors without decay."""
    lr, decay, eps, betas = 0.1, 0.5, 1e-8, (0.9, 0.98)
    optim = {"name": name, "lr": lr, "weight_decay": decay, "betas": betas, "eps": eps}
    before = [p.detach().clone() for p in parameters]
    optimizer = build_optimizer(optim, parameters)
    for p in parameters:
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    step = 0.3 / (0.3 + eps)  # both moments are unbiased after one step
    matrix, vector = (p.detach() for p in parameters)
    torch.testing.assert_close(matrix, before[0] * (1 - lr * decay) - lr * step)
    torch.testing.assert_close(vector, before[1] - lr * step)


def test_adam_adds_its_decay_to_the_gradient(parameters):
    optimizer = build_optimizer({"name": "adam", "lr": 0.1, "weight_decay": 10.0}, parameters)
    before = parameters[0].detach().clone()
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    # The first step of Adam has the gradient's sign: here that of the decayed weight.
    torch.testing.assert_close(
        parameters[0].detach(), before - 0.1 * before.sign(), atol=1e-2, rtol=0
    )


def test_sgd_by_its_formula(parameters):
    """Two steps with momentum; the decay of matrices is part of the gradient."""
    lr, decay, momentum = 0.1, 0.5, 0.9
    optim = {"name": "sgd", "lr": lr, "weight_decay": decay, "momentum": momentum}
    optimizer = build_optimizer(optim, parameters)
    values = [p.detach().clone() for p in parameters]
    held = [torch.zeros_like(value) for value in values]
    for _ in range(2):
        for p in parameters:
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        for value, buffer in zip(values, held, strict=True):
            buffer.mul_(momentum).add_(0.3 + (decay * value if value.ndim > 1 else 0.0))
            value.sub_(lr * buffer)
    torch.testing.assert_close([p.detach() for p in parameters], values)


def test_fused_adam_is_the_fused_kernel(parameters):
    assert build_optimizer({"name": "fused_adam"}, parameters).defaults["fused"] is True


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"name": "adagrad"},
            "model.optim.name='adagrad' is not known: use one of fused_adam, adamw, adam, sgd",
        ),
        ({"lr": 0}, "model.optim.lr=0 must be above 0"),
        ({"betas": [0.9, 1.0]}, "model.optim.betas"),
        ({"weight_decay": -1}, "model.optim.weight_decay=-1"),
        ({"momentum": 1.0}, "model.optim.momentum=1.0 must be in"),
        ({"nesterov": True}, "nesterov is not known; allowed: name, lr"),
    ],
)
def test_wrong_optimizers_are_named(optim, message, parameters):
    with pytest.raises(UserError, match=message):
        build_optimizer(optim, parameters)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_one_kernel_updates_all_parameters_where_torch_has_it(name, parameters):
    assert build_optimizer({"name": name}, parameters).defaults["fused"]
    elsewhere = Parameter(torch.empty(2, 2, device="meta"))
    assert not build_optimizer({"name": name}, [*parameters, elsewhere]).defaults["fused"]
