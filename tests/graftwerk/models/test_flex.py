"""FlexAttention of packed rows against masks. On a CPU torch runs it plainly, forward and back."""

import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from graftwerk.adapters import (
    LoRAConfig,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    Stack,
)
from graftwerk.models.flex import Blocks
from graftwerk.models.positions import RelativePosition, of_documents, visibility
from tests.graftwerk.models.flexible import (
    LENGTH,
    documents,
    forest,
    forests,
    gradients_on_a_cpu,
    packed_t5,
)
from tests.graftwerk.models.test_encoders import CONFIGS
from tests.graftwerk.tiny import LLAMA, shake, tiny_gpt

COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
WINDOWED = replace(LLAMA, num_layers=2, window_size=40, window_layers=(1,))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [0, 30, 200])
def test_tiles_hold_the_mask(seed: int, window: int):
    end, positions = forests(seed, seed + 100)
    made = Blocks.causal(2, end, positions, window).of(windowed=True)
    assert made is not None
    expected = visibility(end, LENGTH, positions if window else None, window)
    said = torch_flex.create_mask(made.mask_mod, 2, None, LENGTH, LENGTH, "cpu")
    torch.testing.assert_close(said, expected)
    theirs = torch_flex.create_block_mask(made.mask_mod, 2, None, LENGTH, LENGTH, "cpu")
    missed = theirs.to_dense().bool() & ~made.to_dense().bool()
    assert not missed.any(), "a tile is skipped in which somebody is seen"
    if not window:
        torch.testing.assert_close(made.to_dense(), theirs.to_dense())
    assert torch.equal(made.full_kv_num_blocks, theirs.full_kv_num_blocks)
    for query_tile in range(3):
        for row in range(2):
            count = int(theirs.full_kv_num_blocks[row, 0, query_tile])
            one, other = (
                m.full_kv_indices[row, 0, query_tile, :count].sort().values for m in (made, theirs)
            )
            assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("read", [0, 140, 400])
def test_tiles_hold_the_documents(seed: int, read: int):
    asking = torch.cat([documents(seed, LENGTH), documents(seed + 100, LENGTH)])
    asked = torch.cat([documents(seed + n, read) for n in (7, 8)]) if read else asking
    made = Blocks.of_documents(asking, asked).whole
    assert made is not None
    sizes = 2, None, LENGTH, asked.shape[1]
    said = torch_flex.create_mask(made.mask_mod, *sizes, "cpu")
    torch.testing.assert_close(said[:, 0], of_documents(asking, asked))
    theirs = torch_flex.create_block_mask(made.mask_mod, *sizes, "cpu")
    torch.testing.assert_close(made.to_dense(), theirs.to_dense())
    assert torch.equal(made.full_kv_num_blocks, theirs.full_kv_num_blocks)


def test_documents_in_no_order_are_seen_all():
    asking = documents(3, LENGTH)
    asked = asking[:, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))]
    made = Blocks.of_documents(asking, asked).whole
    assert made is not None
    theirs = torch_flex.create_block_mask(made.mask_mod, 1, None, LENGTH, LENGTH, "cpu")
    assert not (theirs.to_dense().bool() & ~made.to_dense().bool()).any()


def test_scores_of_distances_are_those_of_their_matrix():
    torch.manual_seed(0)
    for bidirectional in (True, False):
        table = RelativePosition(CONFIGS["t5"], bidirectional)
        by_distance = table.by_distance(LENGTH)
        place = torch.arange(LENGTH)
        matrix = by_distance[:, place - place[:, None] + LENGTH - 1]
        assert torch.equal(matrix[None], table(LENGTH, LENGTH))


def adapted(*configs, shape=WINDOWED, active="a"):
    model = tiny_gpt(shape)
    for name, config in zip("abc", configs, strict=False):
        model.add_adapter(name, config)
        for _, _, part in model.parts(name):
            shake(part)
    model.freeze_base()
    model.set_active(active)
    return model


def both(model, end, positions):
    """Logits and gradients by masks, and by FlexAttention."""
    tokens = torch.randint(0, 60, end.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for way in ("sdpa", "flex"):
        model.attention = way
        model.zero_grad()
        with gradients_on_a_cpu():
            logits = model(tokens, positions, end)
            logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), grads))
    return found


