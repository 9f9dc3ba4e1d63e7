"""The key-value cache of generation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Grid:
    """Where the tokens of a pass, one row of N, stand for attention: in a grid [B, S].

    All else meets each token once and no padding. B rows of the cache, S places in each, K tokens
    in a row of the cache and places.

    Args:
        tokens: [B, S] which token stands in each place; one may stand in several (virtual tokens),
            and any in a place that nobody looks at.
        places: [N] the place `b * S + s` at which each token finds what it attended to.
        mask: [B, 1, S, K] what each place sees; None, on a first pass: all up to itself.
    """

    tokens: Tensor
    places: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> "Grid":
        mask = None if self.mask is None else self.mask.to(device)
        return Grid(self.tokens.to(device), self.places.to(device), mask)


class KeyValueCache:
    """Keys and values of the tokens seen so far, for each layer of a decoder.

    `end` [B, K] says how far each cached token may be seen (None: by all that follow), `positions`
    [B or 1, K] where each stands. `grid` is that of the next pass, None where it has rows of its
    own. `cross` holds keys and values of encoder states, made once. Layers above a `Parallel` hold
    its wider batch.

    `room`: the tokens that there will be, where that is known. A cache that is `fixed` has them
    all from then on, for attention too: shapes stay, and masks say what is there.
    """

    def __init__(self, num_layers: int, room: int = 0):
        self.own: list[Pair | None] = [None] * num_layers  # [B, `length` or more, groups, d]
        self.cross: list[Pair | None] = [None] * num_layers
        self.end: Tensor | None = None
        self.positions: Tensor | None = None
        self.cross_mask: Tensor | None = None  # [B, 1, 1, E]: which source tokens are no padding
        self.rows: Tensor | None = None  # [B]: the rows' numbers, for a `BatchSplit`
        self.grid: Grid | None = None
        self.columns: Tensor | None = None  # [S]: where a fixed cache takes up the next pass
        self.room = room
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Appends [B, S, groups, head size] to a layer and returns all that it holds."""
        held = self.own[layer]
        if self.columns is not None and held is not None:
            for buffer, new in zip(held, (key, value), strict=True):
                buffer.index_copy_(1, self.columns, new)
            return held
        past = self.length - key.shape[1]
        if held is None and self.room <= self.length:
            self.own[layer] = key, value
            return key, value
        if held is None or held[0].shape[1] < self.length:
            room = max(self.room, self.length, 2 * past)  # twice as much: few copies a token
            key_held, value_held = held or (None, None)
            held = _buffer(key, room, key_held, past), _buffer(value, room, value_held, past)
            self.own[layer] = held
        for buffer, new in zip(held, (key, value), strict=True):
            buffer[:, past : self.length] = new
        return held[0][:, : self.length], held[1][:, : self.length]

    def spread(self, tokens: Tensor) -> Tensor:
        """A pass's tokens [1, N, ...] in its grid [B, S, ...]; as they are where it has none."""
        return tokens if self.grid is None else tokens[0][self.grid.tokens]

    def gather(self, tokens: Tensor) -> Tensor:
        """The way back from `spread`."""
        return tokens if self.grid is None else tokens.flatten(0, 1)[self.grid.places][None]

    def note(self, end: Tensor | None, positions: Tensor, batch: int, new: int) -> None:
        """Notes how far `new` tokens may be seen and where they stand; once a forward pass."""
        if self.columns is not None and self.positions is not None:
            self.positions.index_copy_(1, self.columns, positions)
            return
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

    def fix(self, rows: int, new: int, room: int) -> None:
        """Fixes a cache with a grid: from now on it has `rows` of `room` tokens, a pass `new`.

        Whoever reads on moves `columns`, and shows in the grid's mask what they have reached.
        """
        assert self.positions is not None
        past, self.length = self.length, room

        def grown(held: Tensor) -> Tensor:
            """With zeros: what is masked is multiplied with none, not with a NaN."""
            return F.pad(held, (*(0, 0) * (held.dim() - 2), 0, room - past, 0, rows - len(held)))

        self.positions = grown(self.positions)
        for layer, held in enumerate(self.own):
            assert held is not None
            key, value = held
            self.own[layer] = grown(key[:, :past]), grown(value[:, :past])
        self.columns = torch.arange(past, past + new, device=self.positions.device)

    def keep(self, rows: Tensor) -> None:
        """Keeps the batch rows with these indices: finished ones leave."""

        self.own = [pair and self._kept(pair, rows) for pair in self.own]
        self.cross = [pair and (pair[0][rows], pair[1][rows]) for pair in self.cross]
        self.end = None if self.end is None else self.end[rows]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows]
        self.rows = rows if self.rows is None else self.rows[rows]
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions[rows]

    def _kept(self, pair: Pair, rows: Tensor) -> Pair:
        """What a layer holds of these rows, and as much room behind it."""
        key, value = (held.new_empty(len(rows), *held.shape[1:]) for held in pair)
        for buffer, held in zip((key, value), pair, strict=True):
            out = buffer[:, : self.length]
            torch.index_select(held[:, : self.length], 0, rows, out=out)
        return key, value


def _buffer(like: Tensor, room: int, held: Tensor | None, past: int) -> Tensor:
    """[B, room, ...] whose first `past` tokens are those held."""
    buffer = like.new_empty(len(like), room, *like.shape[2:])
    if held is not None:
        buffer[:, :past] = held[:, :past]
    return buffer
