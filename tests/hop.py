"""A proxy over tcp or ipc that takes whatever clients send at once, and passes it on when the test says so.

To a client's kernel all has arrived. What servers send passes at once. It runs in the hub of the thread that made it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
from gevent import socket
from gevent.event import Event

__all__ = ["Hop"]

#: A filter of one instruction, which takes nothing of any packet (linux/filter.h).
_ATTACH_FILTER = 26
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))


class Hop:
    """A hop to a target; to be used in a `with`.

    Args:
        target: Where the first connections lead.
        endpoint: Where to listen by ipc; by default at any port.

    Attributes:
        target: Where the connections that come next lead.
        endpoint: Where clients connect.
        accepted: Connections so far.
    """

    def __init__(self, target: str, endpoint: str | None = None) -> None:
        self.target = target
        self.accepted = 0
        self._passes: list[Event] = []
        self._running: list[Any] = []
        self._sockets = [_socket_for(endpoint or "")]
        self._sockets[0].bind(_address(endpoint) if endpoint else ("127.0.0.1", 0))
        self._sockets[0].listen()
        self.endpoint = endpoint or f"tcp://127.0.0.1:{self._sockets[0].getsockname()[1]}"

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep what the clients send that are connected now; those that connect meanwhile are served."""
        held = list(self._passes)
        for each in held:
            each.clear()
        yield
        for each in held:
            each.set()

    def forget(self) -> None:
        """Drop whatever comes by the connections that there are, without a word, as a firewall does. Linux only."""
        for each in self._sockets[1:]:
            each.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(_DROP)))

    def __enter__(self) -> Hop:
        self._running.append(gevent.spawn(self._accept))
        return self

    def __exit__(self, *error: object) -> None:
        gevent.killall(self._running)
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            client, server = self._sockets[0].accept()[0], _socket_for(self.target)
            self._sockets += [client, server]
            self.accepted += 1
            server.connect(_address(self.target))
            passes = Event()
            passes.set()
            self._passes.append(passes)
            self._running += [gevent.spawn(self._up, client, server, passes), gevent.spawn(_copy, server, client)]

    def _up(self, client: Any, server: Any, passes: Event) -> None:
        kept: list[bytes] = []
        arrived = Event()

        def send() -> None:
            while True:
                arrived.wait()
                passes.wait()
                if kept:
                    server.sendall(kept.pop(0))
                else:
                    arrived.clear()

        self._running.append(gevent.spawn(send))
        while data := client.recv(1 << 20):
            kept.append(data)
            arrived.set()


def _socket_for(endpoint: str) -> Any:
    return socket.socket(socket.AF_UNIX if endpoint.startswith("ipc:") else socket.AF_INET)


def _address(endpoint: str) -> Any:
    if endpoint.startswith("ipc:"):
        return endpoint.removeprefix("ipc://")
    host, port = endpoint.removeprefix("tcp://").split(":")
    return host, int(port)


def _copy(source: Any, sink: Any) -> None:
    while data := source.recv(1 << 20):
        sink.sendall(data)
    sink.close()
