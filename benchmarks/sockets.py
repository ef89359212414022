"""What does one call on a socket cost that has nothing to wait for?

Microseconds of CPU of this process, single calls over inproc with a body of 64 bytes, each module in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent
import zmq
import zmq.green

import greensafe

MODULES = {"pyzmq": zmq, "zmq.green": zmq.green, "greensafe": greensafe}

BODY = b"x" * 64


def timed(run: Callable[[], object], count: int) -> float:
    """Microseconds of this process's CPU for each of `count` in `run`."""
    start = time.process_time()
    run()
    return (time.process_time() - start) / count * 1e6


def pair(module: Any) -> tuple[Any, Any, Any]:
    """A context and two connected sockets without high-water marks."""
    context = module.Context()
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.set_hwm(0)
    b.set_hwm(0)
    a.bind("inproc://bench")
    b.connect("inproc://bench")
    return context, a, b


def _calls(module: Any, count: int) -> dict[str, float]:
    context, a, b = pair(module)

    def send() -> None:
        for _ in range(count):
            a.send(BODY)

    def recv() -> None:
        for _ in range(count):
            b.recv()

    def send_multipart() -> None:
        for _ in range(count):
            a.send_multipart([b"1", b"2", BODY])

    def recv_multipart() -> None:
        for _ in range(count):
            b.recv_multipart()

    def poll() -> None:
        for _ in range(count):
            poller.poll()

    poller = module.Poller()
    for sock in (a, b):
        poller.register(sock, zmq.POLLIN)
    calls = {"send": send, "ready recv": recv, "send_multipart, 3": send_multipart, "ready recv_multipart": recv_multipart}
    found = {what: timed(run, count) for what, run in calls.items()}
    a.send(BODY)
    found["Poller.poll, ready"] = timed(poll, count)
    a.close(0)
    b.close(0)
    context.term()
    return found


def _scope(limit: Callable[[float], Any], count: int) -> float:
    def run() -> None:
        for _ in range(count):
            with limit(5):
                pass

    return timed(run, count)


def rows(count: int) -> dict[str, dict[str, float]]:
    """One round: {what: {who: microseconds}}."""
    found: dict[str, dict[str, float]] = {}
    for name, module in MODULES.items():
        for what, took in _calls(module, count).items():
            found.setdefault(what, {})[name] = took
    found["with a limit: pass"] = {
        "gevent.Timeout": _scope(gevent.Timeout, count),
        "greensafe": _scope(greensafe.deadline, count),
    }
    return found
