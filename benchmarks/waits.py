"""What does it cost to wait for a message and to be woken?

Microseconds of CPU per round. On inproc both sides are in this process: two greenlets, for plain pyzmq two threads. On ipc the
other side is a process of its own, always the same bare pyzmq loop, and what is counted is this process alone, libzmq's I/O
thread included. Every recv and every poll finds nothing at first and sleeps.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.lock
import zmq

from . import servers
from .sockets import BODY, MODULES, pair, timed


class Echo:
    """A process that sends back what it receives, and a DEALER of each module that is connected to it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        endpoint = f"ipc://{self._folder.name}/s"
        command = [sys.executable, "-m", "benchmarks.servers", servers.KINDS[0], endpoint]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._contexts = {name: module.Context() for name, module in MODULES.items()}
        self.socks = {name: context.socket(zmq.DEALER) for name, context in self._contexts.items()}
        for sock in self.socks.values():
            sock.connect(endpoint)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        for name, sock in self.socks.items():
            sock.close(0)
            self._contexts[name].term()
        self._folder.cleanup()


def _together(module: Any, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Run both until they end: in threads, or in greenlets."""
    if module is zmq:
        thread = threading.Thread(target=first)
        thread.start()
        second()
        thread.join()
    else:
        gevent.joinall([gevent.spawn(first), gevent.spawn(second)], raise_error=True)


def _wait_and_wake(module: Any, count: int) -> float:
    """One side waits for each message, the other sends the next when it has been taken."""
    context, a, b = pair(module)
    taken = (threading if module is zmq else gevent.lock).Semaphore(0)

    def receive() -> None:
        for _ in range(count):
            b.recv()
            taken.release()

    def send() -> None:
        for _ in range(count):
            a.send(BODY)
            taken.acquire()

    return _timed(module, receive, send, context, count)


def _ping_pong(module: Any, count: int) -> float:
    context, a, b = pair(module)

    def pong() -> None:
        for _ in range(count):
            b.send(b.recv())

    def ping() -> None:
        for _ in range(count):
            a.send(BODY)
            a.recv()

    return _timed(module, pong, ping, context, count)


def _timed(module: Any, first: Callable[[], None], second: Callable[[], None], context: Any, count: int) -> float:
    took = timed(lambda: _together(module, first, second), count)
    context.destroy(0)
    return took


def _to_echo(sock: Any, wait: Callable[[], object], count: int) -> tuple[float, float]:
    """Microseconds of CPU and of time per round trip to the other process."""

    def run() -> None:
        for _ in range(count):
            sock.send(BODY)
            wait()
            sock.recv()

    start = time.perf_counter()
    cpu = timed(run, count)
    return cpu, (time.perf_counter() - start) / count * 1e6


def _bare_hub(sock: Any, count: int) -> tuple[float, float]:
    """The same with a plain socket, a watcher and the hub, and nothing else: what any cooperative recv costs at least."""
    hub = gevent.get_hub()
    watcher = hub.loop.io(sock.FD, 1)
    watcher.start(gevent.getcurrent().switch)

    def wait() -> None:
        while not sock.get(zmq.EVENTS) & 1:
            hub.switch()

    try:
        return _to_echo(sock, wait, count)
    finally:
        watcher.stop()
        watcher.close()


def rows(echo: Echo, count: int) -> dict[str, dict[str, float]]:
    """One round: {what: {who: microseconds}}."""
    found: dict[str, dict[str, float]] = {}
    bare_cpu, bare_time = _bare_hub(echo.socks["pyzmq"], count)
    for name, module in MODULES.items():
        sock, poller = echo.socks[name], module.Poller()
        poller.register(sock, zmq.POLLIN)
        cpu, took = _to_echo(sock, lambda: None, count)
        polled, _ = _to_echo(sock, poller.poll, count)
        figures = {
            "wait and wake, inproc": _wait_and_wake(module, count),
            "ping-pong inproc": _ping_pong(module, count),
            "ping-pong ipc": cpu,
            "ping-pong ipc, time": took,
            "ping-pong ipc, polled": polled,
        }
        for what, figure in figures.items():
            found.setdefault(what, {})[name] = figure
        if module is zmq:
            found["ping-pong ipc"]["bare hub"] = bare_cpu
            found["ping-pong ipc, time"]["bare hub"] = bare_time
    return found
