"""What has the kernel counted of a connection?

Only Linux is asked, for TCP (what `sansio.liveness` judges) and for what a peer by ipc has not read. The descriptor belongs to
libzmq: one that is another's by now gives wrong numbers only.
"""

from __future__ import annotations

import sys

from gevent.monkey import get_original

from .sansio.liveness import Sample

__all__ = ["is_counted", "peer", "sample", "unread"]

_TCP_INFO = 11
_TCP_INFO_SIZE = 148

#: Where in Linux's struct tcp_info (linux/tcp.h) stand: unacked; bytes_acked and bytes_received; notsent_bytes.
_UNACKED, _ACKED, _RECEIVED, _WAITING = slice(24, 28), slice(120, 128), slice(128, 136), slice(144, 148)


def is_counted(endpoint: str) -> bool:
    """Whether the kernel counts what a connection to this endpoint carries."""
    return endpoint.startswith("tcp:") and sys.platform == "linux"


def sample(descriptor: int, taken: int) -> Sample | None:
    """What is counted now of a connection by tcp, None if it cannot be told; `taken` is put into the Sample."""
    try:
        sock = get_original("socket", "socket")(fileno=descriptor)
    except OSError:
        return None
    try:
        info = sock.getsockopt(6, _TCP_INFO, _TCP_INFO_SIZE)
    except OSError:
        return None
    finally:
        sock.detach()
    if len(info) < _TCP_INFO_SIZE:
        return None  # a kernel before 4.6
    received, acked, waiting, unacked = (
        int.from_bytes(info[field], sys.byteorder) for field in (_RECEIVED, _ACKED, _WAITING, _UNACKED)
    )
    return Sample(received, acked, waiting, unacked, taken)


def peer(descriptor: int) -> str | None:
    """Host and port of the other end of a connection by tcp, as in an endpoint; None if it cannot be told."""
    socket = get_original("socket", "socket")
    try:
        sock = socket(fileno=descriptor)
    except (OSError, ValueError):
        return None
    try:
        address = sock.getpeername()
    except OSError:
        return None
    finally:
        sock.detach()
    if not isinstance(address, tuple):
        return None
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
