"""Whose turn is it, of the requests that cannot run yet?

Clients take turns (see `sansio.turns`), so that one with many requests does not keep the others waiting. A client is a list of
routing ids. It does not know why the requests wait, nor for how long.
"""

from __future__ import annotations

from ..sansio.exchange import Exchange
from ..sansio.turns import Turns
from ..sansio.weights import REQUEST, weight

__all__ = ["BACKLOG", "BACKLOG_BYTES", "Backlog"]

#: Requests that are kept, and what they weigh, envelopes and all; then it `is_full`.
BACKLOG = 10_000
BACKLOG_BYTES = 64 * 2**20


class Backlog:
    """Requests that wait for their turn, by the key of their exchange.

    Attributes:
        size: What they weigh, in bytes.
    """

    __slots__ = ("_requests", "_turns", "size")

    def __init__(self) -> None:
        #: Each with whose turn it waits for, and its weight: one that is sent again by another way keeps both.
        self._requests: dict[int, tuple[Exchange, tuple[bytes, ...], int]] = {}
        self._turns = Turns()
        self.size = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, key: int) -> bool:
        return key in self._requests

    def __repr__(self) -> str:
        return f"<Backlog {len(self)} requests by {len(self._turns)} connections, {self.size} bytes>"

    @property
    def is_full(self) -> bool:
        """Whether no more should be accepted for the time being."""
        return len(self._requests) >= BACKLOG or self.size >= BACKLOG_BYTES

    def requests(self) -> list[Exchange]:
        """All of them, the oldest first."""
        return [exchange for exchange, _, _ in self._requests.values()]

    def keep(self, exchange: Exchange) -> None:
        """It waits from now on."""
        key, envelope = exchange.key, exchange.envelope
        origin = envelope.origin
        size = REQUEST + weight(envelope.route + envelope.body)
        if envelope.header is not None:
            size += len(envelope.header.metadata)  # which is in the header's frame as well
        self._requests[key] = exchange, origin, size
        self.size += size
        self._turns.add(origin, key)

    def take(self, key: int) -> Exchange | None:
        """It does not wait any more; None if it did not."""
        found = self._requests.pop(key, None)
        if found is None:
            return None
        exchange, origin, size = found
        self.size -= size
        self._turns.remove(origin, key)
        return exchange

    def next(self) -> Exchange:
        """Take the request whose turn it is."""
        exchange = self.take(self._turns.next())
        assert exchange is not None
        return exchange
