"""Compositions: sequence, widening, naming, refusals."""

import copy

import pytest
import torch

from graftwerk.adapters import BottleneckConfig, IA3Config, LoRAConfig, Parallel, Stack
from graftwerk.errors import UserError
from graftwerk.models import GPT, KeyValueCache
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt, tokens


@pytest.fixture(params=SHAPES)
def model(request) -> GPT:
    model = tiny_gpt(SHAPES[request.param])
    for seed, (name, config) in enumerate(
        {
            "low": IA3Config(),
            "a": BottleneckConfig(dim=4, layer_selection=(2, 3)),
            "b": LoRAConfig(dim=3, layer_selection=(2, 3)),
        }.items()
    ):
        model.add_adapter(name, config)  # pyright: ignore[reportArgumentType]
        for _, _, part in model.parts(name):
            shake(part, seed)
    return model


def logits_of(model: GPT, composition, batch: torch.Tensor) -> torch.Tensor:
    model.set_active(composition)
    return model(batch)


@torch.no_grad()
def test_parallel_equals_a_pass_for_each_child(model: GPT):
    apart = torch.cat([logits_of(model, name, tokens()) for name in ("a", "b")])
    together = logits_of(model, Parallel("a", "b"), tokens())
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_parallel_widens_the_batch_before_its_lowest_part_and_not_earlier(model: GPT):
    rows = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    logits_of(model, Parallel("a", "b"), tokens(2))
    assert rows == [2, 4, 4]


@torch.no_grad()
def test_a_stack_over_a_parallel_applies_its_lower_adapter_to_both(model: GPT):
    apart = [logits_of(model, Stack("low", name), tokens()) for name in ("a", "b")]
    together = logits_of(model, Stack("low", Parallel("a", "b")), tokens())
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_parallel_takes_masks_positions_selection_and_one_row(model: GPT):
    batch = tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    end = torch.tensor([[4] * 4 + [8] * 4])
    select = torch.tensor([2, 7])
    apart = []
    for name in ("a", "b"):
        model.set_active(name)
        apart.append(model(batch, positions, end, select=select))
    model.set_active(Parallel("a", "b"))
    together = model(batch, positions, end, select=select)
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
    two = model(batch.repeat(2, 1), positions.repeat(2, 1), end.repeat(2, 1))
    torch.testing.assert_close(two[::2].flatten(0, 1)[[2, 7, 10, 15]], together)


@torch.no_grad()
def test_parallel_goes_through_the_cache(model: GPT):
    model.set_active(Parallel("a", "b"))
    cache = KeyValueCache(model.config.num_layers)
    pieces = [model(piece, cache=cache) for piece in tokens(2, 9).split([4, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens(2, 9)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_order_matters_in_a_stack_of_bottlenecks():
    model = tiny_gpt()
    for seed, name in enumerate("xy"):
        model.add_adapter(name, BottleneckConfig(dim=4))
        for _, _, part in model.parts(name):
            shake(part, seed)
    forward, backward = (logits_of(model, Stack(*order), tokens()) for order in ("xy", "yx"))
    assert not torch.allclose(forward, backward)


@torch.no_grad()
def test_stacked_loras_add_up():
    model, both = tiny_gpt(), tiny_gpt()
    both.add_adapter("sum", LoRAConfig(dim=6))
    for seed, name in enumerate("xy"):
        model.add_adapter(name, LoRAConfig(dim=3))
        for _, _, part in model.parts(name):
            shake(part, seed)
    for (_, _, x), (_, _, y), (_, _, total) in zip(
        model.parts("x"), model.parts("y"), both.parts("sum"), strict=True
    ):
        for key, dim in (("linear_in.weight", 0), ("linear_out.weight", 1)):
            joined = torch.cat([x.get_parameter(key), y.get_parameter(key)], dim)
            total.get_parameter(key).copy_(joined)
    summed = logits_of(both, "sum", tokens())
    torch.testing.assert_close(
        logits_of(model, Stack("x", "y"), tokens()), summed, rtol=1e-5, atol=1e-5
    )


def test_a_model_with_active_adapters_can_be_copied(model: GPT):
    model.set_active(Stack("low", "a"))
    assert torch.equal(copy.deepcopy(model)(tokens()), model(tokens()))


def test_deleting_an_active_adapter_switches_it_off(model: GPT):
    base = logits_of(model, None, tokens())
    model.set_active("a")
    model.delete_adapter("a")
    assert torch.equal(model(tokens()), base)
    with pytest.raises(UserError, match="no adapter is called 'a': this model has low, b"):
        model.set_active("a")


def test_equality_and_printing_are_exact():
    assert Stack("a") != Stack("a", "b")
    assert Stack("a", Parallel("b", "c")) == Stack("a", Parallel("b", "c"))
    assert Stack("a") != Parallel("a")
    assert repr(Stack("a", Parallel("b", "c"))) == 'Stack("a", Parallel("b", "c"))'


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stack(),
        lambda: Parallel("a", Parallel("b", "c")),
        lambda: tiny_gpt().set_active("nobody"),
        lambda: tiny_gpt().add_adapter("a.b", IA3Config()),
    ],
)
def test_a_composition_without_meaning_is_refused(make):
    with pytest.raises(UserError):
        make()


def test_blocks_of_different_width_are_refused(model: GPT):
    model.add_adapter("c", IA3Config())
    with pytest.raises(UserError, match="one width"):
        model.set_active(Stack(Parallel("a", "b"), Parallel("a", "b", "c")))
