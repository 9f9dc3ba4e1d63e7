"""Compacter's layers: sums of Kronecker products, whose rules layers can share."""

import pytest
import torch

from graftwerk.adapters.methods.bn import BnConfig
from graftwerk.adapters.methods.phm import PHMLinear
from graftwerk.errors import UserError
from tests.graftwerk.adapters.test_prompts import make
from tests.graftwerk.tiny import shake

OWN = {"shared_phm_rule": False}
SETTINGS = {
    "own_rule": OWN,
    "rank_3": {**OWN, "phm_rank": 3},
    "three_rules": {**OWN, "phm_dim": 3},
    "factorised_rule": {**OWN, "factorized_phm_rule": True},
    "whole_w": {**OWN, "factorized_phm_W": False},
    "no_bias": {**OWN, "phm_bias": False},
}


def layer(inputs: int = 12, outputs: int = 24, **settings) -> PHMLinear:
    torch.manual_seed(0)
    return PHMLinear(inputs, outputs, BnConfig(phm_layer=True, **settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_and_its_gradients_are_a_sum_of_kronecker_products(name):
    linear = layer(**SETTINGS[name]).double()
    shake(linear)
    w = dict(linear.named_parameters())
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(12, 24, dtype=torch.float64)
    for i in range(linear.get_parameter(linear.rules[0]).shape[0]):
        if "phm_rule" in w:
            rule = w["phm_rule"][i]
        else:
            rule = torch.outer(w["phm_rule_left"][i, :, 0], w["phm_rule_right"][i, 0])
        total = total + torch.kron(
            rule, w["W"][i] if "W" in w else w["W_left"][i] @ w["W_right"][i]
        )
    want = torch.einsum("bsi,io->bso", x, total) + w.get("b", 0)
    torch.testing.assert_close(linear(x), want, rtol=1e-10, atol=1e-10)
    leaves = [x, *w.values()]
    given = torch.autograd.grad(linear(x).sin().sum(), leaves)
    wanted = torch.autograd.grad(want.sin().sum(), leaves)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "std"),
    [
        ({"shared_phm_rule": True, "phm_init_range": 0.3}, 0.3),
        ({"shared_phm_rule": True, "phm_c_init": "uniform"}, 1 / 3**0.5),
        ({"shared_phm_rule": False}, 0.01),
        ({"shared_phm_rule": False, "phm_c_init": "uniform"}, 0.01 / 3**0.5),
        ({"shared_phm_rule": False, "factorized_phm_rule": True}, 0.01),
    ],
)
def test_rules_are_born_with_the_deviation_that_the_settings_give(settings, std):
    rule = layer(64, 64, phm_dim=32, **settings)
    weight = rule.get_parameter(rule.rules[0])
    assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert weight.mean().item() == pytest.approx(0, abs=0.1 * std)


@pytest.mark.parametrize(
    ("how", "std", "largest"),
    [
        ("glorot-uniform", (2 / 300) ** 0.5, (6 / 300) ** 0.5),
        ("glorot-normal", (2 / 300) ** 0.5, None),
        ("normal", 0.05, None),
    ],
)
def test_weights_are_born_as_hypercomplex_nonlinearity_says(how, std, largest):
    linear = layer(
        400, 800, hypercomplex_nonlinearity=how, factorized_phm_W=False, phm_init_range=0.05
    )
    assert linear.W.shape == (4, 100, 200)
    assert linear.W.std().item() == pytest.approx(std, rel=0.02)
    if largest is not None:
        assert linear.W.abs().max().item() == pytest.approx(largest, rel=1e-2)
    assert not linear.b.any()


def compacter(**settings) -> BnConfig:
    config = {"mh_adapter": True, "reduction_factor": 4, "non_linearity": "gelu"}
    return BnConfig(**config, phm_layer=True, **settings)


def counted(model) -> int:
    model.freeze_base()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "each", "once"),
    [
        ({}, (32 + 8) * 3, 64),  # W of rank 1 and b, and one rule of 4 x 4 x 4
        ({"shared_phm_rule": False}, (32 + 8) * 3 + 2 * 64, 0),
        ({"shared_phm_rule": False, "factorized_phm_rule": True}, (32 + 8) * 3 + 2 * 32, 0),
        ({"shared_W_phm": True}, 32 + 8, 64 + 2 * (32 + 8)),
        ({"phm_bias": False}, (32 + 8) * 2, 64),
        ({"factorized_phm_W": False}, 2 * 32 * 8 // 4 + 32 + 8, 64),
    ],
)
def test_parameters_are_those_of_the_formula(settings, each, once):
    model = make("t5", a=compacter(**settings))
    parts = len(list(model.parts("a")))
    assert parts == 2 * (model.config.num_layers + model.config.decoder_num_layers)
    assert counted(model) == parts * each + once
    assert sum(value.numel() for value in model.adapter_state("a").values()) == parts * each + once


def test_one_rule_learns_from_all_layers_up_and_down():
    model = make("gpt2", a=compacter())
    rules = {id(part.adapter_down[0].phm_rule) for _, _, part in model.parts("a")}
    rules |= {id(part.adapter_up.phm_rule) for _, _, part in model.parts("a")}
    assert len(rules) == 1


def test_a_rule_that_is_not_learned_stays_frozen():
    learned, fixed = make("gpt2", a=compacter()), make("gpt2", a=compacter(learn_phm=False))
    assert counted(learned) - counted(fixed) == 64
    assert "decoder.layers.0.attention_output.adapter_down.0.phm_rule" in fixed.adapter_state("a")


def test_a_shared_rule_survives_saving_and_loading():
    model, other = make("gpt2", a=compacter()), make("gpt2", b=compacter())
    other.load_adapter_state("b", model.adapter_state("a"))
    for (_, _, one), (_, _, two) in zip(model.parts("a"), other.parts("b"), strict=True):
        assert torch.equal(one.adapter_up.matrix(), two.adapter_up.matrix())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction_factor": 16}, "phm_dim=4 does not divide 2"),
        ({"shared_W_phm": True, "reduction_factor": {"0": 2, "default": 4}}, "shared_W_phm=True"),
        ({"phm_c_init": "zero"}, "phm_c_init='zero'.*uniform"),
        ({"hypercomplex_nonlinearity": "relu"}, "hypercomplex_nonlinearity='relu'.*glorot"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(settings, message):
    with pytest.raises(UserError, match=message):
        make("gpt2", a=BnConfig(**{"reduction_factor": 4, **settings}, phm_layer=True))
