"""Fixtures of the training tests."""

from tests.graftwerk.learning_stage import base, cfg, rows

__all__ = ["base", "cfg", "rows"]
