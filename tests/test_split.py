"""split(): the only shard arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from tpx.split import split


@settings(deadline=None)
@given(units=st.integers(0, 500), parts=st.integers(1, 70), unit=st.integers(1, 64))
def test_split_covers_is_disjoint_aligned_and_balanced_to_one_unit(units, parts, unit):
    found = split(units * unit, parts, unit)
    assert len(found) == parts
    assert found[0][0] == 0
    assert found[-1][1] == units * unit
    assert all(left[1] == right[0] for left, right in pairwise(found))
    assert all(bound % unit == 0 for piece in found for bound in piece)
    lengths = [stop - start for start, stop in found]
    assert max(lengths) - min(lengths) <= unit
    assert lengths == sorted(lengths, reverse=True)  # so rank 0 is the fullest


def test_90_blocks_over_4_ranks_are_23_23_22_22():
    assert [(b - a) // 32 for a, b in split(2880, 4, 32)] == [23, 23, 22, 22]


def test_more_parts_than_units_leaves_the_last_ones_empty():
    assert split(96, 4, 32) == [(0, 32), (32, 64), (64, 96), (96, 96)]


def test_a_unit_that_does_not_divide_is_a_bug():
    with pytest.raises(AssertionError):
        split(100, 2, 32)
