"""Models of ours, born with slots; each file reads as a single-device model."""

from graftwerk.models.cache import KeyValueCache
from graftwerk.models.config import TransformerConfig
from graftwerk.models.gpt import GPT

__all__ = ["GPT", "KeyValueCache", "TransformerConfig"]
