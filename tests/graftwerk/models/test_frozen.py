"""What is frozen costs no backward pass, and keeps nothing for one."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from graftwerk.adapters import LoRAConfig
from tests.graftwerk.tiny import SHAPES, tiny_gpt

TOKENS = torch.arange(18).view(2, 9)


def adapted(layers: int):
    """A tiny GPT-2 with LoRA, which alone is trained."""
    model = tiny_gpt(replace(SHAPES["gpt2"], num_layers=layers))
    model.add_adapter("a", LoRAConfig(dim=2))
    model.train_only(["a"])
    model.set_active("a")
    return model


def kept(run: Callable[[], object]) -> list[Tensor]:
    """What a pass keeps for the backward pass."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return found


def test_nothing_is_kept_below_the_lowest_adapter():
    one, three = adapted(1), adapted(3)
    three.set_active("a", skip_layers=(0, 1))
    assert len(kept(lambda: three(TOKENS))) == len(kept(lambda: one(TOKENS)))
    assert len(kept(lambda: three(TOKENS))) > 5


def test_frozen_projections_keep_no_input():
    model, inputs = adapted(2), []
    for name, module in model.named_modules():
        if name.endswith(("linear_fc1", "linear_fc2")):
            module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    held = {tensor.data_ptr() for tensor in kept(lambda: model(TOKENS))}
    assert len(inputs) == 4
    assert not held & {tensor.data_ptr() for tensor in inputs}


def test_embeddings_have_no_gradient():
    model, entered = adapted(2), []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    model(TOKENS).sum().backward()
    assert not entered[0].requires_grad
    assert all(
        (p.grad is not None) == (".adapter_layer." in n) for n, p in model.named_parameters()
    )
