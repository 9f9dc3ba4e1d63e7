"""What of the active adapters would change where texts lie together in a row."""

from graftwerk.adapters.composition import BatchSplit, MultiTask, Split, below, names
from graftwerk.adapters.model import AdapterModel

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
    for name in dict.fromkeys(names(model.active)):
        if any(part.own_row for _, _, part in model.parts(name)):
            return f"adapter {name!r} has a gate, which is a mean over a row"
    return None


def bound_to_texts(model: AdapterModel) -> str | None:
    """Why no two texts may share tokens that they begin with; None where they compute as apart.

    They do where all that is done at a token follows from the tokens before it.
    """
    for name in dict.fromkeys(names(model.active)):
        if any(part.whole_row for _, _, part in model.parts(name)):
            return f"adapter {name!r} reads what comes behind a token"
    return bound_to_rows(model)
