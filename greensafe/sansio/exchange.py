"""Who waits for an answer, who may still give one, and what is next?

The request tables of both roles. A `Responder` (server) sees to it that each request gets exactly one answer and that its
handler is signalled, killed and finally called a zombie in time; a `Requester` (client) that each request resolves exactly
once and never with another's reply.

What an exchange of the responder may do is a table, `_NEXT`; an event that does not fit names role, state and event.

    state      answer owed   handler runs
    RUNNING    yes           yes
    PROMISED   yes           no             it returned LATER
    ANSWERED   no            yes
    OVER       no            no

Neither role knows sockets, clocks or greenlets: `now` is an argument, what is to be done is returned.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import LocalProtocolError, RemoteProtocolError
from .due import DueQueue
from .envelope import Envelope, Header, Kind, remaining_ms, split

__all__ = ["Exchange", "Expire", "Expired", "Kill", "Requester", "Resolution", "Responder", "State", "Zombie"]

#: Seconds between two kills of a handler that survives them, at least: however short the grace, a zombie must not cost more
#: than the requests.
AGAIN = 0.1


class State(enum.Enum):
    """Of an exchange on the server's side; see the table above."""

    RUNNING = "running"
    PROMISED = "promised"
    ANSWERED = "answered"
    OVER = "over"
    #: The handler has ended and neither answered nor promised: the answer is owed by the watchdog.
    ABANDONED = "abandoned"


class _Event(enum.Enum):
    ANSWER = "answer"
    PROMISE = "promise"
    FINISH = "finish"


_RUNNING, _PROMISED, _ANSWERED, _OVER, _ABANDONED = (
    State.RUNNING,
    State.PROMISED,
    State.ANSWERED,
    State.OVER,
    State.ABANDONED,
)

_NEXT: dict[_Event, dict[tuple[State, bool], State]] = {
    # (state, whether the handler still runs) -> state
    _Event.ANSWER: {
        (_RUNNING, True): _ANSWERED,
        (_PROMISED, True): _ANSWERED,
        (_PROMISED, False): _OVER,
        (_ABANDONED, False): _OVER,
    },
    _Event.PROMISE: {(_RUNNING, True): _PROMISED},
    _Event.FINISH: {(_RUNNING, True): _ABANDONED, (_PROMISED, True): _PROMISED, (_ANSWERED, True): _OVER},
}
_ON_ANSWER, _ON_PROMISE, _ON_FINISH = _NEXT[_Event.ANSWER], _NEXT[_Event.PROMISE], _NEXT[_Event.FINISH]


class Exchange:
    """One request on the server's side.

    Attributes:
        key: A number that no other exchange of this responder has.
        envelope: The request.
        state: See the module's head.
        at: When it is due next: the deadline, then the kill, then each further one. None for never.
        is_running: Whether its handler has not ended.
        is_expired: Whether the deadline has passed.
        kills: How often the handler was to be killed.
        is_limited_by_caller: The deadline is the caller's own limit, which is earlier than the server's.
        owner: The shell's own object.
    """

    __slots__ = ("at", "envelope", "is_expired", "is_limited_by_caller", "is_running", "key", "kills", "owner", "state")

    def __init__(self, key: int, envelope: Envelope, at: float | None, is_limited_by_caller: bool) -> None:
        self.key = key
        self.envelope = envelope
        self.state = _RUNNING
        self.at = at
        self.is_running = True
        self.is_expired = False
        self.kills = 0
        self.is_limited_by_caller = is_limited_by_caller
        self.owner: Any = None

    @property
    def is_answered(self) -> bool:
        """Whether the one answer has been given."""
        return self.state is _ANSWERED or self.state is _OVER

    @property
    def is_over(self) -> bool:
        """Answered, and its handler has ended."""
        return self.state is _OVER


class Expire(NamedTuple):
    """The deadline has come: answer, if an answer is owed, and signal the handler, if it runs."""

    exchange: Exchange


class Kill(NamedTuple):
    """The grace is over and the handler still runs: kill it."""

    exchange: Exchange


class Zombie(NamedTuple):
    """The handler has survived a kill; said once."""

    exchange: Exchange


Effect = Expire | Kill | Zombie


