"""Tests of greensafe.server.descriptors: a server for which no descriptor is left says so, and when it is over."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, run_python, wait_until

import greensafe as zmq
from greensafe import Client, Request, Server, hooks, supervise
from greensafe.hooks import DescriptorsExhausted
from greensafe.hub import every as _every
from greensafe.server import descriptors

pytestmark = pytest.mark.usefixtures("limit")

#: A server and a client that are connected, an idle green ROUTER whose events are collected, and two sockets that will connect.
EXHAUSTED = """
import os, resource, socket, time
import gevent
import greensafe as zmq
from greensafe.server import descriptors

descriptors.PERIOD = 0.005
records = []

def wait_until(predicate):
    with gevent.Timeout(60):
        while not predicate():
            gevent.sleep(0.001)

def spin():
    # The I/O thread tries to accept all the time.
    begin = time.process_time()
    wait_until(lambda: time.process_time() > begin + 0.1)

server = zmq.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=30, hooks=records.append)
server.start()
client = zmq.Client(server.endpoint, timeout=30)
client.request(b"1")
router = zmq.Context.instance().socket(zmq.ROUTER)
router.bind("tcp://127.0.0.1:*")
events = router.connection_events()
late = [socket.socket() for _ in range(2)]
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, hard))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
wait_until(lambda: not server.healthy)
for sock, endpoint in zip(late, (server.endpoint, router.last_endpoint.decode())):
    sock.connect(("127.0.0.1", int(endpoint.rsplit(":")[-1])))
spin()
print(server.healthy, server.stats.is_accepting, client.request(b"2"), len(events._events))
for fd in taken:
    os.close(fd)
wait_until(lambda: server.healthy)
for sock in late:
    sock.settimeout(30)
    print(len(sock.recv(10)))
print(server.stats.is_accepting, [type(each).__name__ for each in records if "Descr" in repr(each)])
for each in (client, server):
    each.close()
events.close()
router.close(0)
for sock in late:
    sock.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
def test_out_of_descriptors() -> None:
    """The server is not healthy, is told of once, and serves its client; nobody is flooded; then it accepts who had waited."""
    result = run_python(EXHAUSTED)
    told = "['DescriptorsExhausted', 'DescriptorsExhausted']"
    assert result.out == f"False False b'2' 0\n10\n10\nTrue {told}\n", result.err


class Supply:
    """Stands for the process's descriptors."""

    is_empty = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        monkeypatch.setattr(descriptors, "PERIOD", 2 * MS)
        monkeypatch.setattr(descriptors, "_problem", self._problem)

    def _problem(self, reserve: int) -> str | None:
        self.asked += 1
        return "no file descriptor is left (Too many open files)" if self.is_empty else None

    def pass_by(self) -> None:
        """Have it looked at a few times more."""
        end = self.asked + 3
        wait_until(lambda: self.asked >= end)


@pytest.fixture
def supply(monkeypatch: pytest.MonkeyPatch) -> Supply:
    return Supply(monkeypatch)


def test_it_is_said_once(context: zmq.Context, supply: Supply, caplog: pytest.LogCaptureFixture) -> None:
    """When it begins and when it is over, in the log, with what to do, and to hooks, with the limit and how long it was."""
    told: list[hooks.Record] = []
    with Server("tcp://127.0.0.1:0", lambda request: b"", deadline=LONG, hooks=told.append, context=context) as server:
        supply.pass_by()
        assert server.healthy
        supply.is_empty = True
        supply.pass_by()
        assert not server.healthy
        assert server.state == "started"
        supply.is_empty = False
        supply.pass_by()
        assert server.healthy
        endpoint = server.endpoint
    begin, end = [record for record in told if isinstance(record, DescriptorsExhausted)]
    assert begin.endpoint == end.endpoint == endpoint
    assert begin.limit == end.limit == descriptors._limit()
    assert begin.seconds is None
    assert end.seconds is not None
    assert end.seconds > 0
    first, second = [record for record in caplog.records if record.name == "greensafe.descriptors"]
    assert (first.levelno, second.levelno) == (logging.ERROR, logging.WARNING)
    assert "ulimit -n" in first.getMessage()
    assert first.__dict__["endpoint"] == second.__dict__["endpoint"] == endpoint


