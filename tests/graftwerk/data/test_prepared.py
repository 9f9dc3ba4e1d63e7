"""What data preparation keeps of each row: little, and right."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.prepared import HashTable, _summary

keys = st.integers(-(2**60), 2**60 - 1)


@given(st.lists(st.tuples(keys | st.integers(0, 9), st.integers(0, 6)), max_size=200))
def test_a_key_keeps_the_number_that_it_was_given_first(given):
    table, expected = HashTable(), {}
    table.RECENT = 4
    for key, number in given:
        assert table.put(key, number) == expected.get(key)
        expected.setdefault(key, number)


def test_many_keys_take_some_bytes_each():
    table = HashTable()
    for number in range(150_000):
        assert table.put(hash(str(number)), number % 7) is None
    assert all(table.put(hash(str(number)), 0) == number % 7 for number in range(150_000))
    assert len(table._recent) < HashTable.RECENT
    assert 8 * len(table._places) <= 23 * 131_072


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_lengths_are_told_by_values_that_occur(lengths):
    ranked = sorted(lengths)
    assert _summary(Counter(lengths)) == {
        "median": ranked[(len(ranked) - 1) // 2],
        "p95": ranked[math.ceil(0.95 * len(ranked)) - 1],
        "max": ranked[-1],
    }
