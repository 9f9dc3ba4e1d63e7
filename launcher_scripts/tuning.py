"""Checks of `model.peft`: what a run trains, under which composition, and if that fits the base."""

from typing import Any

from launcher_scripts.complete import short
from launcher_scripts.compositions import UNFIT, Tree, blocks_in, names_in, read
from launcher_scripts.schema import Peft
from launcher_scripts.shapes import Shape
from launcher_scripts.sweep_points import check_points, point_path, swept
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
    "fusion": "fusion_tuning",
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
    drop = peft.get("adapter_drop")
    layers = drop.get("layers") if isinstance(drop, dict) else None
    _depth(f"{key}.peft.adapter_drop.layers", layers, shape, report)
    given = peft.get("peft_scheme")
    if not isinstance(given, str | list | None):
        return
    names = schemes_of(given)
    if not _known(f"{key}.peft.peft_scheme", names, report):
        return
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
    points = [peft]
    if peft.get("sweep") is not None:
        points = check_points(name, model, names, BLOCKS[names[0]], report)
        if not points:  # composed of nothing that could be looked at
            return
    for point in points:
        for block in dict.fromkeys(BLOCKS[scheme] for scheme in names):
            if block is not None:
                _layers(f"{key}.peft.{block}", point.get(block), shape, report)
        _together(f"{key}.peft", point, names, report)
        _room(key, model, point, names, report)
    _composed(f"{key}.peft", peft, names, report)


def _known(key: str, names: list[str], report: Report) -> bool:
    """Whether all schemes are known and go together."""
    if not names:
        report(key, f"is empty: name some of {', '.join(BLOCKS)}; none trains the whole model")
        return False
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
        return False
    if "none" in names and len(names) > 1:
        report(key, f"{','.join(names)}: none trains the whole model and goes with no other method")
        return False
    return True


def _together(key: str, peft: dict[str, Any], schemes: list[str], report: Report) -> None:
    """Settings of the chosen methods that do not go together, as the methods see it."""
    blocks = {str(BLOCKS[name]): peft.get(str(BLOCKS[name])) for name in schemes}
    chosen = {name: block for name, block in blocks.items() if isinstance(block, dict)}
    for name, block in chosen.items():
        strategy = block.get("position_embedding_strategy")
        if strategy is not None and block.get("weight_tying") is False:
            what = f"{shown(strategy)} tells tied layers apart: set weight_tying to True, or null"
            report(f"{key}.{name}.position_embedding_strategy", what)
        for field in ("target_modules", "tunable_base_param_names"):
            if block.get(field) == []:
                report(f"{key}.{name}.{field}", "is empty: name some")
    lora, prompts = chosen.get("lora_tuning", {}), chosen.get("p_tuning", {})
    if lora.get("dora") is True and lora.get("weight_tying") is True:
        report(f"{key}.lora_tuning.dora", "goes with untied layers: set weight_tying to False")
    if "qlora" in schemes and lora.get("dora") is True:
        report(f"{key}.lora_tuning.dora", "reads weights that qlora holds in 4 bits: use lora")
    if {"qlora", "selective"} <= set(schemes):
        what = "selective trains parameters of the base, which qlora holds in 4 bits: use lora"
        report(f"{key}.peft_scheme", what)
    size = prompts.get("embedding_dim")
    if prompts.get("encoder") == "lstm" and isinstance(size, int) and size % 2:
        report(f"{key}.p_tuning.embedding_dim", f"{size}: an lstm needs an even number")


def _composed(key: str, peft: dict[str, Any], schemes: list[str], report: Report) -> None:
    """What is trained and what is frozen are the adapters of the composition."""
    methods = [scheme for scheme in schemes if scheme not in ("fusion", "none")]
    trained = swept(peft, schemes)
    trained = trained or _trained(
        f"{key}.adapter_names", peft.get("adapter_names"), methods, report
    )
    items = peft.get("adapters")
    frozen = [str(each.get("name")) for each in items or [] if isinstance(each, dict)]
    given = None if peft.get("sweep") is not None else peft.get("composition")
    for name in {name for name in frozen if frozen.count(name) > 1 or name in trained}:
        report(f"{key}.adapters", f"{name} must name one adapter, and none that is trained here")
    if schemes == ["none"]:
        drop = peft.get("adapter_drop")
        layers = drop.get("layers") if isinstance(drop, dict) else None
        idle = {"composition": given, "adapters": frozen, "adapter_drop.layers": layers}
        for name in (name for name, value in idle.items() if value not in (None, [])):
            report(f"{key}.{name}", "goes with a method; peft_scheme none trains the whole model")
    elif given is None and "fusion" in schemes and (trained or not frozen):
        report(f"{key}.composition", 'must say what is fused, such as "Fuse(a, b)"')
    elif isinstance(given, str):
        tree = check_composition(f"{key}.composition", given, [*frozen, *trained], report)
        if tree is not None:
            _used(f"{key}.composition", tree, trained, "fusion" in schemes, report)


