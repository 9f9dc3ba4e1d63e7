"""What of the active adapters would change where texts lie together in a row."""

from typing import Any

from graftwerk.adapters.composition import BatchSplit, MultiTask, below, names
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.slots import PrefixSlot


def bound_to_rows(model: AdapterModel) -> str | None:
    """Why a row must be one text; None where several in a row compute as apart."""
    shape: Any = model.config
    for block in (BatchSplit, MultiTask):
        if inside := sorted(below(model.active, block)):
            return f"{block.__name__} gives adapter {inside[0]!r} rows of a batch"
    prompted = bool(model.plan.virtual_tokens)
    if prompted and shape.architecture != "gpt":
        return f"prompts of a {shape.architecture} read the row behind them"
    for name in dict.fromkeys(names(model.active)):
        parts = list(model.parts(name))
        gated = any(part.whole_text for _, _, part in parts)
        prefixed = [part for _, slot, part in parts if isinstance(slot, PrefixSlot)]
        if gated and prompted:
            return f"adapter {name!r} has a gate, which is a mean over the prompt too"
        if any(part.whole_text for part in prefixed):
            return f"adapter {name!r} has a prefix with a gate, which is a mean over a row"
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
