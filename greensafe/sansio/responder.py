"""Who is owed an answer, and what is next?

The request table of the server's role: a `Responder` sees to it that each request gets exactly one answer, that its handler is
signalled, killed and finally called a zombie in time, and that its client hears meanwhile that it is worked on (see `callers`).
(The client's table is `requester`.)

With a journal the same request may come again, by another way: while it is owed its answer it is not opened anew but joined,
and all who have sent it get the answer. There the gate is opened (`seal`) before the answer is stored; `deliver` has it leave.

It does not know sockets, clocks or greenlets: `now` is an argument, what is to be done is returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from ..errors import LocalProtocolError, RemoteError, RemoteProtocolError
from .callers import Caller, Callers
from .due import DueQueue
from .envelope import GREET, NO_JOURNAL, NOBODY, OTHER_JOURNAL, Envelope, Header, Kind, ServerHeader, pack_server, split
from .exchange import Event, Exchange, State
from .weights import DEAD_BYTES, weight

__all__ = ["Acked", "Cancel", "Effect", "Expire", "Kill", "Responder", "Say", "Send", "Zombie"]

#: Clients that are told of a lost message, at most, if nobody knows whose it was.
MOST_TOLD = 1000

#: Bytes of the ways by which open requests have come again: what is more than that is not answered by all its ways.
WAYS_BYTES = 16 * 2**20

#: Bytes of one such way that is answered all the same, since it is the only one that is known to work.
SMALL_WAY = 1000

#: Limits that are seen to at a time; the others come in the next turn.
AT_A_TIME = 100

#: Seconds between two kills of a handler that survives them, at least: however short the grace, a zombie must not cost more
#: than the requests.
AGAIN = 0.1

#: Ways by which the answer to one request leaves, besides that by which it has come last.
MOST_WAYS = 8

_PROMISE, _FINISH, _ANSWER = Event.PROMISE, Event.FINISH, Event.ANSWER


class Expire(NamedTuple):
    """The deadline has come: answer, if an answer is owed, and signal the handler, if it runs."""

    exchange: Exchange


class Cancel(NamedTuple):
    """The client does not want the answer any more: answer CANCELLED and stop the handler; `Responder.cancel` was done."""

    exchange: Exchange


class Kill(NamedTuple):
    """The grace is over and the handler still runs: kill it."""

    exchange: Exchange


class Zombie(NamedTuple):
    """The handler has survived a kill; said once."""

    exchange: Exchange


class Send(NamedTuple):
    """Frames for the ROUTER that are nobody's answer."""

    frames: list[bytes]


class Say(NamedTuple):
    """The same, and said again soon: a client that does not read need not be told."""

    frames: list[bytes]


class Acked(NamedTuple):
    """The answer to this request has arrived: a journal need not keep it any longer."""

    request_id: bytes


Effect = Expire | Cancel | Kill | Zombie | Send | Say | Acked


