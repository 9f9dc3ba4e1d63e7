"""Work that two gloo processes do together, and what each of them says of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.graftwerk.ranks import on_processes


def on_two_ranks(work: Callable[[DeviceMesh], Any], folder: Path) -> list[Any]:
    """What `work(mesh)`, a function of a module, gives on rank 0 and on rank 1."""
    on_processes(2, _one_rank, folder, work)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def _one_rank(rank: int, folder: Path, work: Callable[[DeviceMesh], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(work(init_device_mesh("cpu", (2,))), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
