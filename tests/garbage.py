"""What may anybody on the network send to a server or a client?

Everything is made from one `random.Random`, so a seed repeats it. Frames are for ZeroMQ sockets; bytes are for TCP connections,
where `greeting` and `ready` make a handshake of ZMTP 3 (RFC 23, mechanism NULL) that may stop or go wrong anywhere.

What a message asks for is in its body: `token` first, so that whoever gets an answer can tell whether it is his.
"""

from __future__ import annotations

import random
import struct

from greensafe.sansio.envelope import Header, Kind, ServerHeader

__all__ = ["Garbage", "frame", "greeting", "ready"]

HTTP_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
HTTP_RESPONSE = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nno\n"
TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(200)

SOCKET_TYPES = [b"REQ", b"REP", b"DEALER", b"ROUTER", b"PUB", b"SUB", b"PUSH", b"PULL", b"PAIR", b"NONSENSE", b""]

MORE, LONG, COMMAND = 1, 2, 4


def greeting(mechanism: bytes = b"NULL", major: int = 3) -> bytes:
    """The 64 bytes with which a ZMTP 3 connection begins."""
    return b"\xff" + bytes(8) + b"\x7f" + bytes([major, 0]) + mechanism.ljust(20, b"\0") + b"\0" + bytes(31)


def frame(body: bytes, flags: int = 0, size: int | None = None) -> bytes:
    """One frame of ZMTP 3, which may say that it is longer than it is."""
    length = len(body) if size is None else size
    head = struct.pack("!BQ", flags | LONG, length) if length > 255 else struct.pack("!BB", flags, length)
    return head + body


def ready(socket_type: bytes) -> bytes:
    """The command that ends the handshake of the mechanism NULL."""
    body = b"\x05READY" + b"\x0bSocket-Type" + struct.pack("!I", len(socket_type)) + socket_type
    return frame(body, COMMAND)


class Garbage:
    """A source of nonsense, some of it nearly right."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def bytes(self, longest: int = 80) -> bytes:
        return self.random.randbytes(self.random.randrange(longest))

    def header(self, request_id: bytes, *, is_server: bool) -> bytes:
        """A valid header of any kind, of that role as a rule."""
        pick = self.random.choice
        if is_server == (self.random.random() < 0.9):
            kind = pick([*(kind for kind in Kind if kind >= 0x80), self.random.randrange(0x80, 0x100)])
            return ServerHeader(
                kind, request_id, self.bytes(2).ljust(16, b"i"), pick([bytes(16), b"j" * 16]), pick([0, 1, 2, 0xFFFF])
            ).encode()
        kind = pick([*(kind for kind in Kind if kind < 0x80), Kind.REQUEST, self.random.randrange(0x80)])
        remaining = pick([None, None, 0, 1, 30, 10**6])
        patience = pick([0, 1, 100, 5000, 0xFFFFFFFF])
        flags, age, journal = pick([0, 1, 0xFFFF]), pick([0, 0, 1, 0xFFFFFFFF]), pick([bytes(16), bytes(16), b"j" * 16])
        return Header(kind, request_id, remaining, patience, flags, self.bytes(), age, journal).encode()

    def mutated(self, frame: bytes) -> bytes:
        """The same with something changed, cut off or added; now and then nothing."""
        way = self.random.randrange(5)
        index = self.random.randrange(len(frame) + 1)
        if way == 0:
            return frame[:index]
        if way == 1:
            return frame + self.bytes(20)
        if way == 2 and index < len(frame):
            return frame[:index] + self.random.randbytes(1) + frame[index + 1 :]
        if way == 3:
            return frame[:index] + self.bytes(5) + frame[index:]
        return frame

    def ids(self) -> bytes:
        """One of a few, so that ids meet again."""
        return self.random.randrange(8).to_bytes(16, "big")

    def message(self, token: bytes, *, is_server: bool = False) -> list[bytes]:
        """Frames for a DEALER or a ROUTER, from random ones to a message that is right."""
        pick = self.random.choice
        if self.random.random() < 0.2:
            return [self.bytes() for _ in range(self.random.randrange(1, 6))]
        head = self.header(self.ids(), is_server=is_server)
        if self.random.random() < 0.3:
            head = self.mutated(head)
        route = [self.bytes(6) or b"r" for _ in range(pick([0, 0, 0, 1, 5, 300]))]
        body = [token + pick([b"", b"hang", b"raise", b"later", b"none"]), *(self.bytes() for _ in range(pick([0, 0, 1, 50])))]
        frames = [*route, *pick([[head], [head], [head, head], []]), *pick([[b""], [b""], [b""], [], [b"", b""]]), *body]
        return frames[: self.random.randrange(len(frames)) + 1] if self.random.random() < 0.1 else frames

    def stream(self) -> bytes:
        """What a TCP client may send, and a TCP server."""
        whole = greeting() + ready(self.random.choice(SOCKET_TYPES))
        ways = [
            lambda: self.random.randbytes(self.random.randrange(2000)),
            lambda: self.random.choice([HTTP_REQUEST, HTTP_RESPONSE, TLS_HELLO]),
            lambda: self.random.choice(
                [b"\xff", b"\x01\x00", b"\xff" + bytes(8) + b"\x7f", b"\xff" + bytes(8) + b"\x7f\x01\x05"]
            ),
            lambda: greeting(
                self.random.choice([b"PLAIN", b"CURVE", b"GSSAPI", b"NOPE", b"\xff" * 20]), self.random.randrange(5)
            ),
            lambda: whole[: self.random.randrange(len(whole))],
            lambda: self.mutated(whole),
            lambda: whole + self.traffic(),
            lambda: whole + self.mutated(self.traffic()),
            lambda: whole + self.random.randbytes(200),
            lambda: whole + frame(b"", self.random.choice([0, MORE]), self.random.choice([2**17, 2**31, 2**63, 2**64 - 1])),
            lambda: whole + frame(b"PING"[: self.random.randrange(5)], COMMAND) + frame(self.bytes(), COMMAND),
            lambda: whole + b"".join(frame(self.bytes(), MORE) for _ in range(300)),
        ]
        return self.random.choice(ways)()

    def traffic(self) -> bytes:
        """A message as it is on the wire."""
        *first, last = self.message(b"raw:")
        return b"".join(frame(each, MORE) for each in first) + frame(last)
