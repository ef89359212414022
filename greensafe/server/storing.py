"""Which requests wait for the journal, whose turn is it to be written, and how long may each of them wait?

Rules:

* What is handed over to the journal in one batch is bounded (`AT_ONCE`); what comes beyond that is kept, clients in turn, and
  bounded like the requests whose turn to run has not come: then nothing more is read.
* A request that is not stored `grace` after its handler's limit, counted from its turn, is rejected: it was not run. An answer
  that is not stored `grace` after its deadline leaves as what is true of it: nobody knows whether it is stored. Without a limit
  both wait until the journal itself counts as stalled.

It does not know what is stored of a request, nor what it is answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from time import monotonic

from ..errors import JournalError, RemoteError
from ..journal.base import Journal
from ..journal.commits import LOOK, Commits
from ..sansio.envelope import Header
from ..sansio.exchange import Exchange
from ..sansio.records import Begin, Forget, Known
from ..sansio.weights import weight
from .backlog import Backlog

__all__ = ["AT_ONCE", "NOT_STORED", "Memory", "Storing", "too_late", "unstorable"]

#: The weight of the requests that may wait for one batch; what comes then waits for the next one.
AT_ONCE = 8 * 2**20

#: What a request weighs at least, so that one batch has no more than 1,024 of them.
_LEAST = AT_ONCE // 1024

#: The answer of a request that could not be stored. Its client is not told the journal's path, nor what is wrong with it.
NOT_STORED = RemoteError("RESOURCE_EXHAUSTED", "the request could not be stored, and was not run", "JournalError")

#: The answer of a request that was not stored for so long that it must not be run any more.
_TOO_LATE = "the request could not be stored in time, and was not run: the journal's disk, or an effect before it, takes long"


def _weigh(exchange: Exchange) -> int:
    """Return how much a request adds to the journal's queue, in bytes."""
    return max(_LEAST, weight(exchange.envelope.route) + weight(exchange.envelope.body))


class Memory:
    """What is known of one request beyond its exchange.

    Attributes:
        request_id: The client's id of it.
        attempt: As Request.attempt.
        steps: The results that are stored.
        counts: How often each name was used in this run.
        is_begun: Its Begin is stored, so its answer can be.
        is_counted: The journal counts this run as one in vain, and was not told yet that it was not.
        is_vanished: Its client's connection is gone.
        number: Of its Begin, or of its Rerun then, among the journal's writes.
        at: When, on the monotonic clock, its request or its answer is not to wait for the journal any longer.
    """

    __slots__ = ("at", "attempt", "counts", "is_begun", "is_counted", "is_vanished", "number", "request_id", "steps")

    def __init__(self, request_id: bytes) -> None:
        self.request_id = request_id
        self.attempt = 1
        self.steps: dict[tuple[str, int], bytes] = {}
        self.counts: dict[str, int] = {}
        self.is_begun = False
        self.is_counted = False
        self.is_vanished = False
        self.number = 0
        self.at = math.inf


