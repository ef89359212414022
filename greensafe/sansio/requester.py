"""Who waits for an answer, over which connection was it asked, and what is known of who answers?

The request table of the client's role: a `Requester` sees to it that each request resolves exactly once and never with
another's reply. (The server's table is `responder`.) A request is *waiting* until it is handed to a connection, then *sent*;
when its connection is lost it waits again, and the caller decides for how long.

What a `Connection` is known for ends with it: whether a greensafe server answers there, whether anybody stands in between,
and whether that server drains. Until a server's header has come back nothing but requests may be sent on it, since a plain REP
would run anything else as a request; nor after a plain REP has answered: behind a proxy one may stand beside greensafe servers.

It does not know sockets, clocks or greenlets: `now` is an argument, what is to be done is returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import LocalProtocolError
from .due import DueQueue
from .envelope import (
    GREET,
    MAGIC,
    NO_JOURNAL,
    NOBODY,
    SERVER_HEADER_SIZE,
    VERSION,
    Header,
    Kind,
    ServerHeader,
    decode,
    pack,
    remaining_ms,
)
from .liveness import WORDLESS, explains

__all__ = ["Asked", "Connection", "Requester", "Resolution"]

_REQUEST, _REPLY = int(Kind.REQUEST), int(Kind.REPLY)

#: The kinds that end a request.
_ENDS = frozenset({_REQUEST, _REPLY, int(Kind.ERROR), int(Kind.REJECTED), int(Kind.INTERRUPTED)})

#: Those among them after which the request is open as before: it may be sent again.
_RETURNS = frozenset({int(Kind.REJECTED), int(Kind.INTERRUPTED)})

#: How a server's header begins that says REPLY and has no metadata.
_REPLY_HEAD = MAGIC + bytes((VERSION, _REPLY)) + SERVER_HEADER_SIZE.to_bytes(2, "big")

#: Bytes of a request's id.
_ID = 16

#: Bytes of a WORKING that are read: 131,072 ids. A server has no reason to name as many, and to look each up takes 0.2 µs.
LONGEST_WORD = 2 * 2**20

#: Requests given up of which a connection remembers the sizes one by one.
LEFT = 100

#: Connections that a request remembers to have been sent on: a server that ends each may make it a new one for hours.
MOST_TRIED = 64


class Asked:
    """One request on the client's side.

    Attributes:
        request_id: 16 bytes.
        body: Its frames.
        at: When it expires here, None for never.
        told: Until when the server is told to try, if that is earlier than `at`.
        metadata: Bytes that the server gets and returns.
        owner: The shell's own object.
        frames: What was sent last, empty before.
        connection: Where it was sent, None while it waits.
        tried: The last `MOST_TRIED` connections it was sent on: an answer by any other is none.
        is_heard: The server has said that it works on it.
        heard_by: The journal of the server that has; b"" before.
        first_at: When it was first sent, 0 before.
        may_have_run: A try of it was lost that had been handed over.
        journal: The journal of the server for which it may have run, if no other may run it; NO_JOURNAL for any.
        heard_at: When it was sent or heard of last.
        is_open: Not resolved, given up or expired.
    """

    __slots__ = (
        "at",
        "body",
        "connection",
        "first_at",
        "frames",
        "heard_at",
        "heard_by",
        "is_heard",
        "is_open",
        "journal",
        "may_have_run",
        "metadata",
        "owner",
        "request_id",
        "told",
        "tried",
    )

    def __init__(
        self, request_id: bytes, body: Sequence[bytes], at: float | None, told: float | None, metadata: bytes, owner: Any
    ) -> None:
        self.request_id = request_id
        self.body = body
        self.at = at
        self.told = told
        self.metadata = metadata
        self.owner = owner
        self.frames: list[bytes] = []
        self.connection: Connection | None = None
        self.tried: tuple[Connection, ...] = ()
        self.is_heard = False
        self.heard_at = 0.0
        self.heard_by = b""
        self.first_at = 0.0
        self.may_have_run = False
        self.journal = NO_JOURNAL
        self.is_open = True

    @property
    def is_bound(self) -> bool:
        """Whether only a server with this journal may run it."""
        return self.journal is not NO_JOURNAL


class Connection:
    """What is known of one connection, from its beginning to its loss.

    Attributes:
        sent: The open requests that were sent on it, by id.
        is_heard: Something valid has come back on it.
        is_known: A greensafe server has answered on it.
        is_mixed: A plain peer has answered on it. There may be others beside it, behind a proxy.
        is_direct: Nobody is between the two: what holds for the connection holds for the server.
        is_draining: The server wants further requests to go elsewhere.
        is_over: It has received its last request: those that are open on it were not run.
        torn_at: When messages came that were not received whole, and of which nobody knows what they were.
        spoken_at: When the server has last answered a request, or said that it works on one.
        forgiven_at: Nothing that the server has not said by then is held against it.
        left: When requests were sent that were given up since and may not have arrived yet, and their sizes in bytes.
        instance, journal: Of the server that answered last; b"" before, and NO_JOURNAL if it has none.
        signature: How its headers end if they have no metadata: the bytes of both, and of the hops; None before.
    """

    __slots__ = (
        "forgiven_at",
        "instance",
        "is_direct",
        "is_draining",
        "is_heard",
        "is_known",
        "is_mixed",
        "is_over",
        "journal",
        "left",
        "sent",
        "signature",
        "spoken_at",
        "torn_at",
    )

    def __init__(self) -> None:
        self.sent: dict[bytes, Asked] = {}
        self.is_heard = False
        self.is_known = False
        self.is_mixed = False
        self.is_direct = False
        self.is_draining = False
        self.is_over = False
        self.instance = b""
        self.journal = b""
        self.signature: bytes | None = None
        self.forgiven_at = self.spoken_at = float("-inf")
        self.torn_at: list[float] = []
        self.left: list[tuple[float, int]] = []

    @property
    def is_journaling(self) -> bool:
        """Whether the server that answered last keeps a journal."""
        return self.journal not in (b"", NO_JOURNAL)

    def journal_of(self, asked: Asked, before: bytes) -> bytes:
        """The journal of the server that has got this request by this connection; NO_JOURNAL if it has none or nobody knows.

        Behind a proxy only that server itself can tell. `before` is what was known of this endpoint before this connection.
        """
        if self.is_mixed:
            return NO_JOURNAL
        if self.is_known:
            return self.journal if self.is_direct else asked.heard_by or NO_JOURNAL
        return before

    def leave(self, asked: Asked) -> None:
        """A request is given up of which nothing was heard: it may still be under way, and others behind it."""
        at, size = asked.heard_at, _size(asked)
        if len(self.left) >= LEFT:
            size += self.left.pop()[1]
        self.left.append((at, size))

    def arrive(self, asked: Asked) -> None:
        """A request was heard of for the first time: what was sent before it has arrived as well."""
        if not asked.is_heard:
            self.left = [(at, size) for at, size in self.left if at > asked.heard_at]

    def under_way(self, until: float) -> int:
        """Bytes of requests handed over by `until` of which nothing was heard, so that they may not have arrived."""
        sent = sum(_size(asked) for asked in self.sent.values() if not asked.is_heard and asked.heard_at <= until)
        return sent + sum(size for at, size in self.left if at <= until)

    def learn(self, header: ServerHeader) -> None:
        """Take in what every message of a server tells."""
        self.is_known = True
        self.is_direct = header.hops == 1
        self.instance = header.instance
        self.journal = header.journal
        self.signature = header.instance + header.journal + header.hops.to_bytes(2, "big")


class Resolution(NamedTuple):
    """A request's answer.

    Attributes:
        asked: The request.
        body: The frames of the answer, at least one.
        kind: REPLY; ERROR: a greensafe server says that it is an error; REJECTED: the same, and it was not run: the request
            waits again; INTERRUPTED: the same, and it goes on there when it is sent again: it waits again, too;
            REQUEST: a plain REP answered, which returns the header as it was.
        journal: Of the server that answered; b"" for a plain REP.
        flaw: Why the answer cannot be taken; then it is an ERROR without a body.
    """

    asked: Asked
    body: list[bytes]
    kind: int
    journal: bytes
    flaw: str = ""


class Requester:
    """The client's table.

    Args:
        patience: Seconds of silence after which a server is taken for dead, which servers are told; None for no such limit.
        max_frames: Of one message, its envelope included; None for any number. What has more is malformed. (Whoever reads need
            hand over no more than one frame beyond that.)

    Attributes:
        pending: The requests that are open, by id; to be looked at only.
        late: Answers to requests that are not open: given up, answered before, or never asked.
        malformed: Messages without delimiter, body or header.
        noted: How many of these the caller has noted: its to set.
        ignored: Messages that mean nothing here: kinds that are unknown, or a client's.
        ended: The answer that a request has just been given. Whoever hands it on sets it to None afterwards.
    """

    __slots__ = ("_due", "_patience_ms", "ended", "ignored", "late", "malformed", "max_frames", "noted", "patience", "pending")

    def __init__(self, patience: float | None = None, max_frames: int | None = None) -> None:
        self.patience = patience
        self.max_frames = float("inf") if max_frames is None else max_frames
        self._patience_ms = 0 if patience is None else max(1, round(patience * 1000))
        self.pending: dict[bytes, Asked] = {}
        self._due: DueQueue[Asked] = DueQueue(_is_due)
        self.late = 0
        self.malformed = 0
        self.noted = 0
        self.ignored = 0
        self.ended: Resolution | None = None

    def __len__(self) -> int:
        """Requests that are open."""
        return len(self.pending)

    def __repr__(self) -> str:
        return f"<Requester open={len(self)} late={self.late} malformed={self.malformed} ignored={self.ignored}>"

    def asked(self) -> list[Asked]:
        """The requests that are open."""
        return list(self.pending.values())

    def open(
        self,
        request_id: bytes,
        body: Sequence[bytes],
        at: float | None,
        owner: Any,
        told: float | None = None,
        metadata: bytes = b"",
    ) -> Asked:
        """A new request, which waits; see Asked for the arguments.

        Raises:
            LocalProtocolError: The id is in use; nothing is changed.
        """
        if request_id in self.pending:
            raise LocalProtocolError(f"requester: open does not fit request {request_id.hex()}, which is open already")
        asked = Asked(request_id, body, at, told, metadata, owner)
        if at is not None:
            self._due.push(at, asked)
        self.pending[request_id] = asked  # last, and no call follows: whoever is interrupted has opened it, or not
        return asked

    def send(self, asked: Asked, connection: Connection, now: float) -> list[bytes]:
        """Hand a waiting request to a connection; returns the frames for the DEALER, `[header, b"", *body]`.

        Who is not known, or is known by way of others, is asked to greet: only that tells who will answer this request.
        """
        at, told = asked.at, asked.told
        limit = at if told is None else told if at is None else min(at, told)
        flags = 0 if connection.is_direct else GREET
        left = None if limit is None else remaining_ms(now, limit)
        age = max(1, round((now - asked.first_at) * 1000)) if asked.may_have_run else 0
        header = pack(_REQUEST, asked.request_id, left, self._patience_ms, flags, asked.metadata, age, asked.journal)
        if not asked.first_at:
            asked.first_at = now
        asked.connection = connection
        if connection not in asked.tried:
            asked.tried = (*asked.tried[1 - MOST_TRIED :], connection)
        asked.is_heard = False
        asked.heard_at = now
        connection.sent[asked.request_id] = asked
        asked.frames = [header, b"", *asked.body]
        return asked.frames

    def receive(self, frames: Sequence[bytes], connection: Connection, now: float) -> Resolution | None:
        """Take in what the DEALER received; None if it resolves nothing. Never raises, whatever the frames are."""
        if not 3 <= len(frames) <= self.max_frames or frames[1] != b"":
            return self._receive_malformed(frames, connection, now)
        frame = frames[0]
        asked = self.pending.get(frame[8:24])
        if asked is not None and asked.connection is connection:
            # Nearly all answers teach nothing, and need not be taken apart: a plain REP's, and those of a server that has
            # answered before.
            if frame == asked.frames[0]:
                connection.is_heard = connection.is_mixed = True
                return self._end(asked, frames, _REQUEST, b"", now)
            if frame[24:] == connection.signature and frame.startswith(_REPLY_HEAD):
                return self._end(asked, frames, _REPLY, connection.journal, now)
        return self._receive(frames, connection, now)

    def _receive_malformed(self, frames: Sequence[bytes], connection: Connection, now: float) -> Resolution | None:
        """Of its frames the first may be all there are. If it answers a request that ends: its caller would wait for ever."""
        malformed = self.malformed + 1
        answer = None if len(frames) <= self.max_frames else self.receive(frames[:3], connection, now)
        self.malformed = malformed
        flaw = f"the reply has more than {self.max_frames} frames: have it sent in fewer, or raise the Client's max_frames"
        return None if answer is None else answer._replace(body=[], kind=int(Kind.ERROR), flaw=flaw)

    def _receive(self, frames: Sequence[bytes], connection: Connection, now: float) -> Resolution | None:
        header = decode(frames[0])
        if header is None:
            self.malformed += 1
            return None
        connection.is_heard = True
        if isinstance(header, ServerHeader):
            connection.learn(header)
        else:
            connection.is_mixed = True
        if header.kind == Kind.REJECTED and header.request_id == NOBODY:
            self._note_torn(connection, now)
            return None
        if header.kind in _ENDS:
            return self._resolve(header, frames, connection, now)
        if header.kind == Kind.WORKING:
            self._hear(frames[2], now, connection)
        elif header.kind == Kind.DRAINING:
            connection.is_draining = connection.is_direct  # a proxy goes on, with others
        elif header.kind == Kind.CLOSED:
            connection.is_draining = connection.is_over = connection.is_direct
        else:
            self.ignored += 1
        return None

    def _resolve(
        self, header: Header | ServerHeader, frames: Sequence[bytes], connection: Connection, now: float
    ) -> Resolution | None:
        """An answer to an earlier try counts as well, if it is one: what has arrived is not asked for again."""
        asked = self.pending.get(header.request_id)
        returns = header.kind in _RETURNS
        if asked is None or connection not in asked.tried or (returns and asked.connection is not connection):
            self.late += 1
            return None
        journal = header.journal if isinstance(header, ServerHeader) else b""
        if asked.connection is not connection:
            self.unsend(asked)  # it was sent again by another one, of which this answer tells nothing
        if returns:
            self.unsend(asked)
            return Resolution(asked, list(frames[2:]), header.kind, journal)
        return self._end(asked, frames, header.kind, journal, now)

    def _end(self, asked: Asked, frames: Sequence[bytes], kind: int, journal: bytes, now: float) -> Resolution:
        answer = Resolution(asked, list(frames[2:]), kind, journal)
        connection = asked.connection
        if connection is not None and connection.left:
            connection.arrive(asked)
        # No call from here on: what a signal's handler raises leaves the table as it was, or finds the answer in `ended`.
        if connection is not None:
            if asked.request_id in connection.sent:
                del connection.sent[asked.request_id]
            connection.spoken_at = now
            asked.connection = None
        self.ended = answer
        asked.is_open = False
        del self.pending[asked.request_id]
        return answer

    def torn(self, frames: Sequence[bytes], connection: Connection, now: float) -> Asked | None:
        """Take in the first frames of a message that was not received whole.

        Returns:
            The request whose answer it was, if that can be told and it was asked by this connection. It waits again.
        """
        self.malformed += 1
        header = decode(frames[0]) if frames else None
        if header is None:
            self._note_torn(connection, now)
            return None
        if isinstance(header, ServerHeader) and header.kind not in _ENDS:
            return None
        asked = self.pending.get(header.request_id)
        if asked is None or asked.connection is not connection:
            return None
        self.unsend(asked)
        return asked

    def _hear(self, ids: bytes, now: float, connection: Connection) -> None:
        for start in range(0, min(len(ids), LONGEST_WORD) - _ID + 1, _ID):
            asked = self.pending.get(ids[start : start + _ID])
            if asked is not None:
                if connection.left and asked.connection is connection:
                    connection.arrive(asked)
                asked.is_heard = True
                asked.heard_at = now
                asked.heard_by = connection.journal
                connection.spoken_at = now

    def bind(self, asked: Asked, journal: bytes) -> None:
        """It may have run for a server with this journal: from now on no other server may run it."""
        asked.may_have_run = True
        asked.journal = NO_JOURNAL if journal == NO_JOURNAL else journal

    def abandon(self, asked: Asked) -> bool:
        """Forget a request that nobody waits for any more; False if it was not open."""
        if not asked.is_open:
            return False
        asked.is_open = False
        del self.pending[asked.request_id]
        if asked.connection is not None and not asked.is_heard:
            asked.connection.leave(asked)
        self.unsend(asked)
        return True

    def unsend(self, asked: Asked) -> None:
        """Take a request off its connection: if it is open it waits again."""
        if asked.connection is not None:
            asked.connection.sent.pop(asked.request_id, None)
            asked.connection = None

    def cancel(self, asked: Asked) -> list[bytes] | None:
        """What tells the server that nobody waits for a sent request any more; None if it must not, or need not, be told."""
        return self._note(Kind.CANCEL, asked.request_id, asked.connection) if asked.is_open else None

    def ack(self, answer: Resolution, connection: Connection) -> list[bytes] | None:
        """What tells a server that journals that its answer has arrived; None for any other, and if it was none.

        Behind a proxy another worker may get it, perhaps the one whose answer is still on its way.
        """
        if answer.journal in (b"", NO_JOURNAL) or answer.kind in _RETURNS:
            return None
        return self._note(Kind.ACK, answer.asked.request_id, connection)

    def _note(self, kind: Kind, request_id: bytes, connection: Connection | None) -> list[bytes] | None:
        if connection is None or not connection.is_known or connection.is_mixed:
            return None
        return [Header(kind, request_id).encode(), b"", b""]

    def lose(self, connection: Connection) -> list[Asked]:
        """The connection is gone: returns the open requests that were sent on it. They wait again, until they are abandoned."""
        lost = list(connection.sent.values())
        for asked in lost:
            self.unsend(asked)
        return lost

    def silent(self, connection: Connection, now: float) -> list[Asked]:
        """The sent requests of which nothing was heard for too long, though their server is one that says WORKING."""
        patience = self.patience
        if patience is None or not connection.is_known:
            return []
        since = now - WORDLESS * patience
        if connection.forgiven_at > since:
            return []
        unheard = [
            asked for asked in connection.sent.values() if asked.heard_at <= since and (asked.is_heard or connection.is_direct)
        ]
        if unheard and _have_not_arrived(unheard, connection, since, now):
            self.forgive(connection, now)
            return []
        return unheard

    def _note_torn(self, connection: Connection, now: float) -> None:
        torn_at = connection.torn_at
        if len(torn_at) > 1 and now - torn_at[-2] < (self.patience or 0.0) / 10:
            torn_at[-1] = now  # so there are some ten or twenty at most
        else:
            torn_at.append(now)

    def missing(self, connection: Connection, now: float) -> list[Asked]:
        """The requests that were sent before a message was not received whole, and of which nothing was heard for long since.

        They wait again. One of them was in that message, or its answer was.
        """
        until = now if self.patience is None else now - WORDLESS * self.patience
        over = [at for at in connection.torn_at if at <= until]
        if not over:
            return []
        del connection.torn_at[: len(over)]
        missing = [asked for asked in connection.sent.values() if asked.heard_at <= over[-1]]
        for asked in missing:
            self.unsend(asked)
        return missing

    def forgive(self, connection: Connection, now: float) -> None:
        """Begin to count the silence anew: this process was itself not there to hear, or nothing could come."""
        connection.forgiven_at = now

    def abandon_all(self) -> list[Asked]:
        """Forget all open requests; returns them."""
        given_up = list(self.pending.values())
        for asked in given_up:
            self.abandon(asked)
        return given_up

    def tick(self, now: float) -> Iterator[Asked]:
        """The requests whose limit has come by `now`; they are still open. See `DueQueue.take_due`."""
        return (asked for _, asked in self._due.take_due(now))

    def next_deadline(self) -> float | None:
        """When `tick` is to be called next, None for not at all."""
        return self._due.next_at()


def _size(asked: Asked) -> int:
    return sum(map(len, asked.frames))


def _have_not_arrived(unheard: Sequence[Asked], connection: Connection, since: float, now: float) -> bool:
    """Whether these are only not there yet, as far as can be told: their server's program has spoken of others meanwhile."""
    if any(asked.is_heard for asked in unheard):
        return False
    if connection.spoken_at <= since:
        return False
    sent = [asked.heard_at for asked in unheard]
    return explains(connection.under_way(max(sent)), now - min(sent))


def _is_due(asked: Asked, at: float) -> bool:
    return asked.is_open
