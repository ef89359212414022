"""What does a request cost its client: alone, and as one of many at a time?

All ask the same bare REP loop, a process of its own, in turn; the time is what the caller waits. `tcp` is used where
heartbeats count bytes. *bare DEALER* sends the same frames as a Client and keeps as many requests in flight, in a plain
blocking loop without greenlets: what the server, also a loop in Python, lets anybody have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent
import zmq.green

import greensafe
from greensafe.client.client import HEARTBEAT
from greensafe.sansio.envelope import GREET, Header, Kind

from .servers import BODY, REP, Bench

GREENLETS = 50

Ask = Callable[[], object]


def _req(module: Any, endpoint: str) -> tuple[Ask, Ask]:
    context = module.Context()
    sock = context.socket(module.REQ)
    sock.connect(endpoint)

    def ask() -> None:
        sock.send(BODY)
        sock.recv()

    def close() -> None:
        sock.close(0)
        context.term()

    return ask, close


def _client(endpoint: str, heartbeat: float | None) -> tuple[Ask, Ask]:
    client = greensafe.Client(endpoint, heartbeat=heartbeat)
    return lambda: client.request(BODY), client.close


class _Bare:
    """A plain DEALER, and as many requests in flight as asked for."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.DEALER)
        self._sock.connect(endpoint)

    def run(self, inflight: int, count: int) -> float:
        """Microseconds for each request."""
        sock, message = self._sock, [Header(Kind.REQUEST, bytes(16), flags=GREET).encode(), b"", BODY]
        start = time.perf_counter()
        for _ in range(inflight):
            sock.send_multipart(message)
        for _ in range(count - inflight):
            sock.recv_multipart()
            sock.send_multipart(message)
        for _ in range(inflight):
            sock.recv_multipart()
        return (time.perf_counter() - start) / count * 1e6

    def close(self) -> None:
        self._sock.close(0)
        self._context.term()


def _timed(ask: Ask, greenlets: int, count: int) -> float:
    """Microseconds for each request."""

    def work() -> None:
        for _ in range(count // greenlets):
            ask()

    start = time.perf_counter()
    gevent.joinall([gevent.spawn(work) for _ in range(greenlets)], raise_error=True)
    return (time.perf_counter() - start) / count * 1e6


class Asking:
    """Everybody who asks, connected to one server each transport."""

    def __init__(self) -> None:
        self._servers = {transport: Bench(REP, transport) for transport in ("ipc", "tcp")}
        self._askers: dict[tuple[str, str], tuple[Ask, Ask]] = {}
        for transport, server in self._servers.items():
            self._askers[transport, "zmq.green REQ"] = _req(zmq.green, server.endpoint)
            self._askers[transport, "greensafe REQ"] = _req(greensafe, server.endpoint)
            self._askers[transport, "no heartbeat"] = _client(server.endpoint, None)
            self._askers[transport, "Client"] = _client(server.endpoint, HEARTBEAT)
        self._bare = {transport: _Bare(server.endpoint) for transport, server in self._servers.items()}
        for ask, _ in self._askers.values():
            ask()

    def close(self) -> None:
        for _, close in self._askers.values():
            close()
        for bare in self._bare.values():
            bare.close()
        for server in self._servers.values():
            server.close()

    def _time(self, transport: str, who: str, greenlets: int, count: int) -> float:
        return _timed(self._askers[transport, who][0], greenlets, count)

    def rows(self, count: int) -> dict[str, dict[str, float]]:
        """One round: {what: {who: microseconds}}."""
        found: dict[str, dict[str, float]] = {}
        for transport in self._servers:
            everybody = ("zmq.green REQ", "greensafe REQ", "no heartbeat", "Client")
            alone = {who: self._time(transport, who, 1, count // 10) for who in everybody}
            found[f"{transport}, one at a time"] = alone
            found[f"{transport}, {GREENLETS} greenlets"] = {
                "zmq.green REQ": alone["zmq.green REQ"],
                "bare DEALER": self._bare[transport].run(GREENLETS, count),
                **{who: self._time(transport, who, GREENLETS, count) for who in ("no heartbeat", "Client")},
            }
        return found
