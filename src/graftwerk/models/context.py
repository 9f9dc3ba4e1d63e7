"""What all layers of one forward pass share: above all, who sees whom.

Shapes: B batch, S new tokens, K tokens seen (S and those in the cache), E encoder states,
h hidden_size.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.adapters.slots import Flow, widen
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.flex import Blocks
from graftwerk.models.positions import FAR, RelativePosition, neighbours, runs_of


@dataclass
class Context:
    """What all layers of one forward pass share.

    `mask` [B or 1, 1, S, K] is True where a query sees a key; None: plain causal attention if
    `causal`, else everything is seen. `window_mask` is that of layers with a window, None where no
    text is longer. `scores` [1, heads, S, K] are added before the softmax (relative positions).
    `positions` [B or 1, S]. `rotary` is (cos, sin), each [B or 1, S, 1, rotary size]. `cache` holds
    keys and values between passes. `states` [B, E, h] are the encoder's, seen where `states_mask`
    [B, 1, 1 or S, E] is True. `flow` is what slots are told, `source_flow` those that read encoder
    states. `relative` is the table that made `scores`. `documents` [B, tokens] or `end` [B, K] say
    which text each token is of, as in the models' arguments; neither: a row is one. `runs` are the
    columns of all rows, one row after the other, in runs that do not see each other: how many, and
    the mask within them, None where it is plain causal; None: rows are not taken apart. `blocks`
    stand for `mask`, `window_mask` and `scores` where FlexAttention reads them, `states_blocks` for
    `states_mask`.
    """

    positions: Tensor
    flow: Flow = field(default_factory=Flow)
    source_flow: Flow = field(default_factory=Flow)
    mask: Tensor | None = None
    causal: bool = False
    window_mask: Tensor | None = None
    scores: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    cache: KeyValueCache | None = None
    states: Tensor | None = None
    states_mask: Tensor | None = None
    relative: RelativePosition | None = None
    documents: Tensor | None = None
    end: Tensor | None = None
    runs: list[tuple[int, Tensor | None]] | None = None
    blocks: Blocks | None = None
    states_blocks: Blocks | None = None

    def widened(self, n: int) -> "Context":
        """The context of a batch that is repeated `n` times.

        Another object: gradient checkpointing runs the layers below a second time, with theirs.
        """
        positions = widen(self.positions, n)
        assert positions is not None
        rotary = self.rotary
        if rotary is not None and rotary[0].shape[0] > 1:
            rotary = torch.cat([rotary[0]] * n), torch.cat([rotary[1]] * n)
        return replace(
            self,
            positions=positions,
            flow=widened(self.flow, n),
            source_flow=widened(self.source_flow, n),
            mask=widen(self.mask, n),
            window_mask=widen(self.window_mask, n),
            rotary=rotary,
            states=repeated(self.states, n),
            states_mask=widen(self.states_mask, n),
            documents=widen(self.documents, n),
            end=widen(self.end, n),
            runs=None if self.runs is None else self.runs * n,
            blocks=self.blocks and self.blocks.widened(n),
            states_blocks=self.states_blocks and self.states_blocks.widened(n),
        )

    def relate(self, relative: RelativePosition, queries: int, keys: int) -> None:
        """Adds the scores of a table of distances; the queries are the last of the keys."""
        self.relative = relative
        if self.blocks is not None:
            self.blocks.bias = relative.by_distance(keys)
        else:
            self.scores = relative(queries, keys)

    def seen(self, windowed: bool) -> tuple[Tensor | None, bool]:
        """What `scaled_dot_product_attention` is given: the mask (or scores), and `is_causal`."""
        mask, causal = self.mask, self.causal
        if windowed and self.window_mask is not None:
            mask, causal = self.window_mask, False
        if self.scores is not None:
            assert not causal, "scores come with a mask"
            return (self.scores if mask is None else hide(self.scores, mask)), False
        return mask, causal

    def neighbours(self, columns: int) -> tuple[Tensor, Tensor]:
        """How many tokens of its text stand before and behind what is in each of the last columns,
        both [B or 1, columns]; virtual tokens are far from any."""
        tokens = self.flow.offset + columns
        if self.documents is not None:
            texts = self.documents
        elif self.end is not None:
            index = torch.arange(self.end.shape[1], device=self.end.device)
            texts = self.end.masked_fill(self.end <= index, -1)[:, len(index) - tokens :]
        else:
            texts = torch.zeros(1, tokens, dtype=torch.int64, device=self.positions.device)
        before, behind = neighbours(texts)
        ahead = max(columns - tokens, 0)
        before = F.pad(before, (ahead, 0), value=FAR)[:, -columns:]
        behind = F.pad(behind, (ahead, 0), value=FAR)[:, -columns:]
        if self.documents is None and self.end is not None:
            # In a tree a text's tokens do not stand together: those before one are what it sees,
            # all that come before it but those that nobody sees any more.
            seen = self.end.shape[1]
            index = torch.arange(seen, device=self.end.device)
            query = index[seen - columns :]
            ends = self.end.maximum(index + 1).sort().values  # padding may end before it begins
            over = torch.searchsorted(ends, query.expand(len(ends), -1).contiguous(), right=True)
            depth = query - over - (seen - columns - self.flow.offset)
            before = depth.masked_fill(depth < 0, FAR)
        return before, behind


def runs_within(end: Tensor, mask: Tensor) -> list[tuple[int, Tensor | None]] | None:
    """A context's `runs`, by `end` [B, S] and its mask; None where that takes nothing apart."""
    runs = runs_of(end)
    if len(runs) == len(end):
        return None
    found: list[tuple[int, Tensor | None]] = []
    for row, start, stop in runs:
        chain = bool((end[row, start:stop] >= stop).all())
        within = mask[row : row + 1, :, start:stop, start:stop]
        found.append((stop - start, None if chain else within))
    return found


def widened(flow: Flow, n: int) -> Flow:
    """What slots are told of a batch that is repeated `n` times."""
    return flow.of(lambda tensor: repeated(tensor, n))


def repeated(tensor: Tensor | None, n: int) -> Tensor | None:
    """`n` copies of a tensor, one after the other."""
    return None if tensor is None else torch.cat([tensor] * n)


def hide(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores, -inf where the mask is not True."""
    return scores.masked_fill(~mask, float("-inf"))
