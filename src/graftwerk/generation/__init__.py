"""Continuing text with a GPT or a T5."""

from graftwerk.generation.decoding import Continuation, complete, generate
from graftwerk.generation.ending import Ending
from graftwerk.generation.sampling import OptionError, Sampling

__all__ = ["Continuation", "Ending", "OptionError", "Sampling", "complete", "generate"]
