"""The counts of one supervised socket, through all the watchdogs that look after it.

`supervise` has one watchdog for all its requests, `supervised` a new one for each block. A `Tally` stays with the socket, so
that requests are numbered and counted from the first to the last.

It does not know how requests are received, nor how their answers leave.
"""

from __future__ import annotations

import os
from collections import Counter

from ..green.socket import Socket
from ..hub.forks import generation
from ..loops.restarts import Restarts
from ..stats import ServerStats
from .descriptors import DescriptorWatch
from .watchdog import Watchdog

__all__ = ["Tally", "tally_of"]

#: What a Responder counts, besides requests.
_COUNTED = ("answered", "cancelled", "malformed", "ignored", "duplicates", "misdirected", "forgotten")


class Tally:
    """The counts of one socket.

    Attributes:
        endpoint: What the socket was called when it was supervised last; "" before.
        generation: The process that counts here, as forks go.
        instance: 16 bytes by which clients tell this socket from one that is made later.
        unsent: Answers that wait until their client reads.
        unreachable: Answers for clients that are gone, or that came when the socket was closed.
        unread: Answers for clients that did not read.
        unsaid: Messages that are no answers, for the same.
        waiting: Bytes that wait until their client reads, by its routing id.
    """

    __slots__ = (
        "_counts",
        "_error",
        "_failures",
        "_live",
        "_received",
        "_restarts",
        "_waiting_size",
        "endpoint",
        "generation",
        "instance",
        "unreachable",
        "unread",
        "unsaid",
        "unsent",
        "waiting",
    )

    def __init__(self) -> None:
        self.endpoint = ""
        self.generation = generation()
        self.instance = os.urandom(16)
        self.unsent = self.unreachable = self.unread = self.unsaid = 0
        self.waiting: dict[bytes, int] = {}
        self._waiting_size = 0
        self._live: dict[Watchdog, tuple[Restarts, DescriptorWatch | None]] = {}
        self._received = 0
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._failures: Counter[str] = Counter()
        self._restarts: Counter[str] = Counter()
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Tally of {len(self._live)} watchdogs received={self.received} answered={self._counts['answered']}>"

    @property
    def received(self) -> int:
        """Requests so far, which is the number of the last one."""
        return max([self._received, *[watchdog.responder.received for watchdog in self._live]])

    def begin(self, endpoint: str, watchdog: Watchdog, restarts: Restarts, descriptors: DescriptorWatch | None = None) -> None:
        """Count what this watchdog does from now on; `end` it whatever happens."""
        self.endpoint = endpoint
        self._error = None
        watchdog.responder.go_on_from(self.received if self._live else self._received)
        self._live[watchdog] = restarts, descriptors

    def renumber(self, watchdog: Watchdog) -> None:
        """Have this watchdog number its next request behind those that others have received meanwhile."""
        if len(self._live) > 1:
            watchdog.responder.go_on_from(self.received)

    def end(self, watchdog: Watchdog) -> None:
        """Keep the counts of a watchdog, which is closed."""
        restarts, _ = self._live.pop(watchdog)
        self._received = max(self._received, watchdog.responder.received)
        self._error = restarts.error
        _add(self._counts, watchdog)
        if watchdog.failures:
            self._failures.update(watchdog.failures)
        if restarts.counts:
            self._restarts.update(restarts.counts)

    def keep(self, peer: bytes, size: int, most: int, most_of_all: int) -> bool:
        """Whether so many bytes more may wait for a peer: then they count until `release`. One message always may."""
        waits = self.waiting.get(peer, 0)
        if self._waiting_size >= most_of_all or (waits and waits + size > most):
            return False
        self.waiting[peer] = waits + size
        self._waiting_size += size
        return True

    def release(self, peer: bytes, size: int) -> None:
        """So many bytes wait no more for a peer."""
        self._waiting_size -= size
        self.waiting[peer] -= size
        if not self.waiting[peer]:
            del self.waiting[peer]

    def stats(self) -> ServerStats:
        """Return how the socket stands now."""
        counts, failures, restarts = self._counts.copy(), self._failures.copy(), self._restarts.copy()
        for watchdog, (loops, _) in self._live.items():
            _add(counts, watchdog)
            failures.update(watchdog.failures)
            restarts.update(loops.counts)
        live, watches = list(self._live), [watch for _, watch in self._live.values() if watch is not None]
        error, can_accept = self._error, not any(watch.is_exhausted for watch in watches)
        return ServerStats(
            endpoint=self.endpoint,
            state="started" if live else "closed" if error is None else "failed",
            is_healthy=error is None and can_accept,
            is_accepting=can_accept,
            received=self.received,
            answered=counts["answered"],
            failures=dict(failures),
            cancelled=counts["cancelled"],
            inflight=sum(watchdog.responder.inflight for watchdog in live),
            running=sum(watchdog.load for watchdog in live),
            backlog=sum(watchdog.backlog for watchdog in live),
            oldest_seconds=max((age for each in live if (age := each.oldest_seconds) is not None), default=None),
            zombie_count=sum(watchdog.responder.zombies for watchdog in live),
            zombies=tuple(zombie for watchdog in live for zombie in watchdog.zombies()),
            unsent=self.unsent,
            drops={
                "malformed": counts["malformed"],
                "ignored": counts["ignored"],
                "duplicates": counts["duplicates"],
                "unreachable": self.unreachable,
                "full_outbox": self.unread,
                "unsaid": self.unsaid,
                "misdirected": counts["misdirected"],
                "forgotten": counts["forgotten"],
            },
            restarts=dict(restarts),
            loop_error="" if error is None else f"{type(error).__name__}: {error}",
        )


def tally_of(sock: Socket) -> Tally:
    """Return the counts of this socket, the same each time; in a forked child others than in its parent."""
    found: Tally | None = sock.__dict__.get("_tally")
    if found is None or found.generation != generation():
        sock.__dict__["_tally"] = found = Tally()
    return found


def _add(counts: dict[str, int], watchdog: Watchdog) -> None:
    for name in _COUNTED:
        if number := getattr(watchdog.responder, name):
            counts[name] += number
