"""Tests of greensafe.testing.clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from greensafe.testing import ManualClock


def test_it_goes_only_when_told() -> None:
    """Calling it and reading `now` give the time, which is the start and all steps since; a step returns it."""
    clock = ManualClock()
    assert (clock(), clock.now) == (0.0, 0.0)
    assert clock.advance(1.5) == clock() == clock.now == 1.5
    assert clock.advance(0) == 1.5
    assert ManualClock(-3).advance(1) == -2.0
    assert repr(clock) == "<ManualClock 1.5 s>"


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (-1e-9, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_step(step: Any, kind: type[Exception]) -> None:
    """Back, nowhere and for ever are refused, and the clock stays where it is."""
    clock = ManualClock(5.0)
    with pytest.raises(kind, match="not"):
        clock.advance(step)
    assert clock.now == 5.0


@pytest.mark.parametrize(("now", "kind"), [(math.nan, ValueError), (math.inf, ValueError), ("now", TypeError)])
def test_what_is_no_time(now: Any, kind: type[Exception]) -> None:
    """A clock starts at a finite number."""
    with pytest.raises(kind, match="the time is a"):
        ManualClock(now)


def test_time_stays_finite() -> None:
    """Steps that are finite each cannot add up to no time at all."""
    clock = ManualClock(1e308)
    with pytest.raises(ValueError, match="finite"):
        clock.advance(1e308)
    assert clock.now == 1e308


@given(st.lists(st.floats(0, 1e9)))
def test_it_never_goes_back(steps: list[float]) -> None:
    """Whatever the steps, each time is the one before or later."""
    clock = ManualClock()
    times = [clock(), *(clock.advance(step) for step in steps)]
    assert times == sorted(times)
