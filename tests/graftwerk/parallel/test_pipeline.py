"""A pipeline of two gloo processes against one process, in double precision."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from graftwerk.adapters import (
    BottleneckConfig,
    Composition,
    LoRAConfig,
    Parallel,
    PrefixTuningConfig,
    PTuningConfig,
    Stack,
)
from graftwerk.errors import UserError
from graftwerk.generation import Sampling, complete
from graftwerk.models import build_model
from graftwerk.parallel.mesh import Mesh, check_sizes
from graftwerk.parallel.pipeline import Cut, Pipeline
from tests.graftwerk.adapters.test_interpreter import SHAPES
from tests.graftwerk.ranks import on_processes
from tests.graftwerk.tiny import shake, tokens

# A prefix whose encoder is shared by the layers of a stack is on both stages of a GPT.
PREFIX = PrefixTuningConfig(prefix_length=2, bottleneck_dim=4, weight_tying=True)
METHODS = {
    "lora": LoRAConfig(dim=2, target_modules=("all",)),
    "high": BottleneckConfig(dim=4, layer_selection=(2,)),
    "prefix": PREFIX,
    "prompt": PTuningConfig(virtual_tokens=2, embedding_dim=6, bottleneck_dim=4),
    "tied": LoRAConfig(dim=2, weight_tying=True),
}
CASES: list[tuple[str, Composition | str]] = [
    ("gpt2", Stack("lora", "prefix", "prompt", "tied")),
    ("gpt2", Stack("lora", Parallel("high", "prefix"))),
    ("gpt2", "high"),
    ("llama", Stack("prompt", Parallel("tied", "lora"))),
    ("t5", Stack("lora", "prefix", "prompt", "tied")),
    ("t5", Stack("lora", Parallel("tied", "prefix"))),
    ("t5", "high"),
    ("bert", Stack("lora", "prefix", "tied")),
]
LENGTHS = (7, 12, 3)  # of the micro-batches' rows


def model_of(shape: str, composition: Composition | str):
    torch.manual_seed(0)
    model = build_model(SHAPES[shape]).eval().double()
    shake(model)
    for name, method in METHODS.items():
        if name in str(composition):
            model.add_adapter(name, method)
            for _, _, part in model.parts(name):
                shake(part.double())
    model.freeze_base()
    model.set_active(composition)
    return model


def micros_of(model) -> list[SimpleNamespace]:
    """Micro-batches of rows of different lengths."""
    made = []
    for number, length in enumerate(LENGTHS):
        inputs = {"tokens": tokens(2, length, 23, number)}
        if model.config.architecture == "t5":
            inputs["source"] = tokens(2, length + 2, 23, number + 9)
            inputs["source_documents"] = torch.zeros(2, length + 2, dtype=torch.int64)
            inputs["source_documents"][0, -1] = -1
        inputs["select"] = torch.tensor([1, length - 1, length + 1])
        made.append(SimpleNamespace(inputs=lambda inputs=inputs: inputs))
    return made


def loss_of(logits: Tensor, micro: SimpleNamespace) -> Tensor:
    return logits.float().square().sum() if logits.dtype != torch.float64 else logits.sin().sum()


def losses_of(model) -> list[Tensor]:
    return [loss_of(model(**micro.inputs()), micro) for micro in micros_of(model)]


def gradients_of(model) -> dict[str, Tensor]:
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.device.type != "meta"
    }


def continued(model) -> list[list[int]]:
    prompts = [[5, 3, 8, 2], [7, 1], [2, 8, 6]]
    sampling = Sampling(tokens_to_generate=5, greedy=True)
    return [row.tokens for row in complete(model, prompts, sampling, eos_ids=[], batch_size=2)]


def two_stages(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = Mesh.of(torch.device("cpu"), pipeline=2)
    found = []
    for shape, composition in CASES:
        model = model_of(shape, composition)
        pipeline = Pipeline(model, mesh)
        seen: list[Tensor] = []

        def loss(answer, micro, seen=seen):
            seen.append(loss_of(answer(), micro))
            return seen[-1]

        pipeline.step(micros_of(model), loss)
        with torch.no_grad():
            again = losses_of(model)
        texts = continued(model) if shape != "bert" else None
        held = [n for n, p in model.named_parameters() if p.device.type != "meta"]
        stages = dict(pipeline.stages)
        found.append(([t.detach() for t in seen], again, gradients_of(model), texts, held, stages))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> list[list]:
    folder = tmp_path_factory.mktemp("stages")
    on_processes(2, two_stages, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{s}-{c}" for s, c in CASES])
def test_two_stages_compute_what_one_process_computes(stages, number: int):
    shape, composition = CASES[number]
    model = model_of(shape, composition)
    losses = losses_of(model)
    sum(losses).backward()
    first, second = stages[0][number], stages[1][number]
    for own, other in zip(losses, second[0], strict=True):  # the last stage has them
        torch.testing.assert_close(own, other)
    for again in (first[1], second[1]):  # a pass without gradients gives them to all
        for own, other in zip(losses, again, strict=True):
            torch.testing.assert_close(own.detach(), other)
    expected, where = gradients_of(model), first[5]
    for name, gradient in expected.items():
        parts = [one[2][name] for one in (first, second) if name in one[2]]
        assert len(parts) <= len(where[name])
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert expected
    if shape != "bert":
        assert first[3] == second[3] == continued(model)


def test_a_stage_holds_its_own_layers_and_what_it_shares(stages):
    first, second = stages[0][0], stages[1][0]
    both = {name for name, own in first[5].items() if own == (0, 1)}
    assert set(first[4]) & set(second[4]) == both
    assert any(".prefix." in name for name in both)
    assert any("linear_in" in name or "lora" in name for name in both)
    assert set(first[4]) | set(second[4]) == set(first[5])
    assert not any(".layers.1." in name for name in set(first[4]) - both)
    # A tied word embedding is on both; positions are not.
    assert "embedding.word_embeddings.weight" in both
    assert "embedding.position_embeddings.weight" not in second[4]


def test_layers_are_cut_as_equally_as_can_be():
    shape = SHAPES["gpt2"]
    cut = Cut.of(type(shape)(**{**shape.to_dict(), "num_layers": 7}), 3)
    assert [(run.first, run.stop) for run in cut.runs] == [(0, 2), (2, 4), (4, 7)]


def test_more_stages_than_layers_are_refused_with_the_number():
    with pytest.raises(UserError, match="use at most"):
        Cut.of(SHAPES["gpt2"], 99)


@pytest.mark.parametrize("split", [0, 2])
def test_a_decoder_begins_on_a_stage_that_there_is(split: int):
    with pytest.raises(UserError, match="split_rank"):
        Cut.of(SHAPES["t5"], 2, split)


def test_sizes_that_do_not_divide_the_processes_are_refused():
    with pytest.raises(UserError, match=r"multiple of 6"):
        check_sizes(8, 3, 2)
    assert check_sizes(8, 2, 2) == 2
