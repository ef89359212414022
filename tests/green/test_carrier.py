"""Tests of greensafe.green._carrier: a REQ and what happens to its peer, with real peers, really killed."""

from __future__ import annotations

import gc
import signal
import socket as net
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import gevent.socket
import pytest
import zmq as plain
from gevent.monkey import get_original
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Disconnected, OperationTimeout, PeerError, PeerSilent, Refused, Unreachable
from greensafe.green._carrier import Carrier

pytestmark = pytest.mark.usefixtures("limit")

#: Heartbeats of a test, in milliseconds: 10 and 30 units.
IVL, TIMEOUT = int(10_000 * MS), int(30_000 * MS)

#: A plain pyzmq server that says when it has a request. What it does with "hold": nothing.
SERVER = """
import sys, zmq
rep = zmq.Context().socket(zmq.REP)
rep.bind(sys.argv[1])
print(rep.last_endpoint.decode(), flush=True)
while True:
    body = rep.recv()
    print(body.decode(), flush=True)
    if body == b"hold":
        sys.stdin.read()
    rep.send(b"re:" + body)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, endpoint: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, endpoint], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        )
        self.endpoint = self.line()

    def line(self) -> str:
        assert self._process.stdout is not None
        line: str = gevent.get_hub().threadpool.apply(self._process.stdout.readline)
        return line.strip()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[[str], Process]]:
    """Starts servers, which are killed afterwards."""
    started: list[Process] = []

    def make(endpoint: str) -> Process:
        started.append(Process(endpoint))
        return started[-1]

    yield make
    for each in started:
        each.end()


@pytest.fixture(params=["tcp", "ipc"])
def wire(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An endpoint to bind to, on a transport that has connections."""
    return {"tcp": "tcp://127.0.0.1:*", "ipc": f"ipc://{tmp_path}/s"}[request.param]


@pytest.fixture(params=["tcp", "ipc"])
def place(request: pytest.FixtureRequest, tmp_path: Path, port: int) -> str:
    """An endpoint for a server that comes and goes."""
    return {"tcp": f"tcp://127.0.0.1:{port}", "ipc": f"ipc://{tmp_path}/s"}[request.param]


@pytest.fixture
def req(context: zmq.Context) -> Any:
    """A REQ."""
    return context.socket(zmq.REQ)


def _bound(context: zmq.Context, kind: int, endpoint: str) -> tuple[Any, str]:
    sock = context.socket(kind)
    sock.linger = 1000
    sock.bind(endpoint)
    return sock, sock.last_endpoint.decode().rstrip("\0")


def test_a_limit_that_was_slept_away(context: zmq.Context, req: Any) -> None:
    """A process that was stopped, or blocked, waits for what libzmq tells once more, and not again and again."""
    _, endpoint = _bound(context, zmq.REP, "tcp://127.0.0.1:*")
    req.connect(endpoint)
    carrier = req._lockstep.carrier
    carrier._start_timer(LONG)
    for is_last in (False, True):
        carrier._timer_at -= 3 * LONG
        carrier.on_timer(carrier._timer)
        assert (carrier._timer is None) is is_last


@pytest.mark.parametrize("how", ["recv", "recv_multipart", "recv_json", "recv_into", "poll", "Poller", "select"])
def test_killed_while_the_reply_is_waited_for(start: Callable[[str], Process], place: str, req: Any, how: str) -> None:
    """Every way to wait ends with Disconnected, and the same socket asks the restarted server."""
    server = start(place)
    req.connect(server.endpoint)
    for number in range(2):
        req.send(b"hold")
        assert server.line() == "hold"
        waiter = gevent.spawn(_wait, req, how)
        gevent.sleep(0)
        server.signal(signal.SIGKILL)
        error = waiter.get()
        assert (type(error), error.endpoint, error.maybe_executed) == (Disconnected, server.endpoint, True)
        server.end()
        server = start(server.endpoint)
        body = b"%d" % number
        req.send(body)
        assert req.recv() == b"re:" + body
        server.line()


