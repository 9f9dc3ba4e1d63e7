"""Fully sharded data parallelism: each data-parallel process keeps a share of the frozen base.

A layer's weights are gathered where a pass comes to it and let go behind it (Rajbhandari et al.
2020, arXiv:1910.02054, section 5.3; torch's `fully_shard`). What is trained stays whole on each
process, and its gradients go the way that they always go.
"""

import torch
from torch.distributed.fsdp import fully_shard

from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5
from graftwerk.models.layers import TransformerLayer
from graftwerk.parallel.mesh import Mesh
from graftwerk.parallel.placement import of_adapters

KEY = "model.use_fsdp=True"


def check(world: int, tensor: int, pipeline: int, whole: bool) -> None:
    """Raises a UserError where a base cannot be sharded: there must be one, frozen, and copies.

    Args:
        world: how many processes there are.
        tensor, pipeline: over how many of them one model is split.
        whole: whether all of the model is trained.
    """
    if whole:
        raise UserError(
            f"{KEY} shards the frozen base under adapters, and here the whole model is trained: "
            f"set it to False; model.tensor_model_parallel_size splits weights and gradients"
        )
    if pipeline > 1:
        raise UserError(
            f"{KEY} goes with model.pipeline_model_parallel_size=1, not {pipeline}: a stage of a "
            f"pipeline holds its layers whole"
        )
    if world <= tensor:
        raise UserError(
            f"{KEY} shards the base over the model's data-parallel copies, of which there is one: "
            f"use at least {2 * tensor} devices (trainer.devices x trainer.num_nodes), or False"
        )


def shard_base(model: GPT | T5 | BERT, mesh: Mesh, device: torch.device) -> None:
    """Keeps this process's share of the base on `device`, and all of what is trained.

    The model, with its adapters in their places, may lie elsewhere: only a layer at a time is
    whole on the device. From here on only `model(...)` runs it, on all processes at once.
    """
    assert mesh.devices is not None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where torch puts the shares
    axis = mesh.devices["data"]
    whole = {p for n, p in model.named_parameters() if p.requires_grad or of_adapters(n)}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    notes = {name: vars(parameter) for name, parameter in model.named_parameters()}
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for module in (*layers, model):
        fully_shard(module, mesh=axis, ignored_params=whole)
    for name, parameter in model.named_parameters():
        vars(parameter).update(notes[name])  # how it lies over tensor-parallel ranks
