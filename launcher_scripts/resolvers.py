"""Functions that YAML values call: `${multiply:a,b}`, `${divide_ceil:a,b}`, `${divide_floor:a,b}`.

The first three are those of the published launcher's files; `${launcher_scripts:}` is the folder of
this module, the default of `launcher_scripts_path`.
"""

import math
from pathlib import Path

from omegaconf import OmegaConf

FOLDER = Path(__file__).resolve().parent


def multiply(first: int | float, second: int | float) -> int | float:
    return first * second


def divide_ceil(dividend: int, divisor: int) -> int:
    return math.ceil(dividend / divisor)


def divide_floor(dividend: int, divisor: int) -> int:
    return dividend // divisor


def launcher_scripts() -> str:
    return str(FOLDER)


def register() -> None:
    """Make the functions known to OmegaConf; safe to call twice."""
    for function in (multiply, divide_ceil, divide_floor, launcher_scripts):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
