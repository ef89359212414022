"""A server, or a client, that speaks ZMTP 3.0 or 2.0 byte by byte, to do what libzmq's sockets never do.

NULL mechanism; a server has one client at a time. See https://rfc.zeromq.org/spec/23 and /15.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from gevent import socket

MORE, LONG_FRAME, COMMAND = 1, 2, 4

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
#: Of ZMTP 2.0: signature, revision, type of socket (REP), an empty identity.
OLD_GREETING = b"\xff" + bytes(8) + b"\x7f\x01\x04\x00\x00"


def frame(data: bytes, flags: int = 0) -> bytes:
    """One frame as it is on the wire."""
    if len(data) > 255:
        return struct.pack("!BQ", flags | LONG_FRAME, len(data)) + data
    return struct.pack("!BB", flags, len(data)) + data


def message(frames: Sequence[bytes]) -> bytes:
    """A message as it is on the wire."""
    return b"".join(frame(each, MORE) for each in frames[:-1]) + frame(frames[-1])


def ready(kind: bytes = b"ROUTER", routing_id: bytes = b"") -> bytes:
    """The command that ends the handshake."""
    announced = b"\x08Identity" + struct.pack("!I", len(routing_id)) + routing_id if routing_id else b""
    return frame(b"\x05READY\x0bSocket-Type" + struct.pack("!I", len(kind)) + kind + announced, COMMAND)


class Connection:
    """One connection, after the handshake."""

    def __init__(self, sock: Any, kind: bytes = b"ROUTER", is_old: bool = False, routing_id: bytes = b"") -> None:
        self.sock = sock
        self._rest = sock.makefile("rb")
        sock.sendall(OLD_GREETING if is_old else GREETING)
        self._rest.read(12)
        if is_old:
            self._rest.read(2)  # libzmq answers a revision of 1 in kind: the type, and an identity
        else:
            self._rest.read(52)
            assert self._frame()[0] & COMMAND
            sock.sendall(ready(kind, routing_id))

    def receive(self) -> list[bytes]:
        """The frames of the next message; commands (PING) are not answered."""
        frames = []
        while True:
            flags, data = self._frame()
            if not flags & COMMAND:
                frames.append(data)
                if not flags & MORE:
                    return frames

    def send(self, frames: Sequence[bytes], rest: bytes = b"") -> None:
        """Send a message, and `rest` in the same segment."""
        self.sock.sendall(message(frames) + rest)

    def close(self, is_reset: bool = False) -> None:
        """End the connection, by FIN or by RST."""
        if is_reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._rest.close()
        self.sock.close()

    def _frame(self) -> tuple[int, bytes]:
        flags = self._read(1)[0]
        size = struct.unpack("!Q", self._read(8))[0] if flags & LONG_FRAME else self._read(1)[0]
        return flags, self._read(size)

    def _read(self, size: int) -> bytes:
        data: bytes = self._rest.read(size)
        if len(data) < size:
            raise EOFError("the client is gone")
        return data


def connect(endpoint: str, kind: bytes = b"DEALER", buffer: int | None = None, routing_id: bytes = b"") -> Connection:
    """A client's connection over tcp, whose kernel takes about `buffer` bytes that nobody reads; announces any routing id."""
    host, port = endpoint.removeprefix("tcp://").split(":")
    sock = socket.socket()
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.connect((host, int(port)))
    return Connection(sock, kind, routing_id=routing_id)


class Listener:
    """Where such a server listens; to be used in a `with`. `endpoint` is where clients connect."""

    def __init__(self, endpoint: str) -> None:
        transport, _, address = endpoint.partition("://")
        self._sock = socket.socket(socket.AF_INET if transport == "tcp" else socket.AF_UNIX)
        self._sock.bind(("127.0.0.1", 0) if transport == "tcp" else address)
        self._sock.listen()
        self._accepted: list[Any] = []
        self.endpoint = f"tcp://127.0.0.1:{self._sock.getsockname()[1]}" if transport == "tcp" else endpoint

    def accept_raw(self) -> Any:
        """A client's socket, before any handshake."""
        sock = self._sock.accept()[0]
        self._accepted.append(sock)
        return sock

    def accept(self, kind: bytes = b"ROUTER", is_old: bool = False) -> Connection:
        """The next client, after the handshake."""
        return Connection(self.accept_raw(), kind, is_old)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        for sock in [self._sock, *self._accepted]:
            sock.close()
