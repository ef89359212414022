"""Sockets made from endpoints: listening ones that can stop and listen again, connected ones, and ones that are reset.

Sockets are gevent's own, so programs may be monkey-patched or not. Endpoints are written as ZeroMQ's, tcp and ipc.

It does not know what is sent through them.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Any

import gevent
from gevent import socket

from ...transport.endpoints import check_endpoint

__all__ = ["Entrance", "check_target", "close", "dial", "reset"]

#: SO_LINGER on, for 0 seconds: close() then sends RST instead of FIN (RFC 9293, 3.10.5). Windows takes two shorts.
_ABORT = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


def _split(endpoint: str) -> tuple[str, str]:
    """Split an endpoint that can be used here into transport and rest."""
    transport, _, address = check_endpoint(endpoint).partition("://")
    if transport not in ("tcp", "ipc") or (transport == "ipc" and not hasattr(socket, "AF_UNIX")):
        raise ValueError(f"{endpoint!r} cannot be linked: only tcp can, and ipc where the system has Unix sockets")
    if transport == "ipc" and address == "*":
        raise ValueError("a link needs the path of an ipc endpoint: ipc:///tmp/name, or ipc://@name")
    return transport, address


def check_target(endpoint: str) -> str:
    """Return `endpoint` if it may be possible to connect to it; TypeError or ValueError says what is wrong."""
    transport, address = _split(endpoint)
    host, _, port = address.rpartition(":")
    if transport == "tcp" and (host in ("", "*") or port in ("*", "0")):
        raise ValueError(f"{endpoint!r} is no target: a host and a port to connect to are needed")
    return endpoint


def _resolve(endpoint: str) -> tuple[int, Any]:
    """The family and the address of an endpoint, for bind and connect."""
    transport, address = _split(endpoint)
    if transport == "ipc":
        return socket.AF_UNIX, "\0" + address[1:] if address.startswith("@") else address
    host, _, port = address.rpartition(":")
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    found = socket.getaddrinfo(host, 0 if port == "*" else int(port), 0, socket.SOCK_STREAM)
    return found[0][0], found[0][4]


def dial(endpoint: str) -> Any:
    """Connect to `endpoint`; OSError if nobody is there. Leaves nothing open if it is interrupted."""
    family, address = _resolve(endpoint)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.connect(address)
        send_at_once(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def send_at_once(sock: Any) -> None:
    """Have small pieces sent when they are written: waiting for more (Nagle) would be a delay that nobody asked for."""
    if sock.family != getattr(socket, "AF_UNIX", None):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def reset(sock: Any) -> None:
    """Close a socket with RST; a Unix socket, which has none, the ordinary way."""
    with contextlib.suppress(OSError):  # closed already, or its peer was first
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    close(sock)


def close(sock: Any) -> None:
    """Close a socket soon, also if some greenlet waits for its descriptor.

    gevent then leaves the descriptor open until the loop has polled once more; a loop with nothing else to do polls for ever.
    """
    sock.close()
    loop = gevent.get_hub().loop
    loop.run_callback(loop.run_callback_threadsafe, int)  # behind what close() had to do, something that ends the poll


class Entrance:
    """The address at which clients connect. It stays the same while connecting is refused and possible again.

    Attributes:
        endpoint: The address, with the port that the system chose.
        listener: The socket that accepts; None while connecting is refused.

    Raises:
        OSError: The address cannot be bound to.
    """

    def __init__(self, endpoint: str) -> None:
        self._family, self._address = _resolve(endpoint)
        self._is_unix = self._family == getattr(socket, "AF_UNIX", None)
        # A port that was asked for may be one that old connections still keep (TIME_WAIT); one of the system's choice is free.
        self._may_be_kept = not self._is_unix and self._address[1] != 0
        self._holder: Any = None
        self._is_ours = False
        self.endpoint = endpoint
        self.listener: Any = None
        try:
            self._hold()
            self.open()
        except OSError as error:
            self.close()
            error.add_note(endpoint)
            raise
        if not self._is_unix:
            host, port = self._address[:2]
            self.endpoint = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def open(self) -> None:
        """Listen; nothing happens if it does."""
        if self.listener is None:
            if self._is_unix:
                self._unlink()
            listener = self._bound()
            listener.listen(socket.SOMAXCONN)
            self.listener, self._is_ours = listener, True
            self._address = self._address if self._is_unix else listener.getsockname()

    def refuse(self) -> None:
        """Have connecting refused; what was accepted is left alone."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def close(self) -> None:
        """Give the address up."""
        self.refuse()
        if self._holder is not None:
            self._holder.close()
            self._holder = None
        if self._is_unix:
            self._unlink()

    def _hold(self) -> None:
        """Keep the port by a socket that is bound and never listens: otherwise the system could give it away meanwhile.

        It shares the port only once it has it, so that an address which somebody else uses is an error.
        """
        if not self._is_unix and hasattr(socket, "SO_REUSEPORT"):
            self._holder = self._bound(is_first=True)
            self._address = self._holder.getsockname()

    def _bound(self, is_first: bool = False) -> Any:
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        is_shared = not self._is_unix and hasattr(socket, "SO_REUSEPORT")
        try:
            if is_shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, self._may_be_kept)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, not is_first)
            sock.bind(self._address)
            if is_shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except BaseException:
            sock.close()
            raise
        return sock

    def _unlink(self) -> None:
        """Take away the file of a Unix socket that was bound here before."""
        if self._is_ours and not self._address.startswith("\0"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address)
