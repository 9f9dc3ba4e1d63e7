"""What compositions go through: files, caches, compilers, bfloat16, checkpointing, threads."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from graftwerk.adapters import (
    Average,
    BatchSplit,
    BottleneckConfig,
    Fuse,
    LoRAConfig,
    MultiTask,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Split,
    Stack,
    parse,
)
from graftwerk.adapters.configs import BnConfig, HubLoRAConfig
from graftwerk.checkpoints import load_adapters, save_adapters
from graftwerk.generation.decoding import generate
from graftwerk.models import TransformerConfig, build_model
from graftwerk.models.layers import TransformerLayer
from tests.graftwerk.adapters.test_interpreter import SHAPES
from tests.graftwerk.tiny import shake, tokens

METHODS = {
    "a": BnConfig(mh_adapter=True, reduction_factor=4),
    "b": BnConfig(reduction_factor=4, original_ln_after=False, original_ln_before=True),
    "high": BnConfig(reduction_factor=4, leave_out=(0,)),
    "gated": BnConfig(reduction_factor=4, use_gating=True),
    "gated_lora": HubLoRAConfig(places=("query", "fc1"), r=2, use_gating=True),
    "lora": LoRAConfig(dim=2, target_modules=("all",)),
    "nemo": BottleneckConfig(dim=3),
    "short": PrefixTuningConfig(prefix_length=1, reparametrise=False),
    "long": PrefixTuningConfig(prefix_length=3, bottleneck_dim=4),
    "prompt": PromptTuningConfig(virtual_tokens=2),
}
FUSIONS = ("a,b",)
ROWS = 3
SOURCE, TARGET = tokens(ROWS, 5, 23), tokens(ROWS, 4, 23, seed=1)
DOCUMENTS = torch.tensor([[0] * 5, [0] * 3 + [-1] * 2, [0] * 5])
END = torch.tensor([[5] * 5, [2, 2, 5, 5, 5], [5] * 5])
TASKS = torch.tensor([1, 0, 1])
COMPOSITIONS = [
    Stack("lora", Parallel("a", Stack("short", Fuse("a", "b")), "long")),
    Stack(
        Parallel("b", Average("a", "nemo", weights=[0.3, 0.9])),
        BatchSplit(
            "lora", BatchSplit("gated", "gated_lora", batch_sizes=[1, 1]), batch_sizes=[1, 2]
        ),
    ),
    Stack("prompt", Split("a", Split("nemo", "lora", splits=[1, 1]), splits=[1, 9])),
    Stack(Fuse(Stack("nemo", "a"), "b"), MultiTask("lora", "gated")),
    Stack("lora", Parallel("high", Stack("high", "high"))),  # the first layer sees one copy
]


def make(name: str, names=METHODS, shape: TransformerConfig | None = None):
    torch.manual_seed(0)
    model = build_model(shape or SHAPES[name])
    shake(model)
    for name in names:
        model.add_adapter(name, METHODS[name])
    for key in FUSIONS if "b" in names else ():
        model.add_fusion(key)
    for seed, name in enumerate(names):
        for _, _, part in model.parts(name):
            shake(part, seed + 1)
    for key in model.fusions:
        for _, _, layer in model.fusion_layers(key):
            shake(layer, 20)
    return model.eval()


def run(model) -> torch.Tensor:
    if model.config.architecture == "t5":
        source = {"source": SOURCE, "source_documents": DOCUMENTS}
        return model(TARGET, **source, task_ids=TASKS)
    if model.config.architecture == "bert":
        return model(SOURCE, documents=DOCUMENTS, task_ids=TASKS)
    return model(SOURCE, end=END, task_ids=TASKS)


everywhere = pytest.mark.parametrize("shape", SHAPES)


def results(model) -> list[torch.Tensor]:
    """What the model says under each composition."""
    found = []
    for tree in COMPOSITIONS:
        model.set_active(parse(str(tree)))
        found.append(run(model))
    return found


@everywhere
@torch.no_grad()
def test_files_of_adapters_and_fusions_and_its_text_bring_a_composition_back(shape, tmp_path):
    model = make(shape)
    save_adapters(model, list(METHODS), tmp_path / "adapters", {}, fusions=list(model.fusions))
    fresh = make(shape, ())
    load_adapters(fresh, tmp_path / "adapters")
    for own, other in zip(results(fresh), results(model), strict=True):
        assert torch.equal(own, other)


@torch.no_grad()
def test_a_copy_of_a_model_has_its_composition():
    model = make("gpt2")
    for tree in COMPOSITIONS:
        model.set_active(tree)
        assert torch.equal(run(copy.deepcopy(model)), run(model))


@everywhere
@torch.no_grad()
def test_in_bfloat16_a_composition_is_near_what_it_is_in_float32(shape):
    model = make(shape)
    exact = results(model)
    for _, parameter in model.base_parameters():
        parameter.data = parameter.data.bfloat16()
    for own, rounded in zip(exact, results(model), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded - own).square().mean() < 0.03**2 * own.square().mean()


@everywhere
def test_checkpointed_layers_give_the_same_gradients(shape, monkeypatch):
    model = make(shape)
    model.train_only(METHODS, model.fusions)
    model.train()

    def gradients(tree) -> list[torch.Tensor]:
        model.zero_grad()
        model.set_active(tree)
        (run(model).square().mean() + model.fusion_loss()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, forward, runs = [gradients(tree) for tree in COMPOSITIONS], TransformerLayer.forward, []

    def again(layer, x, context):
        runs.append(layer)
        return checkpoint(forward, layer, x, context, use_reentrant=False)

    monkeypatch.setattr(TransformerLayer, "forward", again)
    for tree, expected in zip(COMPOSITIONS, plain, strict=True):
        for own, other in zip(gradients(tree), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    assert runs


@torch.no_grad()
def test_threads_have_compositions_of_their_own():
    model = make("gpt2")
    expected = results(model)
    model.set_active("a")
    own = run(model)

    def many(number: int) -> bool:
        with torch.no_grad(), model.setup(COMPOSITIONS[number]):
            return all(torch.equal(run(model), expected[number]) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(many, [0, 1, 2, 3, 2, 1, 0, 3]))
        assert torch.equal(run(model), own)
    assert all(found)


COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler, and none is here")
@torch.no_grad()
def test_a_compiled_model_does_what_the_model_does():
    names = METHODS.keys() - {"high"}
    model = make("gpt2", sorted(names), replace(SHAPES["gpt2"], num_layers=1))
    model.set_active(COMPOSITIONS[0])
    expected = run(model)
    model.compile()
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@torch.no_grad()
def test_a_compiled_model_follows_a_change_of_its_composition():
    model, traced = make("gpt2"), []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    model.compile(backend=backend)
    for tree in (COMPOSITIONS[0], None, COMPOSITIONS[2], COMPOSITIONS[0]):
        model.set_active(tree)
        torch.testing.assert_close(run(model), model.forward(SOURCE, end=END, task_ids=TASKS))
        with model.setup("a"):
            torch.testing.assert_close(run(model), model.forward(SOURCE, end=END))
    assert traced


# ---- generation

PROMPTS = [[5, 3], [7, 1, 9, 4], [2, 8, 6], [11]]


def continued(model, prompts=PROMPTS, new: int = 6, **how) -> list[list[int]]:
    return generate(model, prompts, new, **how)


@torch.no_grad()
def without_cache(model, prompts, task=None, new: int = 6) -> list[list[int]]:
    """Each prompt alone, read from its beginning for each token."""
    found = []
    for prompt in prompts:
        row: list[int] = []
        for _ in range(new):
            if model.config.architecture == "t5":
                start = [model.config.decoder_start_token_id, *row]
                logits = model(torch.tensor([start]), source=torch.tensor([prompt]))
            else:
                logits = model(torch.tensor([[*prompt, *row]]))
            row.append(int(logits[0, -1].argmax()))
        found.append(row)
    return found


ALONE = ["a", "gated", "gated_lora", "long", Stack("prompt", "b"), Split("a", "b", splits=[2, 3])]


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("tree", ALONE, ids=str)
def test_generation_with_a_cache_and_in_a_batch_is_that_without(shape, tree):
    model = make(shape)
    model.set_active(tree)
    assert continued(model) == without_cache(model, PROMPTS)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
def test_under_parallel_each_child_continues_every_prompt(shape):
    model = make(shape)
    children = ("long", "a", Stack("short", Fuse("a", "b")), "gated_lora")
    model.set_active(Stack("lora", Parallel(*children)))
    found = continued(model)
    expected = []
    for child in children:
        members = child.children if isinstance(child, Stack) else (child,)
        model.set_active(Stack("lora", *members))
        expected += without_cache(model, PROMPTS)
    assert found == expected


@pytest.mark.parametrize("shape", ["gpt2", "t5"])
@pytest.mark.parametrize("inner", ["lora", "gated"])
def test_rows_of_a_batch_split_keep_their_child_when_others_have_left(shape, inner):
    model = make(shape)
    nested = BatchSplit(inner, "long", batch_sizes=[1, 1])
    expected = []
    for child, prompt in zip(("a", "b", inner, "long"), PROMPTS, strict=True):
        model.set_active(child)
        expected += without_cache(model, [prompt])
    model.set_active(BatchSplit("a", "b", nested, batch_sizes=[1, 1, 2]))
    assert continued(model) == expected
    ending = {row[1] for row in expected[:2]}  # the first rows leave after a token or two
    ended = [cut_before(row, ending) for row in expected]
    assert len({len(row) for row in ended}) > 1
    assert continued(model, eos_ids=ending) == ended


def cut_before(row: list[int], ending: set[int]) -> list[int]:
    stops = [place for place, token in enumerate(row) if token in ending]
    return row[: stops[0]] if stops else row
