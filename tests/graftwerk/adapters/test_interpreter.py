"""Random nestings against `interpreter`: one row and one adapter at a time, in float64."""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftwerk.adapters import (
    Average,
    BatchSplit,
    BottleneckConfig,
    Composition,
    Fuse,
    FusionConfig,
    LoRAConfig,
    MultiTask,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Split,
    Stack,
)
from graftwerk.adapters.composition import fusions
from graftwerk.adapters.configs import BnConfig, HubLoRAConfig
from graftwerk.models import TransformerConfig, build_model
from tests.graftwerk.adapters.interpreter import Tree, interpreted
from tests.graftwerk.tiny import shake, tokens

SIZES = {
    "vocab_size": 23,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 24,
}
SHAPES = {
    "gpt2": TransformerConfig(**SIZES, max_position_embeddings=32),
    "llama": TransformerConfig(
        **SIZES,
        max_position_embeddings=32,
        num_query_groups=1,
        normalization="rmsnorm",
        position_embedding_type="rope",
        activation="swiglu",
        bias=False,
        qkv_bias=False,
    ),
    "t5": TransformerConfig(
        architecture="t5",
        **SIZES,
        max_position_embeddings=0,
        normalization="rmsnorm",
        position_embedding_type="relative",
        normalize_attention_scores=False,
        activation="relu",
        bias=False,
        qkv_bias=False,
    ),
    "bert": TransformerConfig(
        architecture="bert",
        **SIZES,
        max_position_embeddings=32,
        transformer_block_type="post_ln",
        final_layernorm=False,
        embedding_layernorm=True,
        num_token_types=2,
    ),
}
FUSABLE = {
    "sequential": BnConfig(reduction_factor=4, original_ln_before=True),
    "houlsby": BnConfig(mh_adapter=True, cross_adapter=True, reduction_factor=4, ln_after=True),
    "ending": BnConfig(reduction_factor=8, original_ln_after=False, residual_before_ln=False),
    "beside": BnConfig(reduction_factor=4, is_parallel=True, scaling=4.0, leave_out=(0,)),
    "gated": BnConfig(mh_adapter=True, reduction_factor=8, use_gating=True, leave_out=(1,)),
    "nemo": BottleneckConfig(dim=3),
}
ANYWHERE = {
    **FUSABLE,
    "lora": LoRAConfig(dim=2, target_modules=("all",)),
    "hub_lora": HubLoRAConfig(places=("query", "value", "fc1"), r=2, use_gating=True),
    "ia3": HubLoRAConfig(
        places=("key", "value", "fc2"), r=1, composition_mode="scale", init_weights="ia3"
    ),
    "inverse": BnConfig(reduction_factor=8, inv_adapter="nice", leave_out=(0, 1)),
}
WHOLE_ROWS = {
    **ANYWHERE,
    "short": PrefixTuningConfig(prefix_length=1, reparametrise=False),
    "long": PrefixTuningConfig(prefix_length=3, bottleneck_dim=4, use_gating=True),
    "prompt": PromptTuningConfig(virtual_tokens=2, shifts_positions=False),
    "words": PromptTuningConfig(virtual_tokens=2, place="word_embedding", shifts_positions=False),
}
ROWS, LENGTH = 3, 5


@cache
def model_of(shape: str):
    """A model with every adapter of `WHOLE_ROWS`, in float64."""
    torch.manual_seed(0)
    model = build_model(SHAPES[shape])
    shake(model)
    for seed, (name, config) in enumerate(WHOLE_ROWS.items()):
        model.add_adapter(name, config)
        for _, _, part in model.parts(name):
            shake(part, seed + 1)
    return model.double().eval()


def with_fusions(model, tree: Tree):
    """The model with a fusion for each `Fuse` of a composition."""
    for number, fuse in enumerate(fusions(tree)):
        if fuse.name not in model.fusions:
            config = FusionConfig() if number % 2 else FusionConfig(query_before_ln=True)
            model.add_fusion(fuse.name, config)
            for _, _, layer in model.fusion_layers(fuse.name):
                shake(layer.double().eval(), number + 50)
    return model


SOURCE, TARGET = tokens(ROWS, LENGTH, 23), tokens(ROWS, 4, 23, seed=1)
DOCUMENTS = torch.tensor([[0] * 5, [0] * 3 + [-1] * 2, [0] * 4 + [-1]])
END = torch.tensor([[5] * 5, [2, 2, 5, 5, 5], [5] * 5])
TASKS = torch.tensor([1, 0, 1])


def run(model, rows: slice) -> Tensor:
    """The model's answer to some rows: packed, or padded."""
    more = {"task_ids": TASKS[rows]}
    if model.config.architecture == "t5":
        source = {"source": SOURCE[rows], "source_documents": DOCUMENTS[rows]}
        return model(TARGET[rows], **source, **more)
    if model.config.architecture == "bert":
        return model(SOURCE[rows], documents=DOCUMENTS[rows], **more)
    return model(SOURCE[rows], end=END[rows], **more)


