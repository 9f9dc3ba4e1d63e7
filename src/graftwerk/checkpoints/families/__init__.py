"""The model families of Hugging Face that we know, by `model_type`."""

from graftwerk.checkpoints.families.bert import BERT, ROBERTA
from graftwerk.checkpoints.families.family import Family, Raw
from graftwerk.checkpoints.families.gpt import GPT2, GPT_NEOX, GPTJ, OPT
from graftwerk.checkpoints.families.llama import LLAMA, MISTRAL, NEMOTRON, QWEN2, QWEN3
from graftwerk.checkpoints.families.t5 import MT5, T5

__all__ = ["FAMILIES", "Family", "Raw"]

# In the order in which a config without a family is tried.
_ALL = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON, GPT_NEOX, GPTJ, OPT, T5, MT5, BERT, ROBERTA)
FAMILIES = {family.model_type: family for family in _ALL}