class Responder:
    """The server's table.

    Args:
        grace: Seconds between the deadline and the kill, and, if it is more than `AGAIN`, between kills.
        instance, journal: 16 bytes each, see ServerHeader.
        reads_on: Requests are received while others are open. If not, clients are not told that nobody is in between, since
            they would take a request that was not received yet for forgotten.
        max_frames: Of one message, its envelope included; None for any number. What has more is malformed. (Whoever reads need
            hand over no more than one frame beyond that.)

    Attributes:
        inflight: Requests that are owed an answer.
        running: Handlers that have not ended.
        zombies: Those among them that have survived a kill.
        answered: Requests that were answered.
        cancelled: Requests whose clients did not want the answer any more.
        malformed: Messages refused by `receive`.
        ignored: CANCEL and ACK for requests that are not open.
        duplicates: Answers refused because there was one already.
        joined: Requests that have come again while they were owed their answer.
        misdirected: Requests refused because only a server with another journal may run them.
        soonest: The time of what is due next, or earlier; infinity for nothing. `next_deadline` makes it exact.
    """

    __slots__ = (
        "_callers",
        "_dead_size",
        "_due",
        "_grace",
        "_ids",
        "_instance",
        "_journal",
        "_key",
        "_max_frames",
        "_reads_on",
        "_spared",
        "_ways_size",
        "answered",
        "cancelled",
        "duplicates",
        "ignored",
        "inflight",
        "joined",
        "malformed",
        "misdirected",
        "running",
        "soonest",
        "zombies",
    )

    def __init__(
        self,
        *,
        grace: float,
        instance: bytes = bytes(16),
        journal: bytes = NO_JOURNAL,
        reads_on: bool = True,
        max_frames: int | None = None,
    ) -> None:
        self._grace = grace
        self._instance = instance
        self._journal = journal
        self._reads_on = reads_on
        self._max_frames = math.inf if max_frames is None else max_frames
        self._key = 0
        self._due: DueQueue[Exchange] = DueQueue(_is_due)
        self._callers = Callers()
        #: Those whose kill was put off, since this process was away when its time came; some may have ended since.
        self._spared: set[Exchange] = set()
        #: What the ways of requests weigh that have come again, and what is over and still queued.
        self._ways_size = 0
        self._dead_size = 0
        #: With a journal: what is owed an answer, by the client's id.
        self._ids: dict[bytes, Exchange] | None = None if journal == NO_JOURNAL else {}
        self.inflight = 0
        self.running = 0
        self.zombies = 0
        self.answered = 0
        self.cancelled = 0
        self.malformed = 0
        self.ignored = 0
        self.duplicates = 0
        self.joined = 0
        self.misdirected = 0
        self.soonest = math.inf

    @property
    def received(self) -> int:
        """Requests that have come."""
        return self._key

    @property
    def forgotten(self) -> int:
        """Clients without open requests that were not remembered until their next WORKING, for want of room."""
        return self._callers.forgotten

    @property
    def is_draining(self) -> bool:
        """Whether clients that send requests are told to send the next ones elsewhere."""
        return self._callers.is_draining

    def go_on_from(self, received: int) -> None:
        """Number the next requests as if so many had come before; `received` counts those as well."""
        self._key = received

    def open_ids(self) -> list[bytes]:
        """With a journal: the ids of the requests that are owed an answer."""
        return list(self._ids or ())

    def __repr__(self) -> str:
        state = "draining" if self.is_draining else "open"
        return (
            f"<Responder {state} received={self.received} inflight={self.inflight} running={self.running}"
            f" zombies={self.zombies} answered={self.answered}>"
        )

    def receive(self, frames: Sequence[bytes], now: float) -> Exchange | Effect | None:
        """Take in a message as a ROUTER received it.

        Returns:
            For a request an Exchange, whose handler counts as running from here, and whose caller's limit, if it is told in the
            header, holds from here. For anything else what is to be done, or None.

        Raises:
            RemoteProtocolError: It is malformed, or a server's message. It is counted, and nothing else is changed.
        """
        if len(frames) > self._max_frames:
            return self._too_many(frames)
        try:
            envelope = split(frames)
            if isinstance(envelope.header, ServerHeader):
                raise RemoteProtocolError(f"{envelope.header!r}: that is for a client, not for a server")
        except RemoteProtocolError:
            self.malformed += 1
            raise
        header = envelope.header
        if header is None:
            return self._open(envelope, header, now)
        if header.kind == Kind.REQUEST:
            if header.journal != NO_JOURNAL and header.journal != self._journal:
                return self._misdirected(envelope, header)
            earlier = None if self._ids is None else self._ids.get(header.request_id)
            return self._open(envelope, header, now) if earlier is None else self._join(earlier, envelope, header, now)
        if header.kind == Kind.CANCEL:
            return self._cancelled(envelope, header, now)
        if header.kind == Kind.PING:
            return Send(self._say(Kind.PONG, envelope.origin, header.request_id, envelope.body, header.metadata))
        if header.kind == Kind.ACK:
            if self._ids is not None:
                return Acked(header.request_id)
            self.ignored += 1
            return None
        self.malformed += 1
        unknown = RemoteError("UNIMPLEMENTED", f"{header!r}: this server does not know that kind", "UnknownKind").to_reply()
        return Send(self._say(Kind.ERROR, envelope.origin, header.request_id, [unknown], header.metadata))

    def _too_many(self, frames: Sequence[bytes]) -> Send:
        """It is not run, and its client is told where that can be: a REQ would wait for ever. There may have been more."""
        self.malformed += 1
        envelope = split(frames)
        header = envelope.header
        message = (
            f"a message of more than {self._max_frames} frames: send fewer and longer ones, or raise the server's max_frames"
        )
        error = RemoteError("INVALID_ARGUMENT", message, "TooManyFrames")
        if header is None:
            return Send([*envelope.route, error.to_reply()])
        if isinstance(header, Header) and header.kind == Kind.REQUEST:
            return Send(self._refusal(Kind.ERROR, envelope, header, error))
        raise RemoteProtocolError(message)

    def sender_of(self, frames: Sequence[bytes]) -> bytes | None:
        """The routing id that a message came with which lacks it; None if it is not known, or not only that is missing.

        A client's request ids begin alike, and with 8 bytes that nobody else can know.
        """
        try:
            envelope = split([b"?", *frames])
        except RemoteProtocolError:
            return None
        if not isinstance(envelope.header, Header):
            return None
        way, begin = envelope.origin[1:], envelope.header.request_id[:8]
        for caller in self._callers:
            if caller.origin[1:] == way and any(request_id.startswith(begin) for request_id in caller.open):
                return caller.origin[0]
        return None

    def torn(self, frames: Sequence[bytes], error: RemoteError) -> list[Send]:
        """Take in the first frames of a message that was not received whole; returns what its client is told.

        Args:
            frames: The frames.
            error: What has become of it.
        """
        self.malformed += 1
        try:
            envelope = split([*(frames or [b"?"]), b"", b""])  # up to the delimiter, if that was received
        except RemoteProtocolError:
            return []
        header = envelope.header
        if isinstance(header, Header):
            return [Send(self._refusal(Kind.REJECTED, envelope, header, error))] if header.kind == Kind.REQUEST else []
        if header is None and b"" in frames[1:]:
            return [Send([*envelope.route, error.to_reply()])]
        # Nobody knows which request it was, if it was one. Those who may have sent it find out.
        begin = tuple(frames[:1])
        origins = (caller.origin for caller in self._callers if caller.origin[:1] == begin or not begin)
        told = [error.to_reply()]
        return [Send(self._say(Kind.REJECTED, origin, NOBODY, told)) for origin in islice(origins, MOST_TOLD)]

    def begin(self, exchange: Exchange, now: float, limit: float | None) -> None:
        """Its handler is about to start: from here the server's own limit in seconds holds, if it is the earlier one."""
        if limit is not None and (exchange.at is None or now + limit < exchange.at):
            exchange.is_limited_by_caller = False
            self._set_due(exchange, now + limit)

    def _open(self, envelope: Envelope, header: Header | None, now: float) -> Exchange:
        exchange = Exchange(self._key + 1, envelope, now)
        try:
            if header is not None:
                if header.remaining_ms is not None:
                    exchange.is_limited_by_caller = True
                    self._set_due(exchange, now + header.remaining_ms / 1000)
                at = self._callers.add(exchange, envelope.origin, header.request_id, header.patience_ms, now)
                if at < self.soonest:
                    self.soonest = at
                if self._ids is not None:
                    self._ids[header.request_id] = exchange
        except BaseException:
            # By a signal's handler, or for want of memory: the message is taken in once more, if it is, as if it were new.
            exchange.at = None
            if header is not None and self._ids is not None and self._ids.get(header.request_id) is exchange:
                del self._ids[header.request_id]
            if header is not None:
                self._callers.leave(envelope.origin, header.request_id, exchange)
            self.next_deadline()  # what this has made due sooner may not have been noted
            raise
        # No call from here on, so nothing can come between: the caller gets the exchange that is counted.
        self._key += 1
        self.inflight += 1
        self.running += 1
        return exchange

    def _join(self, exchange: Exchange, envelope: Envelope, header: Header, now: float) -> Send | None:
        """It has come again. From now on it counts as come by the way that is known to work."""
        if envelope.body != exchange.envelope.body:
            message = "a request with this id and another body is open: an id is for one request"
            return Send(self._refusal(Kind.ERROR, envelope, header, RemoteError("INVALID_ARGUMENT", message, "OtherBody")))
        envelope.body = exchange.envelope.body  # the same: not to be kept for each way
        origin = envelope.origin
        others = [other for other in (exchange.envelope, *exchange.also) if other.origin != origin]
        most = MOST_WAYS
        room = WAYS_BYTES - self._ways_size + exchange.ways_size
        if sum(map(_way, others[:MOST_WAYS])) + _way(envelope) > room:
            if _way(envelope) > max(room, SMALL_WAY):
                self.ignored += 1
                return None
            most = 0
        self.joined += 1
        exchange.also = tuple(others[:most])
        for forgotten in others[most:]:
            self._callers.leave(forgotten.origin, header.request_id, exchange)
        exchange.envelope = envelope
        self._ways_size -= exchange.ways_size
        exchange.ways_size = _way(envelope) + sum(map(_way, exchange.also))
        self._ways_size += exchange.ways_size
        self.soonest = min(self.soonest, self._callers.add(exchange, origin, header.request_id, header.patience_ms, now))
        if header.flags & GREET:
            return Send(self._say(Kind.WORKING, origin, header.request_id, [header.request_id]))
        return None

    def _misdirected(self, envelope: Envelope, header: Header) -> Send:
        self.misdirected += 1
        message = "this request may have run for a server with another journal: this server must not run it"
        return Send(self._refusal(Kind.REJECTED, envelope, header, RemoteError("FAILED_PRECONDITION", message, OTHER_JOURNAL)))

    def _refusal(self, kind: Kind, envelope: Envelope, header: Header, error: RemoteError) -> list[bytes]:
        return self._say(kind, envelope.origin, header.request_id, [error.to_reply()], header.metadata)

    def limit(self, exchange: Exchange, at: float) -> None:
        """The caller is known to give up at `at`, if that is earlier than what was known before."""
        if exchange.at is None or at < exchange.at:
            exchange.is_limited_by_caller = True
            self._set_due(exchange, at)

    def _set_due(self, exchange: Exchange, at: float) -> None:
        self._due.push(at, exchange)  # first: a caller that is interrupted here does it once more
        exchange.at = at
        if at < self.soonest:
            self.soonest = at

    def _cancelled(self, envelope: Envelope, header: Header, now: float) -> Cancel | None:
        exchange = self._callers.find(envelope.origin, header.request_id)
        if exchange is None:
            self.ignored += 1
            return None
        return self.cancel(exchange, now)

    def cancel(self, exchange: Exchange, now: float) -> Cancel:
        """The client of an unanswered request does not want the answer any more; returns what is to be done."""
        self.cancelled += 1
        exchange.is_expired = True
        self._set_due(exchange, now + self._grace)
        return Cancel(exchange)

    def greeting(self, exchange: Exchange) -> list[bytes] | None:
        """What is said at once about a request that is not answered: frames of a WORKING, or None if it need not be said."""
        header = exchange.envelope.header
        if not isinstance(header, Header) or not header.flags & GREET or exchange.is_answered:
            return None
        return self._say(Kind.WORKING, exchange.envelope.origin, header.request_id, [header.request_id])

    def drain(self) -> list[Send]:
        """Have clients told to send further requests elsewhere: those with open ones now, the others as they ask."""
        self._callers.is_draining = True
        return [Send(told) for caller in self._callers if (told := self._tell(caller)) is not None]

    def drain_notice(self, exchange: Exchange) -> list[bytes] | None:
        """What the client of a new request is told while this server drains: frames, or None."""
        return self._tell(exchange.caller) if self._callers.is_draining and exchange.caller is not None else None

    def _tell(self, caller: Caller) -> list[bytes] | None:
        if caller.is_told:
            return None
        caller.is_told = True
        return self._say(Kind.DRAINING, caller.origin, bytes(16), [b""])

    def close(self) -> list[Send]:
        """Have clients told that nothing more is received: what they hear no answer to by then was not run.

        For who has answered all that was received, and has thrown no answer away. While it drains no client is forgotten, so
        these are all that have asked since then, or shortly before.
        """
        return [Send(self._say(Kind.CLOSED, caller.origin, bytes(16), [b""])) for caller in self._callers]

    def answer(self, exchange: Exchange, body: Sequence[bytes], kind: Kind = Kind.REPLY) -> list[bytes]:
        """The frames of the one answer, for the ROUTER.

        Args:
            exchange: The request.
            body: At least one frame.
            kind: REPLY, ERROR, or REJECTED for an error of a request that was not run; a plain client is not told.

        Raises:
            LocalProtocolError: There was an answer already. It is counted; nothing is to be sent.
        """
        self.seal(exchange)
        return self.deliver(exchange, body, kind)

    def seal(self, exchange: Exchange) -> None:
        """The first half of `answer`: there is an answer now. Errors as there."""
        try:
            exchange.move(_ANSWER)
        except LocalProtocolError:
            self.duplicates += 1
            raise

    def deliver(self, exchange: Exchange, body: Sequence[bytes], kind: Kind | int = Kind.REPLY) -> list[bytes]:
        """The second half: the answer leaves."""
        envelope = exchange.envelope
        header = envelope.header
        caller = exchange.caller
        hops = len(envelope.route)
        if hops > 2 and exchange.at is not None and (header is None or hops > 3 or header.metadata):
            self._bury(_way(envelope))
        if header is None or caller is None:
            frames = [*envelope.route, *body]
        else:
            if exchange.ways_size:
                self._ways_size -= exchange.ways_size
                exchange.ways_size = 0
            self._callers.settle(caller, header.request_id, exchange)
            if self._ids is not None and self._ids.get(header.request_id) is exchange:
                del self._ids[header.request_id]
            frames = self._say(kind, caller.origin, header.request_id, body, header.metadata)
        # No call from here on: whoever is interrupted before may deliver once more.
        exchange.is_delivered = True
        self.inflight -= 1
        self.answered += 1
        return frames

    def copies(self, exchange: Exchange, body: Sequence[bytes], kind: Kind | int = Kind.REPLY) -> list[list[bytes]]:
        """The same answer for all others that have sent the same request."""
        frames = []
        for envelope in exchange.also:
            header, origin = envelope.header, envelope.origin
            if isinstance(header, Header):
                self._callers.leave(origin, header.request_id, exchange)
                frames.append(self._say(kind, origin, header.request_id, body, header.metadata))
        exchange.also = ()  # the queue of times may hold on to this exchange until its limit, but not to what was asked
        return frames

    def _bury(self, size: int) -> None:
        """Something is over that the queue of times may hold on to until it would have been due, which may be never."""
        self._dead_size += size
        if self._dead_size > DEAD_BYTES:
            self._dead_size = 0
            self._due.sweep()

    def promise(self, exchange: Exchange) -> None:
        """The handler has returned LATER: the end of its greenlet does not mean that the answer is missing."""
        exchange.move(_PROMISE)

    def finish(self, exchange: Exchange) -> bool:
        """The handler has ended. True: it owes an answer that nobody will give unless the caller does."""
        exchange.move(_FINISH)
        exchange.is_running = False
        self.running -= 1
        if exchange.kills > 1:
            self.zombies -= 1
        return exchange.state is State.ABANDONED

    def tick(self, now: float, effects: list[Effect] | None = None) -> list[Effect]:
        """What is to be done by `now`, in the order of the times; then what clients are to be told.

        It is done in parts, so that other things come in between: `next_deadline` tells whether there is more.

        Args:
            now: When this is.
            effects: What it is appended to. If a signal's handler raises here, what stands there is to be done all the same.
        """
        effects = [] if effects is None else effects
        for _, exchange in self._due.take_due(now, AT_A_TIME):
            # If it is spared, this process was stopped, or blocked: the handler has not had its grace.
            is_killed = exchange.is_expired and not self._spares(exchange, now)
            found: list[Effect] = [Kill(exchange)] if is_killed else [] if exchange.is_expired else [Expire(exchange)]
            if is_killed and exchange.kills == 1:
                found.insert(0, Zombie(exchange))
            again = now + (max(self._grace, AGAIN) if is_killed or exchange.kills else self._grace)
            is_running = exchange.is_running
            if is_running:
                self._due.push(again, exchange)
            # No call from here on, so all of this is done, or it comes again.
            effects += found
            exchange.is_expired = True
            if is_killed:
                exchange.kills += 1
                if exchange.kills == 2:
                    self.zombies += 1
            if is_running:
                exchange.at = again
                if again < self.soonest:
                    self.soonest = again
        for caller in self._callers.take(now):
            effects.append(Say(self._say(Kind.WORKING, caller.origin, next(iter(caller.open)), [b"".join(caller.open)])))
        return effects

    def _spares(self, exchange: Exchange, now: float) -> bool:
        """Whether a kill comes so late that it is put off, once."""
        at = now if exchange.at is None else exchange.at
        if exchange.kills or exchange in self._spared or now - at <= max(self._grace, AGAIN):
            return False
        self._spared.add(exchange)
        if len(self._spared) > self.running:  # not each time: there may be as many as handlers
            self._spared = {each for each in self._spared if each.is_running}
        return True

    def next_deadline(self) -> float | None:
        """When `tick` is to be called next, None for not at all."""
        times = [at for at in (self._due.next_at(), self._callers.next_at()) if at is not None]
        self.soonest = min(times, default=math.inf)
        return min(times, default=None)

    def _say(
        self, kind: Kind | int, origin: Sequence[bytes], request_id: bytes, body: Sequence[bytes], metadata: bytes = b""
    ) -> list[bytes]:
        hops = len(origin) if self._reads_on else 0
        header = pack_server(kind, request_id, self._instance, self._journal, hops, metadata)
        return [*origin, header, b"", *body]


def _is_due(exchange: Exchange, at: float) -> bool:
    return exchange.at == at and exchange.state is not State.OVER


def _way(envelope: Envelope) -> int:
    """What an envelope weighs without the body; metadata is kept twice, in the header's frame and by itself."""
    return weight(envelope.route) + (0 if envelope.header is None else len(envelope.header.metadata))
