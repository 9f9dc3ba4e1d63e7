"""Where a process stands: among the stages of a pipeline, the replicas of the data, the shards of a
tensor.

Ranks are laid out as Megatron lays them: tensor-parallel ones side by side, then data-parallel
ones, then the pipeline's stages (Narayanan et al. 2021, arXiv:2104.04473, section 3).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from graftwerk.errors import UserError

NAMES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Axis:
    """One way to divide work: this process is `rank` of `size`; no group where it is alone."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    def share(self, total: int) -> range:
        """The numbers, of 0 to `total`, that fall to this process: a run of them."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up over the axis, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


@dataclass(frozen=True)
class Mesh:
    """This process on each axis; a single process by default.

    `devices` is torch's mesh of the same names; None for a single process. `backward` are the
    pipeline's processes once more, for gradients. `split` is the first stage of a T5's decoder.
    `sequence`: tensor-parallel processes share rows by their columns, too.
    """

    pipeline: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    tensor: Axis = field(default_factory=Axis)
    devices: DeviceMesh | None = None
    backward: dist.ProcessGroup | None = None
    split: int | None = None
    sequence: bool = False

    @property
    def model_parallel(self) -> bool:
        """Whether one model lies on several processes."""
        return self.pipeline.size * self.tensor.size > 1

    @property
    def tensor_devices(self) -> DeviceMesh | None:
        """The one-dimensional mesh of tensor-parallel ranks; None where there is one."""
        if self.tensor.size == 1 or self.devices is None:
            return None
        return self.devices["tensor"]

    @classmethod
    def of(
        cls,
        device: torch.device,
        tensor: int = 1,
        pipeline: int = 1,
        split: int | None = None,
        sequence: bool = False,
    ) -> "Mesh":
        """The mesh of all processes; `torch.distributed` is there already if there are several.

        Raises:
            UserError: where the sizes do not divide the number of processes.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        data = check_sizes(world, tensor, pipeline)
        if world == 1:
            return cls()
        devices = init_device_mesh(device.type, (pipeline, data, tensor), mesh_dim_names=NAMES)
        axes = {
            name: Axis(devices[name].size(), devices.get_local_rank(name), devices.get_group(name))
            for name in NAMES
            if devices[name].size() > 1
        }
        backward: Any = None
        if pipeline > 1:
            pipelines = devices.mesh.flatten(1).T.tolist()
            backward, _ = dist.new_subgroups_by_enumeration(pipelines)
        return cls(**axes, devices=devices, backward=backward, split=split, sequence=sequence)


def check_sizes(world: int, tensor: int, pipeline: int) -> int:
    """The number of data-parallel replicas.

    Raises:
        UserError: where the other sizes do not divide the number of processes.
    """
    for key, size in (("tensor", tensor), ("pipeline", pipeline)):
        if size < 1:
            raise UserError(f"model.{key}_model_parallel_size={size} must be 1 or more")
    if world % (tensor * pipeline):
        raise UserError(
            f"model.tensor_model_parallel_size={tensor} x "
            f"model.pipeline_model_parallel_size={pipeline} = {tensor * pipeline} does not divide "
            f"the {world} processes (trainer.devices x trainer.num_nodes): use a multiple of "
            f"{tensor * pipeline} devices"
        )
    return world // (tensor * pipeline)
