"""Tests of greensafe.server.stepping; what a handler sees of it is in test_journaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import gevent
import pytest
from helpers import MS, wait_until

from greensafe.journal import Effect, JsonOrBytes, Step, in_transaction
from greensafe.journal.commits import Commits
from greensafe.sansio.envelope import Envelope
from greensafe.sansio.exchange import Event, Exchange
from greensafe.server.stepping import Steps
from greensafe.server.storing import Memory

pytestmark = pytest.mark.usefixtures("limit")


class Stuck:
    """What takes writes and stores none."""

    def __init__(self) -> None:
        self.writes: list[Any] = []
        self.withdrawn: list[int] = []

    def write(self, write: Any, then: Callable[..., None]) -> int:
        self.writes.append(write)
        return len(self.writes)

    def withdraw(self, number: int) -> None:
        self.withdrawn.append(number)


def _exchange() -> Exchange:
    exchange = Exchange(1, Envelope([b"id", b""], None, [b"body"]), 0.0)
    exchange.memory = Memory(bytes(16))
    return exchange


@pytest.mark.parametrize(
    ("fn", "is_answered", "withdrawn"),
    [(int, False, []), (int, True, []), (in_transaction(int), False, [1])],
    ids=["step", "of what is answered", "effect"],
)
def test_nobody_waits_any_more(fn: Any, is_answered: bool, withdrawn: list[int]) -> None:
    """What a step has done stays to be stored: its request may go on later; an effect that has not begun is not done."""
    stuck, exchange = Stuck(), _exchange()
    steps = Steps(cast(Commits, stuck), JsonOrBytes())
    running = gevent.spawn(steps.run, exchange, "a", fn, ())
    wait_until(lambda: stuck.writes)
    if is_answered:
        exchange.move(Event.ANSWER)
    running.kill(timeout=1000 * MS)
    assert stuck.withdrawn == withdrawn
    assert isinstance(stuck.writes[0], Effect if withdrawn else Step)
    assert "Steps" in repr(steps)
