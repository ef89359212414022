"""Tests of greensafe.restarts: loops that are made to fail, in servers and clients with real sockets."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest
from helpers import LONG, MS, running, wait_until

import greensafe as zmq
from greensafe import Client, RemoteError, Request, Server
from greensafe.client.channel import Channel
from greensafe.client.pool import Failover
from greensafe.hooks import LoopFailed, ServerStopped
from greensafe.hub.timers import TICK
from greensafe.loops.restarts import Restarts
from greensafe.sansio.backoff import FIRST, JITTER, RESTARTS
from greensafe.sansio.requester import Requester
from greensafe.sansio.responder import Responder
from greensafe.server.backlog import Backlog
from greensafe.server.systemd import Notifier
from greensafe.transport import inbox as _inbox, outbox as _outbox, pump as _pump, whole as _whole
from greensafe.transport.inbox import Inbox
from greensafe.transport.pump import Pump

pytestmark = pytest.mark.usefixtures("limit")

ENDPOINT = "inproc://s"

#: What stands for errors that nobody has thought of.
ERRORS: list[Callable[[], Exception]] = [lambda: zmq.ZMQError(zmq.EFSM), lambda: MemoryError("x"), lambda: RuntimeError("x")]


class Fault:
    """Stands before a function and fails at some of its calls.

    Attributes:
        left: How often it still fails.
        skips: Calls before that.
    """

    def __init__(self, real: Callable[..., Any], error: BaseException, skips: int = 0) -> None:
        self._real = real
        self._error = error
        self.skips = skips
        self.left = 0

    def __call__(self, *args: Any) -> Any:
        if self.left and not self.skips:
            self.left -= 1
            raise self._error
        self.skips = max(0, self.skips - 1) if self.left else self.skips
        return self._real(*args)


def _echo(request: Request) -> bytes:
    return request.body


@pytest.fixture
def made() -> Iterator[list[Restarts]]:
    """Restarts that are closed afterwards."""
    found: list[Restarts] = []
    yield found
    for each in found:
        each.close()


def test_a_loop_goes_on(made: list[Restarts], caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is logged with its traceback, counted and told; then the loop's turn is done again, later."""
    told: list[Any] = []
    restarts = Restarts(ENDPOINT, told.append, told.append)
    made.append(restarts)
    error, turns = ValueError("injected"), []

    def turn() -> None:
        turns.append(len(told))
        if len(turns) <= RESTARTS:
            raise error

    restarts.run("loop", turn)
    assert len(turns) == 1
    wait_until(lambda: len(turns) == RESTARTS + 1)
    assert turns == [0, 1, 2, 3]
    assert restarts.counts == {"loop": RESTARTS}
    assert [(type(record), record.endpoint, record.loop, record.error) for record in told] == [
        (LoopFailed, ENDPOINT, "loop", error)
    ] * RESTARTS
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == [error] * RESTARTS
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert repr(restarts) == "<Restarts open inproc://s counts={'loop': 3}>"


def test_a_loop_is_given_up(made: list[Restarts], caplog: pytest.LogCaptureFixture) -> None:
    """After three restarts whoever owns it is given the error, once, and nothing of his is called again."""
    told: list[Any] = []
    given_up: list[Exception] = []
    restarts = Restarts(ENDPOINT, given_up.append, told.append)
    made.append(restarts)
    errors = [ValueError(str(number)) for number in range(10)]
    left = iter(errors)

    def turn() -> None:
        raise next(left)

    restarts.run("one", turn)
    restarts.run("other", turn)
    wait_until(lambda: given_up)
    assert given_up == [errors[3]]
    assert restarts.error is errors[3]
    assert sum(restarts.counts.values()) == RESTARTS
    assert [record.seconds is None for record in told] == [False, False, False, True]
    assert caplog.records[-1].levelno == logging.CRITICAL
    restarts.run("one", turn)
    gevent.sleep(250 * MS)
    assert next(left) is errors[5]
    assert len(told) == 4
    assert "given up" in repr(restarts)


