"""Which process of how many this is, as srun, torchrun or a launcher of its kind says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig

from graftwerk.errors import UserError
from graftwerk.parallel.mesh import Mesh, check_sizes
from graftwerk.training.stopping import Stop


@dataclass(frozen=True)
class World:
    """This process's rank among `size` processes; `environment` tells Lightning, None for one.

    `stop` is where the wish to stop is noted.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    environment: ClusterEnvironment | None = None
    stop: Stop = field(default_factory=Stop, compare=False)

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "World":
        """torchrun's RANK, LOCAL_RANK and WORLD_SIZE first, then srun's variables, else alone.

        Slurm's are believed inside a job step only: a batch script has SLURM_NTASKS too.
        """
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
            local_rank = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env or size > 1 else 0
            return cls(rank, local_rank, size, _outside(_Torchrun, size))
        if "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_STEPID" in env):
            count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
            size = _number(env, count) if count in env else 1
            rank, local_rank = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID")
            return cls(rank, local_rank, size, _outside(_Slurm, size))
        return cls()

    def check(self, devices: int, num_nodes: int) -> None:
        """Raises a UserError where another number of processes was started than is configured."""
        if devices * num_nodes != self.size:
            raise UserError(
                f"trainer.devices={devices} x trainer.num_nodes={num_nodes} needs "
                f"{devices * num_nodes} processes, one for each device, but {self.size} "
                f"{'was' if self.size == 1 else 'were'} started: start it through main.py, srun or "
                f"`torchrun --nproc-per-node {devices}`, or change trainer.devices"
            )

    def say(self, line: str) -> None:
        """Prints a line, once: on rank zero."""
        if self.rank == 0:
            print(line, flush=True)

    def connect(self, device: torch.device) -> None:
        """Joins the processes, over NCCL on GPUs and gloo on CPUs. A process alone: nothing to do.

        Lightning finds it done.
        """
        if self.environment is None or dist.is_initialized():
            return
        os.environ["MASTER_ADDR"] = self.environment.main_address
        os.environ["MASTER_PORT"] = str(self.environment.main_port)
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            rank=self.rank,
            world_size=self.size,
            device_id=device if cuda else None,
        )

    def mesh(self, model: DictConfig, device: torch.device) -> Mesh:
        """The processes as `model` lays them out, joined.

        Raises:
            UserError: where tensor and pipeline sizes do not divide their number, and for
                `sequence_parallel` without tensor parallelism.
        """
        tensor, pipeline = model_parallel_sizes(model)
        check_sizes(self.size, tensor, pipeline)
        sequence = bool(model.get("sequence_parallel"))
        if sequence and tensor == 1:
            raise UserError(
                "model.sequence_parallel=True splits rows over tensor-parallel devices: set "
                "model.tensor_model_parallel_size to 2 or more, or sequence_parallel to False"
            )
        self.connect(device)
        split = model.get("pipeline_model_parallel_split_rank")
        return Mesh.of(device, tensor, pipeline, split, sequence)


def model_parallel_sizes(model: DictConfig) -> tuple[int, int]:
    """Over how many devices a `model` section splits a model: by tensor, by pipeline."""
    tensor, pipeline = (model.get(f"{k}_model_parallel_size") for k in ("tensor", "pipeline"))
    return tensor or 1, pipeline or 1


class _Checked:
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing: `World.check` has looked already, with a message of our own."""


class _Torchrun(_Checked, TorchElasticEnvironment):
    pass


class _Slurm(_Checked, SLURMEnvironment):
    def __init__(self) -> None:
        super().__init__(auto_requeue=False)  # what to do about signals is ours to say


def _outside(kind: type[ClusterEnvironment], size: int) -> ClusterEnvironment | None:
    return kind() if size > 1 else None


def _number(env: Mapping[str, str], name: str) -> int:
    if not env.get(name, "").isdigit():
        raise UserError(f"environment variable {name}={env.get(name)!r} must be a whole number")
    return int(env[name])
