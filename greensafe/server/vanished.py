"""Which clients of a ROUTER are gone?

libzmq tells of a lost connection by its descriptor and of a message by its routing id. What joins the two is the descriptor by
which a message came (ZMQ_SRCFD). A descriptor's number is used again as soon as it is free: so before a message is noted, all
events that precede it are read.

inproc has no events, and no client that vanishes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

from ..transport.monitor import ConnectionEvent, Monitor

__all__ = ["Vanished"]


class Vanished:
    """The connections of one ROUTER by which messages came.

    Args:
        sock: The ROUTER, bound or not.
        on_vanished: Called in the hub with the routing id of a client whose connection is gone.
    """

    __slots__ = ("__weakref__", "_clients", "_descriptors", "_monitor", "_on_vanished")

    def __init__(self, sock: zmq.Socket[Any], on_vanished: Callable[[bytes], None]) -> None:
        self._on_vanished = on_vanished
        self._clients: dict[int, bytes] = {}
        self._descriptors: dict[bytes, int] = {}
        self._monitor = Monitor(sock, self._on_event, zmq.EVENT_DISCONNECTED)

    def __repr__(self) -> str:
        return f"<Vanished connections={len(self._clients)} {self._monitor!r}>"

    def note(self, client: bytes, descriptor: int) -> None:
        """A message of this client came by this descriptor; one that has come again by another way belongs there."""
        if not self._monitor.drain():
            return  # who had the descriptor before may be among the events that are left
        before = self._clients.get(descriptor)
        if before == client or descriptor < 0:
            return
        self._descriptors.pop(before or b"", None)
        self._clients.pop(self._descriptors.get(client, -1), None)
        self._clients[descriptor] = client
        self._descriptors[client] = descriptor

    def close(self) -> None:
        """Watch no longer; to be called before the socket is closed."""
        self._monitor.close()

    def _on_event(self, event: ConnectionEvent) -> None:
        client = self._clients.pop(event.value, None)
        if client is not None:
            del self._descriptors[client]
            self._on_vanished(client)
