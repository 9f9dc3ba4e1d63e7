"""What a learning stage trains: the model, on its device, with the trained parts unfrozen."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters import method_from_config
from graftwerk.checkpoints import load_base, load_tokenizer
from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.data.datamodule import data_files, encoders_from_config
from graftwerk.data.jsonl import read_rows
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from graftwerk.models import GPT, TransformerConfig
from graftwerk.training.trainer import precision_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Learner:
    """A model with its trained parts unfrozen; `adapter` is None where all of it is trained."""

    model: GPT
    tokenizer: "PreTrainedTokenizerBase"
    adapter: str | None
    base: str
    autocast: bool


def tokenizer_of(stage: str, model: DictConfig) -> "PreTrainedTokenizerBase":
    """The base's tokenizer; for `training` the one that `model.tokenizer` describes."""
    if stage != "training":
        return load_tokenizer(model.language_model_path)
    if model.get("restore_path"):
        return load_tokenizer(model.restore_path)
    wanted = model.get("tokenizer") or {}
    kind = wanted.get("type", "word")
    if kind == "pretrained":
        if not wanted.get("path"):
            raise UserError("model.tokenizer.path is missing: type pretrained reads it from there")
        return load_tokenizer(wanted["path"])
    return build_tokenizer(kind, _texts(model), wanted.get("vocab_size"))


def _texts(model: DictConfig) -> Iterator[str]:
    """All that a model may have to read: the templates' own words and the rows' fields."""
    for entry in model.task_templates:
        yield from (literal for literal, _ in TaskTemplate.from_config(entry).pieces)
    encoders_from_config(model, _NoTokens())  # type: ignore[arg-type]  (checks the tasks' names)
    for key in ("train_ds", "validation_ds"):
        for path in data_files(model, key):
            for _, row in read_rows(path):
                yield from (value for value in row.values() if isinstance(value, str))


class _NoTokens:
    """Stands for a tokenizer before there is one."""

    bos_token_id = eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return []


def build_learner(
    stage: str, cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> Learner:
    """The model on its device, with what is trained unfrozen and the rest frozen.

    A frozen base is held in `trainer.precision`; what is trained is float32.
    """
    dtype, model_cfg = precision_of(cfg.trainer), cfg.model
    if stage == "training":
        model = _whole_model(model_cfg, tokenizer, device)
        base = str(model_cfg.get("restore_path") or model_cfg.nemo_path)
        return Learner(model, tokenizer, None, base, autocast=dtype == torch.bfloat16)
    name, method = method_from_config(model_cfg, stage)
    model = load_base(model_cfg.language_model_path, dtype=dtype, device=device)
    _check_length(model_cfg, model.config)
    torch.manual_seed(model_cfg.seed)
    model.add_adapter(name, method)
    if model_cfg.get("restore_path"):
        _restore(model, name, model_cfg.restore_path)
    model.set_active(name)
    model.freeze_base()
    return Learner(model, tokenizer, name, str(model_cfg.language_model_path), autocast=False)


def _whole_model(
    model_cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> GPT:
    if model_cfg.get("restore_path"):
        model = load_base(model_cfg.restore_path, device=device)
    else:
        given: Any = OmegaConf.to_container(model_cfg, resolve=True)
        known = {field.name for field in fields(TransformerConfig)}
        shape = {k: v for k, v in given.items() if k in known and v is not None}
        shape.setdefault("max_position_embeddings", model_cfg.encoder_seq_length)
        shape.setdefault("ffn_hidden_size", 4 * shape["hidden_size"])
        model = GPT(TransformerConfig(**{**shape, "vocab_size": len(tokenizer)}))
        model.initialise(torch.Generator().manual_seed(model_cfg.seed))
    _check_length(model_cfg, model.config)
    return model.to(device).requires_grad_(True)


def _check_length(model_cfg: DictConfig, config: TransformerConfig) -> None:
    bounded = config.position_embedding_type == "learned_absolute"
    if bounded and model_cfg.encoder_seq_length > config.max_position_embeddings:
        raise UserError(
            f"model.encoder_seq_length={model_cfg.encoder_seq_length} is longer than the "
            f"{config.max_position_embeddings} positions that the model has: lower it"
        )


def _restore(model: GPT, name: str, path: str) -> None:
    """Weights of an adapter file into the new adapter; settings that change its function agree."""
    settings, state = read_adapter(path)
    free = ("name", "dropout", "column_init_method", "row_init_method")
    own = {k: v for k, v in model.adapter_config(name).items() if k not in free}
    other = {k: settings.get(k) for k in own if settings.get(k) != own[k]}
    if other:
        said = ", ".join(f"{key} {value!r} instead of {own[key]!r}" for key, value in other.items())
        raise UserError(f"model.restore_path={path} holds an adapter with {said}")
    model.load_adapter_state(name, state)
