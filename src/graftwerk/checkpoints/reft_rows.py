"""LoReFT with a base, as a file of ours holds it: the rows R [r, h] alone, not the base [h, h].

Any base that completes R's rows makes the same R by the same reflections, so that what was loaded
computes the same and is trained on from there.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from graftwerk.adapters.methods.reft import with_base

ROWS = "projection.weight"
ORIGINAL = "projection.parametrizations.weight.original"
BASE = "projection.parametrizations.weight.0.base"


def without_bases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's weights with R in the place of what makes it."""
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem = key.removesuffix(ORIGINAL)
        if stem != key and stem + BASE in state:
            made[stem + ROWS] = rotation(tensor, state[stem + BASE])
        elif not key.endswith(BASE):
            made[key] = tensor
    return made


def with_bases(
    state: Mapping[str, Tensor], config: Mapping[str, Any], size: int
) -> dict[str, Tensor]:
    """The other way round of `without_bases`, where the method has bases at all.

    Args:
        config: the settings of the adapter's method.
        size: h of the model. Rows of another length are left as they are, and are refused as
            weights that do not fit: no number of a stranger's makes a base.
    """
    if not _has_bases(config):
        return dict(state)
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem = key.removesuffix(ROWS)
        fits = tensor.ndim == 2 and len(tensor) <= size == tensor.shape[1]
        if stem != key and fits and tensor.is_floating_point():
            original, base = with_base(tensor.float())
            made |= {stem + ORIGINAL: original, stem + BASE: base}
        else:
            made[key] = tensor
    return made


def rotation(original: Tensor, base: Tensor) -> Tensor:
    """R [r, h], as torch makes it of `original` [r, h] and a base [h, h]."""
    rows, size = original.shape
    with torch.device("meta"):
        linear = parametrizations.orthogonal(nn.Linear(size, rows, bias=False))
    reflections = linear.get_submodule("parametrizations.weight.0")
    reflections.base = base.float()
    return reflections(original.float()).detach().to(original.dtype).contiguous()


def _has_bases(config: Mapping[str, Any]) -> bool:
    each = config.get("configs")
    if isinstance(each, list | tuple):
        return any(_has_bases(one) for one in each if isinstance(one, Mapping))
    return bool(config.get("orthogonal_base"))
