"""AdapterHub's composition blocks, which are the engine's own, and its way to make one of names."""

from graftwerk.adapterhub.context import composition_of as parse_composition
from graftwerk.adapters.composition import (
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
)

__all__ = [
    "Average",
    "BatchSplit",
    "Fuse",
    "MultiTask",
    "Parallel",
    "Split",
    "Stack",
    "parse_composition",
]
