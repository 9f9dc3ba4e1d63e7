"""Packed rows by FlexAttention (He et al. 2024, arXiv:2412.05496), which skips what nobody sees.

Rows are tiled, 128 queries by 128 keys: tiles in which nobody sees anyone are not computed, and
only those that are seen in part look at the mask. `end`, or which document each token is of, says
all of it without a mask [S, S]; scores of distances are added without a matrix of them.

Shapes: B batch, S tokens of a row, E of one that it reads, T tiles of a row, d head size.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.models.compiling import why_not_compiled
from graftwerk.models.config import TransformerConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128


class Blocks:
    """Who sees whom in the rows of one pass, for FlexAttention's kernels; made once a pass.

    `whole` is what layers without a window see, None: plain causal attention; `windowed` what those
    with one do, None: as the others.

    Args:
        make: (`whole`, `windowed`) of the rows.
        rows: what the masks are made of, each [B, tokens].
        bias: [heads, 2 S - 1], added to scores by distance, key minus query, from -(S - 1) on.
    """

    def __init__(
        self,
        make: "Callable[..., tuple[BlockMask | None, BlockMask | None]]",
        rows: tuple[Tensor, ...],
        bias: Tensor | None = None,
    ):
        self.make, self.rows, self.bias = make, rows, bias
        self.whole, self.windowed = make(*rows)
        self.kernel = kernel_of(rows[0].device)

    @classmethod
    def causal(cls, batch: int, end: Tensor | None, positions: Tensor, window: int = 0) -> "Blocks":
        """Those of `positions.visibility`.

        `end` [B or 1, S], None: plain causal rows; `positions` [B or 1, S]; `window`: the largest
        distance of positions, and one; 0: no layer has a window.
        """
        length = positions.shape[1]
        visible = positions.new_full((1, length), length) if end is None else end
        rows = visible.clamp(max=length), positions
        rows = tuple(row.expand(batch, -1).int().contiguous() for row in rows)
        return cls(partial(_causal, plain=end is None, window=window), rows)

    @classmethod
    def of_documents(cls, asking: Tensor, asked: Tensor) -> "Blocks":
        """Those of `positions.of_documents`: documents `asking` [B, S] see `asked` [B, E]."""
        return cls(_of_documents, (asking.int().contiguous(), asked.int().contiguous()))

    def widened(self, n: int) -> "Blocks":
        """Those of a batch that is repeated `n` times."""
        return Blocks(self.make, tuple(row.repeat(n, 1) for row in self.rows), self.bias)

    def of(self, windowed: bool) -> "BlockMask | None":
        """What a layer sees; None: plain causal attention."""
        return self.windowed if windowed and self.windowed is not None else self.whole

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, seen: "BlockMask", scale: float
    ) -> Tensor:
        """Queries [B, S, heads, d], keys and values [B, E, groups, d] -> [B, S, heads d]."""
        attended = self.kernel(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            score_mod=None if self.bias is None else _by_distance(self.bias),
            block_mask=seen,
            scale=scale,
            enable_gqa=query.shape[2] > key.shape[2],
        )
        return attended.transpose(1, 2).flatten(2)


def suits(tokens: Tensor, config: TransformerConfig) -> bool:
    """Whether FlexAttention's kernels are made for such rows [B, S]: of a tile, on a GPU."""
    large = tokens.shape[1] >= TILE and config.kv_channels >= 16  # the least that they multiply
    return large and tokens.is_cuda and why_not_compiled("cuda") is None


_kernels: dict[str, Callable[..., Any]] = {}


def kernel_of(device: torch.device) -> Callable[..., Any]:
    """FlexAttention, compiled; on a CPU the plain one, which is for tests: it makes all scores."""
    if device.type not in _kernels:
        from torch.nn.attention.flex_attention import flex_attention  # imports torch's compiler

        plain = device.type == "cpu"
        _kernels[device.type] = flex_attention if plain else torch.compile(flex_attention)
    return _kernels[device.type]


