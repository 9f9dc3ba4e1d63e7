"""Who sees whom, and where tokens stand: masks, rotary angles, relative distances.

Shapes: B batch, S new tokens, K tokens seen (S and those in the cache), d head size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftwerk.models.config import RotaryScaling, TransformerConfig

FAR = torch.iinfo(torch.int32).max  # further than any token


def visibility(
    end: Tensor, queries: int, positions: Tensor | None = None, window: int = 0
) -> Tensor:
    """The mask [B, 1, S, K] in which query i sees key j iff `j <= i < end[j]`; end [B, K].

    The queries are the last of the K tokens. With a window also
    `positions[i] - positions[j] < window`; positions [B or 1, K].
    """
    seen = end.shape[1]
    index = torch.arange(seen, device=end.device)
    query = index[seen - queries :, None]
    mask = (index <= query) & (query < end[:, None, :])
    if window:
        assert positions is not None, "a window is measured in positions"
        mask = mask & within(positions[:, seen - queries :], positions, window)
    return mask[:, None]


def within(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """The mask [B or 1, S, K] of keys less than `window` positions before a query.

    Positions [B or 1, S] of queries, [B or 1, K] of keys.
    """
    return queries[:, :, None] - keys[:, None, :] < window


def runs_of(end: Tensor, least: int = 128) -> list[tuple[int, int, int]]:
    """Rows cut where no token sees across: each run's row, its first column and the one behind it.

    `end` [B, S] as in `visibility`. Neighbours are one run while they have `least` columns or less.
    """
    length = end.shape[1]
    cuts = end.cummax(1).values <= torch.arange(1, length + 1, device=end.device)
    runs: list[tuple[int, int, int]] = []
    for row, cut in enumerate(cuts):
        start = last = 0
        for stop in (*(cut[:-1].nonzero().flatten() + 1).tolist(), length):
            if last > start and stop - start > least:
                runs.append((row, start, last))
                start = last
            last = stop
        runs.append((row, start, length))
    return runs


def neighbours(texts: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens of its text stand before each token and behind it, both as `texts` [B, S].

    Texts are runs of one number; negative ones are padding. What is behind a text's end is far from
    it, and counts on from its beginning; what is before it is far from both.
    """
    length = texts.shape[1]
    index = torch.arange(length, device=texts.device).expand_as(texts)
    begins = nn.functional.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True)
    first = torch.where(begins & (texts >= 0), index, -1).cummax(1).values
    later = nn.functional.pad(torch.where(begins, index, length)[:, 1:], (0, 1), value=length)
    stop = later.flip(1).cummin(1).values.flip(1)
    before = (index - first).masked_fill(first < 0, FAR)
    return before, (stop - 1 - index).masked_fill(texts < 0, FAR)


def same_document(documents: Tensor, virtual: int = 0) -> Tensor:
    """The mask [B, 1, v + S, v + S] in which tokens see those of their document; documents [B, S].

    Nobody sees padding (-1), which sees document 0 as in Hugging Face's models: AdapterHub's gates
    are means over all positions. `virtual` columns are put in front, which all see and which see
    themselves alone, or the row where it is one document.
    """
    mask = of_documents(documents, documents)
    if virtual:
        mask = nn.functional.pad(mask, (virtual, 0), value=True)
        real = documents >= 0
        single = (documents <= 0).all(1, True)  # a prompt reads the text that it stands before
        ahead = nn.functional.pad(real & single, (virtual, 0), value=True)
        mask = torch.cat([ahead[:, None].expand(-1, virtual, -1), mask], 1)
    return mask[:, None]


def of_documents(asking: Tensor, asked: Tensor) -> Tensor:
    """The mask [B, S, E] in which tokens of documents `asking` [B, S] see those of `asked` [B, E].

    Padding (-1) sees document 0, as somebody must be seen.
    """
    there = (asked == 0).any(1, True)  # a row without document 0 is padding alone
    asking = torch.where((asking < 0) & there, 0, asking)
    return asking[:, :, None] == asked[:, None, :]


