"""Tests of greensafe.server.systemd: a real process tells a real datagram socket that stands where systemd's would."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gevent
import pytest
from helpers import LONG, MS, ROOT, wait_until

from greensafe import Client, Server
from greensafe.server import systemd

pytestmark = [
    pytest.mark.usefixtures("limit"),
    pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no AF_UNIX sockets"),
]

#: What WATCHDOG_USEC says, in seconds.
WATCHDOG = 200 * MS

PROGRAM = f"""
import os, socket, sys, time, gevent, greensafe

def mark(state):
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state, "\\0" + address[1:] if address[0] == "@" else address)

def handler(request):
    if request.body == b"block":
        mark(b"BLOCKED")
        time.sleep({5 * WATCHDOG})
        mark(b"FREE")
    while request.body == b"zombie":
        try:
            gevent.sleep(60)
        except BaseException:
            pass
    return request.body

def tell_unhealthy():
    while server.healthy:
        gevent.sleep(0.001)
    mark(b"UNHEALTHY")
    gevent.sleep({5 * WATCHDOG})
    mark(b"STILL")

server = greensafe.Server("tcp://127.0.0.1:0", handler, deadline=0.05, grace=0.05, max_zombies=0, blocked_after=None)
server.start()
print(server.endpoint, flush=True)
gevent.spawn(tell_unhealthy)
server.serve_forever(stop_timeout=0.1)
"""


class Told:
    """What has come in so far."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.states: list[bytes] = []

    def read(self) -> list[bytes]:
        while True:
            try:
                self.states.append(self._sock.recv(4096))
            except BlockingIOError:
                return self.states

    def wait_for(self, state: bytes, count: int = 1) -> None:
        wait_until(lambda: self.read().count(state) >= count)


