"""Words split over ranks: each holds the embeddings, and makes the logits, of a run of ids.

N labelled positions, V words of which a rank holds v. Where ranks do not divide V, the first hold
one more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from graftwerk.adapters.part import Layout
from graftwerk.parallel.exchange import sum_backward, sum_forward
from graftwerk.parallel.shares import gather, shard, share_range


@dataclass
class Vocabulary:
    """A vocabulary of `size` words, split over the ranks of `group`.

    `apart`: a model's logits are those of this rank's words, not all of them gathered.
    """

    size: int
    group: dist.ProcessGroup
    apart: bool = False

    @property
    def words(self) -> tuple[int, int]:
        """(first, end) of this rank's ids."""
        return share_range(self.size, self.group)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy [N], float32, of labels [N] under this rank's logits [N, v].

        Ranks exchange the largest logit, the sum of exponentials and the label's logit of each
        position, in two reductions; no rank sees another's logits. float64 stays what it is.
        """
        return _SplitCrossEntropy.apply(logits, labels, self)  # pyright: ignore[reportReturnType]


@contextmanager
def split_logits(model: nn.Module) -> Iterator[Vocabulary | None]:
    """Within it a model's logits stay split; what it gives is for `training.loss`.

    None, and nothing is different, where the model's words are not split.
    """
    output = getattr(model, "output_layer", None)
    vocabulary = output.vocabulary if isinstance(output, SplitOutputLayer) else None
    if vocabulary is None:
        yield None
        return
    before, vocabulary.apart = vocabulary.apart, True
    try:
        yield vocabulary
    finally:
        vocabulary.apart = before


class SplitLookup(nn.Module):
    """The embeddings [v, h] of this rank's words; the others' come by one all-reduce."""

    def __init__(self, weight: nn.Parameter, vocabulary: Vocabulary):
        super().__init__()
        self.weight = shard(weight, Layout(dim=0, size=vocabulary.size), vocabulary.group)
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [B, S, h]."""
        start, stop = self.vocabulary.words
        others = (tokens < start) | (tokens >= stop)
        found = F.embedding((tokens - start).masked_fill(others, 0), self.weight)
        return sum_forward(found.masked_fill(others[..., None], 0.0), self.vocabulary.group)


class SplitOutputLayer(nn.Module):
    """Hidden states to the logits of this rank's words, or, gathered, of all."""

    def __init__(
        self, weight: nn.Parameter | None, bias: nn.Parameter | None, vocabulary: Vocabulary
    ):
        super().__init__()
        self.vocabulary = vocabulary
        self.weight, self.bias = self._share(weight), self._share(bias)

    def _share(self, whole: nn.Parameter | None) -> nn.Parameter | None:
        layout = Layout(dim=0, size=self.vocabulary.size)
        return None if whole is None else shard(whole, layout, self.vocabulary.group)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """[..., h] and the rank's word embeddings [v, h], which serve as weight where the layer has
        none of its own -> [..., v], or [..., V]."""
        vocabulary, x = self.vocabulary, sum_backward(x, self.vocabulary.group)
        logits = F.linear(x, embeddings if self.weight is None else self.weight, self.bias)
        if vocabulary.apart:
            return logits
        return _GatherWords.apply(logits, vocabulary)  # pyright: ignore[reportReturnType]


class _GatherWords(Function):
    """All logits of the ranks' shares; all ranks then do the same with them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.words = vocabulary.words
        layout = Layout(dim=logits.ndim - 1, size=vocabulary.size)
        return gather(logits, layout, vocabulary.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        start, stop = ctx.words
        return grads[0][..., start:stop], None


class _SplitCrossEntropy(Function):
    """`log sum exp(z) - z_label`; the gradient is `softmax(z) - 1 at the label`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
        start, stop = vocabulary.words
        z = logits if logits.dtype == torch.float64 else logits.float()
        largest = z.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=vocabulary.group)
        z = z - largest[:, None]
        local = (labels - start).clamp(0, stop - start - 1)[:, None]
        here = ((labels >= start) & (labels < stop))[:, None]
        found = z.gather(1, local).masked_fill(~here, 0.0).squeeze(1)
        exp = z.exp()
        sums = torch.stack([exp.sum(-1), found])
        dist.all_reduce(sums, group=vocabulary.group)
        ctx.save_for_backward(exp.div_(sums[0][:, None]), local, here)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        shares, local, here = ctx.saved_tensors
        gradient = shares.scatter_add(1, local, -here.to(shares.dtype))
        return (gradient * grads[0][:, None]).to(ctx.dtype), None, None
