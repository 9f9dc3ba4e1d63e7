"""Prompts that begin alike, read once, against prompts that are read alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.adapters import (
    Average,
    BatchSplit,
    BnConfig,
    BottleneckConfig,
    Fuse,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    MultiTask,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    Split,
    Stack,
)
from graftwerk.generation import Sampling, complete, generate
from graftwerk.generation.reading import AHEAD
from graftwerk.generation.sharing import FOREVER, Tree, batches, can_share, grow
from graftwerk.models import GPT
from graftwerk.models.positions import visibility
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt

SHAPES = SHAPES | {
    "window": replace(SHAPES["llama"], window_size=6),
    "window in one layer": replace(SHAPES["gpt2"], window_size=5, window_layers=(1,)),
}
METHODS: dict[str, MethodConfig] = {
    "lora": LoRAConfig(dim=4),
    "bottleneck": BottleneckConfig(dim=4),
    "other": BottleneckConfig(dim=4),
    "ia3": IA3Config(),
    "prefix": PrefixTuningConfig(prefix_length=3, bottleneck_dim=8),
    "prompt": PromptTuningConfig(virtual_tokens=4),
    "unmoved": PromptTuningConfig(virtual_tokens=4, shifts_positions=False),
    "gated": BnConfig(reduction_factor=4, use_gating=True),
    "reft": ReftConfig(),
    "last": ReftConfig(suffix_positions=2),
}
WITH = [
    None,
    *METHODS,
    Stack("prompt", "lora", "prefix"),
    Fuse("bottleneck", "other"),
    Average("bottleneck", "other", weights=[1, 2]),
    Parallel("lora", Stack("ia3", "bottleneck")),
    Split("bottleneck", "other", splits=[3, 30]),
    BatchSplit("lora", "ia3", batch_sizes=[4, 5]),
]
COUNTED = ("gated", "reft", "last", Split, BatchSplit)  # these read each prompt by itself
TRUNK, TWIG = [9, 4, 7, 7, 5, 3, 11, 8], [20, 21, 22]
PROMPTS = [
    [*TRUNK, 30, 31],
    [40, 41, 42],
    [*TRUNK, *TWIG, 50],
    [*TRUNK, *TWIG, 51, 52, 53],
    TRUNK,  # the beginning of others
    [*TRUNK, *TWIG, 50],  # a second time
    [*TRUNK, 32],
    [12, *TRUNK],
    [40, 41, 43, 44],
]


def model_with(shape: str, active) -> GPT:
    model = tiny_gpt(SHAPES[shape])
    for seed in range(3):  # so that what it says varies
        shake(model, seed)
    for name, config in METHODS.items():
        model.add_adapter(name, config)
        for _, _, part in model.parts(name):
            shake(part)
    if isinstance(active, Fuse):
        model.add_fusion(["bottleneck", "other"])
    model.set_active(active)
    return model.eval()


def counts(active) -> bool:
    return active in COUNTED or type(active) in COUNTED


@torch.no_grad()
def alone(model: GPT, row: int, prompt: Sequence[int], new: int) -> list[int]:
    """A prompt in a batch of one, read from its beginning for each token."""
    tokens = list(prompt)
    active = model.active
    if isinstance(active, BatchSplit):
        active = active.children[0 if row < active.batch_sizes[0] else 1]
    with model.setup(active):
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def count_tokens(model: GPT) -> list[int]:
    """How many tokens each pass to come goes through the layers with."""
    found: list[int] = []
    layer = model.decoder.layers[0]
    layer.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[:2].numel()))
    return found


OTHERS = [None, "prefix", Stack("prompt", "lora", "prefix"), "unmoved"]


@pytest.mark.parametrize(
    ("shape", "active"),
    [("gpt2", active) for active in WITH]
    + [(shape, active) for shape in SHAPES if shape != "gpt2" for active in OTHERS],
    ids=str,
)
def test_prompts_that_begin_alike_are_continued_as_each_one_alone(shape: str, active):
    model = model_with(shape, active)
    found = generate(model, PROMPTS, 4, batch_size=9)
    children = active.children if isinstance(active, Parallel) else [active]
    for number, child in enumerate(children):
        model.set_active(child)
        own = found[number * len(PROMPTS) : (number + 1) * len(PROMPTS)]
        assert own == [alone(model, row, prompt, 4) for row, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    "active", [each for each in WITH if not isinstance(each, Parallel)], ids=str
)
def test_a_shared_beginning_is_read_once_where_nothing_counts_tokens_or_rows(active):
    model = model_with("gpt2", active)
    passes, virtual = count_tokens(model), model.plan.virtual_tokens
    generate(model, PROMPTS, 2, batch_size=9)
    if counts(active):
        assert not can_share(model)
        assert passes[0] != 28
    else:
        # The trunk 8, the twig 3, tips 1 and 3, twice none, branches 2 and 1; 9 and 5 beside it.
        assert passes == [virtual + 8 + 3 + 1 + 3 + 2 + 1 + 9 + 5, len(PROMPTS)]


def test_rows_of_tasks_are_read_by_themselves():
    model = model_with("gpt2", MultiTask("lora", "ia3"))
    tasks = [0, 1, 0, 1, 1, 0, 0, 1, 0]
    found = complete(model, PROMPTS, Sampling(tokens_to_generate=4), task_ids=tasks)
    for row, task, prompt in zip(found, tasks, PROMPTS, strict=True):
        model.set_active(("lora", "ia3")[task])
        assert row.tokens == alone(model, 0, prompt, 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_finished_rows_leave_and_the_others_go_on_as_if_they_had_been_alone(shape: str):
    model = model_with(shape, "lora")
    expected = [row[: 1 + row[0] % 7] for row in generate(model, PROMPTS, 7)]
    assert len(set(map(len, expected))) > 2, "rows end together"
    passes = count_tokens(model)
    found = generate(model, PROMPTS, 9, stop=lambda row: len(row) == 1 + row[0] % 7)
    assert found == expected
    going = [sum(len(row) > step for row in expected) for step in range(1, 7)]
    assert passes[1:] == [count for count in going if count]


def test_rows_go_on_behind_the_room_that_the_cache_has_from_the_start():
    model = model_with("llama", None)
    found = generate(model, PROMPTS[:2], AHEAD + 9)
    assert found == [alone(model, 0, prompt, AHEAD + 9) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_passes_are_of_one_shape_and_say_the_same(shape: str):
    model, graphs, after = model_with(shape, Stack("prompt", "lora", "prefix")), [], {}

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def ended(row: list[int]) -> bool:
        after[len(row)] = len(graphs)
        return len(row) == 1 + row[0] % 7

    sampling = Sampling(tokens_to_generate=9)
    expected = complete(model, PROMPTS, sampling, stop=ended)
    compiler = partial(torch.compile, backend=backend)
    torch.compiler.reset()
    assert complete(model, PROMPTS, sampling, stop=ended, compiler=compiler) == expected
    assert len({len(row.tokens) for row in expected}) > 2, "rows end together"
    assert (after[1], set(after.values()) - {0}, len(graphs)) == (0, {1}, 1)


def test_compiled_passes_of_batches_of_like_sizes_share_a_graph():
    model, graphs, caches = model_with("llama", "lora"), [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def compiler(layers):
        caches.append(len(caches))
        return torch.compile(layers, backend=backend)

    torch.compiler.reset()
    rows = [[word, *prompt] for word in range(3) for prompt in PROMPTS[:6]]
    rows += [row[:-1] for row in rows]
    sampling = Sampling(tokens_to_generate=9)
    expected = complete(model, rows, sampling, batch_size=5)
    assert complete(model, rows, sampling, batch_size=5, compiler=compiler) == expected
    assert len(graphs) < len(caches) / 2, (len(graphs), len(caches))


def test_draws_and_log_probabilities_are_those_of_rows_alone():
    model = model_with("gpt2", "lora")
    sampling = Sampling(
        greedy=False,
        temperature=2.0,
        top_k=20,
        repetition_penalty=1.3,
        tokens_to_generate=8,
        compute_logprob=True,
    )
    together = complete(model, PROMPTS, sampling)
    assert together[2].tokens != together[5].tokens  # the same prompt, other chances
    for number, prompt in enumerate(PROMPTS):
        (row,) = complete(model, [prompt], sampling, numbers=[number])
        assert together[number].tokens == row.tokens
        assert together[number].logprobs == pytest.approx(row.logprobs, abs=1e-4)


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(1, 6))
def test_a_tree_holds_each_prompt_and_shows_each_token_what_is_before_it(rows, most: int):
    trees = grow(rows, hidden_size=32, most=most)
    assert sorted(row for tree in trees for row in tree.rows) == list(range(len(rows)))
    for tree in trees:
        assert len(tree.rows) <= most
        seen = visibility(torch.tensor([tree.end]), len(tree.end))[0, 0]
        for row, path in zip(tree.rows, tree.paths, strict=True):
            assert [tree.tokens[column] for column in path] == rows[row]
            assert [tree.positions[column] for column in path] == list(range(len(path)))
            for place, column in enumerate(path):
                assert seen[column].nonzero()[:, 0].tolist() == path[: place + 1]


def test_a_tree_reads_no_beginning_twice_that_its_rows_share():
    (tree,) = grow([[*TRUNK, tip] for tip in range(40, 50)], hidden_size=32, most=10)
    assert tree.tokens == [*TRUNK, *range(40, 50)]
    assert tree.end[:8] == [FOREVER] * 8
    assert tree.end[8:] == [*range(9, 18), FOREVER]


def test_prompts_join_only_where_that_saves_more_than_it_costs():
    near = [[1] * 50 + [tip] for tip in (2, 3)]
    far = [[1] * 2 + [tip] * 300 for tip in (2, 3)]
    assert len(grow(near, hidden_size=32, most=9)) == 1
    assert len(grow(far, hidden_size=32, most=9)) == 2
    assert len(grow(far, hidden_size=32 * 500, most=9)) == 1
    assert len(grow([[1, 2]] * 19, hidden_size=32, most=9)) == 3


@settings(deadline=None, max_examples=40)
@given(ROWS, st.integers(1, 6), st.integers(0, 40))
def test_a_batch_holds_no_more_tokens_than_its_rows_padded_would(rows, batch_size: int, most: int):
    trees = grow(rows, 32, batch_size)
    found = list(batches(trees, batch_size, most))
    assert [t for batch in found for t in batch] == sorted(trees, key=lambda t: len(t.tokens))
    for batch in found:
        assert held(batch, most) <= batch_size * (longest(batch) + most)


def held(batch: list[Tree], most: int) -> int:
    widest, rows = max(len(tree.tokens) for tree in batch), max(len(t.rows) for t in batch)
    return len(batch) * (widest + rows * most)


def longest(batch: list[Tree]) -> int:
    return max(len(path) for tree in batch for path in tree.paths)
