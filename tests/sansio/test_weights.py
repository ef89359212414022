"""Tests of greensafe.sansio.weights."""

from __future__ import annotations

import sys

import pytest

from greensafe.sansio.weights import weight


@pytest.mark.parametrize("size", [0, 1, 5, 15, 16, 300, 65_536])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_a_weight_is_no_less_than_what_python_takes(size: int, count: int) -> None:
    """Of frames in two lists, as a request's are: each object with its header, rounded up as the allocator does."""
    frames = [bytes([number % 256]) * size for number in range(count)]
    taken = sum((sys.getsizeof(frame) + 15) // 16 * 16 for frame in frames) + 2 * 8 * count
    assert taken <= weight(frames) <= taken + 32 * count


def test_frames_without_bytes_weigh_something() -> None:
    """Whoever sends a hundred thousand empty frames has sent nothing, and it is kept all the same."""
    assert weight([b""] * 100_000) > 1_000_000
    assert weight([]) == 0
