"""Tests of greensafe.server.storing."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest

from greensafe import RemoteError
from greensafe.journal.commits import LOOK
from greensafe.sansio.envelope import Envelope
from greensafe.sansio.exchange import Exchange
from greensafe.sansio.weights import FRAME
from greensafe.server import storing
from greensafe.server.storing import Memory, Storing

GRACE = 1000.0


def _storing(limit: float | None = 10.0) -> Storing:
    unused: Any = None
    return Storing(unused, unused, unused, None, limit=limit, grace=GRACE)


def _exchange(key: int = 1, at: float | None = None, body: tuple[bytes, ...] = (b"body",)) -> Exchange:
    exchange = Exchange(key, Envelope([b"id", b"header", b""], None, list(body)), 0.0)
    exchange.memory = Memory(bytes(16))
    exchange.at = at
    return exchange


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ((b"body",), storing.AT_ONCE // 1024),
        ((bytes(10_000),), 10_000 + 8 + 4 * FRAME),
        ((b"",) * 100_000, 100_003 * FRAME + 8),
    ],
    ids=["small", "large", "empty frames"],
)
def test_what_a_request_weighs(body: tuple[bytes, ...], weight: int) -> None:
    """All its frames, with what each costs beyond its bytes; small ones as much as bounds their number."""
    assert storing._weigh(_exchange(body=body)) == weight


@pytest.mark.parametrize(
    ("at", "is_overdue"), [(-GRACE, True), (-GRACE + LOOK / 2, True), (-GRACE + 100, False), (None, False)]
)
def test_an_answer_leaves_after_the_grace(at: float | None, is_overdue: bool) -> None:
    """At the last look before it is over; without a deadline never."""
    held = _storing()
    exchange = _exchange(at=None if at is None else monotonic() + at)
    held.hold(exchange, None)
    assert exchange.is_held
    assert [each is exchange for each, _ in held.overdue_answers()] == [True] * is_overdue
    assert "and 1 answers" in repr(held)


def test_a_late_answer_has_its_own_grace() -> None:
    """What is given at the deadline, or after a cancel, counts from then: `at` is the kill's by then, and moves on."""
    held = _storing()
    exchange = _exchange(at=monotonic() - 2 * GRACE)
    exchange.is_expired = True
    held.hold(exchange, None)
    assert list(held.overdue_answers()) == []
    exchange.memory.at = monotonic()
    assert len(list(held.overdue_answers())) == 1


def test_what_is_said_of_an_answer() -> None:
    """A missed deadline stays one, for the caller that knows its own; any other answer is one that may be had later."""
    held = _storing()
    late = RemoteError("DEADLINE_EXCEEDED", "too late", "CallerLimit")
    for key, error in ((1, late), (2, None), (3, RemoteError("NOT_FOUND", "no", "KeyError"))):
        held.hold(_exchange(key, at=monotonic() - 2 * GRACE), error)
    said = [(error.code, error.type) for _, error in held.overdue_answers()]
    assert said == [("DEADLINE_EXCEEDED", "CallerLimit"), ("UNAVAILABLE", "JournalError"), ("UNAVAILABLE", "JournalError")]


def test_how_long_a_request_waits() -> None:
    """The handler's limit and the grace; without a limit there is none but the journal's own."""
    assert _storing(10.0).patience == 10.0 + GRACE
    waiting = _storing(None)
    exchange = _exchange()
    waiting.requests[1] = exchange
    exchange.memory.at = monotonic() + waiting.patience
    assert waiting.overdue_requests() == []
    exchange.memory.at = monotonic()
    assert len(waiting.overdue_requests()) == 1
