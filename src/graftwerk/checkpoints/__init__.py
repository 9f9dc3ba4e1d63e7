"""Reading and writing base models and adapters; one file for each outside format."""

from graftwerk.checkpoints.adapter import (
    load_adapter,
    load_adapters,
    read_adapters,
    save_adapter,
    save_adapters,
)
from graftwerk.checkpoints.base import load_base, load_tokenizer, save_base

__all__ = [
    "load_adapter",
    "load_adapters",
    "load_base",
    "load_tokenizer",
    "read_adapters",
    "save_adapter",
    "save_adapters",
    "save_base",
]