def _used(key: str, tree: Tree | str, trained: list[str], fuses: bool, report: Report) -> None:
    """What is trained has a place in the composition."""
    used = list(names_in(tree))
    if idle := [name for name in trained if name not in used]:
        report(key, f"{tree} leaves out {', '.join(idle)}, which peft_scheme trains")
    if fuses and "Fuse" not in [each.block for each in blocks_in(tree)]:
        report(key, f"{tree} has no Fuse, and peft_scheme names fusion")


def left_under_composition(
    stage: str, peft: dict[str, Any], path: str
) -> tuple[list[dict[str, str]], str] | None:
    """What a stage leaves that trains under a composition: adapters with their files, and that.

    None where it says nothing of one, or of what is not right.
    """
    names = schemes_of(peft.get("peft_scheme"))
    frozen, given = peft.get("adapters") or [], peft.get("composition")
    points = swept(peft, names)
    if not (frozen or given or points or "fusion" in names) or "none" in names:
        return None
    methods = [scheme for scheme in names if scheme != "fusion"]
    trained = _trained("", peft.get("adapter_names"), methods, lambda key, what: None)
    items = [{"name": str(each["name"]), "path": str(each["path"])} for each in frozen]
    if points:
        members = [*(each["name"] for each in items), f"Parallel({', '.join(points)})"]
        items += [{"name": name, "path": point_path(path, name)} for name in points]
        return items, members[0] if len(members) == 1 else f"Stack({', '.join(members)})"
    members = [*(each["name"] for each in items), *trained]
    block = "Fuse" if "fusion" in names else "Stack"
    plain = members[0] if len(members) == 1 else f"{block}({', '.join(members)})"
    items += [{"name": name, "path": path} for name in trained or [stage]]
    return items, str(given or plain)


def _trained(key: str, given: Any, methods: list[str], report: Report) -> list[str]:
    """The names of what is trained; by default those of the schemes."""
    if not isinstance(given, str | list):
        return ["lora" if scheme == "qlora" else scheme for scheme in methods]
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    count = len(names) if len(methods) == 1 else len(methods)
    if len(names) != count or len(set(names)) < len(names) or not names:
        what = ", ".join(methods) or "no method"
        report(
            key,
            f"{shown(','.join(map(str, names)))} must be one name for each of {what}, each "
            "another; of one method there may be several",
        )
    return [str(name) for name in names] if methods else []


def check_composition(key: str, text: str, known: list[str], report: Report) -> Tree | str | None:
    """Report what is wrong in a composition of the `known` adapters; None where it is none."""
    try:
        tree = read(text)
    except ValueError as error:
        report(key, f"{shown(text)}: {error}")
        return None
    unknown = list(dict.fromkeys(name for name in names_in(tree) if name not in known))
    for name in unknown:
        near = closest(name, known)
        hint = f"; did you mean {near}?" if near else ""
        report(key, f"{shown(text)}: {name} is none of {', '.join(known) or 'no adapters'}{hint}")
    for block in dict.fromkeys(each.block for each in blocks_in(tree) if each.block in UNFIT):
        report(key, f"{shown(text)}: no {block} in a stage: {UNFIT[block]}")
    return None if unknown else tree


def check_scored(model: dict[str, Any], shape: Shape | None, report: Report) -> None:
    """Report what is wrong in the compositions of `eval`."""
    given, items = model.get("composition"), model.get("adapters")
    _depth("eval.model.skip_layers", model.get("skip_layers"), shape, report)
    if given in (None, "auto") or not isinstance(items, list):
        return
    known = [str(each.get("name")) for each in items if isinstance(each, dict)]
    for text in given if isinstance(given, list) else [given]:
        if isinstance(text, str):
            check_composition("eval.model.composition", text, known, report)


def _depth(key: str, layers: Any, shape: Shape | None, report: Report) -> None:
    """Layers, numbered from 0, that the base does not have; a number: so many of the first."""
    depth = _layers_of(shape)
    chosen = layers if isinstance(layers, list) else [layers - 1 if type(layers) is int else None]
    if depth is None or all(n < depth for n in chosen if isinstance(n, int)):
        return
    report(key, f"{shown(layers)} is beyond the model's {depth} layers, 0 to {depth - 1}")


def _layers_of(shape: Shape | None) -> int | None:
    if shape is None or shape.num_layers is None:
        return None
    return shape.num_layers + (shape.decoder_num_layers or 0)


def _layers(key: str, block: Any, shape: Shape | None, report: Report) -> None:
    chosen = block.get("layer_selection") if isinstance(block, dict) else None
    if not isinstance(chosen, list):
        return
    depth = _layers_of(shape)
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
