"""Tests of greensafe.journal._stall."""

from __future__ import annotations

from time import monotonic

import gevent
import pytest
from helpers import MS, wait_until

from greensafe.journal._stall import LIMIT, LOOKS, Lookout, Stall

pytestmark = pytest.mark.usefixtures("limit")


def test_stalled_once() -> None:
    """It is said at the first look that finds it so, and over when the work has come to its end."""
    stall = Stall()
    stall.begin()
    ages = [LIMIT * look / LOOKS for look in range(1, LOOKS + 3)]
    assert [stall.look(age) for age in ages] == [False] * (LOOKS - 1) + [True, False, False]
    assert "on" in repr(stall)
    assert stall.end()
    assert not stall.is_on
    assert not stall.end()
    assert "off" in repr(stall)


def test_time_without_looks_is_not_the_journals() -> None:
    """A process that was stopped, or whose hub was blocked, finds old work, and has hardly looked at it."""
    stall = Stall()
    stall.begin()
    assert not any(stall.look(100 * LIMIT) for _ in range(LOOKS - 1))
    stall.begin()  # a further try of the same batch
    assert not any(stall.look(100 * LIMIT) for _ in range(LOOKS - 1))
    assert stall.look(100 * LIMIT)


def test_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go on while there is work, stop by themselves, and in a pause between two tries nothing stalls."""
    monkeypatch.setattr("greensafe.journal._stall.LOOK", MS)
    monkeypatch.setattr("greensafe.journal._stall.LIMIT", 0.0)
    is_busy, is_in_thread, ages = True, False, []
    looks: list[None] = []
    lookout = Lookout(gevent.get_hub(), lambda: is_busy, lambda: is_in_thread, ages.append, lambda: looks.append(None))
    lookout.begin(monotonic() - 1000.0)
    wait_until(lambda: len(looks) > 2 * LOOKS)
    assert (ages, lookout.is_stalled) == ([], False)
    is_in_thread = True
    wait_until(lambda: lookout.is_stalled)
    assert len(ages) == 1
    assert "looking" in repr(lookout)
    is_busy = False
    wait_until(lambda: "at rest" in repr(lookout))
    assert lookout.is_stalled
    assert lookout.end()
    lookout.stop()
