"""Models of ours, born with slots; each file reads as a single-device model."""

from graftwerk.models.base import Transformer
from graftwerk.models.bert import BERT
from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.gpt import GPT
from graftwerk.models.t5 import T5

__all__ = ["BERT", "GPT", "T5", "KeyValueCache", "Transformer", "TransformerConfig", "build_model"]

MODELS = {"gpt": GPT, "t5": T5, "bert": BERT}


def build_model(config: TransformerConfig) -> GPT | T5 | BERT:
    """The model that a config describes, with random weights."""
    return MODELS[config.architecture](config)
