"""Tensor parallelism over two gloo processes against one process, in double precision."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PTuningConfig,
    Stack,
)
from graftwerk.errors import UserError
from graftwerk.models import GPT
from graftwerk.parallel.tensor import gather, layout_of, parallelize, sum_partial_gradients
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt, tokens

TARGETS = ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")
ADAPTERS = {
    "lora": LoRAConfig(dim=4, alpha=8, target_modules=TARGETS),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(dim=4),
    "tied": LoRAConfig(dim=2, weight_tying=True),
    "prompt": PTuningConfig(virtual_tokens=2, embedding_dim=6, bottleneck_dim=4),
    "prefix": PrefixTuningConfig(prefix_length=2, bottleneck_dim=4),
    "rows": PrefixTuningConfig(prefix_length=2, reparametrise=False),
}


def model_with_adapters(shape: str) -> GPT:
    model = tiny_gpt(SHAPES[shape]).double()
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model.add_adapter(name, config)
        for _, _, part in model.parts(name):
            shake(part.double(), seed)
    model.freeze_base()
    model.set_active(Stack(*ADAPTERS))
    return model


def one_step(model: GPT, reduce: Callable[[], None] = lambda: None) -> None:
    """One plain SGD step, so that weights differ by exactly the gradient."""
    batch = tokens()
    logits = model(batch[:, :-1]).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
    reduce()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trainable, lr=1.0).step()


def two_ranks(rank: int, folder: Path, shape: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    group = mesh.get_group()
    model = model_with_adapters(shape)
    parallelize(model, mesh)
    one_step(model, lambda: sum_partial_gradients(model.parameters(), group))
    state = {
        name: gather(parameter.detach(), layout_of(parameter), group)
        for name, parameter in model.named_parameters()
    }
    torch.save((state, model(tokens()).detach()), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_on_two_ranks_equals_one_process(shape: str, tmp_path: Path):
    mp.spawn(two_ranks, (tmp_path, shape), nprocs=2)
    plain = model_with_adapters(shape)
    born = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    one_step(plain)
    for rank in (0, 1):
        state, logits = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(logits, plain(tokens()), rtol=1e-9, atol=1e-9)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(state[name], parameter, rtol=1e-9, atol=1e-9)
            assert parameter.requires_grad != torch.equal(parameter, born[name]), name


def test_a_size_that_does_not_divide_is_refused_with_the_numbers(tmp_path: Path):
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        object.__setattr__(mesh, "size", lambda: 3)
        with pytest.raises(UserError, match=r"size=3 .*num_attention_heads=4"):
            parallelize(tiny_gpt(), mesh)
    finally:
        dist.destroy_process_group()