def _by_distance(bias: Tensor) -> Callable[..., Tensor]:
    """Adds [heads, 2 S - 1] to scores."""
    nearest = bias.shape[1] // 2

    def added(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[h, j - i + nearest]

    return added


def _causal(
    end: Tensor, positions: Tensor, plain: bool, window: int
) -> "tuple[BlockMask | None, BlockMask | None]":
    """Both masks [B, 1, S, S] of `visibility` in tiles; `end` [B, S], at most S.

    With a window some tiles count as seen in part that nobody sees: texts interleave in a tree.
    """

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[b, j])

    def sees_near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[b, j]) & (positions[b, i] - positions[b, j] < window)

    ends = _tiles(end)
    number = torch.arange(ends.shape[1], device=end.device)
    query, earlier = number[:, None] * TILE, number < number[:, None]  # [T, 1], [T, T]
    nearest, furthest = (x[:, None] for x in ends.aminmax(dim=2))  # [B, 1, T] of keys
    some = (earlier & (furthest > query)) | (number == number[:, None])
    every = earlier & (nearest >= query + TILE)
    lengths = end.shape[1], end.shape[1]
    whole = None if plain else _block_mask(some, every, sees, lengths)
    if not window:
        return whole, None
    first, last = _tiles(positions).aminmax(dim=2)
    some = some & (first[:, :, None] - last[:, None] < window)
    every = every & (last[:, :, None] - first[:, None] < window)
    return whole, _block_mask(some, every, sees_near, lengths)


def _of_documents(asking: Tensor, asked: Tensor) -> "tuple[BlockMask, None]":
    """The mask [B, 1, S, E] of `positions.of_documents` in tiles.

    Where documents do not come in the order of their numbers some tiles count as seen in part that
    nobody sees.
    """
    first = asked.eq(0).any(1, True).int() - 1  # what padding sees: document 0 where there is one
    seen = torch.where(asking < 0, first, asking)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[b, i] == asked[b, j]

    # Padding is told apart: it lies at one end of a row, and what it sees at the other.
    beyond = torch.iinfo(asked.dtype).max
    least, most = (x[:, :, None] for x in _range(asking, beyond))
    lowest, highest = (x[:, None] for x in _range(asked, beyond))
    some = (least <= highest) & (lowest <= most)
    for_padding = _tiles(asked == first).any(2)
    some |= _tiles(asking < 0).any(2)[:, :, None] & for_padding[:, None]
    least, most = (x[:, :, None] for x in _tiles(seen).aminmax(dim=2))
    lowest, highest = (x[:, None] for x in _tiles(asked).aminmax(dim=2))
    every = (least == most) & (lowest == highest) & (least == lowest)
    every &= _filled(asking)[:, None] & _filled(asked)
    return _block_mask(some, every, sees, (asking.shape[1], asked.shape[1])), None


def _range(documents: Tensor, beyond: int) -> tuple[Tensor, Tensor]:
    """The least and the largest number [B, T] in each tile, padding aside."""
    tiles = _tiles(documents)
    return tiles.masked_fill(tiles < 0, beyond).amin(2), tiles.amax(2)


def _tiles(rows: Tensor) -> Tensor:
    """[B, S] -> [B, T, 128]; the last token fills up the last tile."""
    length = rows.shape[1]
    count = -(-length // TILE)
    places = torch.arange(count * TILE, device=rows.device).clamp(max=length - 1)
    return rows[:, places].unflatten(1, (count, TILE))


def _filled(rows: Tensor) -> Tensor:
    """Which tiles [T] of rows [B, S] no token lacks."""
    length = rows.shape[1]
    return torch.arange(TILE, length + TILE, TILE, device=rows.device) <= length


def _block_mask(
    some: Tensor, every: Tensor, sees: Callable[..., Tensor], lengths: tuple[int, int]
) -> "BlockMask":
    """Tiles [B, T, T] of which queries see some keys, and of which all see every key."""
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=lengths,
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of tiles [B, T, T] how many each row of them has, and which: first those, then the rest."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
