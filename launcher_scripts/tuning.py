"""Checks of `model.peft`: which methods a run trains, and whether their settings fit the base."""

from typing import Any

from launcher_scripts.complete import short
from launcher_scripts.schema import Peft
from launcher_scripts.shapes import Shape
from launcher_scripts.validate import Report, closest, default_of, fields_of, shown

# A scheme and its block of settings.
BLOCKS = {
    "adapter": "adapter_tuning",
    "ia3": "ia3_tuning",
    "lora": "lora_tuning",
    "ptuning": "p_tuning",
    "prefix": "prefix_tuning",
    "prompt": "prompt_tuning",
    "selective": "selective_tuning",
    "qlora": "lora_tuning",
    "none": None,
}
VIRTUAL = ("ptuning", "prompt")  # schemes that put tokens before each row


def schemes_of(value: Any) -> list[str]:
    """The names in a `peft_scheme`: one, several joined by commas, a list of them; null is none."""
    words = value if isinstance(value, list) else ["none" if value is None else value]
    return [name.strip() for word in words for name in str(word).split(",")]


def check_tuning(
    name: str, model: dict[str, Any], shape: Shape | None, report: Report, notices: list[str]
) -> None:
    """Report what is wrong in the methods of a stage's model; tell what has no effect.

    Args:
        name: the stage.
        model: its section as plain values; what is of another type is reported elsewhere.
        shape: the base's, where it is known.
    """
    key, peft = f"{name}.model", model.get("peft")
    if not isinstance(peft, dict):
        for block in ("adapter_tuning", "ia3_tuning"):
            _layers(f"{key}.{block}", model.get(block), shape, report)
        return
    given = peft.get("peft_scheme")
    if not isinstance(given, str | list | None):
        return
    names = schemes_of(given)
    if not _known(f"{key}.peft.peft_scheme", names, report):
        return
    for block in dict.fromkeys(BLOCKS[scheme] for scheme in names):
        if block is not None:
            _layers(f"{key}.peft.{block}", peft.get(block), shape, report)
    idle = [
        block
        for block in dict.fromkeys(BLOCKS.values())
        if block is not None
        and block not in [BLOCKS[scheme] for scheme in names]
        and peft.get(block) != default_of(fields_of(Peft)[block][1])
    ]
    if idle:
        said = ", ".join(short(f"{key}.peft.{block}") for block in idle)
        notices.append(f"{name}: without effect, since peft_scheme is {','.join(names)}: {said}")
    _room(key, model, peft, names, report)


def _known(key: str, names: list[str], report: Report) -> bool:
    """Whether all schemes are known and go together."""
    unknown = [name for name in names if name not in BLOCKS]
    for name in unknown:
        near = closest(name, BLOCKS)
        hint = f"; did you mean {near}?" if near else ""
        known = ", ".join(BLOCKS)
        report(key, f"must be some of {known}, joined by commas, not {shown(name)}{hint}")
    if unknown:
        return False
    if len(set(names)) < len(names) or {"lora", "qlora"} <= set(names):
        report(key, f"{','.join(names)} must name each method once, and lora or qlora")
    elif "none" in names and len(names) > 1:
        report(key, f"{','.join(names)}: none trains the whole model and goes with no other method")
    return True


def _layers(key: str, block: Any, shape: Shape | None, report: Report) -> None:
    chosen = block.get("layer_selection") if isinstance(block, dict) else None
    if not isinstance(chosen, list):
        return
    depth = None
    if shape is not None and shape.num_layers is not None:
        depth = shape.num_layers + (shape.decoder_num_layers or 0)
    beyond = [n for n in chosen if isinstance(n, int) and depth is not None and n > depth]
    if not chosen:
        report(f"{key}.layer_selection", "is empty; null selects all layers")
    elif beyond:
        report(f"{key}.layer_selection", f"{beyond} are beyond the model's {depth} layers")


def _room(
    key: str, model: dict[str, Any], peft: dict[str, Any], names: list[str], report: Report
) -> None:
    """Virtual tokens are part of a row's length and must leave some of it."""
    blocks = [peft.get(str(BLOCKS[name])) for name in names if name in VIRTUAL]
    counts = [block.get("virtual_tokens") for block in blocks if isinstance(block, dict)]
    total = sum(count for count in counts if isinstance(count, int))
    length = model.get("encoder_seq_length")
    if total and isinstance(length, int) and length < total + 2:
        report(
            f"{key}.encoder_seq_length",
            f"{length} leaves no room behind {total} virtual tokens: at least {total + 2}",
        )
