"""Compiled layers: the same loss and gradients, by few graphs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from graftwerk.adapters import BottleneckConfig, LoRAConfig, Parallel, Stack
from graftwerk.adapters.masks import chances, dropouts
from graftwerk.errors import UserError
from graftwerk.models import GPT
from graftwerk.parallel.compiled import compile_layers, compiles
from graftwerk.parallel.recompute import recompute
from graftwerk.training.loss import label_losses
from tests.graftwerk.models.flexible import packed_t5
from tests.graftwerk.tiny import LLAMA, shake, tiny_gpt

COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOKENS = torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(0))
END = torch.tensor([[10] * 10 + [30] * 20, [7] * 5 + [5] * 0 + [30] * 25])  # texts of a packed row
POSITIONS = torch.tensor([[*range(10), *range(20)], [*range(5), *range(25)]])
SELECT, LABELS = torch.tensor([4, 17, 33, 58]), torch.tensor([3, 50, 9, 20])


class Graphs:
    """A compiler that counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.made = 0
        torch.compiler.reset()

    def __call__(self, function: Callable) -> Callable:
        return torch.compile(function, backend=self.backend)

    def backend(self, graph: nn.Module, _: object) -> Callable:
        self.made += 1
        return graph.forward


def adapted(layers: int = 3, dropout: float = 0.0) -> GPT:
    """A tiny LLaMA with LoRA everywhere and a bottleneck, of which each can be active."""
    model = tiny_gpt(replace(LLAMA, num_layers=layers))
    targets = ("attention", "mlp")
    model.add_adapter("a", LoRAConfig(dim=4, dropout=dropout, target_modules=targets))
    model.add_adapter("b", LoRAConfig(dim=2, dropout=dropout))
    model.add_adapter("c", BottleneckConfig(dim=4, dropout=dropout))
    for name in "abc":
        for _, _, part in model.parts(name):
            shake(part)
            part.train()
    model.freeze_base()
    model.set_active("a")
    return model


