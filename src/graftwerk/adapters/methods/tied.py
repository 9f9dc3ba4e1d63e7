"""How a part that shares its weights with other layers' learns which layer it is in.

The strategies of NeMo's `...WeightTying` adapters: a row of a trained table, zero at birth, joins
what flows through the part.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.part import PartLinear


class LayerPosition(nn.Module):
    """One row of `table` [layers, e] for each layer, which all of them share.

    `add`: e = in, joins the input; `concat`: e = dim, stands behind the input's features;
    `mlpconcat`: the same, through two linear layers with a gelu between; `biasadd`: e = out, joins
    the output.
    """

    def __init__(self, strategy: str, in_features: int, out_features: int, dim: int):
        super().__init__()
        self.strategy = strategy
        self.index = 0
        size = {"add": in_features, "biasadd": out_features}.get(strategy, dim)
        self.extra = dim if strategy in ("concat", "mlpconcat") else 0  # features behind the input
        self.table = nn.Parameter(torch.zeros(1, size))
        self.first = self.second = None
        if strategy == "mlpconcat":
            self.first = PartLinear(size, size, bias=False)
            self.second = PartLinear(size, size, bias=False)

    def place(self, index: int, count: int) -> None:
        """Takes a row of its own; called once, before the parameters are shared."""
        self.index = index
        self.table = nn.Parameter(torch.zeros(count, self.table.shape[1]))

    def enter(self, x: Tensor) -> Tensor:
        """What goes into the part [..., in + extra] in the place of x [..., in]."""
        if self.strategy == "biasadd":
            return x
        row = self.table[self.index].to(x.dtype)
        if self.strategy == "add":
            return x + row
        if self.first is not None and self.second is not None:
            row = self.second(F.gelu(self.first(row)))
        return torch.cat([x, row.expand(*x.shape[:-1], -1)], -1)

    def leave(self, y: Tensor) -> Tensor:
        """What comes out of it [..., out]."""
        return y + self.table[self.index].to(y.dtype) if self.strategy == "biasadd" else y