def _wait(req: Any, how: str) -> PeerError:
    if how == "poll":
        assert req.poll() == zmq.POLLIN
    elif how == "Poller":
        poller = zmq.Poller()
        poller.register(req, zmq.POLLIN)
        assert poller.poll() == [(req, zmq.POLLIN)]
    elif how == "select":
        assert zmq.select([req], [], []) == ([req], [], [])
    with pytest.raises(PeerError) as caught:
        if how == "recv_into":
            req.recv_into(bytearray(10))
        elif hasattr(req, how) and how != "poll":
            getattr(req, how)()
        else:
            req.recv(zmq.NOBLOCK)
    return caught.value


@pytest.mark.parametrize("how", ["recv", "NOBLOCK", "poll(0)"])
def test_gone_before_recv_is_called(context: zmq.Context, endpoint: str, req: Any, how: str) -> None:
    """The loss is known already, over inproc as well; it is told once, and the socket sends again."""
    rep, address = _bound(context, zmq.REP, endpoint)
    req.connect(address)
    req.send(b"x")
    assert rep.recv() == b"x"
    rep.close(0)
    if how == "poll(0)":
        wait_until(lambda: req.poll(0))
    if how == "NOBLOCK":
        error = wait_until(lambda: _nonblocking(req))
    else:
        with pytest.raises(Disconnected) as caught:
            req.recv()
        error = caught.value
    assert isinstance(error, Disconnected)
    assert error.endpoint == address
    with pytest.raises(zmq.ZMQError) as again:
        req.recv()
    assert again.value.errno == zmq.EFSM
    req.send(b"y")
    assert not req.poll(0)


def _nonblocking(req: Any) -> PeerError | None:
    try:
        req.recv(zmq.NOBLOCK)
    except PeerError as error:
        return error
    except zmq.Again:
        return None
    raise AssertionError("a message came")


def test_inproc_wakes_who_waits(context: zmq.Context, req: Any) -> None:
    """The bound peer closes while recv waits, and the edge was consumed by another call."""
    rep, address = _bound(context, zmq.REP, "inproc://gone")
    req.connect(address)
    req.send(b"x")
    assert rep.recv() == b"x"
    waiters = [gevent.spawn(_wait, req, "recv")]
    gevent.sleep(0)
    rep.close(0)
    wait_until(lambda: req.getsockopt(zmq.EVENTS) is not None and waiters[0].ready())
    assert isinstance(waiters[0].get(), Disconnected)


def test_inproc_stays_a_plain_req(context: zmq.Context, req: Any) -> None:
    """The look for the peer changes neither the bytes nor the lockstep: sending twice is EFSM, before and after waiting."""
    router, address = _bound(context, zmq.ROUTER, "inproc://plain")
    req.connect(address)
    for body in (b"1", b"2"):
        req.send(body)
        with pytest.raises(OperationTimeout):
            req.recv(timeout=1 * MS)
        assert req.poll(0) == 0
        req._lockstep.is_interrupted = False  # or the next send would begin anew
        with pytest.raises(zmq.ZMQError) as caught:
            req.send(b"twice")
        assert caught.value.errno == zmq.EFSM
        route, *rest = router.recv_multipart()
        assert rest == [b"", body]
        router.send_multipart([route, b"", body])
        assert req.recv() == body
    assert router.poll(0) == 0


def test_relaxed_by_the_program_stays_relaxed(context: zmq.Context, req: Any) -> None:
    """A program that has set REQ_RELAXED itself may send twice, after a look and after a reset too."""
    router, address = _bound(context, zmq.ROUTER, "inproc://relaxed")
    req.setsockopt(zmq.REQ_RELAXED, 1)
    req.connect(address)
    req.send(b"1")
    assert req.poll(0) == 0
    req.send(b"2")
    req.reset()
    req.send(b"3")
    req.send(b"4")
    assert router.recv_multipart()[1:] == [b"", b"1"]


