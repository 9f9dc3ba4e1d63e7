"""Evaluation: what a model answered against what it should have."""
