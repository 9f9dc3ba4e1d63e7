"""AdapterHub's composition blocks, which are the engine's own."""

from graftwerk.adapters.composition import (
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
)

__all__ = ["Average", "BatchSplit", "Fuse", "MultiTask", "Parallel", "Split", "Stack"]
