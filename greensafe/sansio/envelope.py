"""What in a message is address, what is greensafe's header and what is body?

A ROUTER receives `[routing id, ..., header or somebody's id, b"", body, ...]`. Everything up to the first empty frame after the
first routing id is the route and goes back as it came, so plain peers, CORRELATE ids and any number of proxies are served.

The header is the last frame before that delimiter. In network byte order:

    offset  size  field
         0     4  magic 89 47 53 0A (0x89 'G' 'S' '\\n')
         4     1  version: 1
         5     1  kind, see Kind; below 0x80 a client's, from 0x80 a server's
         6     2  length of the whole frame in bytes
         8    16  request id

    a client's                                          a server's
        24     4  remaining time in ms, rounded up;         24    16  the server's instance: random at each start
                  FF FF FF FF for no limit                  40    16  its journal; zeros for none
        28     4  patience in ms; 0 for no WORKING          56     2  hops: routing ids before the header
        32     2  flags, see GREET                          58     -  metadata, up to the end of the frame
        34     4  age in ms: how long ago it was first sent,
                  if it may have run since; 0: it was not
        38    16  the only journal that may run it; zeros for any
        54     -  metadata, up to the end of the frame

It is valid if and only if the magic fits, the version is 1, the length is the frame's and at least that of its half of the
table, and the metadata fits into either half. Any other frame in that place is somebody's id. See docs/protocol.md.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence

from ..errors import RemoteProtocolError

__all__ = [
    "CALLER_LIMIT",
    "GREET",
    "HEADER_SIZE",
    "MAGIC",
    "MAX_METADATA",
    "MAX_ROUTE",
    "MAX_ROUTE_BYTES",
    "NO_JOURNAL",
    "OTHER_JOURNAL",
    "SERVER_HEADER_SIZE",
    "SERVER_STOPPED",
    "VERSION",
    "Envelope",
    "Header",
    "Kind",
    "ServerHeader",
    "decode",
    "pack",
    "pack_server",
    "remaining_ms",
    "split",
]

MAGIC = b"\x89GS\n"
VERSION = 1

_CLIENT = struct.Struct("!4sBBH16sIIHI16s")
_SERVER = struct.Struct("!4sBBH16s16s16sH")

#: Bytes of a client's header and of a server's, without metadata.
HEADER_SIZE = _CLIENT.size
SERVER_HEADER_SIZE = _SERVER.size

#: Bytes of metadata that fit into either: the length field has 16 bits.
MAX_METADATA = 0xFFFF - SERVER_HEADER_SIZE

#: Frames among which the delimiter has to be: what stands before it goes back with every answer.
MAX_ROUTE = 256

#: Bytes that they may have, a header not counted.
MAX_ROUTE_BYTES = 65_536

#: A flag of a request: say WORKING at once, unless the answer is there at once.
GREET = 0x0001

#: The type of the error that answers a request whose own limit, not the server's, has run out.
CALLER_LIMIT = "CallerLimit"

#: The type of the error that rejects a request which may have run for a server with another journal.
OTHER_JOURNAL = "OtherJournal"

#: The type of the error of a request that was owed an answer when its server was stopped.
SERVER_STOPPED = "ServerStopped"

#: What a server without a journal says in its place, and a client whom any may serve.
NO_JOURNAL = bytes(16)

#: The request id of a message that is about no request: DRAINING, CLOSED, and REJECTED if nobody knows which it was.
NOBODY = bytes(16)

_NO_LIMIT = 0xFFFFFFFF
_MAX_MS = _NO_LIMIT - 1

#: The kinds from here on are servers'.
_SERVERS = 0x80


class Kind(enum.IntEnum):
    """What a message is. Below 0x80 clients send it, above servers do."""

    REQUEST = 0x01
    CANCEL = 0x02
    PING = 0x03
    ACK = 0x04
    REPLY = 0x81
    ERROR = 0x82
    WORKING = 0x83
    PONG = 0x84
    REJECTED = 0x85
    DRAINING = 0x86
    INTERRUPTED = 0x87
    CLOSED = 0x88


class Header:
    """What a client says of a message.

    Attributes:
        kind: What the message is: a Kind, or another number below 0x80.
        request_id: 16 bytes, the client's.
        remaining_ms: Milliseconds that the client goes on waiting, None for no limit.
        patience_ms: Milliseconds of silence after which it takes the server for dead; 0: it wants no WORKING.
        flags: GREET, or 0. Other bits mean nothing yet.
        metadata: Bytes that are passed through.
        age_ms: Milliseconds since it was first sent, if it may have run since then; 0 if it was not sent before.
        journal: 16 bytes of the journal of the server for which it may have run: no other server may run it. NO_JOURNAL: any.
    """

    __slots__ = ("age_ms", "flags", "journal", "kind", "metadata", "patience_ms", "remaining_ms", "request_id")

    def __init__(
        self,
        kind: int,
        request_id: bytes,
        remaining_ms: int | None = None,
        patience_ms: int = 0,
        flags: int = 0,
        metadata: bytes = b"",
        age_ms: int = 0,
        journal: bytes = NO_JOURNAL,
    ) -> None:
        self.kind = kind
        self.request_id = request_id
        self.remaining_ms = remaining_ms
        self.patience_ms = patience_ms
        self.flags = flags
        self.metadata = metadata
        self.age_ms = age_ms
        self.journal = journal

    def encode(self) -> bytes:
        """The frame. ValueError if one of the ids has not 16 bytes or the metadata is too long."""
        _check(self.request_id, self.metadata)
        _check(self.journal)
        return pack(
            self.kind,
            self.request_id,
            self.remaining_ms,
            self.patience_ms,
            self.flags,
            self.metadata,
            self.age_ms,
            self.journal,
        )

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, Header) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._fields())

    def _fields(self) -> tuple[object, ...]:
        return (
            self.kind,
            self.request_id,
            self.remaining_ms,
            self.patience_ms,
            self.flags,
            self.metadata,
            self.age_ms,
            self.journal,
        )

    def __repr__(self) -> str:
        return f"<Header {_name(self.kind)} {self.request_id.hex()} remaining={self.remaining_ms} ms>"


class ServerHeader:
    """What a server says of a message.

    Attributes:
        kind: What the message is: a Kind, or another number from 0x80.
        request_id: 16 bytes, the client's.
        instance: 16 bytes, other ones each time a server is started.
        journal: 16 bytes of its journal, NO_JOURNAL without one.
        hops: Routing ids that stood before the request's header: 1 if nobody is between the two; 0 if the server does not say,
            since it receives no request while another is open.
        metadata: The request's.
    """

    __slots__ = ("hops", "instance", "journal", "kind", "metadata", "request_id")

    def __init__(
        self,
        kind: int,
        request_id: bytes,
        instance: bytes,
        journal: bytes = NO_JOURNAL,
        hops: int = 1,
        metadata: bytes = b"",
    ) -> None:
        self.kind = kind
        self.request_id = request_id
        self.instance = instance
        self.journal = journal
        self.hops = hops
        self.metadata = metadata

    def encode(self) -> bytes:
        """The frame. ValueError if one of the ids has not 16 bytes or the metadata is too long."""
        _check(self.request_id, self.metadata)
        _check(self.instance)
        _check(self.journal)
        return pack_server(self.kind, self.request_id, self.instance, self.journal, self.hops, self.metadata)

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, ServerHeader) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._fields())

    def _fields(self) -> tuple[object, ...]:
        return self.kind, self.request_id, self.instance, self.journal, self.hops, self.metadata

    def __repr__(self) -> str:
        return f"<ServerHeader {_name(self.kind)} {self.request_id.hex()} of {self.instance.hex()} hops={self.hops}>"


def pack(
    kind: int,
    request_id: bytes,
    remaining_ms: int | None,
    patience_ms: int,
    flags: int,
    metadata: bytes,
    age_ms: int = 0,
    journal: bytes = NO_JOURNAL,
) -> bytes:
    """A client's header of arguments that are known to be right; see Header."""
    remaining = _NO_LIMIT if remaining_ms is None else min(max(remaining_ms, 0), _MAX_MS)
    patience = patience_ms if patience_ms <= 0xFFFFFFFF else 0xFFFFFFFF
    age = age_ms if age_ms <= 0xFFFFFFFF else 0xFFFFFFFF
    length = HEADER_SIZE + len(metadata)
    return _CLIENT.pack(MAGIC, VERSION, kind, length, request_id, remaining, patience, flags, age, journal) + metadata