def test_the_reply_comes_first(context: zmq.Context, endpoint: str, req: Any) -> None:
    """A reply that was sent before the end is delivered; the end does not matter then."""
    for number in range(20):
        # libzmq gives a name back a moment after its socket was closed.
        rep, address = wait_until(lambda: _bound_if_free(context, endpoint))
        req.connect(address)
        req.send(b"%d" % number)
        rep.send(b"re:" + rep.recv())
        rep.close(1000)
        if number % 2:
            wait_until(lambda: req.poll(0))
            gevent.sleep(2 * MS)
        assert req.recv() == b"re:%d" % number
        req.disconnect(address)


def test_on_disconnect_decides(context: zmq.Context, wire: str) -> None:
    """What the hook returns is what the call returns, whichever call; it is called once, and the socket can send."""
    told = []

    class Socket(zmq.Socket):
        def on_disconnect(self, error: PeerError) -> Any:
            told.append(error)
            return None

    rep, address = _bound(context, zmq.REP, wire)
    with Socket(context, zmq.REQ) as req:
        req.linger = 0
        req.connect(address)
        for call in (req.recv, req.recv_json, req.recv_multipart, req.recv_pyobj, req.recv_string):
            req.send(b"x")
            rep.recv()
            rep.close(0)
            assert call() is None
            wait_until(lambda: _rebound(context, address))
            rep = context.kept[-1]
    assert [type(error) for error in told] == [Disconnected] * 5


def _bound_if_free(context: Any, endpoint: str) -> tuple[Any, str] | None:
    try:
        return _bound(context, zmq.REP, endpoint)
    except zmq.ZMQError:
        context.kept.pop().close()
        return None


def _rebound(context: Any, address: str) -> bool:
    return _bound_if_free(context, address) is not None


def test_several_endpoints(context: zmq.Context, req: Any) -> None:
    """Only when none is left."""
    (a, first), (b, second) = (_bound(context, zmq.REP, "tcp://127.0.0.1:*") for _ in range(2))
    with req.connection_events() as events:
        req.connect(first)
        req.connect(second)
        while [events.get(timeout=LONG).kind for _ in range(6)].count(zmq.Event.HANDSHAKE_SUCCEEDED) != 2:
            raise AssertionError("other events came")
        req.send(b"x")
        waiter = gevent.spawn(_wait, req, "recv")
        ready = wait_until(lambda: next((rep for rep in (a, b) if rep.poll(0)), None))
        ready.close(0)
        while events.get(timeout=LONG).kind != zmq.Event.DISCONNECTED:
            pass
        gevent.sleep(5 * MS)
        assert not waiter.ready()
        (b if ready is a else a).close(0)
        assert isinstance(waiter.get(), Disconnected)


def test_a_request_waits_for_who_is_not_there_yet(context: zmq.Context, place: str, req: Any) -> None:
    """Nobody being there, or hanging up before the handshake, is not an error: the request waits."""
    req.setsockopt(zmq.RECONNECT_IVL, 1)
    with req.connection_events() as events:
        req.connect(place)
        req.send(b"early")
        waiter = gevent.spawn(req.recv)
        while events.get(timeout=LONG).kind != zmq.Event.CONNECT_RETRIED:
            pass
    wait_until(lambda: _rebound(context, place))
    rep = context.kept[-1]
    rep.send(b"re:" + rep.recv())
    assert waiter.get() == b"re:early"


def test_one_who_hangs_up_at_once_is_nobody(req: Any) -> None:
    """Such as a load balancer with nobody behind it, or a web server."""
    with _listening(lambda connection: connection.close()) as (address, seen):
        req.setsockopt(zmq.RECONNECT_IVL, 1)
        req.connect(address)
        req.send(b"x")
        waiter = gevent.spawn(_wait, req, "recv")
        wait_until(lambda: len(seen) > 5)
        assert not waiter.ready()
        waiter.kill()


