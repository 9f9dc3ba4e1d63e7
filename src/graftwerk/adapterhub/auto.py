"""`AutoAdapterModel`: any base of ours with AdapterHub's methods."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from graftwerk.adapterhub.adapter_methods import AdapterMethods
from graftwerk.adapterhub.file_methods import FileMethods
from graftwerk.adapterhub.generation import GenerationMethods
from graftwerk.adapterhub.head_methods import HeadMethods
from graftwerk.adapterhub.hub_names import find_model
from graftwerk.checkpoints import load_base, load_tokenizer
from graftwerk.errors import UserError
from graftwerk.models import TransformerConfig


class AutoAdapterModel(FileMethods, AdapterMethods, HeadMethods, GenerationMethods):
    """A base with adapters, fusions and prediction heads, in AdapterHub's words."""

    model_type: ClassVar[str | None] = None  # of the bases that a class is for; None: all

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config: PretrainedConfig | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "AutoAdapterModel":
        """The base at a path or under a name of the Hub, in eval mode, without adapters.

        The base's own head is there as the head `default`, and active.

        Args:
            config: stands in for the checkpoint's `config.json`: labels, dropout of heads, names of
                special tokens. It does not change the base.
            revision: a branch, tag or commit of a name of the Hub.

        Raises:
            UserError: where there is no base, or it is of another kind than the class is for.
        """
        path = find_model(pretrained_model_name_or_path, revision)
        base = load_base(path, dtype, device)
        if config is None:
            config = read_config(path, base.config, str(pretrained_model_name_or_path))
        kind = getattr(config, "model_type", "") or ""
        if cls.model_type is not None and kind != cls.model_type:
            raise UserError(
                f"{pretrained_model_name_or_path} is a {kind} model, {cls.__name__} is for "
                f"{cls.model_type}: use AutoAdapterModel"
            )
        made = CLASSES.get(kind, AutoAdapterModel) if cls is AutoAdapterModel else cls
        model = made(base, config)
        return model.eval()


def read_config(path: Path, shape: TransformerConfig, name: str) -> PretrainedConfig:
    """The `config.json` of a checkpoint; of another form of ours what can be said of one."""
    file = path / "config.json"
    values: dict[str, Any] = {}
    if path.is_dir() and file.is_file():
        values = json.loads(file.read_text())
    else:
        values = {"model_type": shape.architecture, "vocab_size": shape.vocab_size}
        try:
            tokenizer = load_tokenizer(path)
        except UserError:
            tokenizer = None  # a base without one: its special tokens stay unsaid
        if tokenizer is not None:
            values |= {"pad_token_id": tokenizer.pad_token_id}
            values |= {"eos_token_id": tokenizer.eos_token_id}
    values |= {"hidden_size": shape.hidden_size, "name_or_path": name}
    return PretrainedConfig.from_dict(values)


class BertAdapterModel(AutoAdapterModel):
    model_type = "bert"


class RobertaAdapterModel(AutoAdapterModel):
    model_type = "roberta"


class GPT2AdapterModel(AutoAdapterModel):
    model_type = "gpt2"


class LlamaAdapterModel(AutoAdapterModel):
    model_type = "llama"


class T5AdapterModel(AutoAdapterModel):
    model_type = "t5"


CLASSES: dict[str, type[AutoAdapterModel]] = {
    kind: each
    for each in (
        BertAdapterModel,
        RobertaAdapterModel,
        GPT2AdapterModel,
        LlamaAdapterModel,
        T5AdapterModel,
    )
    if (kind := each.model_type) is not None
}
# Older names.
AutoModelWithHeads = AutoAdapterModel
BertModelWithHeads = BertAdapterModel
RobertaModelWithHeads = RobertaAdapterModel
GPT2ModelWithHeads = GPT2AdapterModel
T5ModelWithHeads = T5AdapterModel
