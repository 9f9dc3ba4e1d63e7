"""The key-value cache of generation."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens seen so far, for each layer.

    `end` [B, K] says how far each cached token may be seen (None: by all that follow).
    Layers above a `Parallel` hold its wider batch.
    """

    def __init__(self, num_layers: int):
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.end: Tensor | None = None
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [B, S, groups, head size] to a layer and returns all that it holds."""
        old_key, old_value = self.keys[layer], self.values[layer]
        if old_key is not None and old_value is not None:
            key, value = torch.cat([old_key, key], 1), torch.cat([old_value, value], 1)
        self.keys[layer], self.values[layer] = key, value
        return key, value

    def extend_end(self, end: Tensor | None, batch: int, new: int, device: torch.device) -> None:
        """Notes how far `new` tokens may be seen; call once a forward pass, before the layers."""
        if end is not None or self.end is not None:
            forever = torch.iinfo(torch.int64).max
            if self.end is None:
                self.end = torch.full((batch, self.length), forever, device=device)
            if end is None:
                end = torch.full((batch, new), forever, device=device)
            self.end = torch.cat([self.end, end], 1)
        self.length += new

    def keep(self, rows: Tensor) -> None:
        """Keeps the batch rows with these indices: finished ones leave."""
        self.keys = [None if key is None else key[rows] for key in self.keys]
        self.values = [None if value is None else value[rows] for value in self.values]
        self.end = None if self.end is None else self.end[rows]
