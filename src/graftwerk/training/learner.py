"""What a learning stage trains: the model, on its device, with the trained parts unfrozen."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from graftwerk.adapters import method_from_config
from graftwerk.checkpoints import load_tokenizer
from graftwerk.checkpoints.adapter import read_adapter
from graftwerk.checkpoints.base_path import adapter_of, base_of
from graftwerk.data.datamodule import data_files, encoders_from_config, longest_row
from graftwerk.data.jsonl import read_rows
from graftwerk.data.templates import TaskTemplate
from graftwerk.data.tokenizers import build_tokenizer
from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, TransformerConfig
from graftwerk.training.base import Base, revision_of
from graftwerk.training.trainer import precision_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Learner:
    """A model with its trained parts unfrozen; `adapter` is None where all of it is trained."""

    model: GPT | T5 | BERT
    tokenizer: "PreTrainedTokenizerBase"
    adapter: str | None
    base: str
    autocast: bool


def open_base(stage: str, model: DictConfig) -> Base | None:
    """The checkpoint that a run begins with; None for `training` from first weights.

    Raises:
        UserError: where it cannot be used for the stage.
    """
    if stage != "training":
        return Base.open(base_of(model), revision_of(model), model.get("head"))
    if not model.get("restore_path"):
        return None
    base = Base.open(str(model.restore_path), revision_of(model))
    if base.config.architecture != "gpt":
        raise UserError(
            f"model.restore_path={base.path} is a {base.config.architecture} model: stage training "
            f"trains GPTs; train an adapter on it by adapter_learning or ia3_learning"
        )
    return base


def tokenizer_of(model: DictConfig, base: Base | None) -> "PreTrainedTokenizerBase":
    """The base's tokenizer; for a model from first weights the one that `model.tokenizer` says."""
    if base is not None:
        return base.tokenizer()
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

    bos_token_id = eos_token_id = pad_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return []


def build_learner(
    stage: str,
    cfg: DictConfig,
    base: Base | None,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
) -> Learner:
    """The model on its device, with what is trained unfrozen and the rest frozen.

    A frozen base is held in `trainer.precision`; what is trained is float32.
    """
    dtype, model_cfg = precision_of(cfg.trainer), cfg.model
    if stage == "training":
        model = _whole_model(model_cfg, base, tokenizer, device)
        name = str(base.path if base is not None else model_cfg.nemo_path)
        return Learner(model, tokenizer, None, name, autocast=dtype == torch.bfloat16)
    assert base is not None
    name, method = method_from_config(model_cfg, stage)
    model = base.load(dtype, device, model_cfg.seed)
    torch.manual_seed(model_cfg.seed)
    model.add_adapter(name, method)
    start = adapter_of(model_cfg)
    if start is not None:
        _restore(model, name, start)
    model.set_active(name)
    model.freeze_base()
    return Learner(model, tokenizer, name, base.path, autocast=False)


def _whole_model(
    model_cfg: DictConfig,
    base: Base | None,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
) -> GPT:
    if base is not None:
        model = base.load(torch.float32, device)
        assert isinstance(model, GPT)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # they may be views of the file
        return model.requires_grad_(True)
    given: Any = OmegaConf.to_container(model_cfg, resolve=True)
    known = {field.name for field in fields(TransformerConfig)}
    shape = {k: v for k, v in given.items() if k in known and v is not None}
    shape.setdefault("max_position_embeddings", model_cfg.encoder_seq_length)
    shape.setdefault("ffn_hidden_size", 4 * shape["hidden_size"])
    config = TransformerConfig(**{**shape, "vocab_size": len(tokenizer)})
    longest_row(model_cfg, config)  # checks that the model has the positions
    model = GPT(config)
    model.initialise(torch.Generator().manual_seed(model_cfg.seed))
    return model.to(device).requires_grad_(True)


def _restore(model: GPT | T5 | BERT, name: str, path: str) -> None:
    """Weights of an adapter file into the new adapter; settings that change its function agree."""
    settings, state = read_adapter(path)
    free = ("name", "dropout", "column_init_method", "row_init_method")
    own = {k: v for k, v in model.adapter_config(name).items() if k not in free}
    other = {k: settings.get(k) for k in own if settings.get(k) != own[k]}
    if other:
        said = ", ".join(f"{key} {value!r} instead of {own[key]!r}" for key, value in other.items())
        raise UserError(f"model.restore_path={path} holds an adapter with {said}")
    model.load_adapter_state(name, state)
