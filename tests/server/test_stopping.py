"""What docs/operations.md says of stopping: a real process, with clients outside of it, that gets real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gevent
import pytest
from helpers import LONG, MS, running, wait_until

import greensafe as zmq
from greensafe import Client, RemoteError, move_on
from greensafe.server import stopping
from greensafe.server.stopping import POLL
from greensafe.testing import ManualClock

pytestmark = pytest.mark.usefixtures("limit")

PROGRAM = """
import logging, sys, gevent, gevent.event, greensafe

logging.basicConfig(level=logging.INFO)
go = gevent.event.Event()

def handler(request):
    match request.body:
        case b"go":
            go.set()
        case b"wait":
            go.wait()
        case b"never":
            gevent.sleep(3600)
    return request.body

limit, places = float(sys.argv[1]), int(sys.argv[2])
server = greensafe.Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=places)
server.start()
print(server.endpoint, flush=True)
server.serve_forever(stop_timeout=limit)
print("returned", server.state, flush=True)
"""

OWN = """
import signal, gevent, greensafe

go = gevent.event.Event()

def handler(request):
    if request.body == b"raise":
        signal.raise_signal(signal.SIGTERM)
    elif request.body == b"wait":
        go.wait()
    return request.body

server = greensafe.Server("tcp://127.0.0.1:0", handler, deadline=None)
signal.signal(signal.SIGTERM, lambda *_: server.stop())
signal.signal(signal.SIGUSR1, lambda *_: go.set())
server.start()
print(server.endpoint, flush=True)
while not server.closed:
    gevent.sleep(0.05)
print("returned", server.state, flush=True)
"""

SIGNALS = [signal.SIGTERM, signal.SIGINT]


class Service:
    """The process, and a client whose requests are in it."""

    def __init__(self, process: subprocess.Popen[str], client: Client, other: Client) -> None:
        self.process = process
        self.other = other
        self._client = client
        self.asked: list[gevent.Greenlet] = []

    def ask(self, *bodies: bytes) -> None:
        """Have them run, or wait for their turn: the server has said of each that it works on it."""
        self.asked += [gevent.spawn(self._client.request, body) for body in bodies]
        table = self._client._requester
        wait_until(lambda: len(table) == len(self.asked) and all(asked.is_heard for asked in table.asked()))

    def signal(self, number: int) -> None:
        """Send it, and wait until the client knows that the server drains."""
        self.process.send_signal(number)
        wait_until(lambda: self._client.stats.endpoints[0].is_draining)

    def end(self) -> list[str]:
        """Wait for the process's end, whose code has to be 0; what it has printed and logged."""
        assert self.process.wait(LONG) == 0
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        assert self.process.stdout.read() == "returned closed\n"
        return self.process.stderr.read().splitlines()

    @contextmanager
    def unrun(self) -> Iterator[Callable[[], None]]:
        """Two requests that have no turn: the plain client's is answered, the greensafe client's waits for the next server."""
        with zmq.Context() as context, context.socket(zmq.REQ) as req:
            req.connect(self.other.stats.endpoints[0].endpoint)
            req.send(b"x")
            waiting = gevent.spawn(self.other.request, b"x")
            wait_until(lambda: self.other.stats.endpoints[0].inflight)

            def check() -> None:
                answer = RemoteError.from_reply(req.recv())
                assert answer is not None
                assert answer.code == "UNAVAILABLE"
                wait_until(lambda: self.other.stats.waiting == 1)
                waiting.kill()

            yield check

    def codes(self) -> list[str]:
        """How the requests have ended: their bodies, or their errors' codes."""
        gevent.joinall(self.asked)
        return [each.exception.code if isinstance(each.exception, RemoteError) else each.get().decode() for each in self.asked]


