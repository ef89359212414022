"""Which clients are told next that their requests are open, and how many of them at a time.

A client is a list of routing ids, and a peer that makes them up is a new client with each. So what is said is bounded: in each
`INTERVAL`, `EACH` messages by one connection and `ALL` by all of them, of which a long one counts as several. Connections take
turns, and so do the clients of one. A client that is not told in time is told later.

It does not know what is said.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from .due import DueQueue

__all__ = ["ALL", "EACH", "INTERVAL", "Rounds"]

#: Seconds: no client is told anything more often, however short its patience.
INTERVAL = 0.05

#: Clients told in one interval by one connection: 5,000 a second, 5 % of a core. A server with default limits has requests of
#: 11,000 clients at most. If all of them are behind one proxy each hears within 2.2 s; a default `heartbeat` allows 4.
EACH = 250

#: And by all connections.
ALL = 500

#: Bytes of routing ids and of requests' ids for which a message counts as one more.
LONG = 1000

_ID = 16


class _Told(Protocol):
    """A client: its routing ids, the connection's first, and its open requests."""

    origin: tuple[bytes, ...]
    open: dict[bytes, Any]


T = TypeVar("T", bound=_Told)


class Rounds(Generic[T]):
    """Clients, each with the time when it is to be told something.

    Args:
        is_live: Tells whether what was pushed for this time still counts.
    """

    __slots__ = ("_due", "_is_live", "_lines", "_said", "_said_each", "_until")

    def __init__(self, is_live: Callable[[T, float], bool]) -> None:
        self._is_live = is_live
        self._due: DueQueue[T] = DueQueue(is_live)
        #: Whose time has come, and when, by their connections.
        self._lines: OrderedDict[bytes, deque[tuple[float, T]]] = OrderedDict()
        self._until = -math.inf
        self._said = 0
        self._said_each: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Entries kept, those that are over included."""
        return len(self._due) + sum(map(len, self._lines.values()))

    def push(self, at: float, client: T) -> None:
        """Have `client` come up at `at`."""
        self._due.push(at, client)

    def sweep(self) -> None:
        """Let go of what is over."""
        self._due.sweep()
        for connection, line in list(self._lines.items()):
            live = deque(entry for entry in line if self._is_live(entry[1], entry[0]))
            if live:
                self._lines[connection] = live
            else:
                del self._lines[connection]

    def next_at(self) -> float | None:
        """When `take` has something to do next, None if nothing is left."""
        at = self._due.next_at()
        if not self._lines:
            return at
        return self._until if at is None else min(at, self._until)

    def take(self, now: float) -> Iterator[T]:
        """The clients whose turn it is by `now`, among them all whose time has come and that have no open request any more.

        Each is taken out when the next one is asked for. If the caller is interrupted before it has pushed it again, or made it
        count no more, it comes again.
        """
        if now >= self._until:
            self._until = now + INTERVAL
            self._said = 0
            self._said_each.clear()
        for at, client in self._due.take_due(now, ALL):
            line = self._lines.get(client.origin[0])
            if line is None:
                self._lines[client.origin[0]] = line = deque()
            line.append((at, client))
        lines = self._lines
        full = 0  # in a row
        while full < len(lines) and self._said < ALL:
            connection = next(iter(lines))
            said, line = self._said_each.get(connection, 0), lines[connection]
            lines.move_to_end(connection)
            if said >= EACH:
                full += 1
                continue
            full = 0
            entry = line[0]
            at, client = entry
            if self._is_live(client, at):
                if client.open:
                    cost = 1 + (sum(map(len, client.origin)) + _ID * len(client.open)) // LONG
                    self._said_each[connection] = said + cost
                    self._said += cost
                yield client
            line = lines.get(connection, line)  # what has been swept meanwhile is another one
            if line and line[0] is entry:
                del line[0]
            if not line and connection in lines:
                del lines[connection]
