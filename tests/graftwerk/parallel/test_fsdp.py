"""A base sharded over data-parallel processes, by itself and over tensor-parallel ones too."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from graftwerk.errors import UserError
from graftwerk.parallel import fsdp
from graftwerk.parallel.mesh import Mesh
from graftwerk.parallel.recompute import recompute
from graftwerk.parallel.shares import gather, layout_of, sum_partial_gradients
from graftwerk.parallel.tensor import parallelize
from tests.graftwerk.parallel.cases import CASES, loss, make
from tests.graftwerk.ranks import on_processes

CPU = torch.device("cpu")
RUNS = [("llama", "selective"), ("llama", "dora"), ("native_t5", "unipelt")]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=4)
    mesh = Mesh.of(CPU, tensor=2)
    assert mesh.tensor_devices is not None
    assert mesh.tensor.group is not None
    said: dict[str, Any] = {}
    for shape, case in RUNS:
        model = make(shape, CASES[case])
        parallelize(model, mesh.tensor_devices)
        recompute(model, "full")
        frozen = {n: p.numel() for n, p in model.named_parameters() if not p.requires_grad}
        fsdp.shard_base(model, mesh, CPU)
        shares = {
            n: p.to_local().numel() for n, p in model.named_parameters() if isinstance(p, DTensor)
        }
        with torch.no_grad():
            value = loss(model)
        found = gradients(model)
        model.set_active(model.active)  # copies of the base leave their places and come again
        again = gradients(model)
        trained = dict(model.named_parameters())
        torch.testing.assert_close(again, found)
        sum_partial_gradients([trained[name] for name in found], mesh.tensor.group)
        whole = {n: gather(g, layout_of(trained[n]), mesh.tensor.group) for n, g in found.items()}
        said[case] = {
            "loss": value,
            "gradients": whole,
            "sharded": [sum(shares.values()), sum(frozen[name] for name in shares)],
            "left": sorted(set(frozen) - set(shares)),
        }
    torch.save(said, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_are_those_of_a_whole_base_and_each_process_keeps_its_share(tmp_path: Path):
    on_processes(4, work, tmp_path)
    for rank in range(4):
        said = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for shape, case in RUNS:
            alone, found = make(shape, CASES[case]), said[case]
            torch.testing.assert_close(found["loss"], loss(alone))
            wanted = gradients(alone)
            assert list(found["gradients"]) == list(wanted)
            # Two backward passes have added up.
            for name, gradient in wanted.items():
                torch.testing.assert_close(found["gradients"][name], 2 * gradient)
            share, all_of_it = found["sharded"]
            assert share <= 0.51 * all_of_it
            assert found["left"] == []


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "whole", "words"),
    [
        (4, 1, 1, True, "the whole model is trained: set it to False"),
        (4, 1, 2, False, "goes with model.pipeline_model_parallel_size=1, not 2"),
        (2, 2, 1, False, "there is one: use at least 4 devices"),
        (1, 1, 1, False, "there is one: use at least 2 devices"),
    ],
)
def test_a_base_that_cannot_be_sharded_is_refused(world, tensor, pipeline, whole, words):
    with pytest.raises(UserError, match=words):
        fsdp.check(world, tensor, pipeline, whole)
