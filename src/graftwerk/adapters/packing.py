"""What of the active adapters would change where texts lie together in a row."""

from typing import Any

from graftwerk.adapters.composition import BatchSplit, MultiTask, below, names
from graftwerk.adapters.model import AdapterModel


def bound_to_rows(model: AdapterModel) -> str | None:
    """Why a row must be one text; None where several in a row compute as apart."""
    for block in (BatchSplit, MultiTask):
        if inside := sorted(below(model.active, block)):
            return f"{block.__name__} gives adapter {inside[0]!r} rows of a batch"
    return None


def bound_to_texts(model: AdapterModel) -> str | None:
    """Why no two texts may share tokens that they begin with; None where they compute as apart.

    They do where all that is done at a token follows from the tokens before it.
    """
    shape: Any = model.config
    if shape.architecture != "gpt":
        return f"a {shape.architecture} reads each row both ways"
    for name in dict.fromkeys(names(model.active)):
        if any(part.whole_row for _, _, part in model.parts(name)):
            return f"adapter {name!r} reads what comes behind a token"
    return bound_to_rows(model)
