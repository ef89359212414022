"""Tests of greensafe.options."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from greensafe.options import check_handler, check_limits, check_options


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


def test_on_error() -> None:
    """None, or something that can be called."""
    check_options(1, None)
    check_options(1, print)
    with pytest.raises(TypeError, match="on_error"):
        check_options(1, "print")