def pack_server(kind: int, request_id: bytes, instance: bytes, journal: bytes, hops: int, metadata: bytes) -> bytes:
    """A server's header of arguments that are known to be right; see ServerHeader."""
    length = SERVER_HEADER_SIZE + len(metadata)
    hops = min(hops, 0xFFFF)  # a client may put any number of frames there
    return _SERVER.pack(MAGIC, VERSION, kind, length, request_id, instance, journal, hops) + metadata


def decode(frame: bytes) -> Header | ServerHeader | None:
    """The header in a frame, or None if it is not a valid one."""
    size = len(frame)
    if size < HEADER_SIZE or not frame.startswith(MAGIC):
        return None
    if frame[5] < _SERVERS:
        _, version, kind, length, request_id, remaining, patience, flags, age, journal = _CLIENT.unpack_from(frame)
        if version != VERSION or length != size or size > HEADER_SIZE + MAX_METADATA:
            return None
        limit = None if remaining == _NO_LIMIT else remaining
        return Header(kind, request_id, limit, patience, flags, frame[HEADER_SIZE:], age, journal)
    if size < SERVER_HEADER_SIZE:
        return None
    _, version, kind, length, request_id, instance, journal, hops = _SERVER.unpack_from(frame)
    if version != VERSION or length != size:
        return None
    return ServerHeader(kind, request_id, instance, journal, hops, frame[SERVER_HEADER_SIZE:])


