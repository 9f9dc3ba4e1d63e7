"""Parallelism, applied to models from outside by plans that name submodules."""