def rotary_angles(
    positions: Tensor, config: TransformerConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Positions [B or 1, S] give [B or 1, S, 1, rotary size]; computed in float32.
    """
    size = config.rotary_size
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / config.rotary_base ** (steps / size)
    if config.rotary_scaling is not None:
        frequencies = _scaled(frequencies, config.rotary_scaling)
    angles = positions[..., None].float() * frequencies
    if config.rotary_interleaved:
        angles = angles.repeat_interleave(2, -1)[:, :, None]
    else:
        angles = torch.cat([angles, angles], -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # LLaMA 3.1: short waves stay, long ones are stretched, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Turns the first features of [B, S, heads, d] by the angles of its positions."""
    turned: Any = _Rotation.apply(x, *rotary, interleaved)
    return turned


class _Rotation(torch.autograd.Function):
    """The way back is the rotation back: neither x nor what it is made of is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    size = cos.shape[-1]
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turned[..., size:] = x[..., size:]
    torch.mul(x[..., :size], cos, out=turned[..., :size])

    def pairs(of: Tensor) -> tuple[Tensor, Tensor]:
        half = size // 2
        if interleaved:
            return of[..., :size:2], of[..., 1:size:2]
        return of[..., :half], of[..., half:size]

    (x_first, x_second), (sin_first, sin_second) = pairs(x), pairs(sin)
    first, second = pairs(turned)
    first.addcmul_(x_second, sin_first, value=-1)
    second.addcmul_(x_first, sin_second)
    return turned


class RelativePosition(nn.Module):
    """A learned score for each head and bucket of distances (Raffel et al. 2019, section 2.1).

    Distances up to half of the buckets have their own, longer ones share logarithmically up to
    `relative_attention_max_distance`. Of an encoder, half of the buckets look forward.
    """

    def __init__(self, config: TransformerConfig, bidirectional: bool):
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance
        buckets = config.relative_attention_num_buckets
        self.weight = nn.Parameter(torch.empty(buckets, config.num_attention_heads))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=config.init_method_std)

    def forward(self, queries: int, keys: int) -> Tensor:
        """Scores [1, heads, S, K]; the queries are the last of the keys."""
        index = torch.arange(keys, device=self.weight.device)
        return self.scores((index - index[keys - queries :, None])[None])

    def by_distance(self, length: int) -> Tensor:
        """Scores [heads, 2 S - 1] of all distances in a row, key minus query, from -(S - 1) on."""
        distance = torch.arange(1 - length, length, device=self.weight.device)
        return self.scores(distance[None, None])[0, :, 0]

    def scores(self, distance: Tensor) -> Tensor:
        """Scores [B, heads, S, K] of distances [B, S, K], key minus query."""
        return self.weight[self.buckets(distance)].permute(0, 3, 1, 2)

    def with_prefix(
        self, queries: int, keys: int, seen: Tensor, kind: str, place: Tensor | None = None
    ) -> Tensor:
        """Scores [B, heads, S, P + K] where a prefix stands before the keys, or before each text.

        `seen` [B, 1 or S, P]: what of it there is; `kind`: the `distances` of a `Flow`; `place`
        [B, S]: of packed rows, which column of its text each query is.
        """
        there = nn.functional.pad(seen, (0, keys), value=True)
        places = there.cumsum(2) - 1  # of what is there
        query = torch.arange(keys - queries, keys, device=places.device)[:, None]
        moved = 0 if kind == "keys" else seen.sum(2, keepdim=True)  # queries too, as keys do
        distance = places - query - moved
        length = seen.shape[2]
        if place is not None:  # the text before it begins later than its row
            later = (query - place[..., None]).clamp(min=0)
            own = distance[..., length:].expand(len(place), -1, -1)
            distance = torch.cat([distance[..., :length] + later, own], 2)
        scores = self.scores(distance)
        if kind == "none":
            ahead = torch.ones(length, dtype=torch.bool, device=seen.device)
            scores = scores.masked_fill(nn.functional.pad(ahead, (0, keys)), 0.0)
        return scores

    def buckets(self, distance: Tensor) -> Tensor:
        """Distances (key minus query) to buckets."""
        count = self.weight.shape[0]
        if self.bidirectional:
            count //= 2
            first = (distance > 0).long() * count
            distance = distance.abs()
        else:
            first = torch.zeros_like(distance)
            distance = (-distance).clamp(min=0)
        exact = count // 2
        far = distance.clamp(min=1).float().div(exact).log()
        far = exact + (far / math.log(self.max_distance / exact) * (count - exact)).long()
        return first + torch.where(distance < exact, distance, far.clamp(max=count - 1))
