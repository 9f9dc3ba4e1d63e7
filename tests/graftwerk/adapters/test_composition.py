"""Compositions: sequence, widening, naming, refusals."""

import copy

import pytest
import torch

from graftwerk.adapters import (
    BatchSplit,
    BottleneckConfig,
    Fuse,
    FusionConfig,
    IA3Config,
    LoRAConfig,
    MultiTask,
    Parallel,
    PromptTuningConfig,
    Split,
    Stack,
)
from graftwerk.adapters.configs import BnConfig
from graftwerk.errors import UserError
from graftwerk.models import GPT, KeyValueCache, TransformerConfig, build_model
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


@torch.no_grad()
def test_a_batch_split_beside_a_parallel_splits_each_copy_of_the_batch(model: GPT):
    batch = tokens(3)
    model.add_adapter("late", LoRAConfig(dim=2, layer_selection=(3,)))
    shake(torch.nn.ModuleList(part for _, _, part in model.parts("late")), 5)
    tree = Stack(BatchSplit("low", "late", batch_sizes=[1, 2]), Parallel("a", "b"))
    together = logits_of(model, tree, batch)
    apart = [
        logits_of(model, Stack(row_child, child), batch[rows])
        for child in ("a", "b")
        for row_child, rows in (("low", slice(0, 1)), ("late", slice(1, 3)))
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_split_gives_tokens_by_their_number_and_the_last_child_the_rest(model: GPT):
    kept = logits_of(model, "a", tokens(2, 9))[:, :4]
    found = logits_of(model, Split("a", "b", splits=[4, 1]), tokens(2, 9))
    torch.testing.assert_close(found[:, :4], kept, rtol=1e-5, atol=1e-5)
    cache = KeyValueCache(model.config.num_layers)
    pieces = [model(piece, cache=cache) for piece in tokens(2, 9).split([2, 3, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), found, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_batch_split_gives_each_row_what_its_child_makes_of_it(model: GPT):
    batch = tokens(3)
    found = logits_of(model, BatchSplit("a", "b", batch_sizes=[1, 2]), batch)
    apart = [logits_of(model, "a", batch[:1]), logits_of(model, "b", batch[1:])]
    torch.testing.assert_close(found, torch.cat(apart), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_multi_task_gives_each_row_the_child_of_its_task(model: GPT):
    batch = tokens(3)
    apart = [logits_of(model, name, batch) for name in ("a", "b")]
    model.set_active(MultiTask("a", "b"))
    found = model(batch, task_ids=torch.tensor([1, 0, 1]))
    wanted = torch.stack([apart[1][0], apart[0][1], apart[1][2]])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="task_ids"):
        model(batch)


@torch.no_grad()
def test_a_static_fusion_of_one_child_is_that_child(model: GPT):
    for name in ("one", "hub"):
        model.add_adapter(name, BottleneckConfig(dim=3) if name == "one" else BnConfig())
        shake(torch.nn.ModuleList(part for _, _, part in model.parts(name)), 4)
        model.add_fusion(name, FusionConfig.named("static"))
        alone = logits_of(model, name, tokens())
        torch.testing.assert_close(
            logits_of(model, Fuse(name), tokens()), alone, rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_skipped_layers_do_what_layers_without_adapters_do(model: GPT):
    part_of = {path: part for path, _, part in model.parts("b")}
    model.set_active("b", skip_layers=(1,))
    found = model(tokens())
    for path in [path for path in part_of if path.startswith("decoder.layers.1.")]:
        del model.get_submodule(path).adapter_layer["b"]
    assert torch.equal(logits_of(model, "b", tokens()), found)
    model.set_active("b", skip_layers=(0, 1, 2))
    assert torch.equal(model(tokens()), logits_of(model, None, tokens()))


@torch.no_grad()
def test_a_prompt_that_is_named_twice_stands_in_two_places():
    model, twins = tiny_gpt(), tiny_gpt()
    for owner, name in ((model, "p"), (twins, "p"), (twins, "q")):
        owner.add_adapter(name, PromptTuningConfig(virtual_tokens=2))
    twins.load_adapter_state("q", twins.adapter_state("p"))
    model.load_adapter_state("p", twins.adapter_state("p"))
    expected = logits_of(twins, Stack("p", "q"), tokens())
    torch.testing.assert_close(logits_of(model, Stack("p", "p"), tokens()), expected)


@torch.no_grad()
def test_a_child_that_ends_its_sublayer_leaves_the_others_of_a_parallel_alone(model: GPT):
    configs = {"ends": BnConfig(original_ln_after=False), "on": BnConfig(), "next": BnConfig()}
    for seed, (name, config) in enumerate(configs.items()):
        model.add_adapter(name, config)
        shake(torch.nn.ModuleList(part for _, _, part in model.parts(name)), seed)
    apart = [logits_of(model, Stack(name, "next"), tokens()) for name in ("ends", "on")]
    together = logits_of(model, Stack(Parallel("ends", "on"), "next"), tokens())
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


# ---- adapters' own heads


def labelling(head: str):
    model = build_model(
        TransformerConfig(
            architecture="bert",
            vocab_size=61,
            num_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            ffn_hidden_size=16,
            max_position_embeddings=32,
            transformer_block_type="post_ln",
            head=head,
            num_labels=3,
        )
    )
    for seed, name in enumerate("ab"):
        model.add_adapter(name, IA3Config())
        shake(model.head_of(name), seed)  # pyright: ignore[reportArgumentType]
    return model.eval()


@torch.no_grad()
def test_under_a_split_the_head_of_the_first_tokens_child_answers_for_a_row():
    model = labelling("classification")
    expected = logits_of(model, "a", tokens())
    found = logits_of(model, Split("a", "b", splits=[5, 5]), tokens())
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_heads_of_tokens_answer_for_their_rows_where_only_some_tokens_are_wanted():
    model = labelling("tagging")
    select = torch.tensor([1, 4, 12, 20])
    for tree in (BatchSplit("a", "b", batch_sizes=[1, 1]), Split("a", "b", splits=[3, 9])):
        model.set_active(tree)
        whole = model(tokens(2, 12))
        assert torch.equal(model(tokens(2, 12), select=select), whole.flatten(0, 1)[select])
