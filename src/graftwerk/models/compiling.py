"""Whether torch's compiler can make kernels here."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch


@cache
def why_not_compiled(kind: str) -> str | None:
    """Why `torch.compile` makes no kernels for a kind of device (`cpu`, `cuda`); None: it does."""
    own = os.environ.get("CXX" if kind == "cpu" else "CC")
    names = ("c++", "g++", "clang++") if kind == "cpu" else ("cc", "gcc", "clang")
    if not any(shutil.which(name) for name in (own, *names) if name):
        return f"no {'C++' if kind == 'cpu' else 'C'} compiler ({', '.join(names)}) is on PATH"
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"kernels are not made for {kind}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.get_device_capability() < (7, 0):
        return "the GPU is older than Triton's kernels (compute capability 7.0)"
    return None