@contextmanager
def _service(limit: float, places: int = 1000) -> Iterator[Service]:
    with (
        running([sys.executable, "-c", PROGRAM, str(limit), str(places)]) as (process, endpoint),
        Client(endpoint) as client,
        Client(endpoint) as other,
    ):
        yield Service(process, client, other)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_drains(number: int) -> None:
    """What runs, and what waits for its turn, is answered, and so is who asks meanwhile; then the process ends with code 0."""
    with _service(3600, places=2) as service:
        service.ask(b"wait", b"wait", b"x", b"x")
        service.signal(number)
        gevent.sleep(50 * MS)
        assert service.process.poll() is None
        late = gevent.spawn(service.other.request, b"y")
        wait_until(lambda: service.other.stats.endpoints[0].inflight)
        (first, second), service.asked = service.asked[:2], service.asked[2:]
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.connect(service.other.stats.endpoints[0].endpoint)
            first.kill()  # its place is free then
            dealer.send_multipart([b"", b"go"])
            assert dealer.recv_multipart(timeout=LONG) == [b"", b"go"]
        assert second.get() == b"wait"
        assert service.codes() == ["x", "x"]
        assert late.get() == b"y"
        (line,) = [line for line in service.end() if "stopped at" in line]
        assert line.startswith("INFO:greensafe.server:")
        assert "the last 0 of them" in line


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_drain(first: int, second: int) -> None:
    """At once: what runs and what waits for its turn is answered UNAVAILABLE, which is logged; the code is 0 all the same."""
    with _service(3600, places=2) as service:
        service.ask(b"never", b"never")
        with service.unrun() as waits:
            service.signal(first)
            gevent.sleep(50 * MS)
            assert service.process.poll() is None
            service.process.send_signal(second)
            assert service.codes() == ["UNAVAILABLE"] * 2
            waits()
        (line,) = [line for line in service.end() if "stopped at" in line]
        assert line.startswith("WARNING:greensafe.server:")
        assert "the last 4 of them UNAVAILABLE" in line


@pytest.mark.parametrize("number", SIGNALS)
def test_the_limit_runs_out(number: int) -> None:
    """What is not answered by then is answered UNAVAILABLE; the code is 0."""
    with _service(1000 * MS, places=2) as service:
        service.ask(b"never", b"never")
        with service.unrun() as waits:
            service.signal(number)
            assert service.codes() == ["UNAVAILABLE"] * 2
            waits()
        (line,) = [line for line in service.end() if "stopped at" in line]
        assert "the last 4 of them UNAVAILABLE" in line


class _Stopped:
    """One run of a server whose process is stopped as it begins to drain. Each look takes a `POLL`."""

    def __init__(self, clock: ManualClock) -> None:
        self.looks = 0
        self._clock = clock
        self._is_open = True

    def drain(self) -> None:
        self._clock.advance(3600.0)

    def is_open(self) -> bool:
        self.looks += 1
        self._clock.advance(POLL)
        return self._is_open

    def is_busy(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._is_open = False


def test_a_pause_of_its_own_is_no_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was stopped as it began to drain has heard nobody meanwhile: it listens as long as it would have."""
    clock = ManualClock(100.0)
    monkeypatch.setattr(stopping, "monotonic", clock)
    monkeypatch.setattr(stopping, "move_on", lambda seconds: move_on(0))
    run = _Stopped(clock)
    stop = stopping.Stop(run, 10 * POLL)
    wait_until(lambda: not run._is_open)
    assert 10 <= run.looks <= 13
    stop.end()


def test_without_requests_it_ends_soon() -> None:
    """Nobody waits for a limit when there is nothing to wait for."""
    with _service(3600) as service:
        assert service.other.request(b"x") == b"x"
        service.process.send_signal(signal.SIGTERM)
        service.end()


@pytest.mark.parametrize("where", ["hub", "handler"])
def test_a_signal_handler_of_the_programs_own(where: str) -> None:
    """It calls stop(), wherever it runs, in the hub or in a handler of the server: all is answered, and the process ends."""
    with running([sys.executable, "-c", OWN]) as (process, endpoint), Client(endpoint) as client, Client(endpoint) as other:
        service = Service(process, client, other)
        service.ask(b"wait")
        if where == "hub":
            process.send_signal(signal.SIGTERM)
        else:
            service.asked.append(gevent.spawn(client.request, b"raise"))
        wait_until(lambda: client.stats.endpoints[0].is_draining)
        process.send_signal(signal.SIGUSR1)
        assert service.codes() == ["wait", "raise"][: len(service.asked)]
        assert not service.end()