def test_closed_it_calls_nothing_again(made: list[Restarts]) -> None:
    """A pause that is not over when the owner closes does not end in a call, and later failures are nobody's."""
    given_up: list[Exception] = []
    calls: list[int] = []
    restarts = Restarts(ENDPOINT, given_up.append)

    def turn() -> None:
        calls.append(1)
        raise ValueError

    restarts.run("loop", turn)
    restarts.close()
    for _ in range(5):
        restarts.run("loop", turn)
    gevent.sleep(100 * MS)
    assert len(calls) == 6
    assert not given_up


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, gevent.GreenletExit])
def test_what_is_no_failure(made: list[Restarts], error: type[BaseException]) -> None:
    """What is not an Exception is for somebody else."""
    restarts = Restarts(ENDPOINT, made.append)

    def turn() -> None:
        raise error

    with pytest.raises(error):
        restarts.run("loop", turn)
    assert not restarts.counts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_other_loops(made: list[Restarts]) -> None:
    """A pause that began in the parent does not end in the child's call."""
    calls: list[int] = []
    restarts = Restarts(ENDPOINT, made.append)
    made.append(restarts)
    restarts.failed("loop", ValueError(), lambda: calls.append(os.getpid()))
    child = os.fork()  # not gevent's, whose loop would from then on collect the states of other tests' processes
    if child == 0:
        gevent.reinit()
        gevent.sleep(100 * MS)
        os._exit(len(calls))
    wait_until(lambda: calls)
    _, status = gevent.os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert calls == [os.getpid()]


# A server's pump.

CLIENTS, EACH = 5, 40


def _ask_all(context: zmq.Context, server: Server) -> list[Any]:
    """Clients whose requests all wait to be read."""
    peers = []
    for number in range(CLIENTS):
        peer = context.socket(zmq.DEALER)
        peer.routing_id = b"%d" % number
        peer.connect(str(server.endpoint))
        for index in range(EACH):
            peer.send_multipart([b"id", b"", b"%d-%d" % (number, index), b"more"])
        peers.append(peer)
    return peers


def _answers(peers: list[Any], count: int = CLIENTS * EACH) -> Counter[bytes]:
    """What comes, until so many are here, and a little longer for what should not."""
    found: Counter[bytes] = Counter()

    def read() -> bool:
        for peer in peers:
            while peer.poll(0):
                frames = peer.recv_multipart()
                assert frames[:2] == [b"id", b""]
                found[frames[2]] += 1
        return found.total() >= count

    wait_until(read)
    gevent.sleep(20 * MS)
    read()
    return found


ALL = Counter(b"%d-%d" % (number, index) for number in range(CLIENTS) for index in range(EACH))


def _break(monkeypatch: pytest.MonkeyPatch, what: str, error: Exception, skips: int = 0) -> Fault:
    """Put a fault before something that the pump of the server does; it fails when `left` is set."""
    owners: list[Any] = {"flush": [Pump], "_recv": [_whole], "_send": [_outbox], "_get": [_pump, _inbox, _outbox]}[what]
    fault = Fault(getattr(owners[0], what), error, skips)
    for owner in owners:
        monkeypatch.setattr(owner, what, lambda *args: fault(*args))
    return fault


