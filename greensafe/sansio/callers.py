"""The clients of one server that send headers: which of their requests are open, and who is to be told so next.

A client is a list of routing ids. It is remembered while it has open requests and until its next WORKING would be due, since
nobody says whether it has gone. Clients without open requests are remembered up to a weight (`IDLE_BYTES`): a peer that puts an
id of its own before each request is a new client each time. How many are told at a time is up to `rounds`.

This module does not know what clients are told, nor what becomes of a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .exchange import Exchange
from .liveness import LOOKS
from .rounds import INTERVAL, Rounds
from .weights import CALLER, DEAD_BYTES, weight

__all__ = ["IDLE_BYTES", "LONGEST_PULSE", "SHORTEST_PULSE", "Caller", "Callers"]

#: Seconds between two WORKING for one client, at least, however short its patience.
SHORTEST_PULSE = INTERVAL

#: And at most, however long: a client that has gone is remembered until its next one would be due.
LONGEST_PULSE = 30.0

#: Bytes of the clients that are remembered until then without an open request: some 20,000 with ordinary routing ids.
IDLE_BYTES = 16 * 2**20


class Caller:
    """A client that sends headers, as far as its requests are open.

    Attributes:
        origin: Its routing ids.
        open: Its unanswered requests by their ids; of two with the same id the later one.
        pulse: Seconds between two WORKING, infinity if it wants none.
        due: When the next one is.
        is_told: It knows that this server drains.
        size: Its weight.
    """

    __slots__ = ("due", "is_told", "open", "origin", "pulse", "size")

    def __init__(self, origin: tuple[bytes, ...]) -> None:
        self.origin = origin
        self.open: dict[bytes, Exchange] = {}
        self.pulse = math.inf
        self.due = math.inf
        self.is_told = False
        self.size = CALLER + weight(origin)


class Callers:
    """The clients of one server.

    Attributes:
        forgotten: Clients without open requests that were not remembered until their next WORKING, for want of room.
        is_draining: Those without open requests are to be told CLOSED: none is forgotten but for want of room.
    """

    __slots__ = ("_by_origin", "_dead_size", "_idle_size", "_pulses", "forgotten", "is_draining")

    def __init__(self) -> None:
        self._by_origin: dict[tuple[bytes, ...], Caller] = {}
        self._pulses: Rounds[Caller] = Rounds(_is_due)
        #: What those without open requests weigh, and those that are forgotten and still queued.
        self._idle_size = 0
        self._dead_size = 0
        self.forgotten = 0
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._by_origin)

    def __iter__(self) -> Iterator[Caller]:
        return iter(self._by_origin.values())

    def __repr__(self) -> str:
        return f"<Callers {len(self)}, idle ones of {self._idle_size} bytes, forgotten={self.forgotten}>"

    def find(self, origin: tuple[bytes, ...], request_id: bytes) -> Exchange | None:
        """The open request that a client knows by this id."""
        caller = self._by_origin.get(origin)
        return None if caller is None else caller.open.get(request_id)

    def add(self, exchange: Exchange, origin: tuple[bytes, ...], request_id: bytes, patience_ms: int, now: float) -> float:
        """A client has sent a request, or has sent it again; returns when `take` has something to do that it had not before."""
        caller = self._by_origin.get(origin)
        if caller is None:
            self._by_origin[origin] = caller = Caller(origin)
        elif not caller.open:
            self._idle_size -= caller.size
        caller.open[request_id] = exchange
        exchange.caller = caller
        if patience_ms:
            pulse = min(max(patience_ms / 1000 / LOOKS, SHORTEST_PULSE), LONGEST_PULSE)
            caller.pulse = min(pulse, caller.pulse)
            if now + caller.pulse < caller.due:
                due = now + caller.pulse
                self._pulses.push(due, caller)
                caller.due = due  # not before; see `take`
                return due
        return math.inf

    def leave(self, origin: tuple[bytes, ...], request_id: bytes, exchange: Exchange) -> None:
        """A client does not wait for this request any more, if it is known and does."""
        caller = self._by_origin.get(origin)
        if caller is not None:
            self.settle(caller, request_id, exchange)

    def settle(self, caller: Caller, request_id: bytes, exchange: Exchange) -> None:
        """The same, of a client that is at hand."""
        if caller.open.get(request_id) is exchange:
            del caller.open[request_id]
            if caller.open:
                return
            if caller.due == math.inf and not self.is_draining:
                self._by_origin.pop(caller.origin, None)
                return
            self._idle_size += caller.size
            if self._idle_size > IDLE_BYTES:
                self.forgotten += 1
                self._forget(caller)

    def take(self, now: float) -> Iterator[Caller]:
        """The clients that are to be told by `now` that their requests are open; each comes up again after its pulse."""
        for caller in self._pulses.take(now):
            if caller.open:
                due = now + caller.pulse
                self._pulses.push(due, caller)
                caller.due = due  # not before: whoever is interrupted pushes it again
                yield caller
            else:
                caller.due = math.inf
                if not self.is_draining:
                    # Only now, so that a client that asks one thing after another is not forgotten after each.
                    self._forget(caller)

    def next_at(self) -> float | None:
        """When `take` has something to do next, None if nothing is left."""
        return self._pulses.next_at()

    def _forget(self, caller: Caller) -> None:
        """A client without open requests."""
        self._by_origin.pop(caller.origin, None)
        self._idle_size -= caller.size
        if caller.due != math.inf:
            caller.due = math.inf
            self._dead_size += caller.size
            if self._dead_size > DEAD_BYTES:
                self._dead_size = 0
                self._pulses.sweep()


def _is_due(caller: Caller, at: float) -> bool:
    return caller.due == at
