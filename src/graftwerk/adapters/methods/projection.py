"""The base's projection behind a slot, for parts that read its weights (DoRA)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graftwerk.adapters.ranks import ALONE, Ranks
from graftwerk.adapters.slots import Rows, Site
from graftwerk.errors import UserError


class Projection:
    """The rows of a projection that make a slot's output. No module, and so no child of the part.

    It knows nothing until `attach` gives it the sublayer. Errors name the configuration key `key`.
    """

    def __init__(self, site: Site, key: str):
        assert site.rows is not None, "only the slots of projections have weights to read"
        self.rows: Rows = site.rows
        self.key = key
        self._sublayer: nn.Module | None = None
        self._kept: tuple[tuple[tuple[Tensor, int], ...], Tensor] = ((), torch.empty(0))

    def attach(self, sublayer: nn.Module) -> None:
        """Takes the sublayer that owns the slot.

        Raises:
            UserError: where its weights are quantised.
        """
        self._sublayer = sublayer
        if not self.linear.weight.is_floating_point():
            raise UserError(
                f"{self.key}=True reads the base's weights, which are quantised: use "
                f"{self.key}=False, or a base in full precision"
            )

    @property
    def here(self) -> bool:
        """Whether this process has the weights; those of another stage of a pipeline it has not."""
        return not self.linear.weight.is_meta

    @property
    def linear(self) -> nn.Linear:
        """The whole projection."""
        assert self._sublayer is not None, "a part is attached when it is added to a model"
        return getattr(self._sublayer, self.rows.linear)

    def weight(self) -> Tensor:
        """The slot's rows of it, [out, in]."""
        return self.rows.of(self.linear.weight).flatten(0, 2)

    def bias(self) -> Tensor | None:
        """The slot's rows of its bias, [out], if it has one."""
        bias = self.linear.bias
        return None if bias is None else self.rows.of(bias).flatten(0, 2)

    def lengths(self, delta: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """The length of each row of W + delta, [out], for delta [out, in]; `ranks` split the in."""
        return ranks.length(torch.linalg.vector_norm(self.weight().to(delta) + delta, dim=1))

    @torch.no_grad()
    def kept_lengths(
        self, made_of: tuple[Tensor, ...], delta: Callable[[], Tensor], ranks: Ranks = ALONE
    ) -> Tensor:
        """`lengths(delta(), ranks)` without a gradient; computed again when W or one of `made_of`,
        which delta is made of, has changed."""
        state = tuple((t, t._version) for t in (self.linear.weight, *made_of))
        held = self._kept[0]
        if len(held) != len(state) or any(
            was is not t or then != now for (was, then), (t, now) in zip(held, state, strict=True)
        ):
            self._kept = state, self.lengths(delta(), ranks)
        return self._kept[1]