class Responder:
    """The server's table.

    Args:
        grace: Seconds between the deadline and the kill, and, if it is more than `AGAIN`, between kills.

    Attributes:
        inflight: Requests that are owed an answer.
        running: Handlers that have not ended.
        zombies: Those among them that have survived a kill.
        answered: Requests that were answered.
        malformed: Messages refused by `receive`.
        duplicates: Answers refused because there was one already.
    """

    __slots__ = ("_due", "_grace", "_key", "answered", "duplicates", "inflight", "malformed", "running", "zombies")

    def __init__(self, *, grace: float) -> None:
        self._grace = grace
        self._key = 0
        self._due: DueQueue[Exchange] = DueQueue(_is_due)
        self.inflight = 0
        self.running = 0
        self.zombies = 0
        self.answered = 0
        self.malformed = 0
        self.duplicates = 0

    def receive(self, frames: Sequence[bytes], now: float, limit: float | None) -> Exchange:
        """Take in a message as a ROUTER received it; its handler counts as running from here.

        Args:
            frames: All frames.
            now: Absolute time.
            limit: The server's own limit in seconds, or None; the caller's in the header counts if it is earlier.

        Raises:
            RemoteProtocolError: It is not a request. It is counted, and nothing else is changed.
        """
        try:
            envelope = split(frames)
            header = envelope.header
            if header is not None and header.kind is not Kind.REQUEST:
                raise RemoteProtocolError(f"a message of kind {header.kind.name}: this server understands requests only")
        except RemoteProtocolError:
            self.malformed += 1
            raise
        at = None if limit is None else now + limit
        by_caller = False
        if header is not None and header.remaining_ms is not None:
            told = now + header.remaining_ms / 1000
            if at is None or told < at:
                at, by_caller = told, True
        self._key += 1
        exchange = Exchange(self._key, envelope, at, by_caller)
        self.inflight += 1
        self.running += 1
        if at is not None:
            self._due.push(at, exchange)
        return exchange

    def answer(self, exchange: Exchange, body: Sequence[bytes], *, error: bool = False) -> list[bytes]:
        """The frames of the one answer, for the ROUTER.

        Raises:
            LocalProtocolError: There was an answer already. It is counted; nothing is to be sent.
        """
        state = _ON_ANSWER.get((exchange.state, exchange.is_running))
        if state is None:
            self.duplicates += 1
            raise _misfit(exchange, _Event.ANSWER)
        exchange.state = state
        self.inflight -= 1
        self.answered += 1
        envelope = exchange.envelope
        header = envelope.header
        if header is None:
            return [*envelope.route, *body]
        reply = Header(Kind.ERROR if error else Kind.REPLY, header.request_id, header.remaining_ms, header.metadata)
        return [*envelope.route[:-2], reply.encode(), b"", *body]

    def promise(self, exchange: Exchange) -> None:
        """The handler has returned LATER: the end of its greenlet does not mean that the answer is missing."""
        self._move(exchange, _Event.PROMISE)

    def finish(self, exchange: Exchange) -> bool:
        """The handler has ended. True: it owes an answer that nobody will give unless the caller does."""
        self._move(exchange, _Event.FINISH)
        exchange.is_running = False
        self.running -= 1
        if exchange.kills > 1:
            self.zombies -= 1
        return exchange.state is _ABANDONED

    def tick(self, now: float) -> list[Effect]:
        """What is to be done by `now`, in the order of the times."""
        effects: list[Effect] = []
        for exchange in self._due.pop_due(now):
            if not exchange.is_expired:
                exchange.is_expired = True
                effects.append(Expire(exchange))
            else:
                exchange.kills += 1
                if exchange.kills == 2:
                    self.zombies += 1
                    effects.append(Zombie(exchange))
                effects.append(Kill(exchange))
            if exchange.is_running:
                exchange.at = now + (self._grace if exchange.kills == 0 else max(self._grace, AGAIN))
                self._due.push(exchange.at, exchange)
        return effects

    def next_deadline(self) -> float | None:
        """When `tick` is to be called next, None for not at all."""
        return self._due.next_at()

    def _move(self, exchange: Exchange, event: _Event) -> None:
        state = _NEXT[event].get((exchange.state, exchange.is_running))
        if state is None:
            raise _misfit(exchange, event)
        exchange.state = state


def _is_due(exchange: Exchange, at: float) -> bool:
    return exchange.at == at and exchange.state is not _OVER


