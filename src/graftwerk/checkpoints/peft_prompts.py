"""P-tuning, prompt tuning and prefix tuning of peft: one tensor, `prompt_embeddings`.

A network that made it in training is not in the file. Rows are virtual tokens: vectors of the
embeddings' size [n, h], or keys and values of all layers [n, 2 layers kv].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwerk.adapters.configs import (
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    settings_of,
)
from graftwerk.adapters.methods.prefix import Prefix
from graftwerk.adapters.methods.prompt import Prompt, PromptTuning
from graftwerk.adapters.model import AdapterModel
from graftwerk.adapters.part import Part
from graftwerk.checkpoints.peft_modules import config_of
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig

PREFIX_TUNING = "PREFIX_TUNING"
PROMPTS = ("P_TUNING", "PROMPT_TUNING", PREFIX_TUNING)
TENSOR = "prompt_embeddings"
SLOT = "embedding.words"  # before positions, types and norm are added


# ---- reading


def prompt_settings(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What is known of a prompt without a model: our method, and how many tokens it has.

    Raises:
        UserError: for a number of tokens that is none.
    """
    count = settings.get("num_virtual_tokens")
    if type(count) is not int or count < 1:
        raise UserError(f"{path}: num_virtual_tokens={count!r}: must be at least 1")
    if settings["peft_type"] == PREFIX_TUNING:
        return settings_of(prefix_method(count))
    return settings_of(prompt_method(count))


def prompt_method(count: int, spare: int = 0) -> PromptTuningConfig:
    """Vectors in the place of words; the row's own tokens stand behind them."""
    return PromptTuningConfig(virtual_tokens=count, place="word_embedding", spare_tokens=spare)


def prefix_method(count: int, encoder: bool = True) -> PrefixTuningConfig:
    """Keys and values of past tokens; of a T5's decoder alone, where it attends to itself."""
    return PrefixTuningConfig(
        prefix_length=count,
        reparametrise=False,
        encoder_prefix=encoder,
        cross_prefix=False,
        shifts_positions=True,
        relative_positions="both",
    )