def step(model: GPT, number: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step of packed rows."""
    model.zero_grad()
    chance = chances(7, [2 * number, 2 * number + 1])
    logits = model(TOKENS, POSITIONS, END, select=SELECT, chance=chance)
    labels = LABELS.repeat(len(logits) // len(LABELS))
    loss = label_losses(logits, labels, torch.ones(len(labels))).sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_alike(found: tuple, wanted: tuple) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert wanted[1].keys() == found[1].keys()
    assert wanted[1]
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_share_graphs_and_steps_need_no_others(dropout: float):
    plain, compiled, graphs = adapted(5, dropout), adapted(5, dropout), Graphs()
    compile_layers(compiled, graphs)
    made = []
    for number in range(4):
        check_alike(step(compiled, number), step(plain, number))
        made.append(graphs.made)
    assert made[-1] == made[1] <= 2, "one of the first layer, whose input has no gradient"


def test_a_change_of_what_is_active_is_followed():
    plain, compiled, graphs = adapted(), adapted(), Graphs()
    compile_layers(compiled, graphs)
    for active in ("a", Parallel("a", "b"), None, Stack("c", "a"), "a"):
        for model in (plain, compiled):
            model.set_active(active, skip_layers=(1,) if active == "a" else ())
        if active is None:
            with torch.no_grad():
                outputs = [model(TOKENS, POSITIONS, END) for model in (plain, compiled)]
            torch.testing.assert_close(*outputs)
        else:
            check_alike(step(compiled), step(plain))
    assert graphs.made > 3


@torch.no_grad()
def test_tiles_and_distances_are_within_the_graphs_of_layers():
    plain, compiled, graphs = packed_t5()[0], packed_t5()[0], Graphs()
    compiled.attention = "flex"
    compile_layers(compiled, graphs)
    for seed in range(3):
        inputs = packed_t5(seed)[1]
        torch.testing.assert_close(compiled(**inputs), plain(**inputs), rtol=1e-4, atol=1e-4)
    assert graphs.made == 2, "one of the encoder, one of the decoder"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_read_encoder_states_learn_alike(dropout: float):
    (plain, inputs), (compiled, _), graphs = packed_t5(), packed_t5(), Graphs()
    compile_layers(compiled, graphs)
    for number in range(3):
        found = []
        for model in (compiled, plain):
            for _, one in dropouts(model.train()):
                one.p = dropout
            model.zero_grad()
            loss = model(**inputs, chance=chances(7, [number, number + 1])).square().mean()
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append((loss.detach(), grads))
        assert any("cross" in name for name in found[0][1])
        check_alike(*found)
    assert graphs.made <= 4, "two of each stack: the first layer's input has no gradient"


@torch.no_grad()
def test_more_graphs_are_made_than_torch_allows_by_itself():
    model, graphs = tiny_gpt(replace(LLAMA, num_layers=1)), Graphs()
    for rank in range(1, 11):
        model.add_adapter(f"r{rank}", LoRAConfig(dim=rank))
    compile_layers(model, graphs)
    for rank in range(1, 11):
        model.set_active(f"r{rank}")
        model(TOKENS)
    assert graphs.made == 10


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_computed_again_give_the_same_gradients(dropout: float):
    plain, compiled = adapted(dropout=dropout), adapted(dropout=dropout)
    compile_layers(compiled, partial(torch.compile, backend="aot_eager"))
    recompute(compiled, "full")
    for number in range(3):
        check_alike(step(compiled, number), step(plain, number))


def test_compiled_layers_keep_no_input_of_what_is_frozen():
    sizes = []
    for compiled in (False, True):
        model, held = adapted(), {}
        if compiled:
            compile_layers(model, partial(torch.compile, backend="aot_eager"))
            step(model)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor, held=held, weights=weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.set_active("b", skip_layers=(0,))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(TOKENS, POSITIONS, END)
        sizes.append(sum(held.values()))
    assert sizes[1] <= sizes[0]


def test_nothing_flows_back_below_the_lowest_adapter():
    model = adapted()
    model.set_active("a", skip_layers=(0, 1))
    compile_layers(model, partial(torch.compile, backend="aot_eager"))
    entered: list[bool] = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _, given: entered.append(given[0].requires_grad))
    _, gradients = step(model)
    assert entered == [False, False, False]
    assert gradients
    assert all(name.startswith("decoder.layers.2.") for name in gradients)


@pytest.mark.long
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler, and none is here")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_kernels_give_the_loss_and_gradients_of_plain_layers(dropout: float):
    plain, compiled = adapted(dropout=dropout), adapted(dropout=dropout)
    torch.compiler.reset()
    compile_layers(compiled)
    for number, active in enumerate(("a", "a", Parallel("a", "b"), "a")):
        plain.set_active(active)
        compiled.set_active(active)
        check_alike(step(compiled, number), step(plain, number))


PACKED = {"data": {"packed_sequence_size": 512}}


@pytest.mark.parametrize(
    ("model", "device", "expected"),
    [
        (PACKED, CPU, False),
        ({}, GPU, False),
        (PACKED, GPU, True),
        (PACKED | {"compile": False}, GPU, False),
        ({"compile": True}, CPU, True),
        (PACKED | {"tensor_model_parallel_size": 2}, GPU, False),
        (PACKED | {"peft": {"peft_scheme": "qlora"}}, GPU, False),
    ],
)
def test_auto_compiles_packed_rows_on_gpus(model, device, expected, monkeypatch):
    monkeypatch.setattr("graftwerk.parallel.compiled.why_not_compiled", lambda kind: None)
    assert compiles(model, device) == expected


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"compile": "yes"}, "'yes' is not known"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size is 2"),
        ({"pipeline_model_parallel_size": 4}, "pipeline_model_parallel_size is 4"),
        ({"use_fsdp": True}, "use_fsdp"),
        ({"activations_checkpoint_granularity": "selective"}, "selective"),
        ({"peft": {"peft_scheme": "qlora"}}, "4 bits"),
        ({}, "no kernels"),
    ],
)
def test_what_cannot_be_compiled_is_refused_where_it_is_asked_for(more, word, monkeypatch):
    monkeypatch.setattr("graftwerk.parallel.compiled.why_not_compiled", lambda kind: "no kernels")
    with pytest.raises(UserError, match=word):
        compiles({"compile": True, **more}, GPU)
