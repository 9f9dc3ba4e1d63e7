"""Activation checkpointing: the backward pass computes again what the forward pass did not keep.

`full` keeps what goes into each layer (Chen et al. 2016, arXiv:1604.06174). `selective` keeps
everything but what attention makes between queries, keys and values and its result: prefixes put
before them, scores, probabilities (Korthikanti et al. 2022, arXiv:2205.05198, section 5).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftwerk.errors import UserError
from graftwerk.models.attention import Attention, CrossAttention
from graftwerk.models.context import Context
from graftwerk.models.layers import TransformerLayer

KEY = "model.activations_checkpoint_granularity"
# What is computed again: which method of which modules.
PLACES: dict[str, tuple[str, tuple[type[nn.Module], ...]]] = {
    "full": ("forward", (TransformerLayer,)),
    "selective": ("attend", (Attention, CrossAttention)),
}


def recompute(model: nn.Module, granularity: str | None) -> None:
    """Makes passes with gradients keep less, by `full`, `selective` or None; others are as before.

    Raises:
        UserError: for another granularity.
    """
    if granularity is None:
        return
    if granularity not in PLACES:
        raise UserError(f"{KEY}={granularity} is not known: use {', '.join(PLACES)} or null")
    method, kinds = PLACES[granularity]
    for module in model.modules():
        if isinstance(module, kinds):
            setattr(module, method, _again(getattr(module, method)))


def _again(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, called once more in the backward pass; its last argument is the context."""

    @wraps(function)
    def run(*args: Any) -> Tensor:
        context = args[-1]
        assert isinstance(context, Context)
        # What is noted or put into a cache is so once.
        leaves_traces = context.flow.record is not None or context.cache is not None
        if leaves_traces or not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)

    return run
