"""Spreads and fitted powers."""

import pytest

from benchmarks.figures import power, spread


def test_a_power_is_found_whatever_its_factor():
    sizes = [64, 128, 256, 512]
    exponent, fit = power(sizes, [3e-5 * size**1.5 for size in sizes])
    assert exponent == pytest.approx(1.5)
    assert fit == pytest.approx(1)


def test_what_is_no_power_fits_worse():
    assert power([1, 2, 4, 8], [1, 4, 2, 8])[1] < 0.9


def test_a_constant_has_the_exponent_zero():
    assert power([1, 2, 4], [5.0, 5.0, 5.0]) == (0, 1)


def test_nothing_has_no_logarithm():
    with pytest.raises(ValueError, match="above zero"):
        power([1, 2], [0.0, 1.0])


def test_a_spread_is_the_median_between_lowest_and_highest():
    assert spread([3.0, 1.0, 2.0, 10.0], ".1f") == "2.5 (1.0, 10.0)"
