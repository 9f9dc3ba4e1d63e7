"""How an adapter's output joins its input."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graftwerk.nemo.adapter_mixin_strategies import (
    AbstractAdapterStrategy,
    ResidualAddAdapterStrategy,
    ReturnResultAdapterStrategy,
    ReturnResultAdapterStrategyConfig,
)
from graftwerk.nemo.adapter_mixins import AccessMixin
from graftwerk.nemo.adapter_modules import LinearAdapter
from tests.graftwerk.nemo.modules import DIM, Adapted, disturb, linear, rows

TRAINING, EVALUATING = SimpleNamespace(training=True), SimpleNamespace(training=False)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_residual_addition_is_the_input_plus_the_output():
    x = rows()
    assert torch.equal(ResidualAddAdapterStrategy()(x, double, module=EVALUATING), x + 2 * x)


def test_stochastic_depth_draws_once_for_the_batch_and_divides_by_what_is_kept():
    x, strategy = rows(), ResidualAddAdapterStrategy(stochastic_depth=0.25)
    torch.manual_seed(0)
    results = [strategy(x, double, module=TRAINING) for _ in range(200)]
    kept = [result for result in results if not torch.equal(result, x)]
    for result in kept:
        torch.testing.assert_close(result, x + 2 * x / 0.75)
    assert 120 < len(kept) < 180  # 150 expected, standard deviation 6


def test_stochastic_depth_is_off_in_evaluation():
    x, strategy = rows(), ResidualAddAdapterStrategy(stochastic_depth=1.0)
    assert torch.equal(strategy(x, double, module=EVALUATING), 3 * x)


def test_with_a_depth_of_one_training_never_sees_the_adapter():
    x, strategy = rows(), ResidualAddAdapterStrategy(stochastic_depth=1.0)
    assert torch.equal(strategy(x, double, module=TRAINING), x)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("inf")])
def test_a_depth_outside_of_zero_to_one_is_a_value_error(p):
    with pytest.raises(ValueError, match="stochastic_depth"):
        ResidualAddAdapterStrategy(stochastic_depth=p)


def test_a_depth_that_is_set_later_is_checked_too():
    strategy = ResidualAddAdapterStrategy()
    strategy.stochastic_depth = 1.5
    with pytest.raises(ValueError, match="stochastic_depth"):
        strategy(rows(), double, module=TRAINING)


def test_l2_registers_the_mean_over_the_batch_of_the_squared_distance():
    module = Adapted()
    strategy = {
        "_target_": "graftwerk.adapters.strategies.ResidualAddAdapterStrategy",
        "l2_lambda": 0.5,
    }
    module.add_adapter("a", linear(adapter_strategy=strategy))
    disturb(module.adapter_layer)
    x = rows()
    before = nn.Sequential(module.fc, module.bn)(x)
    result = module.forward_enabled_adapters(before)
    registry = AccessMixin.get_module_registry(module)
    (loss,) = registry["adapter_layer.a"]["adapter_loss"]
    expected = 0.5 * ((before - result) ** 2).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected)
    AccessMixin.reset_registry(module)
    assert AccessMixin.get_module_registry(module) == {}


@pytest.mark.parametrize("case", ["evaluation", "frozen", "switched off"])
def test_l2_registers_nothing_outside_of_training(case):
    adapter = LinearAdapter(DIM, 3, adapter_strategy=ResidualAddAdapterStrategy(l2_lambda=1.0))
    adapter.requires_grad_(case != "frozen")
    adapter.access_cfg["compute_adapter_loss"] = case != "switched off"
    module = EVALUATING if case == "evaluation" else TRAINING
    adapter.adapter_strategy(rows(), adapter, module=module)
    assert AccessMixin.get_module_registry(adapter) == {}


def test_l2_of_an_adapter_that_has_no_place_for_it_is_a_value_error():
    with pytest.raises(ValueError, match="AdapterModuleUtil"):
        ResidualAddAdapterStrategy(l2_lambda=1.0)(rows(), nn.Linear(DIM, DIM), module=TRAINING)


def test_return_result_gives_the_output_alone():
    x = rows()
    assert torch.equal(ReturnResultAdapterStrategy()(x, double, module=TRAINING), 2 * x)


@pytest.mark.parametrize("input", [[1, 2], (1, 2), {"b": 2, "a": 1}])
def test_return_result_spreads_lists_and_dicts_over_the_arguments(input):
    def adapter(a, b):
        return [a, b]

    assert ReturnResultAdapterStrategy()(input, adapter, module=TRAINING) == [1, 2]


def test_a_strategy_is_configured_by_its_dataclass():
    adapter = LinearAdapter(DIM, 3, adapter_strategy=ReturnResultAdapterStrategyConfig())
    assert isinstance(adapter.adapter_strategy, ReturnResultAdapterStrategy)


def test_the_base_of_strategies_cannot_be_made_itself():
    with pytest.raises(TypeError):
        AbstractAdapterStrategy()
