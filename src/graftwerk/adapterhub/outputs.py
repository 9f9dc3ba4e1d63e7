"""What a model answers: the fields of `transformers`' outputs, and AdapterHub's beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from graftwerk.adapters.slots import Record

Said = dict[str, dict[int, dict[str, np.ndarray]]]


@dataclass
class AdapterModelOutput(ModelOutput):
    """Of a head, or of a model without one. What there is none of is left out.

    Args:
        loss: where the labels were given.
        logits: of a head; `start_logits` and `end_logits` of one for questions.
        last_hidden_state: [B, S, h], where no head is active.
        adapter_gating_scores: what gates let through: adapter -> layer -> place -> array, [B] or
            [B, n], where `output_adapter_gating_scores` asked for it.
        adapter_fusion_attentions: the weights of a fusion's children, [B, S, n], in the same form.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    adapter_gating_scores: Said | None = None
    adapter_fusion_attentions: Said | None = None


@dataclass
class MultiHeadOutput(ModelOutput):
    """Of several heads: one output each, in their order, and the sum of their losses.

    A number gets a head's output (`output[1]`), a name a field (`output["loss"]`).
    """

    head_outputs: list[AdapterModelOutput] | None = None
    loss: Tensor | None = None
    adapter_gating_scores: Said | None = None
    adapter_fusion_attentions: Said | None = None

    @property
    def logits(self) -> Tensor:
        """Those of all heads, one below the other, where they are of one width."""
        return torch.vstack([output["logits"] for output in self.head_outputs or []])

    def __getitem__(self, key: Any) -> Any:
        return self._heads()[key] if isinstance(key, int) else super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._heads())

    def __len__(self) -> int:
        return len(self._heads())

    def _heads(self) -> list[AdapterModelOutput]:
        return self.head_outputs or []


def recorded(record: Record, gates: bool, fusions: bool) -> dict[str, Said]:
    """The fields of an output that say what was recorded and asked for."""
    asked = {"adapter_gating_scores": gates, "adapter_fusion_attentions": fusions}
    said = {"adapter_gating_scores": record.gates, "adapter_fusion_attentions": record.fusions}
    return {key: _arrays(said[key]) for key, wanted in asked.items() if wanted}


def _arrays(said: dict[str, dict[int, dict[str, Tensor]]]) -> Said:
    return {
        name: {
            layer: {place: value.detach().float().cpu().numpy() for place, value in places.items()}
            for layer, places in layers.items()
        }
        for name, layers in said.items()
    }
