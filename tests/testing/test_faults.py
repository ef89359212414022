"""Tests of greensafe.testing.link.faults: what passes when, in a time that the test makes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies as st

from greensafe.hub.timers import TICK
from greensafe.testing import ManualClock
from greensafe.testing.link.faults import BURST, PIECE, Faults


def test_sound() -> None:
    """Without a fault everything passes at once and as it is."""
    faults = Faults()
    assert faults.wait(0.0, 10**9, 0.0) == 0
    assert faults.share(10**9) == 10**9
    assert faults.spoil(b"abc") == b"abc"
    assert str(faults) == "sound"


@pytest.mark.parametrize("name", ["is_cut", "is_stalled"])
def test_nothing_passes_until_it_is_healed(name: str) -> None:
    """Cut and stalled: only a command can end it, and heal() does."""
    faults = Faults()
    setattr(faults, name, True)
    assert faults.wait(0.0, 1, 1e9) == math.inf
    faults.heal()
    assert faults.wait(0.0, 1, 0.0) == 0


def test_delay() -> None:
    """What was read is due so many seconds later; a delay that changes counts for what is underway too."""
    clock, faults = ManualClock(100.0), Faults()
    faults.delay = 2.0
    assert faults.wait(100.0, 1, clock()) == 2.0
    clock.advance(1.5)
    assert faults.wait(100.0, 1, clock()) == 0.5
    faults.delay = 1.0
    assert faults.wait(100.0, 1, clock()) == 0


def _pass(faults: Faults, clock: ManualClock, size: int, late: float = 0.0) -> None:
    """Pass `size` bytes on as a pipe does, in a loop that always comes `late` seconds too late."""
    while size:
        if seconds := faults.wait(clock(), size, clock()):
            clock.advance(max(seconds, TICK) + late)
            continue
        sent = faults.share(size)
        faults.count(sent)
        size -= sent


@settings(deadline=None)
@given(st.floats(10, 1e9), st.floats(0.1, 5.0), st.floats(0, BURST / 2))
def test_a_rate_is_kept(rate: float, seconds: float, late: float) -> None:
    """A second's bytes take a second, also where timers come late; never less."""
    clock, faults = ManualClock(), Faults()
    faults.throttle(rate, clock())
    size = max(1, int(rate * seconds))
    _pass(faults, clock, size, late)
    assert clock.now >= size / rate * (1 - 1e-9)
    assert clock.now <= size / rate + 0.1 + 2 / rate + late
    assert faults.passed == size


def test_an_idle_link_saves_nothing_up() -> None:
    """After an hour in which nothing passed, no more than a piece and BURST seconds' bytes pass at once."""
    clock, faults = ManualClock(), Faults()
    faults.throttle(1000, clock())
    clock.advance(3600)
    assert faults.wait(clock(), 10_000, clock()) == 0
    assert faults.share(10_000) == pytest.approx(1000 * (PIECE + BURST))


def test_the_slowest_rate() -> None:
    """A byte in ten seconds is one byte in ten seconds."""
    clock, faults = ManualClock(), Faults()
    faults.throttle(0.1, clock())
    assert faults.wait(clock(), 5, clock()) == pytest.approx(10)
    _pass(faults, clock, 3)
    assert clock.now == pytest.approx(30)


def test_ends_need_no_rate() -> None:
    """What has no bytes, such as an end, waits for a delay but not for a rate."""
    faults = Faults()
    faults.throttle(1, 0.0)
    assert faults.wait(0.0, 0, 0.0) == 0


def test_corruption_counts_over_pieces() -> None:
    """The byte is found wherever the stream is cut into pieces, once, and told twice it is not put right again."""
    faults = Faults()
    faults.corrupt(0)
    faults.corrupt(3)
    faults.corrupt(3)
    got = b""
    for piece in (b"a", b"bc", b"de", b"f"):
        got += bytes(faults.spoil(memoryview(piece)))
        faults.count(len(piece))
    assert got == b"\x9ebc\x9bef"
    faults.corrupt(1)
    assert faults.spoil(b"gh") == b"g\x97"
    assert faults.spoil(b"gh") == b"g\x97", "what was not sent is asked for again"
    faults.heal()
    assert faults.spoil(b"gh") == b"gh"


def test_text() -> None:
    """It says what it does, all of it."""
    faults = Faults()
    faults.is_cut = faults.is_stalled = True
    faults.delay = 0.25
    faults.throttle(1000, 0.0)
    faults.corrupt(0)
    assert str(faults) == "cut and stalled and delayed 0.25 s and throttled to 1000 B/s and about to corrupt"