@pytest.fixture(params=["path", "abstract"])
def told(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    """A socket as systemd has one, and NOTIFY_SOCKET set to it."""
    if request.param == "path":
        address = name = str(tmp_path / "notify")
    elif sys.platform == "linux":
        address, name = f"@greensafe-{os.getpid()}", f"\0greensafe-{os.getpid()}"
    else:
        pytest.skip("abstract sockets are Linux's")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.setblocking(False)
        yield Told(sock)


@contextmanager
def _service(**environment: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """The service, and a client of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert process.stdout is not None
    try:
        with Client(process.stdout.readline().strip()) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _usec() -> dict[str, str]:
    return {"WATCHDOG_USEC": str(int(WATCHDOG * 1_000_000))}


def test_a_life(told: Told) -> None:
    """READY once it serves, pings while it does, STOPPING on SIGTERM, and nothing after it but pings."""
    with _service(**_usec()) as (process, client):
        told.wait_for(b"READY=1")
        assert client.request(b"x") == b"x"
        told.wait_for(b"WATCHDOG=1", 3)
        process.send_signal(signal.SIGTERM)
        told.wait_for(b"STOPPING=1")
        assert process.wait(LONG) == 0
    states = told.read()
    assert states[0] == b"READY=1"
    assert set(states) == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}
    assert states.count(b"READY=1") == states.count(b"STOPPING=1") == 1


def _fill_queue() -> None:
    """As many datagrams as fit into the queue of the socket at NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, pytest.raises(BlockingIOError):
        other.setblocking(False)
        address = os.environ["NOTIFY_SOCKET"]
        while True:
            other.sendto(b"OTHER=1", "\0" + address[1:] if address.startswith("@") else address)


def test_ready_arrives_though_the_queue_was_full(told: Told) -> None:
    """While systemd takes nothing in, READY waits, then STOPPING behind it; each is said once in the end."""
    _fill_queue()
    ran: list[str] = []

    def run(loop: str, act: Callable[[], object]) -> None:
        ran.append(loop)
        act()

    with systemd.notifier(_well, run) as found:
        assert found is not None
        wait_until(lambda: len(ran) > 1)
        found.stopping()
        told.wait_for(b"STOPPING=1")
        count = len(ran)
    assert [state for state in told.read() if state != b"OTHER=1"] == [b"READY=1", b"STOPPING=1"]
    assert len(ran) == count


def test_what_could_not_be_said_at_all_is_logged(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    """If systemd's queue is full until the end."""
    _fill_queue()
    with systemd.notifier(_well, _run):
        pass
    assert [record.getMessage() for record in caplog.records] == ["systemd was not told READY=1 STOPPING=1: its queue is full"]


def test_what_is_not_said_yet_is_not_a_forked_childs(told: Told) -> None:
    """It neither says it nor goes on trying."""
    _fill_queue()
    with systemd.notifier(_well, _run) as found:
        assert found is not None
        assert found._again is not None
        found._pid = 0  # another process's
        told.read()
        wait_until(lambda: found._again is None)
        assert b"READY=1" not in told.read()


def test_no_ping_while_the_hub_is_blocked(told: Told) -> None:
    """Between a handler's first and last blocked moment, several periods apart, nothing is sent; afterwards it goes on."""
    with _service(**_usec()) as (_, client):
        told.wait_for(b"WATCHDOG=1")
        asked = gevent.spawn(client.request, b"block")
        told.wait_for(b"FREE")
        states = told.read()
        assert states.index(b"FREE") == states.index(b"BLOCKED") + 1
        told.wait_for(b"WATCHDOG=1", states.count(b"WATCHDOG=1") + 2)
        asked.join()


def test_no_ping_from_an_unhealthy_server(told: Told) -> None:
    """When more handlers than max_zombies have survived a kill there are no more pings."""
    with _service(**_usec()) as (_, client):
        told.wait_for(b"WATCHDOG=1")
        gevent.spawn(client.request, b"zombie").join()
        told.wait_for(b"STILL")
        states = told.read()
        assert states.index(b"STILL") == states.index(b"UNHEALTHY") + 1


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}]
)
def test_no_ping_that_nobody_wants(
    told: Told, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, environment: dict[str, str]
) -> None:
    """Without WATCHDOG_USEC, with a wrong one, or with another process's WATCHDOG_PID there are none; the rest works."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with systemd.notifier(_well, _run) as found:
        assert found is not None
        assert found._timer is None
        assert told.read() == [b"READY=1"]
        found.stopping()
        found.stopping()
    assert told.read() == [b"READY=1", b"STOPPING=1"]
    assert ("no number" in caplog.text) is (environment.get("WATCHDOG_USEC") in ("soon", "0"))


def test_pings_for_this_process(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """WATCHDOG_PID may name this process; what is_healthy says counts each time."""
    monkeypatch.setenv("WATCHDOG_USEC", str(int(2 * MS * 1_000_000)))
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    asked: list[bool] = []

    def is_healthy() -> bool:
        asked.append(len(asked) > 3)
        return asked[-1]

    with systemd.notifier(is_healthy, _run):
        told.wait_for(b"WATCHDOG=1")
        assert len(asked) > 3


def test_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NOTIFY_SOCKET is not set or empty nothing is opened."""
    for change in (lambda: monkeypatch.delenv("NOTIFY_SOCKET", raising=False), lambda: monkeypatch.setenv("NOTIFY_SOCKET", "")):
        change()
        with systemd.notifier(_well, _run) as found:
            assert found is None


@pytest.mark.parametrize("address", ["{tmp}/nobody", "vsock:2:1234", "/" + "x" * 200])
def test_errors_hurt_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    """Where nobody listens, or the address is none, the server serves all the same; it is logged, once."""
    caplog.set_level(logging.WARNING, "greensafe.systemd")
    monkeypatch.setenv("NOTIFY_SOCKET", address.format(tmp=tmp_path))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(2 * MS * 1_000_000)))
    server = Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=LONG)
    runner = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    with Client(str(server.endpoint)) as client:
        for _ in range(5):
            assert client.request(b"x") == b"x"
            gevent.sleep(2 * MS)
    server.stop()
    runner.get()
    assert len([record for record in caplog.records if record.name == "greensafe.systemd"]) == 1


def _well() -> bool:
    return True


def _run(loop: str, act: Callable[[], object]) -> None:
    act()
