"""One training step of one process against the same on this rank of two, in double precision."""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from graftwerk.generation import Sampling, complete
from graftwerk.models.layers import TransformerLayer
from graftwerk.parallel.tensor import (
    gather,
    layout_of,
    norm_squared,
    parallelize,
    sum_partial_gradients,
)
from tests.graftwerk.parallel import cases


def compare(
    shape: str, name: str, mesh: DeviceMesh, sequence: bool = False, again: bool = False
) -> list[str]:
    """What differs between one process and this rank of two, after one step on each.

    `again`: the rank's layers keep nothing and run a second time for their gradients.
    """
    case, group = cases.CASES[name], mesh.get_group()
    plain, model = cases.make(shape, case), cases.make(shape, case)
    parallelize(model, mesh, sequence)
    for layer in model.modules() if again else ():
        if isinstance(layer, TransformerLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    born = {key: p.detach().clone() for key, p in model.named_parameters()}
    packed = case.packed
    expected = cases.step(plain, lambda parameters: None, packed)
    found = cases.step(model, lambda parameters: sum_partial_gradients(parameters, group), packed)
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
        answers = cases.run(model, packed), cases.run(plain, packed)
        if not torch.allclose(*answers, rtol=1e-8, atol=1e-9):
            wrong.append("answer after the step")
    return wrong


def generated(mesh: DeviceMesh, sequence: bool = False) -> str:
    """`same`, if this rank continues prompts as one process does; else the first that differs."""
    prompts = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11, 12, 13, 14, 15]]
    for shape in ("gpt2", "llama", "t5"):
        for name in ("stack", "unipelt"):  # of which one reads rows anew
            case = cases.CASES[name]
            plain, model = cases.make(shape, case), cases.make(shape, case)
            parallelize(model, mesh, sequence)
            sampling = Sampling(tokens_to_generate=4)
            found, expected = (complete(m, prompts, sampling) for m in (model, plain))
            if [row.tokens for row in found] != [row.tokens for row in expected]:
                return f"{shape} {name}: {found} {expected}"
    return "same"