PROMPT = PromptTuningConfig(virtual_tokens=5)
CASES = {
    "grouped queries, a window in one layer": ("a", LoRAConfig(dim=4)),
    "prompts before the row": (Stack("b", "a"), LoRAConfig(dim=4), PROMPT),
    "copies of the batch": (Parallel("a", "b"), LoRAConfig(dim=4), LoRAConfig(dim=2)),
    "places in texts": ("a", ReftConfig(prefix_positions=2, suffix_positions=0)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_masks_say_and_its_gradients_are_theirs(case: str):
    active, *configs = CASES[case]
    model = adapted(*configs, active=active)
    with patch.object(Blocks, "attend", autospec=True, side_effect=Blocks.attend) as attend:
        masks, flex = both(model, *forests(3, 4))
    assert attend.call_count == model.config.num_layers
    torch.testing.assert_close(flex[0], masks[0], rtol=1e-5, atol=1e-5)
    assert masks[1], "nothing was trained"
    torch.testing.assert_close(flex[1], masks[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_plain_rows_go_there_for_their_window_alone():
    model = adapted(LoRAConfig(dim=4))
    tokens = torch.randint(0, 60, (2, LENGTH))
    expected = model(tokens)
    model.attention = "flex"
    with patch.object(Blocks, "attend", autospec=True, side_effect=Blocks.attend) as attend:
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert attend.call_count == 1


def test_what_it_does_not_know_goes_by_masks():
    end, positions = forest(0)
    tokens = torch.zeros_like(end)
    prefixed = adapted(PrefixTuningConfig(prefix_length=3))
    dropping = adapted(LoRAConfig(dim=4), shape=replace(WINDOWED, attention_dropout=0.1))
    dropping.train()
    for model in (prefixed, dropping):
        model.attention = "flex"
        context = model.begin(tokens, positions, end).context
        assert context.blocks is None
        assert context.mask is not None
    dropping.eval()
    assert dropping.begin(tokens, positions, end).context.blocks is not None
    dropping.attention = "auto"
    assert dropping.begin(tokens, positions, end).context.blocks is None, "auto is for GPUs"


@torch.no_grad()
def test_other_texts_need_no_other_kernel():
    kernels = []

    def backend(graph, _):
        kernels.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(torch_flex.flex_attention, backend=backend)
    model = adapted(LoRAConfig(dim=4), shape=replace(LLAMA, num_layers=2))
    model.attention = "flex"
    with patch.dict("graftwerk.models.flex._kernels", {"cpu": compiled}):
        for seed in range(4):
            end, positions = forest(seed)
            model(torch.zeros_like(end), positions, end)
    assert len(kernels) == 1


def test_a_table_that_is_trained_goes_by_masks():
    model, inputs = packed_t5()
    model.attention = "flex"
    with patch.object(Blocks, "attend", autospec=True, side_effect=Blocks.attend) as attend:
        with torch.no_grad():
            model(**inputs)
        assert attend.call_count == 2 + 3 * 2
        model.requires_grad_(True)
        model(**inputs)
        assert attend.call_count == 2 + 3 * 2


@pytest.mark.long
@pytest.mark.skipif(not COMPILER, reason="a C++ compiler is needed")
@torch.no_grad()
def test_the_compiled_kernel_says_what_masks_say():
    torch.compiler.reset()
    model = adapted(LoRAConfig(dim=4), shape=replace(WINDOWED, hidden_size=64))
    end, positions = forests(5, 6)
    tokens = torch.randint(0, 60, end.shape, generator=torch.Generator().manual_seed(1))
    expected = model(tokens, positions, end)
    model.attention = "flex"
    compiled = torch.compile(torch_flex.flex_attention)
    with patch.dict("graftwerk.models.flex._kernels", {"cpu": compiled}):
        torch.testing.assert_close(model(tokens, positions, end), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.skipif(not COMPILER, reason="a C++ compiler is needed")
@torch.no_grad()
def test_the_compiled_kernel_knows_documents_and_distances():
    torch.compiler.reset()
    model, inputs = packed_t5()
    expected = model(**inputs)
    model.attention = "flex"
    compiled = torch.compile(torch_flex.flex_attention)
    with patch.dict("graftwerk.models.flex._kernels", {"cpu": compiled}):
        torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)
