"""A learned gate: how much of a part an example gets (Mao et al. 2022, arXiv:2110.07577, 3.2)."""

from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.part import Part, PartLinear
from graftwerk.adapters.ranks import ALONE, Ranks
from graftwerk.adapters.slots import SlotCall
from graftwerk.adapters.texts import Texts


class Gate(PartLinear):
    """`mean over positions of sigmoid(w x + b)`, padding included: x [B, S, in] -> [B, 1, n].

    One scalar an example for each of n gates. In packed rows the mean is over the positions of each
    text, [B, S, n]. Weights are normal with deviation 0.02 at birth. `features` are the ranks that
    split the input's features, `row` those that split its positions.
    """

    def __init__(self, in_features: int, gates: int = 1):
        super().__init__(in_features, gates)
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self,
        input: Tensor,
        texts: Texts | None = None,
        features: Ranks = ALONE,
        row: Ranks = ALONE,
    ) -> Tensor:
        logits = features.sum(F.linear(input, self.weight.to(input.dtype)))
        gates = (logits + self.bias.to(input.dtype)).sigmoid()
        return features.joined(row.mean(gates, texts))


def note_gate(part: Part, call: SlotCall, place: str, gate: Tensor) -> None:
    """Records a gate, as `Gate` gives it, where the pass asks for it."""
    if call.flow.record is not None:
        gate = gate if call.flow.texts is not None else gate[:, 0]
        call.flow.record.note_gate(part, part.adapter, part.site.layer, place, gate)