class Storing:
    """The requests of one server that wait for its journal.

    Args:
        journal: Asked for its time.
        commits: Where they are handed over.
        on_begun: Called with the request, and with the result of its Begin or the error; see `Commits.write`.
        on_room: Called when fewer wait in turn; or None.
        limit: Seconds that a handler has, None for no limit.
        grace: Seconds for which they may wait beyond their limits.

    Attributes:
        requests: Those whose turn to run has come, and that are not stored yet, by the key of their exchange.
        held: Those that are answered, with the error that the answer is, and whose answers are not stored yet.
        patience: Seconds that a request may wait from its turn.
        released: Answers that have left before they were known to be stored.
    """

    def __init__(
        self,
        journal: Journal,
        commits: Commits,
        on_begun: Callable[[Exchange, Known | None, JournalError | None], None],
        on_room: Callable[[], None] | None,
        *,
        limit: float | None,
        grace: float,
    ) -> None:
        self._journal = journal
        self._commits = commits
        self._on_begun = on_begun
        self._on_room = on_room
        self._grace = grace
        #: Those that were not handed over to the journal yet.
        self._turns = Backlog()
        self.requests: dict[int, Exchange] = {}
        self.held: dict[int, tuple[Exchange, RemoteError | None]] = {}
        self.patience = math.inf if limit is None else limit + grace
        self.released = 0

    def __repr__(self) -> str:
        return f"<Storing {len(self.requests)} requests, {len(self._turns)} of them in turn, and {len(self.held)} answers>"

    @property
    def is_full(self) -> bool:
        """Whether no more should be accepted for the time being."""
        return self._turns.is_full

    def begin(self, exchange: Exchange, header: Header) -> None:
        """Store a request as soon as there is room in a batch, and it is its client's turn."""
        exchange.memory = Memory(header.request_id)
        self.requests[exchange.key] = exchange
        commits = self._commits
        if commits.on_room is None and commits.queue.weight < AT_ONCE:
            self._hand_over(exchange, header)
        else:
            self._turns.keep(exchange)
            commits.on_room = self._hand_over_kept

    def is_placed(self, key: int) -> bool:
        """Whether a request waits here, and will come up."""
        exchange = self.requests.get(key)
        return exchange is not None and (key in self._turns or exchange.memory.number > 0)

    def take(self, key: int) -> Exchange | None:
        """A request is not to be stored any more, if that has not begun; None if it was none of these."""
        exchange = self.requests.pop(key, None)
        if exchange is not None and self._turns.take(key) is None:
            self._commits.withdraw(exchange.memory.number)
        return exchange

    def _hand_over(self, exchange: Exchange, header: Header) -> None:
        memory: Memory = exchange.memory
        now = monotonic()
        memory.at = now + self.patience
        came = self._journal.now() - (now - exchange.arrived_at)
        begin = Begin(
            header.request_id,
            exchange.envelope.body,
            since=came - header.age_ms / 1000,
            is_resent=header.age_ms > 0,
            until=None if header.remaining_ms is None else came + header.remaining_ms / 1000,
            client=exchange.envelope.route[0],
            metadata=header.metadata,
        )
        on_begun = self._on_begun
        # If the server stops before this is stored the request was not run, and is new to the next one.
        undo = Forget(header.request_id)
        memory.number = self._commits.write(
            begin, lambda known, error: on_begun(exchange, known, error), undo, _weigh(exchange)
        )

    def _hand_over_kept(self) -> None:
        """The next batch has room for those that wait for it."""
        turns, commits = self._turns, self._commits
        while turns and commits.queue.weight < AT_ONCE:
            exchange = turns.next()
            header = exchange.envelope.header
            assert isinstance(header, Header)
            self._hand_over(exchange, header)
        if turns:
            commits.on_room = self._hand_over_kept
        if self._on_room is not None:
            self._on_room()

    def hold(self, exchange: Exchange, error: RemoteError | None) -> None:
        """An answer waits from now on."""
        self.held[exchange.key] = exchange, error
        exchange.is_held = True
        if exchange.is_expired:
            exchange.memory.at = monotonic() + self._grace
        elif exchange.at is not None:
            exchange.memory.at = exchange.at + self._grace

    def overdue_requests(self) -> list[Exchange]:
        """Those that must not be run any more."""
        now = self._soon()
        return [exchange for exchange in self.requests.values() if exchange.memory.at <= now]

    def overdue_answers(self) -> Iterator[tuple[Exchange, RemoteError]]:
        """Those that are to leave, and what is true of each."""
        now = self._soon()
        for exchange, error in list(self.held.values()):
            if exchange.memory.at <= now:
                yield exchange, _not_known(error)

    def _soon(self) -> float:
        # Looks are LOOK apart: what would be too late at the next one is done at this one, but not before the deadline.
        return monotonic() + min(LOOK, self._grace)


def unstorable(what: str, code: str) -> RemoteError:
    """Return the final answer of a request of which something can never be stored; why is for the log."""
    return RemoteError(code, f"{what} can never be stored in the server's journal, whose log says why", "Unstorable")


def too_late() -> RemoteError:
    """The answer of a request that could not be stored in time."""
    return RemoteError("RESOURCE_EXHAUSTED", _TOO_LATE, "JournalError")


def _not_known(error: RemoteError | None) -> RemoteError:
    text = "its answer was not stored in time, and may still be: sent again, the request gets that answer, or goes on"
    if error is not None and error.code == "DEADLINE_EXCEEDED":
        return RemoteError(error.code, f"{error.message}; {text}", error.type)
    return RemoteError("UNAVAILABLE", f"the request has been answered; {text}", "JournalError")