def _misfit(exchange: Exchange, event: _Event) -> LocalProtocolError:
    handler = "runs" if exchange.is_running else "has ended"
    return LocalProtocolError(
        f"responder: {event.value} does not fit request {exchange.key}, which is {exchange.state.value} (its handler {handler})"
    )


class Resolution(NamedTuple):
    """A request's answer.

    Attributes:
        request_id: 16 bytes.
        owner: What `open` was given.
        body: The frames of the answer, at least one.
        error: A greensafe server says that it is an error.
        greensafe: A greensafe server answered, rather than a plain REP, which returns the header as it was.
    """

    request_id: bytes
    owner: Any
    body: list[bytes]
    error: bool
    greensafe: bool


class Expired(NamedTuple):
    """A request whose limit has come without an answer."""

    request_id: bytes
    owner: Any


class _Pending:
    __slots__ = ("at", "is_open", "owner", "request_id")

    def __init__(self, request_id: bytes, owner: Any, at: float | None) -> None:
        self.request_id = request_id
        self.owner = owner
        self.at = at
        self.is_open = True


class Requester:
    """The client's table.

    Attributes:
        late: Answers to requests that are not open: given up, answered before, or never asked.
        malformed: Messages without delimiter, body or header.
        ignored: Messages of kinds that mean nothing to this version.
    """

    __slots__ = ("_due", "_pending", "ignored", "late", "malformed")

    def __init__(self) -> None:
        self._pending: dict[bytes, _Pending] = {}
        self._due: DueQueue[_Pending] = DueQueue(lambda pending, at: pending.is_open)
        self.late = 0
        self.malformed = 0
        self.ignored = 0

    def __len__(self) -> int:
        """Requests that are open."""
        return len(self._pending)

    def open(
        self, request_id: bytes, body: Sequence[bytes], now: float, at: float | None, owner: Any, told: float | None = None
    ) -> list[bytes]:
        """A new request; returns the frames for the DEALER, `[header, b"", *body]`.

        Args:
            request_id: 16 bytes that no other open request has.
            body: The frames of the request, at least one.
            now: Absolute time.
            at: When the request expires here, None for never.
            owner: Comes back with the Resolution or Expired.
            told: Until when the server is told to try, if that is earlier than `at`.

        Raises:
            LocalProtocolError: The id is in use; nothing is changed.
        """
        if request_id in self._pending:
            raise LocalProtocolError(f"requester: open does not fit request {request_id.hex()}, which is open already")
        limit = at if told is None else told if at is None else min(at, told)
        header = Header(Kind.REQUEST, request_id, remaining_ms(now, limit)).encode()
        pending = _Pending(request_id, owner, at)
        self._pending[request_id] = pending
        if at is not None:
            self._due.push(at, pending)
        return [header, b"", *body]

    def receive(self, frames: Sequence[bytes]) -> Resolution | None:
        """Take in what the DEALER received; None if it resolves nothing (counted by the reason). Never raises."""
        if len(frames) < 3 or frames[1] != b"":
            self.malformed += 1
            return None
        header = Header.decode(frames[0])
        if header is None:
            self.malformed += 1
            return None
        kind = header.kind
        if kind is not Kind.REPLY and kind is not Kind.ERROR and kind is not Kind.REQUEST:
            self.ignored += 1
            return None
        pending = self._pending.pop(header.request_id, None)
        if pending is None:
            self.late += 1
            return None
        pending.is_open = False
        return Resolution(header.request_id, pending.owner, list(frames[2:]), kind is Kind.ERROR, kind is not Kind.REQUEST)

    def abandon(self, request_id: bytes) -> bool:
        """Forget a request that nobody waits for any more; False if it was not open."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return False
        pending.is_open = False
        return True

    def abandon_all(self) -> list[Any]:
        """Forget all open requests; returns their owners."""
        owners = [pending.owner for pending in self._pending.values()]
        for request_id in list(self._pending):
            self.abandon(request_id)
        return owners

    def tick(self, now: float) -> list[Expired]:
        """The requests whose limit has come by `now`; they are not open any more."""
        expired = [Expired(pending.request_id, pending.owner) for pending in self._due.pop_due(now)]
        for each in expired:
            self.abandon(each.request_id)
        return expired

    def next_deadline(self) -> float | None:
        """When `tick` is to be called next, None for not at all."""
        return self._due.next_at()