def test_the_end_of_a_server(context: zmq.Context, supply: Supply) -> None:
    """One that is stopped is not looked after, and starts healthy though it ended without a descriptor."""
    server = Server("tcp://127.0.0.1:0", lambda request: b"", deadline=LONG, context=context)
    server.start()
    supply.is_empty = True
    supply.pass_by()
    server.stop(0)
    asked = supply.asked
    assert server.healthy
    gevent.sleep(10 * MS)
    assert supply.asked == asked
    supply.is_empty = False
    with server:
        supply.pass_by()
        assert server.healthy


def test_over_ipc(context: zmq.Context, supply: Supply, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There libzmq ends the process when it cannot accept, and the log says so before."""
    with Server(f"ipc://{tmp_path}/s", lambda request: b"", deadline=LONG, context=context):
        supply.is_empty = True
        supply.pass_by()
    assert "aborts this process" in caplog.text


def test_over_inproc(context: zmq.Context, supply: Supply) -> None:
    """Nobody connects by a descriptor there, so nobody looks."""
    supply.is_empty = True
    with (
        Server("inproc://s", lambda request: request.body, deadline=LONG, context=context) as server,
        Client("inproc://s", context=context) as client,
    ):
        assert client.request(b"x") == b"x"
        gevent.sleep(10 * MS)
        assert server.healthy
    assert not supply.asked


def test_a_supervised_socket(context: zmq.Context, supply: Supply, caplog: pytest.LogCaptureFixture) -> None:
    """It has no hook, but a log."""

    def handler(request: Request) -> bytes:
        return request.body

    sock = context.socket(zmq.REP)
    sock.bind("tcp://127.0.0.1:*")
    serving = gevent.spawn(supervise, sock, handler, deadline=LONG)
    supply.pass_by()
    supply.is_empty = True
    supply.pass_by()
    supply.is_empty = False
    supply.pass_by()
    sock.close()
    serving.get()
    asked = supply.asked
    said = [record.levelname for record in caplog.records if record.name == "greensafe.descriptors"]
    assert said == ["ERROR", "WARNING"]
    gevent.sleep(10 * MS)
    assert supply.asked == asked


def test_in_a_forked_child(supply: Supply, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the parent's server is nobody's to look after."""
    told: list[hooks.Record] = []
    watch = descriptors.DescriptorWatch("tcp://s", told.append)
    supply.pass_by()
    supply.is_empty = True
    monkeypatch.setattr(_every, "generation", lambda: -1)
    wait_until(lambda: watch._every._timer is None)
    assert not told
    watch.close()


def test_what_is_not_a_want_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to open, a descriptor could be had all the same."""
    monkeypatch.setattr(os, "devnull", "/no/such/file")
    assert descriptors._problem(0) is None


@pytest.mark.parametrize("is_ipc", [True, False])
def test_the_reserve(monkeypatch: pytest.MonkeyPatch, is_ipc: bool) -> None:
    """By ipc the last ones are as good as none, and it is over when twice as many are left; by tcp each one counts."""
    limit = 1000
    lowest = limit - descriptors.RESERVE - 1
    monkeypatch.setattr(descriptors, "_limit", lambda: limit)
    monkeypatch.setattr(os, "open", lambda *_: lowest)
    monkeypatch.setattr(os, "close", lambda _: None)
    told: list[Any] = []
    with contextlib.closing(descriptors.DescriptorWatch("ipc:///s", told.append, is_ipc=is_ipc)) as watch:
        watch.check()
        assert not watch.is_exhausted
        lowest += 1
        watch.check()
        assert watch.is_exhausted is is_ipc
        lowest = limit - 2 * descriptors.RESERVE
        watch.check()
        assert watch.is_exhausted is is_ipc
        lowest -= 1
        watch.check()
        assert not watch.is_exhausted
    assert [record.seconds is None for record in told] == ([True, False] if is_ipc else [])


def test_the_reserve_of_a_low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a low limit it is an eighth."""
    monkeypatch.setattr(os, "close", lambda _: None)
    monkeypatch.setattr(descriptors, "_limit", lambda: 64)
    monkeypatch.setattr(os, "open", lambda *_: 56)
    assert descriptors._problem(descriptors.RESERVE) == "at most 8 file descriptors are left"
    monkeypatch.setattr(os, "open", lambda *_: 55)
    assert descriptors._problem(descriptors.RESERVE) is None


def test_repr() -> None:
    """It says how it is."""
    with contextlib.closing(descriptors.DescriptorWatch("tcp://s")) as watch:
        assert repr(watch) == "<DescriptorWatch of tcp://s fine>"
        watch.is_exhausted = True
        assert repr(watch) == "<DescriptorWatch of tcp://s exhausted>"
