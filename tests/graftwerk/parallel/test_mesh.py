"""Where a process stands on an axis."""

import pytest

from graftwerk.parallel.mesh import Axis


@pytest.mark.parametrize(("total", "size"), [(0, 3), (2, 3), (7, 1), (7, 3), (9, 3)])
def test_shares_are_all_there_is_once_in_order_and_of_lengths_that_differ_by_one(total, size):
    shares = [Axis(size, rank).share(total) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
