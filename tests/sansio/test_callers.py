"""Tests of greensafe.sansio.callers; what clients are told, and what is kept of them, is in test_responder."""

from __future__ import annotations

import math

from greensafe.sansio.callers import SHORTEST_PULSE, Callers
from greensafe.sansio.envelope import Envelope
from greensafe.sansio.exchange import Exchange

A, B = (b"a",), (b"proxy", b"b")


def _exchange() -> Exchange:
    return Exchange(1, Envelope([b"a", b""], None, [b"x"]), 0.0)


def test_a_request_and_its_client() -> None:
    """A request is found by its client and its id, until that client does not wait for it any more; others' stay."""
    callers, first, second = Callers(), _exchange(), _exchange()
    assert callers.add(first, A, b"1", 0, 0.0) == math.inf
    assert callers.add(first, B, b"1", 0, 0.0) == math.inf
    assert callers.add(second, B, b"2", 0, 0.0) == math.inf
    assert (callers.find(A, b"1"), callers.find(B, b"2"), callers.find(A, b"2")) == (first, second, None)
    callers.leave(B, b"1", second)  # that is another one
    callers.leave((b"stranger",), b"1", first)
    assert callers.find(B, b"1") is first
    callers.leave(A, b"1", first)
    assert (callers.find(A, b"1"), [caller.origin for caller in callers]) == (None, [B])
    assert "<Callers 1, " in repr(callers)


def test_when_there_is_something_to_do() -> None:
    """It is said when this becomes sooner, and only then."""
    callers, exchange = Callers(), _exchange()
    assert callers.add(exchange, A, b"1", 5000, 0.0) == 1.0
    assert callers.add(exchange, A, b"2", 5000, 0.5) == math.inf
    assert callers.add(exchange, A, b"3", 1, 0.5) == 0.5 + SHORTEST_PULSE
    assert callers.next_at() == 0.5 + SHORTEST_PULSE


def test_a_client_that_comes_up_twice_for_one_time() -> None:
    """By a coarse clock a time that was replaced by an earlier one may come back: it is told once, and counted once."""
    for is_open in (True, False):
        callers, exchange = Callers(), _exchange()
        callers.add(exchange, A, b"1", 10_000, 0.0)  # due at 2.0
        callers.add(exchange, A, b"2", 5_000, 0.0)  # at 1.0, and then at 2.0 again
        assert len(list(callers.take(1.0))) == 1
        if not is_open:
            callers.leave(A, b"1", exchange)
            callers.leave(A, b"2", exchange)
        assert len(list(callers.take(2.0))) == is_open
        assert callers._idle_size == 0
        assert len(callers._pulses) == len(callers) == is_open
