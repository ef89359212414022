"""How long after the SIGKILL of a server are all of many requests that wait for it told, and what is gevent's part in that?

The gevent rows are the same number of greenlets in `hub.switch()`, each of which is woken from one callback and raises: by a
switch, as the Client does it, or by `throw`. Nothing else happens there, so nobody can be faster.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import gevent

import greensafe

WAITING = 1_000

#: A server that takes requests and answers none.
SILENT = """
import sys, time, zmq
sock = zmq.Context().socket(zmq.ROUTER)
sock.bind(sys.argv[1])
print(sock.last_endpoint.decode(), flush=True)
while True:
    sock.recv_multipart()
"""


def _bare(count: int, throws: bool) -> float:
    """Milliseconds from the first that is woken until the last has caught its exception."""
    hub = gevent.get_hub()
    waiting: list[gevent.Greenlet] = []
    told: list[float] = []
    start: list[float] = []

    def wait() -> None:
        waiting.append(gevent.getcurrent())
        try:
            error = hub.switch()
            raise error
        except greensafe.Disconnected:
            told.append(time.perf_counter())

    def wake() -> None:
        start.append(time.perf_counter())
        for greenlet in waiting:
            error = greensafe.Disconnected("the connection is gone")
            if throws:
                greenlet.throw(error)
            else:
                greenlet.switch(error)

    greenlets = [gevent.spawn(wait) for _ in range(count)]
    while len(waiting) < count:
        gevent.sleep(0.001)
    hub.loop.run_callback(wake)
    gevent.joinall(greenlets, raise_error=True)
    return (told[-1] - start[0]) * 1e3


def _killed(transport: str, count: int) -> float:
    """Milliseconds from the kill until the last caller has caught Disconnected."""
    told: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/s" if transport == "ipc" else "tcp://127.0.0.1:*"
        process = subprocess.Popen([sys.executable, "-c", SILENT, address], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with greensafe.Client(process.stdout.readline().strip().rstrip("\0")) as client:

            def ask() -> None:
                try:
                    client.request(b"x")
                except greensafe.Disconnected:
                    told.append(time.perf_counter())

            greenlets = [gevent.spawn(ask) for _ in range(count)]
            while sum(endpoint.inflight for endpoint in client.stats.endpoints) < count:
                gevent.sleep(0.001)
            gevent.sleep(0.05)
            start = time.perf_counter()
            process.kill()
            gevent.joinall(greenlets, raise_error=True)
        process.wait()
        process.stdout.close()
    return (told[-1] - start) * 1e3


def rows(count: int = WAITING) -> dict[str, dict[str, float]]:
    """One round: {what: {who: milliseconds}}."""
    found: dict[str, dict[str, float]] = {}
    for transport in ("tcp", "ipc"):
        who: dict[str, Callable[[], float]] = {
            "gevent, throw": lambda: _bare(count, True),
            "gevent, switch": lambda: _bare(count, False),
            "Client, SIGKILL": lambda transport=transport: _killed(transport, count),  # type: ignore[misc]
        }
        found[f"{count} waiting, {transport}"] = {name: measure() for name, measure in who.items()}
    return found
