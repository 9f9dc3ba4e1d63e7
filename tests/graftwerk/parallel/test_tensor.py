"""Tensor parallelism over two gloo processes against one process, in double precision."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from graftwerk.errors import UserError
from graftwerk.parallel.tensor import (
    gather,
    layout_of,
    norm_squared,
    parallelize,
    sum_partial_gradients,
)
from tests.graftwerk.parallel import cases
from tests.graftwerk.parallel.two_ranks import on_two_ranks
from tests.graftwerk.tiny import tiny_gpt

PAIRS = [
    *(("t5", name) for name in cases.CASES),
    *(("gpt2", name) for name in cases.CASES),
    *(("llama", name) for name in ("lora_fused", "lora_apart", "ia3", "prefix", "selective")),
    *(("native_t5", name) for name in ("dora", "ia3_everywhere", "selective", "stack")),
    *(("bert", name) for name in ("lora_fused", "bottleneck", "unipelt", "stack", "selective")),
]


def compare(shape: str, name: str, mesh: DeviceMesh, sequence: bool = False) -> list[str]:
    """What differs between one process and this rank of two, after one step on each."""
    case, group = cases.CASES[name], mesh.get_group()
    plain, model = cases.make(shape, case), cases.make(shape, case)
    parallelize(model, mesh)
    born = {key: p.detach().clone() for key, p in model.named_parameters()}
    expected = cases.step(plain, lambda parameters: None)
    found = cases.step(model, lambda parameters: sum_partial_gradients(parameters, group))
    wrong = [] if torch.allclose(found, expected, rtol=1e-10) else [f"loss {found} {expected}"]
    grads, squares = [], torch.zeros((), dtype=torch.float64)
    for (key, p), (_, whole) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        if not whole.requires_grad:
            if not torch.equal(p, born[key]):
                wrong.append(f"{key} is frozen and has changed")
            continue
        if whole.grad is None or p.grad is None:
            if any(grad is not None and grad.any() for grad in (whole.grad, p.grad)):
                wrong.append(f"only one side has a gradient of {key}")
            continue
        squares += whole.grad.square().sum()
        got = gather(p.grad, layout_of(p), group)
        scale = whole.grad.abs().max() + 1e-3
        if got.shape != whole.grad.shape or (got - whole.grad).abs().max() > 1e-9 * scale:
            ratio = (
                (got / whole.grad).flatten()[:3].tolist() if got.shape == whole.grad.shape else ""
            )
            wrong.append(f"gradient of {key} {layout_of(p)} {ratio}")
        if layout_of(p).dim is None:
            grads.append(p.detach().flatten())
    norm = norm_squared(cases.trained(model).values(), group)
    if not torch.allclose(norm, squares, rtol=1e-9):
        wrong.append(f"norm {norm} {squares}")
    if grads:
        mine = torch.cat(grads)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        if not torch.equal(*both):
            wrong.append("replicated parameters differ between ranks")
    with torch.no_grad():
        if not torch.allclose(cases.run(model), cases.run(plain), rtol=1e-8, atol=1e-9):
            wrong.append("answer after the step")
    return wrong


def all_pairs(mesh: DeviceMesh) -> dict[str, list[str]]:
    return {f"{shape} {name}": compare(shape, name, mesh) for shape, name in PAIRS}


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    return on_two_ranks(all_pairs, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(("shape", "name"), PAIRS)
def test_gradients_norm_and_answer_on_two_ranks_are_those_of_one(shape, name, differences):
    for of_rank in differences:
        assert of_rank[f"{shape} {name}"] == []


def test_a_size_that_does_not_divide_is_refused_with_the_numbers(tmp_path: Path):
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        object.__setattr__(mesh, "size", lambda: 3)
        with pytest.raises(UserError, match=r"size=3 .*num_attention_heads=4.*use one of 1, 2$"):
            parallelize(tiny_gpt(), mesh)
    finally:
        dist.destroy_process_group()
