"""What do sockets cost on which nothing happens?

Each measurement is a process of its own, `python -m benchmarks.idle MODULE WAY COUNT SECONDS`: COUNT greenlets, each waiting on
a socket of its own by recv or by a Poller, and the main one asleep. It prints its milliseconds of CPU per second.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from typing import Any

import gevent
import zmq

from .sockets import MODULES

#: Descriptors that are not for sockets.
SPARE = 500

#: zmq.green's Poller is at its end here: it hands every descriptor to select(2), which knows 1024.
POLLED = 800


def _measure(module: Any, way: str, count: int, seconds: float) -> float:
    context = module.Context()
    context.set(zmq.MAX_SOCKETS, count + 1)
    begun = 0

    def wait() -> None:
        nonlocal begun
        sock = context.socket(zmq.DEALER)
        begun += 1
        if way == "recv":
            sock.recv()
        else:
            poller = module.Poller()
            poller.register(sock, zmq.POLLIN)
            poller.poll()

    waiting = [gevent.spawn(wait) for _ in range(count)]
    while begun < count:
        gevent.sleep(0.1)
    gevent.sleep(0.5)
    start = time.process_time()
    gevent.sleep(seconds)
    took = time.process_time() - start
    assert not any(greenlet.ready() for greenlet in waiting)
    return took / seconds * 1000


def _process(name: str, way: str, count: int, seconds: float) -> float:
    command = [sys.executable, "-m", "benchmarks.idle", name, way, str(count), str(seconds)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=300).stdout)


def rows(most: int, seconds: float) -> dict[str, dict[str, float]]:
    """{how many and how: {who: milliseconds of CPU per second}}; at most as many sockets as files may be open."""
    most = min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE)
    nothing = _process("greensafe", "recv", 0, seconds)
    found: dict[str, dict[str, float]] = {}
    for way, count, names in (
        ("recv", most, ["zmq.green", "greensafe"]),
        ("Poller.poll", min(most, POLLED), ["zmq.green", "greensafe"]),
        ("Poller.poll", most, ["greensafe"]),
    ):
        figures = {name: _process(name, way, count, seconds) for name in names}
        found.setdefault(f"{count} in {way}", {"none": nothing}).update(figures)
    return found


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(_measure(MODULES[sys.argv[1]], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])), flush=True)
    os._exit(0)  # nobody has to close thousands of sockets one by one