#: What fails, at which call: `_recv` and `_get` (of EVENTS) are libzmq's, `flush` is the pump's.
FAULTS: list[tuple[str, int, Callable[[], Exception]]] = [
    (what, skips, kind)
    for what, skips in (
        ("_recv", 0),
        ("_recv", 5),
        ("_recv", 6),
        ("_recv", 9),
        ("_get", 0),
        ("_get", 3),
        ("flush", 0),
        ("flush", 1),
    )
    for kind in ERRORS
]
FAULTS.append(("_send", 0, ERRORS[0]))  # libzmq refuses a message at its first frame only


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", ENDPOINT])
@pytest.mark.parametrize(("what", "skips", "kind"), FAULTS)
def test_a_failing_pump_loses_nothing(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, endpoint: str, what: str, skips: int, kind: Callable[[], Exception]
) -> None:
    """Wherever it fails, between messages or in one: every request of every client is answered once."""
    error = kind()
    fault = _break(monkeypatch, what, error, skips)
    told: list[Any] = []
    with Server(endpoint, _echo, deadline=LONG, hooks=told.append, context=context) as server:
        fault.left = 1
        peers = _ask_all(context, server)
        assert _answers(peers) == ALL
        while fault.left:  # how much is sent at a time, and so how often, depends on the machine
            peers[0].send_multipart([b"id", b"", b"x"])
            assert _answers(peers, 1) == {b"x": 1}
        assert (server.state, server.healthy) == ("started", True)
        failed = [record for record in told if type(record) is LoopFailed]
        assert [(record.loop, record.error) for record in failed] == [("pump", error)]
        assert server.stats.restarts == {"pump": 1}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_failing_message_is_alone(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, kind: Callable[[], Exception]
) -> None:
    """A message that cannot be dealt with is reported; all others are answered once, and no loop has failed."""
    with Server(ENDPOINT, _echo, deadline=LONG, context=context) as server:
        assert server._watchdog is not None
        fault = Fault(server._watchdog.accept, kind(), skips=10)
        monkeypatch.setattr(server._watchdog, "accept", fault)
        reported: list[type[BaseException]] = []
        monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda who, kind, *rest: reported.append(kind))
        fault.left = 1
        found = _answers(_ask_all(context, server), CLIENTS * EACH - 1)
        assert len(found) == found.total() == CLIENTS * EACH - 1
        assert reported == [type(kind())]
        assert server.stats.restarts == {}


