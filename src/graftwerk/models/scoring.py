"""Logits that are scored where they are made: nobody holds those of all positions.

At each position they are as many as the vocabulary has words, which makes them the largest tensor
of a pass where all tokens are labelled.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of some positions [n, V], and which of all these are -> what becomes of each, [n].
Score = Callable[[Tensor, slice], Tensor]

AT_ONCE = 1 << 26  # logits that are held at one time


def scored(x: Tensor, logits: Callable[[Tensor], Tensor], words: int, score: Score) -> Tensor:
    """The scores [N] of states x [N, h], whose logits have `words` each.

    More than `AT_ONCE` are made run by run, and made once more in the backward pass.
    """
    size = max(AT_ONCE // words, 1)
    if len(x) <= size:
        return score(logits(x), slice(0, len(x)))

    def run(x: Tensor, first: int) -> Tensor:
        return score(logits(x), slice(first, first + len(x)))

    again: Any = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn here
    return torch.cat([checkpoint(run, x, n * size, **again) for n, x in enumerate(x.split(size))])
