"""Fixtures: a tiny base, rows, and the stage that learns them."""

from tests.graftwerk.learning_stage import base, cfg, rows

__all__ = ["base", "cfg", "rows"]
