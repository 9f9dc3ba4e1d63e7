"""Heads of a model's own and heads that adapters bring, chosen by the active composition.

An adapter for labels is nothing without the head that turns hidden states into them, so each is
trained with a copy of the model's head, which travels in its file (as AdapterHub's heads do, and
`modules_to_save` in peft).
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from graftwerk.adapters.composition import Composition, width
from graftwerk.adapters.plan import Place, resolve
from graftwerk.adapters.slots import Action, Flow, SlotCall


class HeadPart(nn.Module):
    """An adapter's copy of a head, float32 at birth; computes in its type, not the base's."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.head = deepcopy(own).to(torch.float32)

    def forward(self, call: SlotCall) -> Tensor:
        """The head's scores of `call.input`, whatever was said before it."""
        assert call.input is not None
        return self.head(call.input.to(next(self.head.parameters()).dtype))


class Heads(nn.Module):
    """Stands where the model's `own` head stood: the active adapter's head answers, else `own`.

    Of a `Stack` the last one that has a head, of a `Parallel` each for its copy of the batch.
    """

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own
        self.adapter_layer = nn.ModuleDict()

    def add(self, name: str) -> None:
        """Gives an adapter its copy of the model's own head."""
        self.adapter_layer[name] = HeadPart(self.own)

    def remove(self, name: str) -> bool:
        """Takes an adapter's head away; whether that was the last."""
        if name in self.adapter_layer:
            del self.adapter_layer[name]
        return not self.adapter_layer

    def resolve(self, composition: Composition | str | None) -> Action | None:
        """Who answers under a composition."""
        parts = dict(self.adapter_layer.items())
        return resolve(composition, Place(parts, copies=width(composition)))

    def forward(self, x: Tensor, action: Action | None, flow: Flow) -> Tensor:
        """Hidden states [..., h] -> scores [..., labels]."""
        scores = self.own(x)
        return scores if action is None else action(SlotCall(scores, flow, input=x))
