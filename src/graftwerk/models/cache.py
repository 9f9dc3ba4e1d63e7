"""The key-value cache of generation."""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class KeyValueCache:
    """Keys and values of the tokens seen so far, for each layer of a decoder.

    `end` [B, K] says how far each cached token may be seen (None: by all that follow), `positions`
    [B or 1, K] where each stands. `cross` holds keys and values of encoder states, made once.
    Layers above a `Parallel` hold its wider batch.
    """

    def __init__(self, num_layers: int):
        self.own: list[Pair | None] = [None] * num_layers
        self.cross: list[Pair | None] = [None] * num_layers
        self.end: Tensor | None = None
        self.positions: Tensor | None = None
        self.cross_mask: Tensor | None = None  # [B, 1, 1, E]: which source tokens are no padding
        self.rows: Tensor | None = None  # [B]: the rows' numbers, for a `BatchSplit`
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Appends [B, S, groups, head size] to a layer and returns all that it holds."""
        held = self.own[layer]
        if held is not None:
            key, value = torch.cat([held[0], key], 1), torch.cat([held[1], value], 1)
        self.own[layer] = key, value
        return key, value

    def note(self, end: Tensor | None, positions: Tensor, batch: int, new: int) -> None:
        """Notes how far `new` tokens may be seen and where they stand; once a forward pass."""
        if end is not None or self.end is not None:
            forever, device = torch.iinfo(torch.int64).max, positions.device
            if self.end is None:
                self.end = torch.full((batch, self.length), forever, device=device)
            if end is None:
                end = torch.full((batch, new), forever, device=device)
            self.end = torch.cat([self.end, end], 1)
        if self.positions is not None:
            rows = max(len(self.positions), len(positions))
            seen = self.positions.expand(rows, -1)
            positions = torch.cat([seen, positions.expand(rows, -1)], 1)
        self.positions = positions
        self.length += new

    def keep(self, rows: Tensor) -> None:
        """Keeps the batch rows with these indices: finished ones leave."""

        def kept(pair: Pair | None) -> Pair | None:
            return None if pair is None else (pair[0][rows], pair[1][rows])

        self.own = [kept(pair) for pair in self.own]
        self.cross = [kept(pair) for pair in self.cross]
        self.end = None if self.end is None else self.end[rows]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows]
        self.rows = rows if self.rows is None else self.rows[rows]
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions[rows]
