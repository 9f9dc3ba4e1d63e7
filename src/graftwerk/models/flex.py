"""Packed rows by FlexAttention (He et al. 2024, arXiv:2412.05496), which skips what nobody sees.

Rows are tiled, 128 queries by 128 keys: tiles in which nobody sees anyone are not computed, and
only those that are seen in part look at the mask. `end` says all of it without a mask [S, S].

Shapes: B batch, S tokens of a row, T tiles of a row, d head size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.adapters.slots import widen
from graftwerk.models.compiling import why_not_compiled
from graftwerk.models.config import TransformerConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128


class Blocks:
    """Who sees whom in the rows of one pass: `positions.visibility` for FlexAttention's kernels.

    `whole` is what layers without a window see, None: plain causal attention; `windowed` what those
    with one do, None: as the others. Made once a pass.

    Args:
        end: [B or 1, S] as in `visibility`; None: plain causal rows.
        positions: [B or 1, S].
        window: the largest distance of positions, and one; 0: no layer has a window.
    """

    def __init__(self, batch: int, end: Tensor | None, positions: Tensor, window: int = 0):
        length = positions.shape[1]
        self.batch, self.end, self.positions, self.window = batch, end, positions, window
        visible = positions.new_full((1, length), length) if end is None else end
        visible = visible.clamp(max=length).expand(batch, -1).int().contiguous()
        places = positions.expand(batch, -1).int().contiguous()
        self.whole = None if end is None else _block_mask(visible)
        self.windowed = _block_mask(visible, places, window) if window else None
        self.kernel = kernel_of(positions.device)

    def widened(self, n: int) -> "Blocks":
        """Those of a batch that is repeated `n` times."""
        positions = widen(self.positions, n)
        assert positions is not None
        return Blocks(self.batch * n, widen(self.end, n), positions, self.window)

    def of(self, windowed: bool) -> "BlockMask | None":
        """What a layer sees; None: plain causal attention."""
        return self.windowed if windowed and self.windowed is not None else self.whole

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, seen: "BlockMask", scale: float
    ) -> Tensor:
        """Queries [B, S, heads, d], keys and values [B, S, groups, d] -> [B, S, heads d]."""
        attended = self.kernel(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
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


def _block_mask(end: Tensor, positions: Tensor | None = None, window: int = 0) -> "BlockMask":
    """The mask [B, 1, S, S] of `visibility` in tiles; `end` int32 [B, S], at most S.

    With a window some tiles count as seen in part that nobody sees: texts interleave in a tree.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[b, j])

    def sees_near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert positions is not None
        return (j <= i) & (i < end[b, j]) & (positions[b, i] - positions[b, j] < window)

    length, device = end.shape[1], end.device
    count = -(-length // TILE)
    tiles = torch.arange(count * TILE, device=device).clamp(max=length - 1).view(count, TILE)
    number = torch.arange(count, device=device)
    query, earlier = number[:, None] * TILE, number < number[:, None]  # [T, 1], [T, T]
    nearest, furthest = (x[:, None] for x in end[:, tiles].aminmax(dim=2))  # [B, 1, T] of keys
    some = (earlier & (furthest > query)) | (number == number[:, None])
    every = earlier & (nearest >= query + TILE)
    if positions is not None:
        first, last = positions[:, tiles].aminmax(dim=2)
        some = some & (first[:, :, None] - last[:, None] < window)
        every = every & (last[:, :, None] - first[:, None] < window)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=TILE,
        mask_mod=sees if positions is None else sees_near,
        seq_lengths=(length, length),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of tiles [B, T, T] how many each row of them has, and which: first those, then the rest."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
