"""What in a message is address, what is greensafe's header and what is body?

A ROUTER receives `[routing id, ..., header or somebody's id, b"", body, ...]`. Everything up to the first empty frame after the
first routing id is the route and goes back as it came, so plain peers, CORRELATE ids and any number of proxies are served.

The header is the last frame before that delimiter. In network byte order:

    offset  size  field
         0     4  magic 89 47 53 0A (0x89 'G' 'S' '\\n')
         4     1  version: 1
         5     1  kind, see Kind
         6     2  length of the whole frame in bytes
         8    16  request id
        24     4  remaining time in ms, rounded up; FF FF FF FF for no limit
        28     -  metadata, up to the end of the frame

It is valid if and only if the magic fits, the version and the kind are known and the length is the frame's. Any other frame in
that place is somebody's id. See docs/protocol.md.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence

from ..errors import RemoteProtocolError

__all__ = ["HEADER_SIZE", "MAGIC", "VERSION", "Envelope", "Header", "Kind", "split"]

MAGIC = b"\x89GS\n"
VERSION = 1

_FORMAT = struct.Struct("!4sBBH16sI")

#: Bytes of a header without metadata.
HEADER_SIZE = _FORMAT.size

#: Bytes of metadata that fit: the length field has 16 bits.
MAX_METADATA = 0xFFFF - HEADER_SIZE

_NO_LIMIT = 0xFFFFFFFF


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


_KINDS = {int(kind): kind for kind in Kind}


class Header:
    """The header of one message.

    Attributes:
        kind: What the message is.
        request_id: 16 bytes, the client's.
        remaining_ms: Milliseconds that the client goes on waiting, None for no limit.
        metadata: Bytes that are passed through.
    """

    __slots__ = ("kind", "metadata", "remaining_ms", "request_id")

    def __init__(self, kind: Kind, request_id: bytes, remaining_ms: int | None = None, metadata: bytes = b"") -> None:
        self.kind = kind
        self.request_id = request_id
        self.remaining_ms = remaining_ms
        self.metadata = metadata

    def encode(self) -> bytes:
        """The frame. ValueError if the id has not 16 bytes or the metadata is too long."""
        if len(self.request_id) != 16:
            raise ValueError(f"a request id has 16 bytes, not {len(self.request_id)}")
        if len(self.metadata) > MAX_METADATA:
            raise ValueError(f"metadata of {len(self.metadata)} bytes: {MAX_METADATA} fit into a header")
        remaining = _NO_LIMIT if self.remaining_ms is None else min(max(self.remaining_ms, 0), _NO_LIMIT - 1)
        length = HEADER_SIZE + len(self.metadata)
        return _FORMAT.pack(MAGIC, VERSION, self.kind, length, self.request_id, remaining) + self.metadata

    @classmethod
    def decode(cls, frame: bytes) -> Header | None:
        """The header in a frame, or None if it is not a valid one."""
        if not frame.startswith(MAGIC) or len(frame) < HEADER_SIZE:
            return None
        _, version, number, length, request_id, remaining = _FORMAT.unpack_from(frame)
        kind = _KINDS.get(number)
        if version != VERSION or kind is None or length != len(frame):
            return None
        return cls(kind, request_id, None if remaining == _NO_LIMIT else remaining, frame[HEADER_SIZE:])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Header):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def _fields(self) -> tuple[Kind, bytes, int | None, bytes]:
        return self.kind, self.request_id, self.remaining_ms, self.metadata

    def __repr__(self) -> str:
        return f"<Header {self.kind.name} {self.request_id.hex()} remaining={self.remaining_ms} ms>"


def remaining_ms(now: float, at: float | None) -> int | None:
    """What a header says of a limit at absolute time `at`: rounded up, so that the server never gives up first."""
    return None if at is None else max(0, math.ceil((at - now) * 1000))


class Envelope:
    """A message taken apart.

    Attributes:
        route: The frames up to and including the delimiter, as they came.
        header: The header, if the frame before the delimiter is one.
        body: The frames after the delimiter, at least one.
    """

    __slots__ = ("body", "header", "route")

    def __init__(self, route: list[bytes], header: Header | None, body: list[bytes]) -> None:
        self.route = route
        self.header = header
        self.body = body


def split(frames: Sequence[bytes]) -> Envelope:
    """Take apart a message as a ROUTER receives it.

    Raises:
        RemoteProtocolError: There is no delimiter after a routing id, or no body behind it. The text says which.
    """
    try:
        delimiter = frames.index(b"", 1)
    except ValueError:
        raise RemoteProtocolError(
            f"a message of {len(frames)} frames without an empty frame after the routing id: a DEALER has to send one"
            " before the body, as a REQ does"
        ) from None
    body = list(frames[delimiter + 1 :])
    if not body:
        raise RemoteProtocolError("a message without a body: nothing follows the empty frame")
    header = Header.decode(frames[delimiter - 1]) if delimiter > 1 else None
    return Envelope(list(frames[: delimiter + 1]), header, body)
