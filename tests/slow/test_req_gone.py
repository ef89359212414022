"""A REQ whose peer goes: 10,000 times right after it has replied, and killed while requests are pending.

Run by `make slow`; the figures are printed (`-s`). The counts are asserted; the times only against a hang.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from helpers import LONG

import greensafe as zmq
from greensafe import Disconnected

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: Replies to be lost, or not.
ROUNDS = int(os.environ.get("GREENSAFE_ROUNDS", "10000"))

#: Servers to kill.
KILLS = 40

#: A plain pyzmq REP that answers one request and is gone: its socket is closed and its context terminated, by which the reply
#: has left. Then the next one, on an endpoint of its own: a request that reaches a server after its last answer is truly lost.
REPLY_AND_GO = """
import sys, zmq
for number in range(int(sys.argv[2])):
    context = zmq.Context()
    rep = context.socket(zmq.REP)
    rep.bind(sys.argv[1] if sys.argv[1].startswith("tcp") else f"{sys.argv[1]}{number}")
    print(rep.last_endpoint.decode(), flush=True)
    rep.send(b"re:" + rep.recv())
    rep.close()
    context.term()
"""

#: A plain pyzmq ROUTER that takes requests and never answers.
TAKE = """
import sys, zmq
router = zmq.Context().socket(zmq.ROUTER)
router.bind(sys.argv[1])
print(router.last_endpoint.decode(), flush=True)
taken = 0
while True:
    router.recv_multipart()
    taken += 1
    if taken == int(sys.argv[2]):
        print("taken", flush=True)
"""


@contextmanager
def _process(source: str, *args: str) -> Iterator[Any]:
    process = subprocess.Popen([sys.executable, "-c", source, *args], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _endpoint(transport: str, folder: Path) -> str:
    return f"ipc://{folder}/s" if transport == "ipc" else "tcp://127.0.0.1:*"


def _receive(req: Any) -> bytes | type[Disconnected] | None:
    try:
        return bytes(req.recv(timeout=LONG))
    except Disconnected:
        return Disconnected
    except zmq.Again:
        return None


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_reply_wins_over_the_end_that_follows_it(context: zmq.Context, tmp_path: Path, transport: str) -> None:
    """Every reply is delivered and no error raised, however soon after it the connection ends.

    In turn: the caller waits; it waits, and a hub that is blocked until all is over finds reply and end at once; it asks later.
    """
    lost = false = 0
    with _process(REPLY_AND_GO, _endpoint(transport, tmp_path), str(ROUNDS)) as server:
        endpoint = server.stdout.readline()
        for number in range(ROUNDS):
            with context.socket(zmq.REQ) as req:
                req.connect(endpoint.strip())
                req.send(b"%d" % number)
                waiter = None if number % 3 == 2 else gevent.spawn(_receive, req)
                if number % 3 == 0:
                    waiter.join()
                gevent.sleep(0)
                endpoint = server.stdout.readline()  # the next one's: this one is gone
                if waiter is None:
                    gevent.sleep(0.001)
                    waiter = gevent.spawn(_receive, req)
                outcome = waiter.get()
                lost += outcome is None
                false += outcome is Disconnected
                assert outcome in (None, Disconnected, b"re:%d" % number)
    print(f"\n{transport}: {ROUNDS} replies before the end: {lost} lost, {false} false errors")
    assert (lost, false) == (0, 0)


@pytest.mark.parametrize("pending", [1, 100])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_killed_while_requests_are_pending(context: zmq.Context, tmp_path: Path, transport: str, pending: int) -> None:
    """Every caller is told; the times from the kill to the error are printed."""
    took: list[float] = []
    for _ in range(KILLS if pending == 1 else KILLS // 10):
        with _process(TAKE, _endpoint(transport, tmp_path), str(pending)) as server:
            endpoint = server.stdout.readline().strip()
            reqs = [context.socket(zmq.REQ) for _ in range(pending)]
            for req in reqs:
                req.connect(endpoint)
                req.send(b"x")

            def wait(req: Any) -> float:
                with pytest.raises(Disconnected):
                    req.recv(timeout=LONG)
                return monotonic()

            waiters = [gevent.spawn(wait, req) for req in reqs]
            gevent.get_hub().threadpool.apply(server.stdout.readline)
            gevent.sleep(0.02)
            killed = monotonic()
            server.send_signal(signal.SIGKILL)
            gevent.joinall(waiters, timeout=LONG, raise_error=True)
            took += [waiter.get(block=False) - killed for waiter in waiters]
            for req in reqs:
                req.close(0)
    shown = [f"{1000 * value:.2f}" for value in (statistics.median(took), max(took))]
    print(f"\n{transport}, {pending} pending: told after {shown[0]} ms (median of {len(took)}), {shown[1]} ms at most")