class _listening:
    """Somebody who is not libzmq, in greenlets."""

    def __init__(self, behave: Callable[[Any], object]) -> None:
        self._sock = gevent.socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self._sock.listen(5)
        self._behave = behave
        self._seen: list[Any] = []

    def _run(self) -> None:
        while True:
            connection, _ = self._sock.accept()
            self._seen.append(connection)
            self._behave(connection)

    def __enter__(self) -> tuple[str, list[Any]]:
        self._greenlet = gevent.spawn(self._run)
        return f"tcp://127.0.0.1:{self._sock.getsockname()[1]}", self._seen

    def __exit__(self, *args: object) -> None:
        self._greenlet.kill()
        self._sock.close()
        for connection in self._seen:
            connection.close()


def _zmtp2(connection: Any) -> None:
    """Greet as a ZMTP 2.0 ROUTER and read the request."""
    connection.sendall(b"\xff" + b"\0" * 7 + b"\x01\x7f" + b"\x01" + b"\x06" + b"\0\0")
    got = b""
    while b"request" not in got:
        got += connection.recv(1000)


def test_a_zmtp_2_peer_that_dies(req: Any) -> None:
    """libzmq never reports its handshake; its end is told all the same."""
    requested = []

    def behave(connection: Any) -> None:
        _zmtp2(connection)
        requested.append(connection)

    with _listening(behave) as (address, _):
        req.connect(address)
        req.send(b"request")
        waiter = gevent.spawn(_wait, req, "recv")
        wait_until(lambda: requested)
        gevent.sleep(0.3)  # longer than YOUNG, which is not scaled
        requested[0].shutdown(net.SHUT_RDWR)
        requested[0].close()
        assert isinstance(waiter.get(), Disconnected)


def _greet(connection: Any) -> None:
    """Greet as a ZMTP 3.0 ROUTER and read the request."""
    connection.sendall(b"\xff" + b"\0" * 8 + b"\x7f\x03\0NULL" + b"\0" * 48)
    connection.sendall(b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06ROUTER")
    got = b""
    while b"request" not in got:
        got += connection.recv(1000)


def _reply_and_garbage(connection: Any) -> None:
    """Answer the request with a valid reply and a message that a REQ's session rejects, at once."""
    _greet(connection)
    connection.sendall(b"\x01\0" + b"\0\x05reply" + b"\0\x01x")


def test_a_reply_with_garbage_behind_it(context: zmq.Context) -> None:
    """The reply is delivered, though libzmq reports the end of the connection before it hands the reply over.

    Looked for without a pause, so that the report is read as soon as it is there; the peer is in a thread of its own.
    """
    rounds = 300
    with net.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)

        def serve() -> None:
            for _ in range(rounds):
                connection, _address = listener.accept()
                _reply_and_garbage(connection)
                connection.close()

        thread = get_original("threading", "Thread")(target=serve, daemon=True)
        thread.start()
        for _ in range(rounds):
            # Another socket each time: a request that is sent while libzmq ends the connection is truly lost.
            with context.socket(zmq.REQ) as req, gevent.Timeout(LONG, AssertionError("a reply did not come")):
                req.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
                req.send(b"request")
                assert _spinning(req) == b"reply"
        wait_until(lambda: not thread.is_alive())


def _spinning(req: Any) -> bytes:
    """Try without a pause, but for a turn of the hub now and then: only there can a limit end this."""
    while True:
        for _ in range(1000):
            try:
                return bytes(req.recv(zmq.NOBLOCK))
            except zmq.Again:
                pass
        gevent.sleep(MS)


@pytest.mark.parametrize("end", [b"\0\x01x", 50 * b"\xff"], ids=["rejected", "not ZeroMQ"])
def test_a_loop_that_never_turns_the_hub_is_told(context: zmq.Context, end: bytes) -> None:
    """Where no event follows the end of the connection, a REQ that only tries is told of its loss by the clock."""
    with net.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)

        def serve() -> None:
            connection, _address = listener.accept()
            with connection:
                _greet(connection)
                connection.sendall(end)

        thread = get_original("threading", "Thread")(target=serve, daemon=True)
        thread.start()
        with context.socket(zmq.REQ) as req:
            req.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
            req.send(b"request")
            until = monotonic() + LONG
            with pytest.raises(Disconnected):
                while monotonic() < until:
                    with suppress(zmq.Again):
                        req.recv(zmq.NOBLOCK)
        wait_until(lambda: not thread.is_alive())


