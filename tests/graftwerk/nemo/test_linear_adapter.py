"""LinearAdapter: layers, birth, arguments."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from graftwerk.nemo.adapter_mixin_strategies import (
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
)
from graftwerk.nemo.adapter_mixins import instantiate
from graftwerk.nemo.adapter_modules import AdapterModuleUtil, LinearAdapter, LinearAdapterConfig
from tests.graftwerk.nemo.modules import DIM, disturb, rows

FORMULAS = {
    "identity": lambda x: x,
    "hardtanh": lambda x: x.clamp(-1, 1),
    "relu": lambda x: x.clamp(min=0),
    "selu": F.selu,
    "swish": lambda x: x * torch.sigmoid(x),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    spread = x.var(dim=-1, keepdim=True, unbiased=False)
    return (x - x.mean(dim=-1, keepdim=True)) / (spread + 1e-5).sqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("activation", FORMULAS)
def test_pre_is_norm_down_activation_up(activation):
    adapter, x = LinearAdapter(DIM, 3, activation=activation), rows()
    disturb(adapter)
    layer, down, _, up = adapter.module
    expected = FORMULAS[activation](norm(x, layer) @ down.weight.T) @ up.weight.T
    torch.testing.assert_close(adapter(x), expected, atol=1e-5, rtol=1e-5)


def test_post_is_down_activation_up_norm():
    adapter, x = LinearAdapter(DIM, 3, norm_position="post"), rows()
    disturb(adapter)
    down, _, up, layer = adapter.module
    expected = norm(FORMULAS["swish"](x @ down.weight.T) @ up.weight.T, layer)
    torch.testing.assert_close(adapter(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_at_birth_the_output_is_zero(position):
    assert torch.equal(
        LinearAdapter(DIM, 3, norm_position=position)(rows()), torch.zeros(len(rows()), DIM)
    )


def test_it_has_two_matrices_and_a_norm_and_no_bias():
    count = sum(weight.numel() for weight in LinearAdapter(DIM, 3).parameters())
    assert count == 2 * DIM * 3 + 2 * DIM


def test_dropout_is_last_and_only_in_training():
    adapter = LinearAdapter(DIM, 3, dropout=0.5)
    disturb(adapter)
    x = rows(200)
    whole = adapter.eval()(x)
    torch.manual_seed(0)
    dropped = adapter.train()(x)
    zeros = dropped == 0
    assert 0.4 < zeros.float().mean() < 0.6
    torch.testing.assert_close(dropped[~zeros], 2 * whole[~zeros])


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation": "mish"},
        {"norm_position": "middle"},
        {"dropout": 1.5},
        {"dim": 0},
        {"in_features": "6"},
    ],
)
def test_a_wrong_argument_is_named(wrong):
    (key,) = wrong
    with pytest.raises(ValueError, match=key):
        LinearAdapter(**({"in_features": DIM, "dim": 3} | wrong))


def test_the_strategy_is_residual_addition_by_default():
    strategy = LinearAdapter(DIM, 3).adapter_strategy
    assert isinstance(strategy, ResidualAddAdapterStrategy)
    assert (strategy.stochastic_depth, strategy.l2_lambda) == (0.0, 0.0)


@pytest.mark.parametrize(
    "given",
    [
        ResidualAddAdapterStrategy(stochastic_depth=0.25),
        ResidualAddAdapterStrategyConfig(stochastic_depth=0.25),
        OmegaConf.structured(ResidualAddAdapterStrategyConfig(stochastic_depth=0.25)),
        {
            "_target_": "graftwerk.nemo.adapter_mixin_strategies.ResidualAddAdapterStrategy",
            "stochastic_depth": 0.25,
        },
    ],
)
def test_a_strategy_may_be_ready_or_configured(given):
    strategy = LinearAdapter(DIM, 3, adapter_strategy=given).adapter_strategy
    assert isinstance(strategy, ResidualAddAdapterStrategy)
    assert strategy.stochastic_depth == 0.25


@pytest.mark.parametrize("wrong", [5, "residual", nn.ReLU(), {"_target_": "torch.nn.ReLU"}])
def test_what_is_no_strategy_is_an_attribute_error(wrong):
    with pytest.raises(AttributeError, match="adapter_strategy"):
        LinearAdapter(DIM, 3, adapter_strategy=wrong)


def test_its_own_description_makes_an_equal_one():
    adapter = LinearAdapter(
        DIM, 3, "gelu", "post", 0.25, ResidualAddAdapterStrategy(stochastic_depth=0.5)
    )
    again = instantiate(adapter.as_config())
    again.load_state_dict(adapter.state_dict())
    assert again.as_config() == adapter.as_config()
    assert isinstance(again.module[1], nn.GELU)
    assert again.dropout.p == 0.25
    assert again.adapter_strategy.stochastic_depth == 0.5


def test_the_dataclass_makes_what_the_arguments_make():
    strategy = ReturnResultAdapterStrategy()
    made = instantiate(LinearAdapterConfig(DIM, 3, "relu").__dict__ | {"adapter_strategy": None})
    direct = LinearAdapter(DIM, 3, "relu")
    assert (
        made.as_config()
        == direct.as_config()
        != LinearAdapter(DIM, 3, "relu", adapter_strategy=strategy).as_config()
    )


def test_a_subclass_chooses_another_default_strategy():
    class Own(nn.Module, AdapterModuleUtil):
        def get_default_strategy_config(self):
            return ReturnResultAdapterStrategy()

    own = Own()
    own.setup_adapter_strategy(None)
    assert isinstance(own.adapter_strategy, ReturnResultAdapterStrategy)
