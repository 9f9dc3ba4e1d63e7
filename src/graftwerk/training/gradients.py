"""All gradients in one buffer: one reduction, one norm, one scaling a step."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from graftwerk.parallel.mesh import Axis, Mesh
from graftwerk.parallel.placement import Placement
from graftwerk.parallel.shares import layout_of


class GradientBucket:
    """Gradients of all trained parameters as views of one flat float32 tensor.

    Backward passes add into the views. Sums that belong to the gradients (loss, label weight)
    lie in the same tensor, so that one all-reduce brings the gradients and their divisor.

    Args:
        parameters: those that this process trains by name, float32, on one device.
        sums: how many scalars travel with the gradients.
        groups: the names that are clipped together; none: all.
        placement: where the model lies; None: on one process, or the same on all.
        device: of the sums, where nothing is trained here.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        sums: int,
        groups: Sequence[Sequence[str]] = (),
        placement: Placement | None = None,
        device: torch.device | None = None,
    ):
        device = next((p.device for p in parameters.values()), device)
        count = sum(p.numel() for p in parameters.values())
        self.mesh = placement.mesh if placement is not None else Mesh()
        self.flat = torch.zeros(count + sums, device=device)
        self.gradients, self.sums = self.flat.split([count, sums])
        pieces = self.gradients.split([p.numel() for p in parameters.values()])
        views = dict(zip(parameters, pieces, strict=True))
        for name, parameter in parameters.items():
            parameter.grad = views[name].view_as(parameter)
        self.groups = [[views[n] for n in names if n in views] for names in groups or [[*views]]]
        self.norms = torch.zeros(len(self.groups), device=device)  # of the last step, by group
        self.partial, self.shared = [], []  # of which other processes have a summand
        self.counted = self.groups
        if placement is not None and self.mesh.model_parallel:
            kept = {n for n, p in parameters.items() if placement.counts(n, p)}
            self.partial = [views[n] for n, p in parameters.items() if layout_of(p).partial_grad]
            self.shared = [views[n] for n in parameters if placement.shared(n)]
            self.counted = [
                [views[n] for n in names if n in kept] for names in groups or [[*views]]
            ]

    def reduce(self, partial: Iterable[int] = (), staged: Iterable[int] = ()) -> None:
        """Adds up over all processes. One process: nothing to do.

        Args:
            partial: the sums of which each tensor-parallel rank has a summand.
            staged: those of which each stage of a pipeline has one; the others are known to all.
        """
        _sum([*self.partial, *(self.sums[n : n + 1] for n in partial)], self.mesh.tensor)
        _sum([*self.shared, *(self.sums[n : n + 1] for n in staged)], self.mesh.pipeline)
        self.mesh.data.sum_(self.flat)

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to norm `limit` (0: never); returns the norm before, a scalar.

        The norm is of all gradients together, or of each group; what is returned is of all. Nothing
        waits for the device.
        """
        norms = self.norms = self._norms()
        if limit > 0:
            for group, norm in zip(self.groups, norms, strict=True):
                factor = (limit / (norm + 1e-6)).clamp(max=1.0)
                for gradient in group:
                    gradient.mul_(factor)
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms)

    def _norms(self) -> Tensor:
        """Of each group: of the whole model, wherever it lies."""
        norms = torch.stack([get_total_norm(group).to(self.flat) for group in self.counted])
        if not self.mesh.model_parallel:
            return norms
        squares = norms.square_()
        return self.mesh.pipeline.sum_(self.mesh.tensor.sum_(squares)).sqrt_()


def _sum(views: Sequence[Tensor], axis: Axis) -> None:
    """Adds up views over an axis, in one bucket."""
    if axis.group is None or not views:
        return
    bucket = axis.sum_(torch.cat([view.flatten() for view in views]))
    for view, summed in zip(views, bucket.split([v.numel() for v in views]), strict=True):
        view.copy_(summed.view_as(view))