def expected(model, tree: Tree, skip_layers=()) -> Tensor:
    def row(n: int) -> Tensor:
        return run(model, slice(n, n + 1))

    return interpreted(model, tree, ROWS, row, TASKS, skip_layers)


def check(shape: str, tree: Tree, skip_layers=()) -> None:
    model = with_fusions(model_of(shape), tree)
    with torch.no_grad():
        try:
            model.set_active(tree, skip_layers)
            found = run(model, slice(None))
        finally:
            model.set_active(None)
        wanted = expected(model, tree, skip_layers)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# ---- random compositions

Strategy = st.SearchStrategy[Tree]


def some(children: Strategy, most: int = 3) -> st.SearchStrategy[list[Tree]]:
    return st.lists(children, min_size=1, max_size=most)


def fuse() -> st.SearchStrategy[Fuse]:
    name = st.sampled_from(sorted(FUSABLE))
    child = st.one_of(name, st.lists(name, min_size=1, max_size=2).map(lambda n: Stack(*n)))
    return some(child).map(lambda children: Fuse(*children))


@st.composite
def split(draw, depth: int, rows: int) -> Split:
    child = nested(depth - 1, rows, ANYWHERE, Split, Stack, BatchSplit, Average)
    children = draw(some(child))
    return Split(*children, splits=draw(lengths(len(children))))


def lengths(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, LENGTH), min_size=count, max_size=count)


@st.composite
def batch_split(draw, depth: int, rows: int, pool) -> BatchSplit:
    cuts = draw(st.lists(st.booleans(), min_size=rows - 1, max_size=rows - 1))
    edges = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), rows]
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    inner = (Stack, Split, BatchSplit, Average)
    children = [draw(nested(depth - 1, size, pool, *inner)) for size in sizes]
    return BatchSplit(*children, batch_sizes=sizes)


@st.composite
def average(draw, depth: int, rows: int) -> Average:
    pool = {name: config for name, config in ANYWHERE.items()}
    children = draw(some(nested(depth - 1, rows, pool, Stack, Split, BatchSplit)))
    weight = st.floats(0.125, 4)
    weights = st.lists(weight, min_size=len(children), max_size=len(children))
    return Average(
        *children, weights=draw(st.none() | weights), normalize_weights=draw(st.booleans())
    )


@st.composite
def stack(draw, depth: int, rows: int, pool, wide: int = 0) -> Stack:
    inner = [Fuse, Split, BatchSplit, Average, MultiTask]
    children = draw(some(nested(depth - 1, rows, pool, *inner)))
    if wide:
        place = draw(st.integers(0, len(children)))
        children.insert(place, draw(parallel(depth - 1, rows, wide)))
    return Stack(*children)


@st.composite
def parallel(draw, depth: int, rows: int, wide: int) -> Parallel:
    child = nested(depth - 1, rows, WHOLE_ROWS, Stack, BatchSplit, Average, Fuse)
    return Parallel(*draw(st.lists(child, min_size=wide, max_size=wide)))


def multi_task(pool) -> st.SearchStrategy[MultiTask]:
    name = st.sampled_from(sorted(pool))
    return st.lists(name, min_size=2, max_size=3).map(lambda children: MultiTask(*children))


def nested(depth: int, rows: int, pool, *kinds: type[Composition]) -> Strategy:
    """A name or, while `depth` lasts, one of the blocks `kinds` for so many rows."""
    leaf = st.sampled_from(sorted(pool))
    if depth < 1:
        return leaf
    blocks = {
        Stack: lambda: stack(depth, rows, pool),
        Fuse: fuse,
        Split: lambda: split(depth, rows),
        BatchSplit: lambda: batch_split(depth, rows, pool),
        Average: lambda: average(depth, rows),
        MultiTask: lambda: multi_task(pool),
    }
    return st.one_of(leaf, *(st.deferred(blocks[kind]) for kind in kinds))


def fits(tree: Tree) -> bool:
    """Whether what stands side by side puts equally many columns before a row."""
    return not isinstance(before_rows(tree), str)


def before_rows(tree: Tree) -> int | str:
    if isinstance(tree, str):
        return WHOLE_ROWS[tree].columns
    each = [before_rows(child) for child in tree.children]
    if any(isinstance(number, str) for number in each):
        return "unlike"
    if isinstance(tree, Stack):
        return sum(number for number in each if isinstance(number, int))
    return each[0] if len(set(each)) == 1 else "unlike"


@st.composite
def compositions(draw) -> Tree:
    wide = draw(st.integers(0, 3))
    kinds = (Stack, Fuse, Split, BatchSplit, Average, MultiTask)
    trees = [nested(3, ROWS, WHOLE_ROWS, *kinds)]
    if wide:
        trees = [parallel(3, ROWS, wide), stack(3, ROWS, WHOLE_ROWS, wide)]
    return draw(st.one_of(trees))


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=20, deadline=None)
@given(tree=compositions(), skip_layers=st.sampled_from([(), (), (), (0,), (1,), (0, 2), (3,)]))
def test_a_random_composition_is_what_the_interpreter_makes_of_it(shape, tree, skip_layers):
    assume(fits(tree))
    check(shape, tree, skip_layers)