def read_prompt(
    model: AdapterModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Our method and weights of a prompt's or a prefix's.

    Raises:
        UserError: where the tensor does not fit the settings or the model.
    """
    config, count = config_of(model), settings["num_virtual_tokens"]
    rows = tensors.get(TENSOR)
    if rows is None or rows.ndim != 2:
        raise UserError(f"{path}: {TENSOR} is missing, or no table of virtual tokens")
    if settings["peft_type"] != PREFIX_TUNING:
        _check_first(config, path)
        if len(rows) < count:
            raise UserError(
                f"{path}: {TENSOR} has {len(rows)} rows, and num_virtual_tokens={count}"
            )
        return prompt_method(count, len(rows) - count), {f"{SLOT}.embedding": rows}
    kv, layers = config.key_size, _layers(config)
    count_of_pairs = rows.shape[1] // (2 * kv)
    if rows.shape != (count, 2 * count_of_pairs * kv) or count_of_pairs < layers:
        raise UserError(
            f"{path}: {TENSOR} is {list(rows.shape)}: {count} virtual tokens of this model have "
            f"keys and values of {kv} in {layers} layers, [{count}, {2 * layers * kv}]"
        )
    pairs = rows.unflatten(1, (2 * count_of_pairs, kv))
    stack = "encoder" if config.architecture == "bert" else "decoder"
    state = {
        f"{stack}.layers.{i}.self_attention.prefix.rows": pairs[:, first : first + 2].flatten(1)
        for i, first in enumerate(_firsts(config, count_of_pairs)[:layers])
    }
    return prefix_method(count, config.architecture == "bert"), state


def _check_first(config: TransformerConfig, path: str | Path) -> None:
    """Raises a UserError where peft classifies a text by what stands first: a virtual token."""
    if config.architecture == "bert" and config.head == "classification":
        raise UserError(
            f"{path}: peft reads the class of a text off what stands first, a virtual token of the "
            f"prompt, and here it is a word: such a prompt fits neither way, a prefix does"
        )


def _layers(config: TransformerConfig) -> int:
    """Layers that have past keys and values."""
    return config.decoder_num_layers if config.architecture == "t5" else config.num_layers


def _firsts(config: TransformerConfig, pairs: int) -> list[int]:
    """Which row of keys is each layer's; that of values follows.

    peft lays those of a T5 out for two attentions a layer, self and cross, out of one set for both,
    and leaves out every second pair: with an even number of layers two share one.
    """
    if config.architecture != "t5":
        return [2 * i for i in range(pairs)]
    return [4 * i % (2 * pairs) for i in range(pairs)]


# ---- writing


def write_prompt(
    model: AdapterModel, method: MethodConfig, parts: Mapping[str, Part], path: str | Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's settings and weights of a prompt or a prefix.

    Raises:
        UserError: for what peft cannot say.
    """
    config = config_of(model)
    if config.architecture == "bert" and config.head == "masked_lm":
        raise UserError(f"{path}: peft has no prompts for a model of masked words")
    if isinstance(method, PrefixTuningConfig):
        rows, more = _prefix_rows(config, method, parts, path)
    else:
        rows, more = _prompt_rows(model, method, parts, path)
    return {
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_query_groups,
        **more,
    }, {TENSOR: rows.detach().cpu().contiguous()}


def _prefix_rows(
    config: TransformerConfig,
    method: PrefixTuningConfig,
    parts: Mapping[str, Part],
    path: str | Path,
) -> tuple[Tensor, dict[str, Any]]:
    kv, t5, layers = config.key_size, config.architecture == "t5", _layers(config)
    placed = config.position_embedding_type in ("learned_absolute", "rope")
    if placed and not method.shifts_positions:
        raise UserError(
            f"{path}: peft's prefixes move the positions of the text back: shifts_positions=False "
            f"has no words there"
        )
    if t5 and method.relative_positions != "both":
        raise UserError(
            f"{path}: peft's prefixes have places in a T5's table of distances: "
            f"relative_positions={method.relative_positions!r} has no words there"
        )
    rows: dict[int, Tensor] = {}
    for slot, part in parts.items():
        if not isinstance(part, Prefix) or part.gate is not None:
            raise UserError(f"{path}: peft has no prefix with gates")
        if ".cross_attention." in slot or (t5 and slot.startswith("encoder.")):
            raise UserError(
                f"{path}: peft has prefixes of a T5 where its decoder attends to itself, and none "
                f"at {slot}: encoder_prefix and cross_prefix must be False"
            )
        rows[int(slot.split(".")[2])] = part.made().detach()
    if len(rows) < layers or (t5 and layers > config.num_layers):
        raise UserError(f"{path}: peft has a prefix in each of {layers} layers, not in {len(rows)}")
    pairs = config.num_layers
    table = torch.zeros(method.prefix_length, 2 * pairs, kv)
    seen: dict[int, int] = {}
    for layer, first in enumerate(_firsts(config, pairs)[:layers]):
        own = rows[layer].unflatten(1, (2, kv)).to(table)
        other = seen.setdefault(first, layer)
        if other != layer and not torch.equal(own, table[:, first : first + 2]):
            raise UserError(
                f"{path}: peft gives one prefix to layers {other} and {layer} of a T5 with an even "
                f"number of layers, and these differ"
            )
        table[:, first : first + 2] = own
    return table.flatten(1), {
        "peft_type": PREFIX_TUNING,
        "num_virtual_tokens": method.prefix_length,
        "token_dim": kv,
        "num_transformer_submodules": 2 if t5 else 1,
        "prefix_projection": False,
        "encoder_hidden_size": None,
    }


def _prompt_rows(
    model: AdapterModel, method: MethodConfig, parts: Mapping[str, Part], path: str | Path
) -> tuple[Tensor, dict[str, Any]]:
    config = config_of(model)
    _check_first(config, path)
    ((slot, part),) = parts.items()
    assert isinstance(part, Prompt)
    rows = part.vectors().detach()
    if config.position_embedding_type in ("learned_absolute", "rope") and not method.shift:
        raise UserError(
            f"{path}: peft's prompts move the positions of the text back: shifts_positions=False "
            f"has no words there"
        )
    if slot != SLOT:
        rows = _as_words(model, rows, path)
    count, copies = len(rows), 1
    if config.architecture == "t5":  # the second copy is for the decoder, which never reads it
        spare = part.spare() if isinstance(part, PromptTuning) else rows[:0]
        spare = spare if len(spare) == count else torch.zeros_like(rows)
        rows, copies = torch.cat([rows, spare.to(rows)]), 2
    return rows, {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": count,
        "token_dim": config.hidden_size,
        "num_transformer_submodules": copies,
        "prompt_tuning_init": "RANDOM",
    }


def _as_words(model: AdapterModel, rows: Tensor, path: str | Path) -> Tensor:
    """The vectors to which the model adds its positions to make what stands behind the words."""
    config = config_of(model)
    if config.num_token_types or config.embedding_layernorm or config.embedding_size:
        raise UserError(
            f"{path}: peft's prompts stand in the place of words, before this model adds token "
            f"types and a norm: one in the place of whole embeddings has no words there"
        )
    if config.position_embedding_type != "learned_absolute":
        return rows
    table = model.get_parameter("embedding.position_embeddings.weight").detach()
    return rows - table[config.position_offset :][: len(rows)].to(rows)
