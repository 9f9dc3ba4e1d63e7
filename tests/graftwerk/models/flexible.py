"""Packed rows of several tiles, and FlexAttention with gradients where there is no GPU."""

import warnings
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.nn.attention import flex_attention as torch_flex

from graftwerk.adapters import LoRAConfig
from graftwerk.models import build_model
from tests.graftwerk.models.test_encoders import CONFIGS
from tests.graftwerk.tiny import shake

LENGTH = 300  # three tiles, the last not full


@contextmanager
def gradients_on_a_cpu():
    """torch refuses them there, though its plain form has them."""
    with patch.object(torch_flex, "_validate_device", lambda *_: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the plain form
        yield


def forest(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`end` and positions [1, LENGTH] of texts and trees, some long, and padding."""
    generator = torch.Generator().manual_seed(seed)
    end, positions = torch.empty(LENGTH, dtype=torch.int64), torch.empty(LENGTH, dtype=torch.int64)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    def grow(start: int, stop: int, depth: int) -> None:
        trunk = draw(stop - start)
        end[start : start + trunk] = stop
        positions[start : start + trunk] = torch.arange(depth, depth + trunk)
        start += trunk
        while start < stop:
            branch = draw(stop - start)
            grow(start, start + branch, depth + trunk)
            start += branch

    start = 0
    while start < LENGTH - 20:
        size = draw(LENGTH - 20 - start)
        grow(start, start + size, 0)
        start += size
    end[start:], positions[start:] = torch.arange(start + 1, LENGTH + 1), 0
    return end[None], positions[None]


def forests(*seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [forest(seed) for seed in seeds]
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def documents(seed: int, length: int) -> torch.Tensor:
    """[1, length] of texts, some long, and maybe padding."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, length, (20,), generator=generator).tolist()
    row = torch.cat([torch.full((size,), n) for n, size in enumerate(sizes)])[:length]
    padding = int(torch.randint(0, length // 2, (), generator=generator))
    row[length - padding * (seed % 2) :] = -1
    return row[None]


def packed_t5(seed: int = 0) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A T5 with LoRA, and a pass of packed rows, which `seed` draws."""
    torch.manual_seed(0)
    model = build_model(replace(CONFIGS["t5"], hidden_size=64))
    model.add_adapter("a", LoRAConfig(dim=4, target_modules=("all",)))
    shake(model)
    model.freeze_base()
    model.set_active("a")
    end, positions = forests(seed, seed + 1)
    target = torch.cat([documents(seed + n, LENGTH) for n in (0, 1)])
    source = torch.cat([documents(seed + n, 400) for n in (2, 3)])
    words = torch.Generator().manual_seed(seed)
    return model.eval(), {
        "tokens": torch.randint(0, 60, target.shape, generator=words),
        "positions": positions,
        "end": end,
        "documents": target,
        "source": torch.randint(0, 60, source.shape, generator=words),
        "source_documents": source,
    }
