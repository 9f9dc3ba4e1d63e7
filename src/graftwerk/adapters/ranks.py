"""The devices among which a model's features are split, as its parts and the model see them.

Nothing here communicates: alone, a device holds all there is. `graftwerk.parallel` has the ranks of
a process group; a part asks both the same questions, and never which of them they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graftwerk.adapters.texts import Texts


class Ranks:
    """One device, which holds everything.

    `first`: whether what is to be added once, and not by every rank, is added here.
    """

    first: bool = True

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' summands. Each gets the gradient of the sum."""
        return x

    def joined(self, x: Tensor) -> Tensor:
        """`x`, which all ranks hold alike; its gradient is the sum of those that they find."""
        return x

    def counted_once(self, x: Tensor) -> Tensor:
        """`x`, which all ranks compute alike, of parameters whose gradients are summed."""
        return x

    def length(self, lengths: Tensor) -> Tensor:
        """The lengths of vectors of whose pieces, one a rank, these are the lengths."""
        return lengths

    def share(self, x: Tensor, dim: int) -> Tensor:
        """A view of this rank's share of a whole tensor, split evenly along `dim`."""
        return x

    def mean(self, x: Tensor, texts: Texts | None = None) -> Tensor:
        """The mean over the columns of a row, [B, S, n] -> [B, 1, n]; over those of each text where
        rows hold several, -> [B, S, n]."""
        if texts is None:
            return self.mean_of_rows(x)[:, None]
        sums = self.sum(texts.sums(x))
        means = sums[..., :-1] / sums[..., -1:].clamp(min=1)
        return texts.spread(self.joined(means).to(x.dtype))

    def mean_of_rows(self, x: Tensor) -> Tensor:
        """The mean over all columns of a row: [B, S, n] -> [B, n]."""
        return x.mean(1)

    def columns(self, x: Tensor) -> Tensor:
        """All columns of a row, of those that are here: [B, S, ...]; without a gradient."""
        return x

    def whole(self, parameter: Tensor) -> Tensor:
        """The whole of a parameter, of which this rank may hold a share; without a gradient.

        All ranks ask at once.
        """
        return parameter.detach()

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """What this rank holds of `whole`, whose share is `parameter`."""
        return whole

    def shape(self, parameter: Tensor) -> torch.Size:
        """The shape of the whole of a parameter."""
        return parameter.shape

    def splitter(self) -> Callable[[nn.Module, nn.Module], None]:
        """A function (part, slot) that gives new parts of one adapter their shares."""
        return lambda part, slot: None


ALONE = Ranks()
