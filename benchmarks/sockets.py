"""What does one call on a socket cost?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import gevent
import zmq
import zmq.green

import greensafe

MODULES = {"pyzmq": zmq, "zmq.green": zmq.green, "greensafe": greensafe}

Measure = Callable[[], float]


def _pair(module: Any, endpoint: str) -> tuple[Any, Any, Any]:
    context = module.Context()
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for sock in (a, b):
        sock.setsockopt(zmq.SNDHWM, 0)
        sock.setsockopt(zmq.RCVHWM, 0)
    a.bind(endpoint)
    b.connect(endpoint)
    return context, a, b


def _timed(run: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / count * 1e6


def send_and_recv(module: Any, count: int) -> dict[str, float]:
    """Microseconds of a send, a ready recv and a ready recv_multipart of three frames, inproc."""
    context, a, b = _pair(module, "inproc://bench")

    def send() -> None:
        for _ in range(count):
            a.send(b"x" * 64)

    def recv() -> None:
        for _ in range(count):
            b.recv()

    def recv_multipart() -> None:
        for _ in range(count):
            b.recv_multipart()

    result = {"send": _timed(send, count), "ready recv": _timed(recv, count)}
    for _ in range(count):
        a.send_multipart([b"1", b"2", b"x" * 64])
    result["ready recv_multipart"] = _timed(recv_multipart, count)
    a.close(0)
    b.close(0)
    context.term()
    return result


def ping_pong(module: Any, transport: str, count: int) -> float:
    """Microseconds of a round trip between two greenlets that wait and wake each other, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        context, a, b = _pair(module, "inproc://bench" if transport == "inproc" else f"ipc://{folder}/s")

        def pong() -> None:
            for _ in range(count):
                b.send(b.recv())

        def ping() -> None:
            for _ in range(count):
                a.send(b"x" * 64)
                a.recv()

        gevent.spawn(pong)
        took = _timed(gevent.spawn(ping).get, count)
        a.close(0)
        b.close(0)
        context.term()
        return took


def scope(kind: str, count: int) -> float:
    """Microseconds of an empty block with a limit."""
    limit = greensafe.deadline if kind == "greensafe" else gevent.Timeout

    def run() -> None:
        for _ in range(count):
            with limit(5):
                pass

    return _timed(run, count)


def rows(count: int) -> dict[str, dict[str, float]]:
    """One round: {what: {who: microseconds}}."""
    found: dict[str, dict[str, float]] = {}
    for name, module in MODULES.items():
        for what, took in send_and_recv(module, count).items():
            found.setdefault(what, {})[name] = took
    for name in ("zmq.green", "greensafe"):
        for transport in ("inproc", "ipc"):
            found.setdefault(f"ping-pong {transport}", {})[name] = ping_pong(MODULES[name], transport, count // 5)
    found["with a limit: pass"] = {"gevent.Timeout": scope("gevent", count), "greensafe": scope("greensafe", count)}
    return found