def remaining_ms(now: float, at: float | None) -> int | None:
    """What a header says of a limit at absolute time `at`: rounded up, so that the server never gives up first."""
    return None if at is None else max(0, math.ceil((at - now) * 1000))


class Envelope:
    """A message taken apart.

    Attributes:
        route: The frames up to and including the delimiter, as they came.
        header: The client's header, if the frame before the delimiter is one; a server's, which is out of place here, too.
        body: The frames after the delimiter, at least one.
    """

    __slots__ = ("body", "header", "route")

    def __init__(self, route: list[bytes], header: Header | ServerHeader | None, body: list[bytes]) -> None:
        self.route = route
        self.header = header
        self.body = body

    @property
    def origin(self) -> tuple[bytes, ...]:
        """The routing ids: where the message came from, and all of them by the same way."""
        return tuple(self.route[: -1 if self.header is None else -2])


def split(frames: Sequence[bytes]) -> Envelope:
    """Take apart a message as a ROUTER receives it.

    Raises:
        RemoteProtocolError: There is no delimiter after a routing id, too much before it, or no body behind it. The text says
            which.
    """
    try:
        delimiter = frames.index(b"", 1, MAX_ROUTE)
    except ValueError:
        raise RemoteProtocolError(
            f"a message of {len(frames)} frames without an empty frame after the routing id, among the first {MAX_ROUTE}:"
            " a DEALER has to send one before the body, as a REQ does"
        ) from None
    body = list(frames[delimiter + 1 :])
    if not body:
        raise RemoteProtocolError("a message without a body: nothing follows the empty frame")
    header = decode(frames[delimiter - 1]) if delimiter > 1 else None
    # libzmq bounds the first routing id, and the header has a limit of its own.
    if delimiter > (1 if header is None else 2) and _too_long(frames, delimiter if header is None else delimiter - 1):
        raise RemoteProtocolError(
            f"a message with more than {MAX_ROUTE_BYTES} bytes before the empty frame, header not counted"
        )
    return Envelope(list(frames[: delimiter + 1]), header, body)


def _too_long(frames: Sequence[bytes], ids: int) -> bool:
    return sum(map(len, frames[:ids])) > MAX_ROUTE_BYTES


def _check(some_id: bytes, metadata: bytes = b"") -> None:
    if len(some_id) != 16:
        raise ValueError(f"an id has 16 bytes, not {len(some_id)}")
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"metadata of {len(metadata)} bytes: {MAX_METADATA} fit into a header")


def _name(kind: int) -> str:
    return Kind(kind).name if kind in _KINDS else f"kind {kind:#04x}"


_KINDS = frozenset(Kind)
