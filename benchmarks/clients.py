"""What does one request cost its client: alone, and as one of many?

All ask the same bare ROUTER loop, a process of its own, over ipc, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent
import zmq.green

import greensafe

from .servers import BODY, KINDS, Bench

GREENLETS = 50

#: Who asks one thing after another, and what all are compared with.
ALONE = "zmq.green REQ"


def _req(module: Any, endpoint: str) -> tuple[Callable[[], object], Callable[[], object]]:
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


def _client(endpoint: str, heartbeat: float | None) -> tuple[Callable[[], object], Callable[[], object]]:
    client = greensafe.Client(endpoint, heartbeat=heartbeat)
    return lambda: client.request(BODY), client.close


def _timed(ask: Callable[[], object], greenlets: int, count: int) -> float:
    """Microseconds for each request."""

    def work() -> None:
        for _ in range(count // greenlets):
            ask()

    start = time.perf_counter()
    gevent.joinall([gevent.spawn(work) for _ in range(greenlets)], raise_error=True)
    return (time.perf_counter() - start) / count * 1e6


def rows(server: Bench, count: int) -> dict[str, dict[str, float]]:
    """One round: {what: {who: microseconds}}."""
    makers = {
        ALONE: lambda: _req(zmq.green, server.endpoint),
        "greensafe REQ": lambda: _req(greensafe, server.endpoint),
        "Client": lambda: _client(server.endpoint, greensafe.client.HEARTBEAT),
        "no heartbeat": lambda: _client(server.endpoint, None),
    }
    found: dict[str, dict[str, float]] = {"one at a time": {}, f"{GREENLETS} greenlets": {}}
    for who, make in makers.items():
        ask, close = make()
        ask()
        found["one at a time"][who] = _timed(ask, 1, count // 10)
        if "REQ" not in who:
            found[f"{GREENLETS} greenlets"][who] = _timed(ask, GREENLETS, count)
        close()
    found[f"{GREENLETS} greenlets"] = {ALONE: found["one at a time"][ALONE], **found[f"{GREENLETS} greenlets"]}
    return found


def main_server() -> Bench:
    """The server that all ask."""
    return Bench(KINDS[0])
