"""All gradients in one buffer: one reduction, one norm, one scaling a step."""

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


class GradientBucket:
    """Gradients of all trained parameters as views of one flat float32 tensor.

    Backward passes add into the views. Sums that belong to the gradients (loss, label weight)
    lie in the same tensor, so that one all-reduce brings the gradients and their divisor.

    Args:
        parameters: the trained ones, float32, on one device.
        sums: how many scalars travel with the gradients.
        groups: how many of the parameters, in their order, are clipped together; none: all.
    """

    def __init__(self, parameters: Iterable[Parameter], sums: int, groups: Sequence[int] = ()):
        parameters = list(parameters)
        count = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(count + sums, device=parameters[0].device)
        self.gradients, self.sums = self.flat.split([count, sums])
        views = self.gradients.split([p.numel() for p in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view.view_as(parameter)
        sizes = iter([p.numel() for p in parameters])
        counts = groups or [len(parameters)]
        self.groups = self.gradients.split([sum(islice(sizes, count)) for count in counts])

    def reduce(self) -> None:
        """Add up over data-parallel processes. One process: nothing to do."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.flat)

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to norm `limit` (0: never); returns the norm before, a scalar.

        The norm is of all gradients together, or of each group; what is returned is of all. Nothing
        waits for the device.
        """
        norms = [torch.linalg.vector_norm(group) for group in self.groups]
        if limit > 0:
            for group, norm in zip(self.groups, norms, strict=True):
                group.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