def test_sending_while_libzmq_ends_the_connection(req: Any) -> None:
    """Whatever the moment, a request is answered, or its caller told; none waits for ever, be it to send."""
    with _listening(_reply_and_garbage) as (address, _):
        req.connect(address)
        outcomes = set()
        for number in range(100):
            req.send(b"request")
            try:
                outcomes.add(req.recv())
            except Disconnected:
                outcomes.add(b"told")
            gevent.sleep(number % 5 * MS)
        assert outcomes <= {b"reply", b"told"}


@pytest.mark.parametrize("kind", [zmq.PUB, zmq.PULL])
def test_the_wrong_socket_type(context: zmq.Context, req: Any, kind: int) -> None:
    """Refused, each time anew, and nothing was executed."""
    _, address = _bound(context, kind, "tcp://127.0.0.1:*")
    req.connect(address)
    for _ in range(3):
        req.send(b"x")
        with pytest.raises(Refused) as caught:
            req.recv()
        assert (caught.value.endpoint, caught.value.maybe_executed) == (address, False)


def test_a_server_that_wants_curve(context: zmq.Context, req: Any) -> None:
    """Another mechanism is Refused; so it is when it happened before the request was sent."""
    server = context.socket(zmq.ROUTER)
    server.curve_publickey, server.curve_secretkey = plain.curve_keypair()
    server.curve_server = True
    server.bind("tcp://127.0.0.1:*")
    with req.connection_events() as events:
        req.connect(server.last_endpoint.decode())
        while events.get(timeout=LONG).kind != zmq.Event.DISCONNECTED:
            pass
    req.send(b"x")
    with pytest.raises(Refused):
        req.recv()


def test_a_peer_that_talks_garbage_after_the_handshake(context: zmq.Context, req: Any) -> None:
    """A DEALER whose reply has no delimiter: libzmq ends the session and never tries again; told, and connected anew."""
    router, address = _bound(context, zmq.ROUTER, "tcp://127.0.0.1:*")
    req.connect(address)
    for body in (b"1", b"2"):
        req.send(body)
        route, *rest = router.recv_multipart()
        assert rest == [b"", body]
        router.send_multipart([route, b"no delimiter"])
        with pytest.raises(Disconnected):
            req.recv()


def test_frozen(start: Callable[[str], Process], place: str, req: Any) -> None:
    """With HEARTBEAT_IVL a stopped process is PeerSilent; a killed one stays Disconnected; without it the wait goes on."""
    server = start(place)
    req.setsockopt(zmq.HEARTBEAT_IVL, IVL)
    req.setsockopt(zmq.HEARTBEAT_TIMEOUT, TIMEOUT)
    req.connect(server.endpoint)
    req.send(b"hold")
    assert server.line() == "hold"
    server.signal(signal.SIGSTOP)
    error = _wait(req, "recv")
    assert isinstance(error, PeerSilent)
    assert (error.silent, error.endpoint, error.maybe_executed) == ("process", server.endpoint, True)
    server.end()
    server = start(server.endpoint)
    req.send(b"hold")
    assert server.line() == "hold"
    gevent.sleep(1.5 * TIMEOUT / 1000)
    server.signal(signal.SIGKILL)
    assert type(_wait(req, "recv")) is Disconnected


def test_frozen_without_heartbeats(start: Callable[[str], Process], req: Any) -> None:
    """Nothing is sent to a peer that the program did not ask for, so a stopped one is waited for."""
    server = start("tcp://127.0.0.1:*")
    req.connect(server.endpoint)
    req.send(b"hold")
    assert server.line() == "hold"
    server.signal(signal.SIGSTOP)
    with pytest.raises(OperationTimeout):
        req.recv(timeout=100 * MS)


