"""What of the active adapters would change where texts lie together in a row."""

from typing import Any

from graftwerk.adapters.composition import BatchSplit, MultiTask, Split, below, names
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import PrefixSlot

COUNTED = {
    Split: "gives its children columns of a row",
    BatchSplit: "gives its children rows of a batch",
    MultiTask: "gives its children rows of a batch",
}


def bound_to_rows(model: AdapterModel) -> str | None:
    """Why a row must be one text; None where several in a row compute as apart."""
    for block, reason in COUNTED.items():
        if below(model.active, block):
            return f"{block.__name__} {reason}"
    shape: Any = model.config
    both_ways = shape.architecture != "gpt"
    if both_ways and model.plan.virtual_tokens:
        return f"prompts of a {shape.architecture} read the row behind them"
    for name in dict.fromkeys(names(model.active)):
        parts = list(model.parts(name))
        if any(part.own_row for _, _, part in parts):
            return f"adapter {name!r} has a gate, which is a mean over a row"
        prefixed = any(isinstance(slot, PrefixSlot) for _, slot, _ in parts)
        if prefixed and shape.position_embedding_type == "relative":
            return f"adapter {name!r} puts a prefix at a distance before the row"
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
