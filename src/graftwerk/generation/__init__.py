"""Decoding with a key-value cache."""

from graftwerk.generation.decoding import generate

__all__ = ["generate"]
