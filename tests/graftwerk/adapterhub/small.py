"""Small models with AdapterHub's methods, in eval mode."""

import torch
from transformers import PretrainedConfig

from graftwerk.adapterhub import AutoAdapterModel
from graftwerk.models import BERT, T5, build_model
from tests.graftwerk.tiny import GPT2, LLAMA, shake
from tests.graftwerk.tiny_families import bert_shape, t5_shape

VOCABULARY = 61
SHAPES = {
    "bert": bert_shape(VOCABULARY),
    "masked": bert_shape(VOCABULARY, "masked_lm"),
    "t5": t5_shape(VOCABULARY),
    "gpt2": GPT2,
    "llama": LLAMA,
}


def small(kind: str = "bert", seed: int = 0) -> AutoAdapterModel:
    torch.manual_seed(seed)
    base = build_model(SHAPES[kind])
    shake(base, seed)
    assert isinstance(base, BERT | T5) or kind in ("gpt2", "llama")
    names = {"pad_token_id": 0, "eos_token_id": 2, "hidden_dropout_prob": 0.0}
    config = PretrainedConfig(hidden_size=32, model_type=kind, name_or_path=f"{kind}-base", **names)
    return AutoAdapterModel(base.eval(), config).eval()


def rows(count: int = 4, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Ids [count, length], none of which is special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def shaken(model: AutoAdapterModel, *names: str, seed: int = 1) -> AutoAdapterModel:
    """The model with every weight of these adapters away from its birth value."""
    for number, name in enumerate(names):
        for _, _, part in model.base.parts(name):
            shake(part, seed + number)
    return model
