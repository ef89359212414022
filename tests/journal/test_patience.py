"""Tests of greensafe.journal._patience."""

from __future__ import annotations

import pytest

from greensafe.journal._patience import LIMIT, LONGEST, SHORTEST, STEP, Patience
from greensafe.testing import ManualClock


@pytest.mark.parametrize("takes", [0.0, 1.0, STEP - LONGEST])
def test_tries_until_the_limit(takes: float) -> None:
    """Pauses grow from the shortest to the longest; the last try begins at the limit at the latest, however long each takes."""
    clock, patience = ManualClock(100.0), Patience()
    pauses = []
    while True:
        began = clock()
        clock.advance(takes)
        pause = patience.failed(began, clock())
        if pause is None:
            break
        pauses.append(pause)
        clock.advance(pause)
    assert pauses == sorted(pauses[:-1]) + pauses[-1:]
    assert all(SHORTEST <= pause <= LONGEST for pause in pauses[:-1])
    assert 100 + LIMIT <= clock() <= 100 + LIMIT + takes
    assert len(pauses) < 20
    assert patience.is_spent
    assert "ill since 100.000" in repr(patience)


def test_a_pause_of_this_process() -> None:
    """While it is stopped, in a try or between two, nothing is tried: that is not counted, however often it happens."""
    clock, patience = ManualClock(100.0), Patience()
    for _ in range(2):
        began = clock()
        clock.advance(3600.0)
        pause = patience.failed(began, clock())
        assert pause is not None
        clock.advance(pause)
    clock.advance(3600.0)
    assert patience.failed(clock(), clock()) is None


def test_the_limit_is_the_troubles_and_not_a_batchs() -> None:
    """What is tried after it has one try, until one succeeds; then all of it begins anew."""
    patience = Patience()
    assert patience.failed(0.0, 0.5) is not None
    for now in (2.5, 4.5):
        assert patience.failed(now, now) is not None
    assert patience.failed(LIMIT, LIMIT) is None
    assert patience.failed(100.0, 100.0) is None
    patience.ended()
    assert (patience.since, patience.is_spent) == (None, False)
    assert patience.failed(100.0, 100.0) == SHORTEST
    assert "since 100" in repr(patience)
    patience.ended()
    assert "well" in repr(patience)
