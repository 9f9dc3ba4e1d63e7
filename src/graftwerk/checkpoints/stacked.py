"""Many small tensors of many layers as few: those that differ in the layer alone are one.

A name costs a file some hundred bytes, and an adapter of 48 layers may have 1500 tensors of a few
numbers. `decoder.layers.0-23.mlp.fc1.gate.bias` [24, 1] stands for 24 tensors [1].
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from graftwerk.errors import UserError

FEW = 256  # tensors of a file that keep their names, each its own
LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..+)")
RUN = re.compile(r"(.*\blayers\.)(\d+)-(\d+)(\..+)")


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file; where there are many, those of layers in a row are stacked."""
    if len(state) <= FEW:
        return dict(state)
    made: dict[str, Tensor] = {}
    alike: dict[tuple, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        if layer := LAYER.fullmatch(key):
            kind = (layer[1], layer[3], tensor.dtype, tensor.shape)
            alike.setdefault(kind, {})[int(layer[2])] = tensor
        else:
            made[key] = tensor
    for (before, behind, *_), layers in alike.items():
        for run in _runs(sorted(layers)):
            own = [layers[number] for number in run]
            name = f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])
            made[f"{before}{name}{behind}"] = torch.stack(own) if len(run) > 1 else own[0]
    return made


def unstacked(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round, as views.

    Raises:
        UserError: for a stack of another height than its name says.
    """
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        run = RUN.fullmatch(key)
        if run is None:
            made[key] = tensor
            continue
        first, last = int(run[2]), int(run[3])
        if not tensor.ndim or len(tensor) != last - first + 1:
            raise UserError(f"{path}: {key} has shape {list(tensor.shape)}: one row a layer")
        for number, own in enumerate(tensor.unbind(), first):
            made[f"{run[1]}{number}{run[4]}"] = own
    return made


def _runs(numbers: list[int]) -> list[list[int]]:
    runs = [[numbers[0]]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
