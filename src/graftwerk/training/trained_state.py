"""What training changes, as checkpoints hold it: whole tensors by global names, of no layout."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from graftwerk.errors import UserError
from graftwerk.parallel.placement import Placement


class TrainedState:
    """The trained weights and an optimizer's state, of this process and of the whole model.

    Args:
        parameters: all that is trained on any stage of a pipeline.
        buffers: what else moves with training, on every stage.
    """

    def __init__(
        self,
        placement: Placement,
        parameters: Mapping[str, Parameter],
        buffers: Mapping[str, Tensor],
    ):
        self.placement, self.parameters = placement, parameters
        self.trained = {n: p for n, p in parameters.items() if placement.here(p)}
        self._here: dict[str, Tensor] = {**self.trained, **buffers}
        self._everywhere: dict[str, Tensor] = {**parameters, **buffers}

    def own(self) -> dict[str, Tensor]:
        """This process's weights by name."""
        return {name: tensor.detach() for name, tensor in self._here.items()}

    def whole(self) -> dict[str, Tensor]:
        """Those of the whole model, on the first process; all ask at once."""
        if not self.placement.mesh.model_parallel:
            return self.own()
        return self.placement.gathered(self.own(), self._everywhere)

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Takes this process's share of what `whole` gave under any layout.

        Raises:
            UserError: for weights of another model or adapter.
        """
        known = self._everywhere
        shares = {
            name: self.placement.share(tensor, known[name])
            for name, tensor in whole.items()
            if name in known
        }
        wrong = [
            name
            for name in {**known, **whole}
            if name not in shares or shares[name].shape != known[name].shape
        ]
        if wrong:
            raise UserError(
                f"the checkpoint to go on from is of another model or adapter ({len(wrong)} of its "
                f"weights differ, such as {min(wrong)}): use another run.results_dir, or set "
                f"exp_manager.resume_if_exists: False"
            )
        with torch.no_grad():
            for name, tensor in self._here.items():
                tensor.copy_(shares[name])

    def of_optimizer(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state by names, whole, on the first process; all ask at once.

        `state`: parameter -> what the optimizer keeps of it; `param_groups`: their settings.
        """
        names = {id(parameter): name for name, parameter in self.trained.items()}
        own = {names[id(p)]: values for p, values in optimizer.state.items()}
        keys = sorted({key for values in own.values() for key in values})
        state: dict[str, dict[str, Any]] = {}
        for key in self._all_keys(keys):
            found = {name: values[key] for name, values in own.items() if key in values}
            if self.placement.mesh.model_parallel:
                found = self.placement.gathered(found, self.parameters)
            for name, value in found.items():
                state.setdefault(name, {})[key] = value
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        ordered = {name: state[name] for name in self.parameters if name in state}
        return {"state": ordered, "param_groups": settings}

    def _all_keys(self, own: list[str]) -> list[str]:
        """What the optimizer keeps on any stage: a stage may train nothing."""
        axis = self.placement.mesh.pipeline
        if axis.group is None:
            return own
        found: list[list[str]] = [[] for _ in range(axis.size)]
        dist.all_gather_object(found, own, axis.group)
        return sorted({key for keys in found for key in keys})

    def load_optimizer(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        """Takes this process's share of what `of_optimizer` gave under any layout."""
        numbers = {
            id(parameter): number
            for number, parameter in enumerate(
                p for group in optimizer.param_groups for p in group["params"]
            )
        }
        state = {
            numbers[id(self.trained[name])]: {
                key: self.placement.share(value, self.trained[name]) if value.ndim else value
                for key, value in values.items()
            }
            for name, values in saved["state"].items()
            if name in self.trained
        }
        own = optimizer.state_dict()["param_groups"]
        groups = [
            {**settings, "params": group["params"]}
            for settings, group in zip(saved["param_groups"], own, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
