"""A model laid over a mesh, and its tensors put together again for files.

What is saved has no layout: tensors are whole, under global names, so that any layout goes on from
any other's checkpoint and writes the same file.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwerk.adapters.ranks import ALONE
from graftwerk.models import BERT, GPT, T5
from graftwerk.parallel.mesh import Mesh
from graftwerk.parallel.pipeline import Pipeline
from graftwerk.parallel.shares import gather, layout_of, share_of, whole_shape


class Placement:
    """A model on this process's place of a mesh. The model holds its adapters, and is changed.

    `pipeline` is None where all layers are here. Tensor-parallel shares have been taken before, by
    `tensor.parallelize`.
    """

    def __init__(self, model: GPT | T5 | BERT, mesh: Mesh | None = None):
        self.model, self.mesh = model, mesh or Mesh()
        self.pipeline = None
        if self.mesh.pipeline.size > 1:
            self.pipeline = Pipeline(model, self.mesh)

    def here(self, parameter: Tensor) -> bool:
        """Whether this process holds a parameter, or a share of it."""
        return parameter.device.type != "meta"

    def shared(self, name: str) -> bool:
        """Whether several stages use a parameter: its gradient is the sum of theirs."""
        return self.pipeline is not None and len(self.pipeline.stages[name]) > 1

    def counts(self, name: str, parameter: Tensor) -> bool:
        """Whether this process is the one among copies of a parameter that stands for it."""
        first = self.pipeline is None or self.pipeline.owner(name) == self.mesh.pipeline.rank
        split = layout_of(parameter).dim is not None
        return first and self.here(parameter) and (split or self.mesh.tensor.rank == 0)

    def numel(self, parameter: Tensor) -> int:
        """The numbers in the whole of a parameter."""
        group = self.mesh.tensor.group
        return parameter.numel() if group is None else whole_shape(parameter, group).numel()

    def share(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """What this process holds of a whole tensor, as it does of the parameter."""
        group = self.mesh.tensor.group
        return whole if group is None else share_of(whole, layout_of(parameter), group)

    # ---- putting together

    def gathered(
        self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Whole tensors by name, on the first process of each replica; others get some or none.

        All processes of a replica ask at once.

        Args:
            tensors: what this process holds; the names are keys of `parameters`.
            parameters: of all stages, by global name: how each tensor lies, unless it is a scalar.
        """
        group = self.mesh.tensor.group
        own = {
            name: tensors[name]
            for name, parameter in parameters.items()
            if name in tensors and self._owned(name)
        }
        if group is not None:
            own = {
                name: gather(tensor, layout_of(parameters[name]), group) if tensor.ndim else tensor
                for name, tensor in own.items()
            }
        return own if self.pipeline is None else self._collected(own, list(parameters))

    def _owned(self, name: str) -> bool:
        pipeline = self.pipeline
        return pipeline is None or pipeline.owner(name) == self.mesh.pipeline.rank

    def _collected(self, own: dict[str, Tensor], order: list[str]) -> dict[str, Tensor]:
        """The stages' tensors, on the first stage, in the order of the names."""
        axis = self.mesh.pipeline
        assert axis.group is not None
        first = dist.get_global_rank(axis.group, 0)
        found: list[dict[str, Tensor]] | None = [{}] * axis.size if axis.rank == 0 else None
        plain = {name: tensor.detach().cpu() for name, tensor in own.items()}
        dist.gather_object(plain, found, first, axis.group)
        if found is None:
            return own
        everything = {name: tensor for stage in found for name, tensor in stage.items()}
        return {name: everything[name] for name in order if name in everything}

    @torch.no_grad()
    def make_whole(self) -> None:
        """Puts whole tensors into the model of each replica's first process, to be written.

        Everything but the frozen base: adapters, fusions, heads and what was trained. The model
        can be written then and no longer be run. All processes of a replica ask at once.
        """
        if not self.mesh.model_parallel:
            return
        parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or of_adapters(name)
        }
        here = {name: p.detach() for name, p in parameters.items() if self.here(p)}
        whole = self.gathered(here, parameters)
        if self.mesh.pipeline.rank == 0 and self.mesh.tensor.rank == 0:
            new = {
                id(parameters[name]): nn.Parameter(
                    tensor.to(self.model.device), parameters[name].requires_grad
                )
                for name, tensor in whole.items()
            }
            for module in self.model.modules():
                for leaf, parameter in list(module._parameters.items()):
                    module._parameters[leaf] = new.get(id(parameter), parameter)
            self.model.ranks = ALONE


def of_adapters(name: str) -> bool:
    """Whether a parameter, by its name, is an adapter's, a fusion's or a head's."""
    inside = (".adapter_layer.", ".fusion_layer.")
    return name.startswith(("replacements.", "head.")) or any(part in name for part in inside)
