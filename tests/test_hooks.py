"""Tests of greensafe.hooks: which record comes when, and what a hook that fails does not touch."""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import pickle
import sys
import typing
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.event
import pytest
from helpers import LONG, MS, running, wait_until

import greensafe as zmq
from greensafe import LATER, Client, OperationTimeout, RemoteError, Request, Server, deadline, hooks, supervised
from greensafe.hooks import (
    CallAnswered,
    CallFailed,
    CallRetried,
    CallStarted,
    ConnectionFailed,
    ConnectionLost,
    ConnectionUp,
    HandlerStuck,
    Record,
    RequestAnswered,
    RequestFailed,
    RequestStarted,
    ServerStarted,
    ServerStopped,
    teller,
)
from greensafe.hub import log_limiter as seldom

pytestmark = pytest.mark.usefixtures("limit")

ENDPOINT = "inproc://s"

#: A server in a process of its own that dies of the request "die" if it is mortal.
SERVER = """
import os, signal, sys, greensafe

def handler(request):
    if request.body == b"die" and sys.argv[2] == "mortal":
        os.kill(os.getpid(), signal.SIGKILL)
    return request.body

server = greensafe.Server(sys.argv[1], handler, deadline=None)
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""


def _handler(request: Request) -> Any:
    match request.body:
        case b"raise":
            raise ValueError("no")
        case b"hang":
            gevent.sleep(LONG)
        case b"reply":
            request.reply(b"by hand")
            return None
        case b"later":
            gevent.spawn(request.reply, b"later")
            return LATER
    return request.body


@pytest.fixture
def told() -> list[Any]:
    """The records of a server, or of a client."""
    return []


@pytest.fixture
def asked() -> list[Any]:
    """The records of the other side."""
    return []


@pytest.fixture
def client(context: zmq.Context, told: list[Any], asked: list[Any]) -> Iterator[Client]:
    """A client of a server, both with a hook."""
    with (
        Server(ENDPOINT, _handler, deadline=LONG, hooks=told.append, context=context),
        Client(ENDPOINT, hooks=asked.append, context=context) as made,
    ):
        yield made


@pytest.mark.parametrize("body", [b"x", b"reply", b"later"])
def test_an_answered_request(client: Client, told: list[Any], asked: list[Any], body: bytes) -> None:
    """It is told twice on each side, with one id and the seconds, however its handler answers."""
    client.request(body, metadata=b"trace")
    _, started, answered = told
    assert type(started) is RequestStarted
    assert type(answered) is RequestAnswered
    assert started.endpoint == answered.endpoint == ENDPOINT
    assert started.request_id == answered.request_id
    assert started.client == answered.client
    assert started.metadata == b"trace"
    assert 0 <= started.seconds <= answered.seconds < LONG
    assert asked[0] == CallStarted((ENDPOINT,), started.request_id, b"trace")
    assert asked[1] == CallAnswered(ENDPOINT, started.request_id, asked[1].seconds, 0)
    assert answered.seconds <= asked[1].seconds


def test_a_failed_request(client: Client, told: list[Any], asked: list[Any]) -> None:
    """It is told as one with the error's code, type and message; on the client's side with the exception."""
    with pytest.raises(RemoteError) as caught:
        client.request(b"raise")
    failed, call = told[-1], asked[-1]
    assert type(failed) is RequestFailed
    assert (failed.code, failed.type, failed.message) == ("INTERNAL", "ValueError", "no")
    assert (type(call), call.error, call.error_name) == (CallFailed, caught.value, "RemoteError")
    assert call.request_id == failed.request_id


@pytest.mark.parametrize("body", [b"x", b"raise", b"hang"])
def test_one_end_for_each_start(client: Client, told: list[Any], asked: list[Any], body: bytes) -> None:
    """Whatever ends a request, each side hears of its end once."""
    for _ in range(5):
        try:
            client.request(body, timeout=5 * MS if body == b"hang" else LONG)
        except (RemoteError, OperationTimeout):
            pass
    ends = (RequestAnswered, RequestFailed)
    wait_until(lambda: sum(isinstance(record, ends) for record in told) == 5)
    ids = [record.request_id for record in told if isinstance(record, ends)]
    assert len(set(ids)) == 5
    assert [record.request_id for record in asked if isinstance(record, (CallAnswered, CallFailed))] == ids


def test_a_request_that_was_never_run(context: zmq.Context, told: list[Any]) -> None:
    """One that is rejected has failed, and was not started."""
    with (
        Server(
            ENDPOINT, _handler, deadline=LONG, max_inflight=1, overload="reject", hooks=told.append, context=context
        ) as server,
        Client(ENDPOINT, context=context) as client,
    ):
        holding = gevent.spawn(client.request, b"hang")
        wait_until(lambda: server.stats.running == 1)
        with pytest.raises(RemoteError, match="RESOURCE_EXHAUSTED"):
            client.request(b"x")
        assert [record.code for record in told if isinstance(record, RequestFailed)] == ["RESOURCE_EXHAUSTED"]
        assert sum(isinstance(record, RequestStarted) for record in told) == 1
        holding.kill()
        server.close()


def test_a_server_comes_and_goes(context: zmq.Context, told: list[Any]) -> None:
    """Each start and each stop is told."""
    server = Server(ENDPOINT, _handler, deadline=LONG, hooks=told.append, context=context)
    for _ in range(2):
        server.start()
        with Client(ENDPOINT, context=context) as client:
            client.request(b"x")
        server.stop()
        server.stop()
    assert [record for record in told if isinstance(record, (ServerStarted, ServerStopped))] == 2 * [
        ServerStarted(ENDPOINT),
        ServerStopped(ENDPOINT, 1),
    ]


@pytest.mark.parametrize("act", ["close", "stop"])
def test_a_hook_that_stops_a_server_that_closes(context: zmq.Context, told: list[Any], act: str) -> None:
    """It has nothing to do: the server closes once, and each request is answered once."""
    count = 20

    def hook(record: Record) -> None:
        told.append(record)
        if isinstance(record, RequestFailed):
            getattr(server, act)()

    server = Server(ENDPOINT, _handler, deadline=LONG, max_inflight=count, hooks=hook, context=context)
    with server, Client(ENDPOINT, context=context) as client:
        asking = [gevent.spawn(_outcome, client) for _ in range(count)]
        wait_until(lambda: server.stats.running == count)
        server.close()
        assert {each.get() for each in asking} == {"UNAVAILABLE"}
    assert sum(isinstance(record, RequestFailed) for record in told) == count
    assert [record for record in told if isinstance(record, ServerStopped)] == [ServerStopped(ENDPOINT, count)]


def _outcome(client: Client) -> str:
    try:
        client.request(b"hang")
    except RemoteError as error:
        return error.code
    return ""


def test_a_stuck_handler_is_named(context: zmq.Context, told: list[Any]) -> None:
    """The handler that survives its kill is told of once, with what stats say of it."""
    go = gevent.event.Event()

    def stubborn(request: Request) -> None:
        while not go.is_set():
            try:
                go.wait()
            except BaseException:
                pass

    with Server(ENDPOINT, stubborn, deadline=5 * MS, grace=5 * MS, hooks=told.append, context=context) as server:
        with Client(ENDPOINT, context=context) as client, pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
            client.request(b"x")
        wait_until(lambda: server.stats.zombie_count)
        stuck = [record for record in told if isinstance(record, HandlerStuck)]
        wait_until(lambda: server.stats.zombies[0].kills > 2)
        assert len(stuck) == 1
        assert stuck[0].zombie.request_id == server.stats.zombies[0].request_id
        go.set()
        wait_until(lambda: not server.stats.zombie_count)


def test_a_killed_server(context: zmq.Context, asked: list[Any]) -> None:
    """Up, lost with the request in flight, its retry, failed attempts, up again: each is told, in this order."""
    command = [sys.executable, "-c", SERVER]
    with running([*command, "tcp://127.0.0.1:0", "mortal"]) as (_, endpoint):
        client = Client(endpoint, hooks=asked.append, retries=1, context=context)
        assert client.request(b"x") == b"x"
        call = gevent.spawn(client.request, b"die", idempotent=True)
        wait_until(lambda: any(isinstance(record, ConnectionFailed) for record in asked))
    with running([*command, endpoint, "immortal"]), client:
        assert call.get() == b"die"
    up, lost, retried = (_first(kind, asked) for kind in (ConnectionUp, ConnectionLost, CallRetried))
    assert up == ConnectionUp(endpoint, 0)
    assert (lost.endpoint, lost.error_name, lost.silent, lost.lost, lost.unsent) == (endpoint, "Disconnected", None, 1, 0)
    assert (retried.endpoint, retried.retries, type(retried.error)) == (endpoint, 1, zmq.Disconnected)
    assert _first(ConnectionFailed, asked).error_name == "Unreachable"
    assert asked.index(lost) < asked.index(retried) < asked.index(ConnectionUp(endpoint, 1))
    assert type(asked[-1]) is CallAnswered
    assert (asked[-1].request_id, asked[-1].retries) == (retried.request_id, 1)


def _first(kind: type, records: list[Any]) -> Any:
    return next(record for record in records if isinstance(record, kind))


def test_a_callers_limit(client: Client, asked: list[Any]) -> None:
    """It is counted under the name of what the program sees, not of the signal on its way there."""
    with pytest.raises(zmq.DeadlineExceeded), deadline(5 * MS):
        client.request(b"hang")
    assert asked[-1].error_name == "DeadlineExceeded"
    assert client.stats.failures == {"DeadlineExceeded": 1}


@pytest.mark.parametrize("error", [ValueError, SystemExit, gevent.Timeout, gevent.GreenletExit, OperationTimeout])
def test_a_failing_hook(context: zmq.Context, caplog: pytest.LogCaptureFixture, error: type[BaseException]) -> None:
    """What it raises is logged; the requests, and the hooks beside it, do not notice."""
    told: list[Any] = []

    def broken(record: Record) -> None:
        if gevent.getcurrent() is gevent.get_hub() or issubclass(error, (Exception, SystemExit)):
            raise error

    with (
        Server(ENDPOINT, _handler, deadline=LONG, hooks=[broken, told.append], context=context),
        Client(ENDPOINT, hooks=[broken, told.append], context=context) as client,
    ):
        assert client.request(b"later") == b"later"
        with pytest.raises(RemoteError, match="INTERNAL"):
            client.request(b"raise")
        with pytest.raises(OperationTimeout):
            client.request(b"hang", timeout=5 * MS)
        assert client.request(b"x") == b"x"
    kinds = {type(record) for record in told}
    assert kinds >= {ServerStarted, RequestStarted, RequestAnswered, RequestFailed, CallAnswered, CallFailed, ServerStopped}
    failed = [record for record in caplog.records if record.name == "greensafe.hooks"]
    assert failed
    assert all(record.levelno == logging.ERROR and record.exc_info for record in failed)


def test_a_kill_that_meets_a_waiting_hook(context: zmq.Context) -> None:
    """It is the greenlet's, not the hook's: it goes on its way, and nothing of the request stays."""
    waiting = gevent.event.Event()

    def slow(record: Record) -> None:
        if isinstance(record, CallStarted):
            waiting.set()
            gevent.sleep(LONG)

    with Client(ENDPOINT, hooks=slow, context=context) as client:
        asking = gevent.spawn(client.request, b"x")
        waiting.wait()
        asking.kill()
        assert isinstance(asking.value, gevent.GreenletExit)
        assert (client.stats.inflight, client.stats.failures) == (0, {"GreenletExit": 1})


def test_a_hooks_context_is_the_handlers(context: zmq.Context) -> None:
    """What a hook puts into a context variable at RequestStarted is seen by that handler alone."""
    current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="none")

    def hook(record: Record) -> None:
        if isinstance(record, RequestStarted):
            current.set(record.request_id)

    def handler(request: Request) -> bytes:
        gevent.sleep(0)
        assert current.get() == request.id
        return request.body

    with Server(ENDPOINT, handler, deadline=LONG, hooks=hook, context=context), Client(ENDPOINT, context=context) as client:
        gevent.joinall([gevent.spawn(client.request, b"x") for _ in range(5)], raise_error=True)
    assert current.get() == "none"


@pytest.mark.parametrize("wrong", [5, "print", [print, 5], object()])
def test_wrong_hooks(wrong: Any) -> None:
    """What cannot be called is a TypeError of the constructor."""
    with pytest.raises(TypeError, match="hooks"):
        Server(ENDPOINT, _handler, deadline=1, hooks=wrong)
    with pytest.raises(TypeError, match="hooks"):
        Client(ENDPOINT, hooks=wrong)


def test_no_hooks() -> None:
    """None and an empty list are nobody to be told: no record is made."""
    assert teller(None) is teller([]) is teller(()) is None


def test_records() -> None:
    """Each is frozen, has no room for more, can be pickled, and is in `Record` and `__all__`."""
    kinds = [kind for kind in vars(hooks).values() if dataclasses.is_dataclass(kind) and kind.__module__ == hooks.__name__]
    assert set(kinds) == set(typing.get_args(Record))
    for kind in kinds:
        assert kind.__name__ in hooks.__all__
        assert not hasattr(kind, "__dict__") or "__slots__" in vars(kind)
    record = RequestAnswered(ENDPOINT, "1", b"c", 0.5)
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.seconds = 1  # type: ignore[misc]


def test_a_hook_that_always_fails_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request may be such a record: ten lines with tracebacks a second of each kind, and the number of those left out."""
    monkeypatch.setattr(seldom, "PERIOD", 20 * MS)

    def hook(record: Record) -> None:
        raise ValueError(record)

    tell = teller(hook)
    assert tell is not None
    for _ in range(100):
        tell(ServerStarted("here"))
    tell(ServerStopped("here", 1))
    assert len(caplog.records) == hooks.MOST_FAILURES + 1
    wait_until(lambda: len(caplog.records) == hooks.MOST_FAILURES + 2)
    assert "(the last of 90 more within" in caplog.records[-1].getMessage()
    assert all(record.exc_info for record in caplog.records[:-1])


class _Unshowable:
    def __call__(self, record: Record) -> None:
        raise ValueError("x")

    def __repr__(self) -> str:
        raise RuntimeError("cannot be shown")


def test_a_hook_that_cannot_be_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Its failure is logged, and nothing else of it comes out."""
    tell = teller([_Unshowable()])
    assert tell is not None
    tell(ServerStarted("e"))
    assert [record.getMessage() for record in caplog.records] == [
        "hook <_Unshowable that cannot be shown> has failed at a ServerStarted"
    ]


def test_blocks_of_one_socket_count_failures_together(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """A hook that fails at each request of a `supervised` loop is limited as elsewhere, though each block is made anew."""
    sock, peer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    sock.bind(ENDPOINT)
    peer.connect(ENDPOINT)
    for _ in range(3 * hooks.MOST_FAILURES):
        peer.send_multipart([b"", b"x"])
        with supervised(sock, deadline=LONG, hooks=_Unshowable()) as request:
            request.reply(b"y")
    said = [record for record in caplog.records if record.name == "greensafe.hooks"]
    assert len(said) == 2 * hooks.MOST_FAILURES
    sock._lines.flush()
