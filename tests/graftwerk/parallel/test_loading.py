"""Ranks that read their share of a checkpoint against one process that reads all of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from graftwerk.checkpoints import load_base
from graftwerk.errors import UserError
from graftwerk.parallel.tensor import gather, layout_of
from tests.graftwerk import families
from tests.graftwerk.tiny import tokens

# A file of fused and transposed projections, one of separate ones, one that is already as ours.
NAMES = ("gpt2", "llama", "neox")


@torch.no_grad()
def load_share(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in NAMES:
        model = load_base(folder / name, mesh=mesh)
        state = {
            key: gather(parameter, layout_of(parameter), mesh.get_group())
            for key, parameter in model.named_parameters()
        }
        kept = sum(parameter.numel() for parameter in model.decoder.layers.parameters())
        torch.save((state, model(tokens()), kept), folder / f"{name}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def test_two_ranks_that_read_their_shares_hold_the_whole_model(tmp_path: Path):
    for name in NAMES:
        families.write(name, tmp_path / name)
    mp.spawn(load_share, (tmp_path,), nprocs=2)
    for name in NAMES:
        whole = load_base(tmp_path / name)
        total = sum(parameter.numel() for parameter in whole.decoder.layers.parameters())
        for rank in (0, 1):
            state, logits, kept = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            torch.testing.assert_close(logits, whole(tokens()), rtol=1e-5, atol=1e-5)
            assert all(torch.equal(state[key], value) for key, value in whole.named_parameters())
            assert kept < 0.55 * total


def test_an_encoder_is_not_split_yet(tmp_path: Path):
    families.write("bert", tmp_path / "bert")
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="tensor_model_parallel_size"):
            load_base(tmp_path / "bert", mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()