@pytest.mark.parametrize("count", [1, 10])
def test_a_handler_that_cannot_be_started(context: zmq.Context, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Where there is no memory for its greenlet its client is answered, whether it came at once or waited for its turn."""

    class Unborn(gevent.Greenlet):  # type: ignore[misc]
        def switch(self, *args: Any) -> Any:
            if fault.left:
                fault()
            return super().switch(*args)

    fault = Fault(lambda: None, MemoryError("injected"), skips=count - 1)
    gate = gevent.event.Event()

    def handler(request: Request) -> bytes:
        gate.wait()
        return request.body

    with Server(ENDPOINT, handler, deadline=None, max_inflight=1, context=context) as server:
        with Client(ENDPOINT, context=context) as client:
            with monkeypatch.context() as patch:
                patch.setattr("greensafe.server.watchdog.gevent.Greenlet", Unborn)
                fault.left = 1
                calls = [gevent.spawn(client.request, b"x") for _ in range(count)]
                wait_until(lambda: server.stats.received == count)
                gate.set()
                gevent.joinall(calls)
            errors = [call.exception for call in calls if call.exception is not None]
            assert [(type(error), error.code, error.type) for error in errors] == [
                (RemoteError, "RESOURCE_EXHAUSTED", "MemoryError")
            ]
            assert client.request(b"x") == b"x"
        assert (server.stats.inflight, server.stats.running, server.stats.restarts) == (0, 0, {})


@pytest.mark.parametrize("what", ["_recv", "_get"])
def test_a_pump_that_goes_on_failing(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The fourth time it is given up: who waits is answered UNAVAILABLE, and serve_forever raises the error."""
    error = zmq.ZMQError(zmq.EFSM)
    fault = _break(monkeypatch, what, error)
    told: list[Any] = []

    def handler(request: Request) -> None:
        gevent.sleep(LONG)

    server = Server("tcp://127.0.0.1:0", handler, deadline=None, hooks=told.append, context=context)
    runner = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    peers = [context.socket(zmq.REQ) for _ in range(3)]
    for peer in peers:
        peer.connect(str(server.endpoint))
        peer.send(b"x")
    wait_until(lambda: server.stats.running == 3)
    fault.left = 10**6
    late = context.socket(zmq.REQ)
    late.connect(str(server.endpoint))
    late.send(b"x")
    for peer in peers:
        answer = RemoteError.from_reply(peer.recv())
        assert answer is not None
        assert answer.code == "UNAVAILABLE"
    runner.join()
    assert runner.exception is error
    assert (server.state, server.closed, server.healthy) == ("failed", True, False)
    stats = server.stats
    assert (stats.state, stats.is_healthy, stats.restarts) == ("failed", False, {"pump": RESTARTS})
    assert stats.loop_error == f"ZMQError: {error}"
    assert repr(server).startswith("<Server failed")
    failed = [record for record in told if type(record) is LoopFailed]
    assert [record.seconds is None for record in failed] == [False] * RESTARTS + [True]
    assert type(told[-1]) is ServerStopped
    assert {record.exc_info and record.exc_info[1] for record in caplog.records if record.name == "greensafe.restarts"} == {
        error
    }
    fault.left = 0
    with server, Client(str(server.endpoint), context=context):
        assert (server.state, server.healthy, server.stats.restarts, server.stats.loop_error) == ("started", True, {}, "")


@pytest.mark.parametrize(("loop", "owner", "name"), [("watchdog", Responder, "tick"), ("turns", Backlog, "next")])
@pytest.mark.parametrize("count", [1, 10])
def test_the_watchdogs_loops(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, loop: str, owner: type, name: str, count: int
) -> None:
    """After one failure deadlines and turns come a little later; after four all are answered and the server is closed."""
    errors = [RuntimeError(str(number)) for number in range(count)]
    left, real = list(errors), getattr(owner, name)

    def fail(self: Any, *args: Any) -> Any:
        if left:
            raise left.pop(0)
        return real(self, *args)

    def handler(request: Request) -> None:
        gevent.sleep(LONG)

    monkeypatch.setattr(owner, name, fail)
    server = Server(ENDPOINT, handler, deadline=20 * MS, max_inflight=2, context=context)
    runner = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    peer = context.socket(zmq.DEALER)
    peer.connect(ENDPOINT)
    for number in range(6):
        peer.send_multipart([b"%d" % number, b"", b"x"])
    answers = dict(peer.recv_multipart()[::2] for _ in range(6))
    assert len(answers) == 6
    codes = {error.code for answer in answers.values() if (error := RemoteError.from_reply(answer)) is not None}
    if count == 1:
        assert codes == {"DEADLINE_EXCEEDED"}
        assert server.stats.restarts == {loop: 1}
        server.close()
        runner.get()
    else:
        assert "UNAVAILABLE" in codes
        runner.join()
        assert runner.exception is errors[RESTARTS]
        assert (server.state, server.stats.restarts) == ("failed", {loop: RESTARTS})


def test_requests_do_not_shorten_a_pause(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while the watchdog's timer rests does not have it tried again before its time, and so given up."""
    failed_at: list[float] = []
    real = Responder.tick

    def tick(self: Responder, now: float, *effects: Any) -> Any:
        if not failed_at or now < failed_at[0] + FIRST * (1 - JITTER) - TICK:
            failed_at.append(now)
            raise RuntimeError("injected")
        return real(self, now, *effects)

    def handler(request: Request) -> None:
        gevent.sleep(LONG)

    monkeypatch.setattr(Responder, "tick", tick)
    with Server(ENDPOINT, handler, deadline=5 * MS, grace=LONG, context=context) as server:
        peer = context.socket(zmq.DEALER)
        peer.connect(ENDPOINT)
        sent = 0
        while not server.stats.answered:
            peer.send_multipart([b"", b"x"])
            sent += 1
            gevent.sleep(MS)
        for _ in range(sent):
            answer = RemoteError.from_reply(peer.recv_multipart()[1])
            assert answer is not None
            assert answer.code == "DEADLINE_EXCEEDED"
        assert len(failed_at) == 1
        assert server.stats.restarts == {"watchdog": 1}
        server.close()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no AF_UNIX sockets")
@pytest.mark.parametrize("count", [1, 10])
def test_pings_that_fail(context: zmq.Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int) -> None:
    """systemd is pinged again after one failure; after four the server ends by itself, before systemd would end it."""
    left = [RuntimeError(str(number)) for number in range(count)]
    real = Notifier._ping

    def ping(self: Notifier) -> None:
        if left:
            raise left.pop(0)
        real(self)

    monkeypatch.setattr(Notifier, "_ping", ping)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(20_000 * 1000 * MS)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.setblocking(False)
        states: list[bytes] = []

        def has_pinged() -> bool:
            try:
                states.append(told.recv(100))
            except BlockingIOError:
                return False
            return states[-1] == b"WATCHDOG=1"

        server = Server(ENDPOINT, _echo, deadline=1, context=context)
        runner = gevent.spawn(server.serve_forever)
        if count == 1:
            wait_until(has_pinged)
            assert server.stats.restarts == {"systemd": 1}
            server.close()
        runner.join()
        assert str(runner.exception) == ("None" if count == 1 else "3")


FAILING = """
import gevent, greensafe
from greensafe.server.backlog import Backlog
from greensafe.client.channel import Channel
from greensafe.hub.timers import TICK
from greensafe.client.pool import Failover
from greensafe.transport import whole as _whole
from greensafe.transport.pump import Pump

is_failing, receive = False, _whole._recv

def fail(*args):
    if is_failing:
        raise MemoryError("injected")
    return receive(*args)

_whole._recv = fail

def handler(request):
    global is_failing
    is_failing = True
    gevent.sleep(3600)

server = greensafe.Server("tcp://127.0.0.1:0", handler, deadline=None)
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""


def test_the_process_ends_with_the_error(context: zmq.Context) -> None:
    """Of a program that only serves: its client is answered, its code is 1, and the traceback says where it has failed."""
    with running([sys.executable, "-c", FAILING]) as (process, endpoint):
        first, second = (context.socket(zmq.REQ) for _ in range(2))
        for req in (first, second):
            req.connect(endpoint)
            req.send(b"x")
        waiting = zmq.Poller()
        for req in (first, second):
            waiting.register(req, zmq.POLLIN)
        answers = []
        for ready, _ in waiting.poll():
            with suppress(zmq.Disconnected):  # the other's request, which nobody has read: if it was told so soon
                answers.append(RemoteError.from_reply(ready.recv()))
        assert [answer and answer.code for answer in answers] == ["UNAVAILABLE"]
        assert process.wait(LONG) == 1
        assert process.stderr is not None
        errors = process.stderr.read()
        assert errors.rstrip().endswith("MemoryError: injected")
        assert "in _read" in errors


# A client's loops.


@pytest.fixture
def running_server(context: zmq.Context) -> Iterator[Server]:
    """A server whose own pump does not meet the faults that are made afterwards."""
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        if request.body == b"wait":
            go.wait()
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=None, context=context) as server:
        server._go = go  # type: ignore[attr-defined]
        yield server


def _break_client(monkeypatch: pytest.MonkeyPatch, client: Client, what: str, error: Exception) -> Fault:
    """Put a fault before something that a loop of this client does."""
    channel = client._channels[0]
    owner, name = {
        "pump": (Inbox, "read"),
        "limits": (Requester, "tick"),
        "looks": (Channel, "look"),
        "retries": (Failover, "_on_paused"),
        "connection": (Channel, "_on_disconnected"),
    }[what]
    real = getattr(owner, name)
    fault = Fault(real, error)
    assert channel._pump is not None
    spared = None if what != "pump" else channel._pump.inbox
    monkeypatch.setattr(owner, name, lambda self, *args: fault(self, *args) if spared in (None, self) else real(self, *args))
    return fault


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("what", ["pump", "limits", "looks"])
def test_a_clients_loop_goes_on(
    context: zmq.Context,
    monkeypatch: pytest.MonkeyPatch,
    running_server: Server,
    what: str,
    kind: Callable[[], Exception],
) -> None:
    """One failure costs no request, and a limit that was due in the meantime still ends its request."""
    error, told = kind(), []
    with Client(str(running_server.endpoint), heartbeat=500 * MS, hooks=told.append, context=context) as client:
        assert client.request(b"x") == b"x"
        fault = _break_client(monkeypatch, client, what, error)
        fault.left = 1
        waiting = [gevent.spawn(client.request, b"wait") for _ in range(3)]
        limited = gevent.spawn(client.request, b"wait", timeout=50 * MS)
        limited.join()
        assert type(limited.exception) is zmq.OperationTimeout
        wait_until(lambda: not fault.left)
        running_server._go.set()  # type: ignore[attr-defined]
        assert [each.get() for each in waiting] == [b"wait"] * 3
        failed = [record for record in told if type(record) is LoopFailed]
        assert [(record.endpoint, record.loop, record.error) for record in failed] == [(running_server.endpoint, what, error)]
        assert client.stats.restarts == {what: 1}
        assert client.stats.state == "open"


@pytest.mark.parametrize("what", ["pump", "limits", "looks"])
def test_a_clients_loop_that_goes_on_failing(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, running_server: Server, what: str
) -> None:
    """It is given up: whoever waits, and whoever asks later, gets Cancelled with the error as its cause."""
    error, told = RuntimeError("injected"), []
    client = Client(str(running_server.endpoint), heartbeat=500 * MS, hooks=told.append, context=context)
    assert client.request(b"x") == b"x"
    fault = _break_client(monkeypatch, client, what, error)
    fault.left = 10**6
    calls = [gevent.spawn(client.request, b"wait", timeout=limit) for limit in (None, LONG, 20 * MS)]
    gevent.joinall(calls)
    assert isinstance(calls.pop().exception, (zmq.OperationTimeout, zmq.Cancelled))  # the server knows its limit, too
    for call in calls:
        assert type(call.exception) is zmq.Cancelled
        assert call.exception.__cause__ is error
    with pytest.raises(zmq.Cancelled, match="injected") as caught:
        client.request(b"x")
    assert caught.value.__cause__ is error
    stats = client.stats
    assert (stats.state, stats.inflight, stats.restarts) == ("failed", 0, {what: RESTARTS})
    assert stats.loop_error == "RuntimeError: injected"
    assert repr(client).startswith("<Client failed")
    assert [record.seconds is None for record in told if type(record) is LoopFailed] == [False] * RESTARTS + [True]
    client.close()
    running_server._go.set()  # type: ignore[attr-defined]


def test_a_connection_that_cannot_be_followed_is_made_again(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, running_server: Server
) -> None:
    """When an event of libzmq's cannot be dealt with, it is lost for those who wait, and the next request is answered."""
    with Client(str(running_server.endpoint), context=context) as client:
        assert client.request(b"x") == b"x"
        fault = _break_client(monkeypatch, client, "connection", RuntimeError("injected"))
        fault.left = 1
        waiting = gevent.spawn(client.request, b"wait")
        wait_until(lambda: running_server.stats.running == 1)
        running_server.close()
        waiting.join()
        assert isinstance(waiting.exception, (RemoteError, zmq.Disconnected))
        wait_until(lambda: not fault.left)
        running_server._bind_to = str(running_server.endpoint)
        running_server.start()
        assert client.request(b"x") == b"x"
        assert client.stats.restarts == {"connection": 1}


def test_a_retry_that_fails_is_made_again(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause before it is over, placing it fails: it is placed a little later."""
    with (
        Server(
            ENDPOINT, lambda request: go.wait() and b"", deadline=None, max_inflight=1, overload="reject", context=context
        ) as server,
        Client(ENDPOINT, retries=3, context=context) as client,
    ):
        go = gevent.event.Event()
        first = gevent.spawn(client.request, b"1")
        wait_until(lambda: server.stats.running)
        fault = _break_client(monkeypatch, client, "retries", RuntimeError("injected"))
        fault.left = 1
        second = gevent.spawn(client.request, b"2")
        wait_until(lambda: client.stats.rejections)
        go.set()
        assert [first.get(), second.get()] == [b"", b""]
        assert client.stats.restarts == {"retries": 1}
