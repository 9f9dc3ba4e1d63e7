"""Invertible adapters: what a language changes in the embeddings is undone before the words.

Pfeiffer et al. 2020 (MAD-X), arXiv:2005.00052, section 3.2.3; the coupling is NICE's (Dinh et al.
2015, arXiv:1410.8516). A `BnConfig` with `inv_adapter` has one.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from graftwerk.adapters.methods.activations import Activation
from graftwerk.adapters.part import Part, PartLinear
from graftwerk.adapters.slots import SlotCall


class Nice(Part):
    """`y1 = x1 + F(x2)`, `y2 = x2 + G(y1)` of the two halves of [..., h]; or the inverse of it.

    F and G are bottlenecks of half the hidden size, divided by `reduction_factor`. The part behind
    the embeddings and the one before the vocabulary projection share them.
    """

    unsuited: ClassVar[dict[str, str]] = {
        "Fuse": "its invertible adapter adds nothing that could be weighed: Stack it before"
    }

    def __init__(self, features: int, non_linearity: str, reduction_factor: float, inverse: bool):
        super().__init__()
        self.inverse = inverse
        self.halves = features // 2, features - features // 2

        def network(inputs: int, outputs: int) -> nn.Sequential:
            inner = max(1, int(inputs // reduction_factor))
            first, second = PartLinear(inputs, inner), PartLinear(inner, outputs)
            for linear in (first, second):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
            return nn.Sequential(first, Activation(non_linearity), second)

        self.F = network(self.halves[1], self.halves[0])
        self.G = network(self.halves[0], self.halves[1])

    def forward(self, call: SlotCall) -> Tensor:
        first, second = call.output.split(self.halves, -1)
        if self.inverse:
            second = second - self.G(first)
            first = first - self.F(second)
        else:
            first = first + self.F(second)
            second = second + self.G(first)
        return torch.cat([first, second], -1)
