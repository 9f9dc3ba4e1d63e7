"""Reading and writing base models and adapters; one file for each outside format."""

from graftwerk.checkpoints.adapter import load_adapter, save_adapter
from graftwerk.checkpoints.base import load_base, load_tokenizer, save_base

__all__ = ["load_adapter", "load_base", "load_tokenizer", "save_adapter", "save_base"]
