"""AdapterDrop: adapters of the lower layers do nothing, for a step or for good.

Rueckle et al. 2021, arXiv:2010.11918: an adapter that was trained with some of its first layers
switched off at random can do without them when speed counts.
"""

import random
from collections.abc import Sequence

from graftwerk.errors import UserError


class LayerChoice:
    """Which layers are left out in a step.

    Args:
        layers: these, always; a number: the first layers, as many as chance says, up to it.
        seed: of chance. What it says of a step depends on the two alone, so that a run that goes on
            from a checkpoint leaves out the same layers.

    Raises:
        UserError: for negative numbers.
    """

    def __init__(self, layers: int | Sequence[int], seed: int = 0):
        self.most = layers if isinstance(layers, int) else None
        self.fixed = () if isinstance(layers, int) else tuple(layers)
        self.seed = seed
        if min((self.most or 0, *self.fixed)) < 0:
            raise UserError(f"AdapterDrop: layers={layers!r}: numbers of layers begin at 0")

    def at(self, step: int) -> tuple[int, ...]:
        """The layers that are left out in a step."""
        if self.most is None:
            return self.fixed
        return tuple(range(random.Random(f"{self.seed} {step}").randint(0, self.most)))