def test_one_that_has_bound_is_not_told(context: zmq.Context, req: Any) -> None:
    """Nobody knows which peer carries its request."""
    rep = context.socket(zmq.REP)
    req.bind("tcp://127.0.0.1:*")
    rep.connect(req.last_endpoint.decode())
    req.send(b"x")
    assert rep.recv() == b"x"
    rep.close(0)
    with pytest.raises(OperationTimeout):
        req.recv(timeout=20 * MS)


def test_other_types_are_not_told(context: zmq.Context, wire: str) -> None:
    """A DEALER waits on while peers come and go, and has no monitor."""
    rep, address = _bound(context, zmq.REP, wire)
    dealer = context.socket(zmq.DEALER)
    dealer.connect(address)
    dealer.send_multipart([b"", b"x"])
    rep.recv()
    rep.close(0)
    with pytest.raises(OperationTimeout):
        dealer.recv(timeout=20 * MS)
    assert dealer._sharing is None


def test_without_a_monitor_the_socket_works(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many sockets for another monitor: counted, logged once, and everything else goes on."""
    monkeypatch.setattr(Carrier, "unmonitored", 0)
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 2)  # six of libzmq's
        others = [context.socket(zmq.PAIR) for _ in range(2)]
        with context.socket(zmq.REP) as rep, context.socket(zmq.REQ) as req, context.socket(zmq.REQ) as second:
            rep.bind("tcp://127.0.0.1:*")
            for each in (req, second):
                each.connect(rep.last_endpoint.decode())
                each.send(b"x")
                rep.send(b"re:" + rep.recv())
                assert each.recv() == b"re:x"
        for each in others:
            each.close()
    assert Carrier.unmonitored == 2
    assert len([record for record in caplog.records if "will not learn of disconnects" in record.message]) == 1


def test_a_send_after_the_loss_begins_anew(context: zmq.Context, wire: str, req: Any) -> None:
    """A program that sends again instead of receiving gets no EFSM, and the old request is gone."""
    rep, address = _bound(context, zmq.REP, wire)
    req.connect(address)
    req.send(b"old")
    assert rep.recv() == b"old"
    rep.close(0)
    wait_until(lambda: req.poll(0))
    req.send(b"new")
    wait_until(lambda: _rebound(context, address))
    rep = context.kept[-1]
    assert rep.recv() == b"new"
    rep.send(b"re:new")
    assert req.recv() == b"re:new"


def test_a_dropped_req_is_collected_at_once(context: zmq.Context, wire: str) -> None:
    """No reference cycle: without the collector the socket is closed and its descriptors are gone, which the fixture checks."""
    rep, address = _bound(context, zmq.REP, wire)
    gc.disable()
    try:
        reqs = [zmq.Socket(context, zmq.REQ)]
        reqs[0].connect(address)
        reqs[0].send(b"x")
        rep.recv()
        rep.close(0)
        wait_until(lambda: reqs[0].poll(0))
        monitor = reqs[0]._sharing.monitor
        with pytest.warns(ResourceWarning, match="Unclosed socket"):
            reqs.clear()
        assert monitor.is_closed
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("endpoint", "advice"), [("tcp://[::1]:5555", "IPV6"), ("tcp://nosuch0:0;127.0.0.1:5555", "source, nosuch0,")]
)
@pytest.mark.parametrize("how", ["recv", "NOBLOCK", "poll"])
def test_what_libzmq_cannot_begin_to_connect_to(req: Any, endpoint: str, advice: str, how: str) -> None:
    """The request is Unreachable, with advice, each time; nothing was delivered."""
    req.connect(endpoint)
    for _ in range(2):
        req.send(b"x")
        if how == "recv":
            with pytest.raises(Unreachable, match=advice) as caught:
                req.recv()
            error: PeerError = caught.value
        elif how == "poll":
            assert req.poll() == zmq.POLLIN
            with pytest.raises(Unreachable, match=advice) as caught:
                req.recv(timeout=0)
            error = caught.value
        else:
            error = wait_until(lambda: _nonblocking(req))
        assert type(error) is Unreachable
        assert not error.maybe_executed
        assert error.endpoint == endpoint
