"""Tests of greensafe.server.options."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from greensafe.client.options import (
    LONGEST_HEARTBEAT,
    SHORTEST_HEARTBEAT,
    check_body,
    check_heartbeat,
    check_metadata,
    check_retries,
)
from greensafe.sansio.envelope import MAX_METADATA
from greensafe.sansio.weights import check_max_frames
from greensafe.server.options import check_handler, check_limits, check_options


def test_handlers() -> None:
    """A handler can be called; the error names what it was."""
    check_handler(print)
    with pytest.raises(TypeError, match=r"handler .* not str"):
        check_handler("print")


@pytest.mark.parametrize(
    ("limit", "grace", "seconds"),
    [
        (1, 1, (1, 1)),
        (None, 0.5, (None, 0.5)),
        (float("inf"), 1, (None, 1)),
        (timedelta(seconds=2), timedelta(seconds=1), (2, 1)),
    ],
)
def test_limits(limit: Any, grace: Any, seconds: Any) -> None:
    """Seconds or timedelta; no deadline is None or inf."""
    assert check_limits(limit, grace) == seconds


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "1", True])
def test_wrong_deadlines(limit: Any) -> None:
    """A deadline that no handler could keep is an error of its own."""
    with pytest.raises((TypeError, ValueError), match=r"deadline|limit"):
        check_limits(limit, 1)


@pytest.mark.parametrize("grace", [0, -1, None, float("nan"), float("inf"), "1", True])
def test_wrong_graces(grace: Any) -> None:
    """There is always a grace, and it ends."""
    with pytest.raises((TypeError, ValueError), match=r"grace|limit"):
        check_limits(1, grace)


@pytest.mark.parametrize("most", [0, -1, 1.5, True, None, "1"])
def test_wrong_numbers_of_requests(most: Any) -> None:
    """max_inflight is a whole number of at least one."""
    with pytest.raises(ValueError, match="max_inflight"):
        check_options(most, None)


@pytest.mark.parametrize("most", [0, 7, 100.0, True, None, "100"])
def test_wrong_numbers_of_frames(most: Any) -> None:
    """max_frames is a whole number that leaves room for an envelope."""
    assert check_max_frames(8) == 8
    with pytest.raises(ValueError, match="max_frames"):
        check_max_frames(most)


def test_on_error() -> None:
    """None, or something that can be called."""
    check_options(1, None)
    check_options(1, print)
    with pytest.raises(TypeError, match="on_error"):
        check_options(1, "print")


def test_heartbeats() -> None:
    """From the shortest that servers keep up with; None and inf are none."""
    assert check_heartbeat(SHORTEST_HEARTBEAT) == SHORTEST_HEARTBEAT
    assert check_heartbeat(float("inf")) is None
    assert check_heartbeat(LONGEST_HEARTBEAT) == LONGEST_HEARTBEAT
    for wrong in (SHORTEST_HEARTBEAT * 0.9, LONGEST_HEARTBEAT * 1.1, 1e300):
        with pytest.raises(ValueError, match=r"heartbeat is a number of seconds from 0\.1 to 1000000, or None"):
            check_heartbeat(wrong)


@pytest.mark.parametrize("retries", [-1, True, 1.0, None])
def test_wrong_numbers_of_retries(retries: Any) -> None:
    """retries is a whole number from 0."""
    check_retries(0)
    with pytest.raises(ValueError, match="retries"):
        check_retries(retries)


def test_metadata() -> None:
    """Bytes that fit into a header."""
    check_metadata(bytes(MAX_METADATA))
    with pytest.raises(ValueError, match=str(MAX_METADATA)):
        check_metadata(bytes(MAX_METADATA + 1))
    with pytest.raises(TypeError, match="metadata"):
        check_metadata("00-trace")


def test_bodies() -> None:
    """One frame at least, each of which is bytes, or a buffer that becomes that."""
    assert check_body((b"1", bytearray(b"2"), memoryview(b"3"))) == [b"1", b"2", b"3"]
    with pytest.raises(ValueError, match="at least one"):
        check_body([])
    for wrong in (b"text", "text", [b"1", "2"]):
        with pytest.raises(TypeError):
            check_body(wrong)
