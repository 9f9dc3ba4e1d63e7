"""Configurations as strings: names, arguments, and unions: `"prefix_tuning|par_bn[scaling=2.0]"`.

The grammar: configurations joined by `|`; each is a name and maybe arguments in brackets,
`key=value` joined by commas; a value is a number, `True`, `False`, `None`, a word, text in quotes,
a list `[...]` of values or a map `{key: value, ...}`.
"""

import ast
from typing import Any

from graftwerk.adapterhub.config_base import AdapterConfig
from graftwerk.adapterhub.configs import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DiReftConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    DoubleSeqBnInvConfig,
    DvoRAConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MTLLoRAConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    VeraConfig,
)
from graftwerk.adapterhub.unions import ConfigUnion, MAMConfig, UniPELTConfig
from graftwerk.errors import UserError

ADAPTER_CONFIG_MAP: dict[str, AdapterConfig] = {
    "seq_bn": SeqBnConfig(),
    "double_seq_bn": DoubleSeqBnConfig(),
    "par_bn": ParBnConfig(),
    "scaled_par_bn": ParBnConfig(scaling="learned"),
    "seq_bn_inv": SeqBnInvConfig(),
    "double_seq_bn_inv": DoubleSeqBnInvConfig(),
    "adapter_plus": AdapterPlusConfig(),
    "compacter": CompacterConfig(),
    "compacter++": CompacterPlusPlusConfig(),
    "prefix_tuning": PrefixTuningConfig(),
    "prefix_tuning_flat": PrefixTuningConfig(flat=True),
    "prompt_tuning": PromptTuningConfig(),
    "lora": LoRAConfig(),
    "ia3": IA3Config(),
    "dora": DoRAConfig(),
    "vera": VeraConfig(),
    "dvora": DvoRAConfig(),
    "mtl_lora": MTLLoRAConfig(),
    "loreft": LoReftConfig(),
    "noreft": NoReftConfig(),
    "direft": DiReftConfig(),
    "mam": MAMConfig(),
    "unipelt": UniPELTConfig(),
    # Older names.
    "pfeiffer": SeqBnConfig(),
    "houlsby": DoubleSeqBnConfig(),
    "parallel": ParBnConfig(),
    "scaled_parallel": ParBnConfig(scaling="learned"),
    "pfeiffer+inv": SeqBnInvConfig(),
    "houlsby+inv": DoubleSeqBnInvConfig(),
}
DEFAULT_ADAPTER_CONFIG = "seq_bn"
OPENING, CLOSING = "[{", "]}"


def parse_config(text: str) -> AdapterConfig:
    """The configuration that a string says; several joined by `|` are a union.

    Raises:
        UserError: for a name, a key or a form that is not known.
    """
    configs = [_single(text, piece.strip()) for piece in _split(text, text, "|")]
    return configs[0] if len(configs) == 1 else ConfigUnion(*configs)


def _single(text: str, piece: str) -> AdapterConfig:
    name, bracket, rest = piece.partition("[")
    name = name.strip()
    if name not in ADAPTER_CONFIG_MAP:
        known = ", ".join(ADAPTER_CONFIG_MAP)
        raise UserError(f"adapter configuration {text!r}: {name!r} is not known: one of {known}")
    config = ADAPTER_CONFIG_MAP[name]
    if not bracket:
        return config
    if not rest.endswith("]"):
        raise UserError(f"adapter configuration {text!r}: {piece!r} does not end with ']'")
    changes: dict[str, Any] = {}
    for argument in _split(text, rest[:-1], ","):
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"adapter configuration {text!r}: {argument!r} must be key=value")
        changes[key.strip()] = _value(text, value.strip())
    return config.replace(**changes)


def _value(text: str, value: str) -> Any:
    if value[:1] == "[" and value[-1:] == "]":
        return [_value(text, item.strip()) for item in _split(text, value[1:-1], ",")]
    if value[:1] == "{" and value[-1:] == "}":
        pairs = [item.partition(":") for item in _split(text, value[1:-1], ",")]
        return {str(_value(text, k.strip())): _value(text, v.strip()) for k, _, v in pairs}
    if value.isidentifier() and value not in ("True", "False", "None"):
        return {"true": True, "false": False, "null": None}.get(value, value)
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(
            f"adapter configuration {text!r}: {value!r} is no number, word, list or text in quotes"
        ) from None


def _split(text: str, piece: str, mark: str) -> list[str]:
    """A piece of `text` cut at each mark that is in no bracket; nothing where it is empty."""
    pieces, depth, start = [], 0, 0
    for place, sign in enumerate(piece):
        depth += (sign in OPENING) - (sign in CLOSING)
        if depth < 0:
            break
        if sign == mark and not depth:
            pieces.append(piece[start:place])
            start = place + 1
    if depth:
        raise UserError(f"adapter configuration {text!r}: its brackets do not match")
    return [*pieces, piece[start:]] if piece.strip() else []
