"""What measurements come to: spreads, and powers that fit them."""

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], form: str) -> str:
    """Median, lowest and highest, in the form of `format`."""
    middle, *ends = (
        format(value, form) for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({', '.join(ends)})"


def power(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The exponent e of `value = c size^e` by least squares over the logarithms, and R squared.

    Raises:
        ValueError: where a value is not above zero, or fewer than two sizes differ.
    """
    if min(values) <= 0:
        raise ValueError("what does not lie above zero has no logarithm")
    x, y = ([math.log(value) for value in each] for each in (sizes, values))
    exponent, constant = statistics.linear_regression(x, y)
    missed = sum((b - exponent * a - constant) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - statistics.fmean(y)) ** 2 for b in y)
    return exponent, 1 - missed / total if total else 1.0
