"""The kernel's counts of a connection.

Only Linux is asked, for TCP (what `sansio.liveness` judges), and by ipc for what a peer has not read, and for its process. The
descriptor belongs to libzmq: one that is another's by now gives wrong numbers only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gevent.monkey import get_original

from ..sansio.liveness import Sample

__all__ = ["is_counted", "listener", "peer", "sample", "unread"]

_TCP_INFO = 11
_TCP_INFO_SIZE = 148

#: SO_PEERCRED, whose first field is a process.
_PEERCRED = 17

#: Where in Linux's struct tcp_info (linux/tcp.h) stand: unacked; bytes_acked and bytes_received; notsent_bytes.
_UNACKED, _ACKED, _RECEIVED, _WAITING = slice(24, 28), slice(120, 128), slice(128, 136), slice(144, 148)


def is_counted(endpoint: str) -> bool:
    """Return whether the kernel counts what a connection to this endpoint carries."""
    return endpoint.startswith("tcp:") and sys.platform == "linux"


def sample(descriptor: int, taken: int) -> Sample | None:
    """Return what is counted now of a connection by tcp, None if it cannot be told; `taken` is put into the Sample."""
    info = _ask(descriptor, lambda sock: sock.getsockopt(6, _TCP_INFO, _TCP_INFO_SIZE))
    if info is None or len(info) < _TCP_INFO_SIZE:
        return None  # a kernel before 4.6
    received, acked, waiting, unacked = (
        int.from_bytes(info[field], sys.byteorder) for field in (_RECEIVED, _ACKED, _WAITING, _UNACKED)
    )
    return Sample(received, acked, waiting, unacked, taken)


def peer(descriptor: int) -> str | None:
    """Host and port of the other end of a connection by tcp, as in an endpoint; None if it cannot be told."""
    address = _ask(descriptor, lambda sock: sock.getpeername())
    if not isinstance(address, tuple):
        return None
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listener(descriptor: int) -> int | None:
    """The process that listens where a connection by ipc was made to; None if it cannot be told.

    The kernel notes it when the process begins to listen: a child that has inherited the listener is told as its parent.
    """
    if sys.platform != "linux":
        return None
    credentials = _ask(descriptor, lambda sock: sock.getsockopt(1, _PEERCRED, 4))
    return None if credentials is None else int.from_bytes(credentials, sys.byteorder)


def unread(descriptor: int) -> int:
    """Bytes that the peer of a connection by ipc has not read, 0 if nobody counts them: a stopped process reads no greeting."""
    if sys.platform != "linux":
        return 0
    import fcntl
    import termios

    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def _ask(descriptor: int, question: Callable[[Any], Any]) -> Any:
    """Ask a socket of libzmq's for an option, and leave it open; None if it is no socket (any more), or not of that kind."""
    try:
        sock = get_original("socket", "socket")(fileno=descriptor)
    except (OSError, ValueError):
        return None
    try:
        return question(sock)
    except OSError:
        return None
    finally:
        sock.detach()
