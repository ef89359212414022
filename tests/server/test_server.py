"""Tests of greensafe.server.server: a life from start to stop. For what handlers do wrong see test_handlers."""

from __future__ import annotations

import errno
import gc
import itertools
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest
from helpers import LONG, MS, check_freed_by_a_kill, run_python, running, wait_until

import greensafe as zmq
from greensafe import LATER, Client, RemoteError, Request, Server, deadline
from greensafe.hooks import RequestFailed, ServerStopped
from greensafe.loops import hubwatch
from greensafe.sansio.envelope import Header, Kind, ServerHeader, decode
from greensafe.server import server as server_module
from greensafe.transport import binding as _binding

pytestmark = pytest.mark.usefixtures("limit")


def _echo(request: Request) -> bytes:
    return request.body


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "ipc://{tmp}/s", "inproc://s"])
def test_endpoint_that_was_bound(context: zmq.Context, tmp_path: Path, endpoint: str) -> None:
    """`endpoint` is where clients connect to, with the port that was taken; start and stop can be repeated."""
    server = Server(endpoint.format(tmp=tmp_path), _echo, deadline=LONG, context=context)
    assert server.closed
    assert server.endpoint is None
    for _ in range(2):
        server.start()
        server.start()
        assert server.started
        assert server.endpoint is not None
        assert not server.endpoint.endswith((":0", "*"))
        with Client(server.endpoint, context=context) as client:
            assert client.request(b"x") == b"x"
        assert "started" in repr(server)
        assert "answered=1" in repr(server)
        server.stop()
        server.stop()
        assert server.closed
        assert not server.started
        assert "closed" in repr(server)


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [
        (TypeError, (b"tcp://127.0.0.1:0", _echo), {"deadline": 1}),
        (TypeError, ("tcp://127.0.0.1:0", "handler"), {"deadline": 1}),
        (TypeError, ("tcp://127.0.0.1:0", _echo), {}),
        (TypeError, ("tcp://127.0.0.1:0", _echo), {"deadline": "1"}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": 0}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": float("nan")}),
        (ValueError, ("nonsense", _echo), {"deadline": 1}),
        (ValueError, ("tcp://127.0.0.1:99999", _echo), {"deadline": 1}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "grace": None}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "grace": 0}),
        (TypeError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "on_error": 5}),
        (TypeError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "context": 5}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "max_inflight": 0}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "max_inflight": True}),
        (TypeError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "journal": object()}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "resume": "never"}),
        (ValueError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "max_attempts": 0}),
        (TypeError, ("tcp://127.0.0.1:0", _echo), {"deadline": 1, "step_codec": object()}),
    ],
)
def test_wrong_arguments(kind: type[Exception], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A wrong argument is an error of the constructor, whose text says which."""
    with pytest.raises(
        kind,
        match=r"endpoint|handler|deadline|limit|grace|max_inflight|journal|port|on_error|context|resume|max_attempts|step_codec",
    ):
        Server(*args, **options)


@pytest.mark.parametrize("endpoint", ["tcp://256.0.0.1:1", "tcp://nowhere:1", "pigeon://x", "ipc:///no/such/folder/s"])
def test_unusable_endpoint(context: zmq.Context, endpoint: str) -> None:
    """An endpoint that cannot be bound is a ZMQError that names it and what to try, and leaves nothing behind."""
    server = Server(endpoint, _echo, deadline=1, context=context)
    with pytest.raises(zmq.ZMQError) as caught:
        server.start()
    assert endpoint in caught.value.__notes__[0]
    assert len(caught.value.__notes__[0]) > len(endpoint)
    assert server.closed


def test_endpoint_in_use(context: zmq.Context) -> None:
    """A second server on the same endpoint fails, the first one goes on."""
    with Server("tcp://127.0.0.1:0", _echo, deadline=LONG, context=context) as first:
        assert first.endpoint is not None
        with pytest.raises(zmq.ZMQError) as caught:
            Server(first.endpoint, _echo, deadline=1, context=context).start()
        assert caught.value.errno == zmq.EADDRINUSE
        with Client(first.endpoint, context=context) as client:
            assert client.request(b"x") == b"x"


@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_address_is_free_when_stop_returns(
    context: zmq.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """When stop() returns the address is free for any process, every time: here for a plain socket, which does not wait."""
    monkeypatch.setattr(server_module, "LAST_REQUESTS", 0.0)
    server = Server(
        "tcp://127.0.0.1:0" if family == "AF_INET" else f"ipc://{tmp_path}/s", _echo, deadline=LONG, context=context
    )
    for _ in range(30):
        server.start()
        _, _, place = str(server.endpoint).partition("://")
        server.stop()
        with socket.socket(getattr(socket, family)) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            plain.bind(("127.0.0.1", int(place.rpartition(":")[2])) if family == "AF_INET" else place)
            plain.listen()
        if family == "AF_UNIX":
            Path(place).unlink()


def test_new_server_on_the_address_of_one_that_has_stopped(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new server can be started at once where another one, or a socket, has just been closed, every time."""
    monkeypatch.setattr(server_module, "LAST_REQUESTS", 0.0)
    sock = context.socket(zmq.ROUTER)
    endpoint = f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}"
    for _ in range(20):
        sock.close()
        with Server(endpoint, _echo, deadline=LONG, context=context):
            pass
        sock = context.socket(zmq.ROUTER)
        sock.bind(endpoint)


def test_listener_that_libzmq_does_not_close(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An I/O thread that is stopped does not keep stop() for ever: it is logged that the address is not free yet."""
    server = Server("tcp://127.0.0.1:0", _echo, deadline=LONG, context=context)
    server.start()
    monkeypatch.setattr(_binding, "LET_GO", 5 * MS)
    monkeypatch.setattr(_binding._Listener, "is_open", True)
    server.stop()
    assert server.closed
    assert f"{server.endpoint} is not free yet" in caplog.text


def test_concurrent_and_out_of_order(context: zmq.Context) -> None:
    """Requests of one client run at the same time, and answers leave in the order in which they are ready."""
    gates = {b"%d" % number: gevent.event.Event() for number in range(3)}

    def handler(request: Request) -> bytes:
        gates[request.body].wait()
        return request.body

    with Server("inproc://s", handler, deadline=LONG, context=context):
        raw = context.socket(zmq.DEALER)
        raw.connect("inproc://s")
        for body in gates:
            raw.send_multipart([b"corr" + body, b"", body])
        for body in (b"2", b"0", b"1"):
            gates[body].set()
            assert raw.recv_multipart() == [b"corr" + body, b"", body]


def test_max_inflight(context: zmq.Context) -> None:
    """No more than max_inflight handlers run at a time; the others wait their turn and none is lost."""
    running, most = 0, 0
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        go.wait()
        gevent.sleep(0)
        running -= 1
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, max_inflight=3, context=context) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context) as client:
            asked = [gevent.spawn(client.request, b"%d" % number) for number in range(50)]
            wait_until(lambda: running == 3)
            assert server.full
            go.set()
            gevent.joinall(asked, raise_error=True)
            assert [greenlet.value for greenlet in asked] == [b"%d" % number for number in range(50)]
        assert most == 3
        assert not server.full


def test_later_from_another_greenlet(context: zmq.Context) -> None:
    """A handler that returns LATER lets somebody else answer; overdue it is answered for, and the late answer is refused."""
    kept: list[Request] = []

    def handler(request: Request) -> Any:
        kept.append(request)
        return LATER

    with (
        Server("inproc://s", handler, deadline=30 * MS, context=context) as server,
        Client("inproc://s", context=context) as client,
    ):
        asked = gevent.spawn(client.request, b"x")
        wait_until(lambda: kept)
        kept.pop().reply_json({"a": 1})
        assert asked.get() == b'{"a": 1}'
        with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
            client.request(b"y")
        request = kept.pop()
        assert request.replied
        with pytest.raises(zmq.LocalProtocolError):
            request.reply(b"too late")
        assert server._watchdog is not None
        assert server._watchdog.load == 0


def test_request(context: zmq.Context) -> None:
    """A handler sees frames, body, id, client, deadline, attempt and metadata."""
    seen: list[Request] = []

    def handler(request: Request) -> list[bytes]:
        seen.append(request)
        assert deadline.current() is request.deadline
        assert 0 < request.deadline.remaining() <= LONG
        assert request.attempt == 1
        assert not request.replied
        assert request.metadata == b""
        assert request.json() == {"a": 1}
        assert "running" in repr(request)
        return [b"1", b"2"]

    with Server("inproc://s", handler, deadline=LONG, context=context), Client("inproc://s", context=context) as client:
        assert client.request_multipart([b'{"a": 1}', b"more"]) == [b"1", b"2"]
        assert seen[0].frames == [b'{"a": 1}', b"more"]
        assert len(bytes.fromhex(seen[0].id)) == 16
        raw = context.socket(zmq.DEALER)
        raw.setsockopt(zmq.ROUTING_ID, b"raw")
        raw.connect("inproc://s")
        raw.send_multipart([b"", b'{"a": 1}'])
        assert raw.recv_multipart() == [b"", b"1", b"2"]
        assert seen[1].client == b"raw"


def test_reply_that_is_no_bytes(context: zmq.Context) -> None:
    """request.reply refuses what is not bytes, and can be called again."""

    def handler(request: Request) -> None:
        with pytest.raises(TypeError, match="frame 0"):
            request.reply("text")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="at least one"):
            request.reply()
        with pytest.raises(ValueError, match="NOPE"):
            request.error("NOPE", "x")
        request.reply(bytearray(b"fine"))

    with Server("inproc://s", handler, deadline=LONG, context=context), Client("inproc://s", context=context) as client:
        assert client.request(b"x") == b"fine"


def test_malformed_messages_affect_nobody(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """Messages that are no requests are counted and logged; the same connection's next request is served."""
    with Server("tcp://127.0.0.1:0", _echo, deadline=LONG, context=context) as server:
        assert server.endpoint is not None
        raw = context.socket(zmq.DEALER)
        raw.connect(server.endpoint)
        for frames in ([b"x"], [b""], [b"", b""][:1], [b"id", b""], [b"a", b"b", b"c"]):
            raw.send_multipart(frames)
        raw.send_multipart([b"", b"good"])
        assert raw.recv_multipart() == [b"", b"good"]
        assert "malformed=5" in repr(server)
        assert "empty frame" in caplog.text


def test_a_client_that_is_gone(context: zmq.Context) -> None:
    """An answer to a client that has left is dropped and counted, and the others are served."""
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        if request.body == b"wait":
            go.wait()
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=context) as server:
        assert server.endpoint is not None
        gone = context.socket(zmq.DEALER)
        gone.connect(server.endpoint)
        gone.send_multipart([b"", b"wait"])
        assert server._watchdog is not None
        assert server._pump is not None
        wait_until(lambda: server._watchdog is not None and server._watchdog.load == 1)
        gone.close(0)
        with Client(server.endpoint, context=context) as client:
            assert client.request(b"x") == b"x"
            go.set()
            wait_until(lambda: server._watchdog is not None and server._watchdog.load == 0)
            assert client.request(b"x") == b"x"


def test_a_client_that_never_reads(context: zmq.Context) -> None:
    """Answers for a client that does not read are kept up to a limit, and nobody else waits for it."""
    with Server("tcp://127.0.0.1:0", lambda request: bytes(200_000), deadline=LONG, context=context) as server:
        assert server.endpoint is not None
        slow = context.socket(zmq.DEALER)
        slow.setsockopt(zmq.RCVHWM, 1)
        slow.connect(server.endpoint)
        for _ in range(1100):
            slow.send_multipart([b"", b"x"])
        with Client(server.endpoint, context=context) as client:
            for _ in range(20):
                assert len(client.request(b"x", timeout=LONG)) == 200_000
        slow.close(0)


def test_stop_answers_what_runs(context: zmq.Context) -> None:
    """stop() waits for what runs, answers the rest UNAVAILABLE after its limit, and kills those handlers."""
    ended: list[str] = []

    def handler(request: Request) -> bytes:
        try:
            gevent.sleep(5 * MS if request.body == b"short" else LONG)
        finally:
            ended.append(request.body.decode())
        return request.body

    server = Server("tcp://127.0.0.1:0", handler, deadline=None, context=context)
    server.start()
    assert server.endpoint is not None
    with Client(server.endpoint, context=context) as client:
        short, long = gevent.spawn(client.request, b"short"), gevent.spawn(client.request, b"long")
        wait_until(lambda: server._watchdog is not None and server._watchdog.load == 2)
        server.stop(100 * MS)
        assert short.get() == b"short"
        long.join()
        assert isinstance(long.exception, RemoteError)
        assert long.exception.code == "UNAVAILABLE"
        wait_until(lambda: sorted(ended) == ["long", "short"])


def test_stop_during_stop(context: zmq.Context) -> None:
    """A second stop with a smaller limit ends the first one's wait."""
    server = Server("inproc://s", lambda request: gevent.sleep(LONG), deadline=None, context=context)
    server.start()
    raw = context.socket(zmq.DEALER)
    raw.connect("inproc://s")
    raw.send_multipart([b"", b"x"])
    wait_until(lambda: server._watchdog is not None and server._watchdog.load == 1)
    first = gevent.spawn(server.stop, None)
    wait_until(lambda: not server.started)
    server.close()
    first.get()
    assert b"UNAVAILABLE" in raw.recv_multipart()[1]


@pytest.mark.parametrize("has_journal", [False, True])
@pytest.mark.parametrize("timeout", [None, LONG, 0])
def test_a_handler_that_stops_its_server(
    context: zmq.Context, tmp_path: Path, has_journal: bool, timeout: float | None
) -> None:
    """The stop does not wait for itself: it begins, the handler answers, serve_forever returns, and it can start again."""
    states: list[tuple[str, bool, str]] = []

    def handler(request: Request) -> bytes:
        server.stop(timeout)
        states.append((server.state, server.started, server.stats.state))
        server.stop(timeout)
        return b"answered"

    journal = tmp_path / "journal" if has_journal else None
    server = Server("inproc://s", handler, deadline=LONG, journal=journal, context=context)
    for _ in range(2):
        serving = gevent.spawn(server.serve_forever)
        wait_until(lambda: server.started)
        with Client("inproc://s", context=context) as client:
            assert client.request(b"x") == b"answered"
        serving.get(timeout=LONG)
        assert server.closed
    assert states == [("stopping", False, "stopping")] * 2


@pytest.mark.parametrize("who", ["on_error", "hook"])
def test_stop_of_a_server_whose_handler_has_returned_nothing(context: zmq.Context, who: str) -> None:
    """What is called behind such a handler, in its greenlet, is part of it: the stop does not wait for itself there either."""
    options: dict[str, Any] = {"on_error": lambda request, error: server.stop(None)}
    if who == "hook":
        options = {"hooks": lambda record: server.stop(None) if isinstance(record, RequestFailed) else None}
    server = Server("inproc://s", lambda request: None, deadline=LONG, context=context, **options)
    server.start()
    with context.socket(zmq.REQ) as req:
        req.connect("inproc://s")
        req.send(b"x")
        answer = RemoteError.from_reply(req.recv())
    assert answer is not None
    assert answer.code == "INTERNAL"
    wait_until(lambda: server.closed)


def test_a_handler_that_stops_its_server_and_goes_on(context: zmq.Context) -> None:
    """It drains as ever: others are answered, the limit holds, and a smaller one that is given later ends it sooner."""
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        if request.body == b"stop":
            server.stop(2 * LONG)
            gevent.sleep(2 * LONG)
        go.wait()
        return request.body

    server = Server("inproc://s", handler, deadline=None, context=context)
    server.start()
    with Client("inproc://s", context=context) as client:
        other, stopping = gevent.spawn(client.request, b"x"), gevent.spawn(client.request, b"stop")
        wait_until(lambda: server.state == "stopping")
        with pytest.raises(RuntimeError, match="stopping"):
            server.start()
        go.set()
        assert other.get() == b"x"
        assert server.state == "stopping"
        server.stop(MS)
        assert server.closed
        stopping.join()
        assert isinstance(stopping.exception, RemoteError)
        assert stopping.exception.code == "UNAVAILABLE"


def test_a_handler_that_terminates_its_context(context: zmq.Context) -> None:
    """Its server is closed before that, so its client has an answer; the handler is killed, and the context is terminated."""
    own = zmq.Context()

    def handler(request: Request) -> bytes:
        own.term()
        return b"never"

    server = Server("tcp://127.0.0.1:0", handler, deadline=None, context=own)
    server.start()
    with Client(str(server.endpoint), context=context) as client, pytest.raises(RemoteError, match="UNAVAILABLE"):
        client.request(b"x")
    assert server.closed
    wait_until(lambda: own.closed)


def test_another_servers_handler_waits_for_the_stop(context: zmq.Context) -> None:
    """Only a handler of the server itself cannot."""
    states: list[str] = []

    def stop(request: Request) -> bytes:
        other.stop()
        states.append(other.state)
        return b"done"

    other = Server("inproc://other", _echo, deadline=LONG, context=context)
    other.start()
    with Server("inproc://s", stop, deadline=LONG, context=context), Client("inproc://s", context=context) as client:
        assert client.request(b"x") == b"done"
    assert states == ["closed"]


def test_on_error_that_waits_does_not_hold_up_the_end(context: zmq.Context) -> None:
    """At the end nobody can wait: an on_error that does has failed, and the standard error goes out."""
    server = Server("inproc://s", _hang, deadline=None, on_error=lambda request, error: gevent.sleep(LONG), context=context)
    server.start()
    with context.socket(zmq.REQ) as req:
        req.connect("inproc://s")
        req.send(b"x")
        wait_until(lambda: server.stats.running)
        server.close()
        assert server.closed
        error = RemoteError.from_reply(req.recv(timeout=LONG))
    assert error is not None
    assert error.code == "UNAVAILABLE"


def _hang(request: Request) -> None:
    gevent.sleep(LONG)


def test_a_hook_that_closes_the_server(context: zmq.Context) -> None:
    """Also while it is being closed, it ends once."""
    told: list[Any] = []

    def hook(record: Any) -> None:
        told.append(type(record))
        if isinstance(record, RequestFailed):
            server.close()

    server = Server("inproc://s", _hang, deadline=LONG, hooks=hook, context=context)
    server.start()
    with Client("inproc://s", context=context) as client:
        asked = [gevent.spawn(client.request, b"x") for _ in range(2)]
        wait_until(lambda: server.stats.running == 2)
        server.stop(0)
        for each in asked:
            with pytest.raises(RemoteError, match="UNAVAILABLE"):
                each.get()
    assert told.count(RequestFailed) == 2
    assert told.count(ServerStopped) == 1
    server.start()
    server.stop()


def test_a_start_that_fails_halfway(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound, but without a descriptor for the monitor, say: nothing is left of it, and the next start serves."""
    server = Server("inproc://s", _echo, deadline=LONG, cancel_vanished=True, context=context)

    def fail(*args: Any) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(server_module, "Vanished", fail)
            with pytest.raises(zmq.ZMQError) as caught:
                server.start()
        assert caught.value.errno == errno.EMFILE
        assert server.closed
        assert not hubwatch._watches
        with server, Client("inproc://s", context=context) as client:
            assert client.request(b"x") == b"x"


def test_stop_in_the_hub(context: zmq.Context) -> None:
    """It begins there and returns; what runs is answered, and then the server is closed."""
    go, states = gevent.event.Event(), []

    def handler(request: Request) -> bytes:
        go.wait()
        return request.body

    def stop() -> None:
        server.stop(LONG)
        states.append(server.state)

    server = Server("inproc://s", handler, deadline=LONG, context=context)
    server.start()
    with Client("inproc://s", context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        wait_until(lambda: server.stats.running)
        gevent.get_hub().loop.run_callback(stop)
        wait_until(lambda: states)
        assert states == ["stopping"]
        go.set()
        assert asked.get() == b"x"
    wait_until(lambda: server.closed)


def test_close_in_the_hub(context: zmq.Context) -> None:
    """It closes there, also while another greenlet waits for the end of a drain."""
    states: list[str] = []
    server = Server("inproc://s", _hang, deadline=LONG, context=context)
    server.start()
    with Client("inproc://s", context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        wait_until(lambda: server.stats.running)
        stopping = gevent.spawn(server.stop, None)
        wait_until(lambda: server.state == "stopping")
        gevent.get_hub().loop.run_callback(lambda: (server.close(), states.append(server.state)))
        stopping.get()
        assert states == ["closed"]
        with pytest.raises(RemoteError, match="UNAVAILABLE"):
            asked.get()


def test_a_stop_that_fails_closes_the_server(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong in its greenlet is logged, whoever has asked for it; nobody waits for ever."""
    server = Server("inproc://s", _echo, deadline=LONG, context=context)
    server.start()
    monkeypatch.setattr(server._watchdog, "drain", lambda: 1 / 0)
    server.stop(None)
    assert server.closed
    assert "ZeroDivisionError" in caplog.text


def test_a_close_that_fails_halfway(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong is reported, and nobody waits for an end that does not come."""
    reported: list[Any] = []
    server = Server("inproc://s", _echo, deadline=LONG, context=context)
    server.start()
    watchdog = server._watchdog
    assert watchdog is not None
    with monkeypatch.context() as patched:
        patched.setattr(gevent.get_hub(), "handle_error", lambda *args: reported.append(args[1]))
        patched.setattr(watchdog, "close", lambda: 1 / 0)
        server.stop(0)
    assert server.closed
    assert reported == [ZeroDivisionError]
    watchdog.close()


def test_a_drain_that_is_killed_before_it_begins(context: zmq.Context) -> None:
    """A program that kills all greenlets it finds kills that one, too: the server is closed at once."""
    server = Server("inproc://s", _hang, deadline=LONG, context=context)
    server.start()
    with Client("inproc://s", context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        wait_until(lambda: server.stats.running)
        before = {id(each) for each in gc.get_objects() if isinstance(each, gevent.Greenlet)}
        gevent.get_hub().loop.run_callback(server.stop, None)
        found: list[gevent.Greenlet] = []
        while not found:
            gevent.sleep(0)
            found = [each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and id(each) not in before]
        gevent.killall(found)
        server.stop(None)
        assert server.closed
        with pytest.raises(RemoteError, match="UNAVAILABLE"):
            asked.get()


def test_stop_behind_a_close_in_the_hub(context: zmq.Context, tmp_path: Path) -> None:
    """It returns when the journal is closed as well: the server can be started again then."""
    server = Server("inproc://s", _echo, deadline=LONG, journal=tmp_path / "journal", context=context)
    server.start()

    def close() -> None:
        server.close()
        with pytest.raises(RuntimeError, match="stopping"):
            server.start()
        done.append(server.closed)

    done: list[bool] = []
    gevent.get_hub().loop.run_callback(close)
    wait_until(lambda: done)
    assert done == [True]
    server.stop()
    server.start()
    server.stop()


def test_a_hook_that_starts_it_again(context: zmq.Context) -> None:
    """Not before the end: serve_forever would return while the server goes on. The hook is told so."""
    said: list[str] = []

    def hook(record: object) -> None:
        if isinstance(record, ServerStopped):
            with pytest.raises(RuntimeError) as caught:
                server.start()
            said.append(str(caught.value))

    server = Server("inproc://s", _echo, deadline=LONG, hooks=hook, context=context)
    server.start()
    gevent.get_hub().loop.run_callback(server.close)
    server._stopped.wait()
    assert server.closed
    assert "stopping" in said[0]


def test_a_killed_stop_is_not_kept(context: zmq.Context) -> None:
    """The greenlet whose stop was ended by a kill is freed, with what it held; the server is closed."""
    server = Server("inproc://s", _hang, deadline=None, context=context)
    server.start()
    raw = context.socket(zmq.DEALER)
    raw.connect("inproc://s")
    raw.send_multipart([b"", b"x"])
    wait_until(lambda: server.stats.running)

    def act(track: Any) -> None:
        held = track(Held())
        server.stop(None)
        assert held

    check_freed_by_a_kill(act)
    assert server.closed


class Held:
    """Something that a greenlet has."""


def test_a_wrong_timeout_is_found_at_once(context: zmq.Context) -> None:
    """Not by the signal that is to stop the server."""
    server = Server("inproc://s", _echo, deadline=LONG, context=context)
    with pytest.raises(TypeError, match="'5'"):
        server.serve_forever(stop_timeout="5")
    assert server.closed


def test_answers_that_nobody_has_read_are_counted_at_the_end(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """What a server has thrown away by closing is in its stats, and in the log."""
    own = zmq.Context()
    own.setsockopt(zmq.SNDHWM, 1)
    with own:
        server = Server("tcp://127.0.0.1:0", lambda request: bytes(1_000_000), deadline=LONG, context=own)
        server.start()
        assert server.endpoint is not None
        with context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.RCVHWM, 1)
            dealer.connect(server.endpoint)
            for _ in range(14):
                dealer.send_multipart([b"", b"x"])
            wait_until(lambda: server.stats.answered == 14)
            unsent = server.stats.unsent
            assert unsent
            server.close()
            assert 0 < server.stats.drops["full_outbox"] <= unsent
    (line,) = [record for record in caplog.records if "stopped at" in record.getMessage()]
    assert line.levelname == "WARNING"
    assert f"{server.stats.drops['full_outbox']} messages were not read" in line.getMessage()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_on_a_signal(number: int) -> None:
    """serve() answers what runs, returns on SIGTERM or SIGINT, and puts the signal handlers back."""
    program = f"""
import os, signal, gevent, greensafe
from greensafe.server.signals import signals
before = signal.getsignal({int(number)})
def handler(request):
    os.kill(os.getpid(), {int(number)})
    gevent.sleep(0.05)
    return b"answered"
def ask():
    with greensafe.Client("inproc://s") as client:
        print(client.request(b"x").decode())
asked = gevent.spawn(ask)
greensafe.serve("inproc://s", handler, deadline=30)
asked.join()
print(signal.getsignal({int(number)}) is before)
signal.signal({int(number)}, lambda *args: print("mine"))
with signals(print, print):
    pass
os.kill(os.getpid(), {int(number)})
"""
    result = run_python(program)
    assert result.out.split() == ["answered", "True", "mine"], result.err
    assert result.code == 0


@pytest.mark.parametrize("patch", ["", "import gevent.monkey; gevent.monkey.patch_all()"])
def test_signals_in_a_greenlet(patch: str) -> None:
    """Patched or not, serve_forever ends on a signal in any greenlet of the main thread."""
    result = run_python(f"""
{patch}
import os, signal, gevent, gevent.monkey, greensafe
server = greensafe.Server("inproc://s", print, deadline=1)
serving = gevent.spawn(server.serve_forever)
while not server.started:
    gevent.sleep(0.001)
gevent.sleep(0)
os.kill(os.getpid(), signal.SIGTERM)
serving.get(timeout={LONG})
print(server.state)
""")
    assert result.out.split() == ["closed"], result.err


def test_a_second_signal_stops_at_once() -> None:
    """While a drain waits for a handler, a second signal ends it."""
    program = """
import os, signal, gevent, greensafe
def handler(request):
    os.kill(os.getpid(), signal.SIGTERM)
    gevent.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    gevent.sleep(3600)
def ask():
    with greensafe.Client("inproc://s") as client:
        try: client.request(b"x")
        except greensafe.RemoteError as error: print(error.code)
asked = gevent.spawn(ask)
server = greensafe.Server("inproc://s", handler, deadline=None)
server.serve_forever(stop_timeout=3600)
asked.join()
"""
    result = run_python(program)
    assert result.out.split() == ["UNAVAILABLE"], result.err


def test_serve_forever_can_be_killed(context: zmq.Context) -> None:
    """A kill of serve_forever stops the server."""
    server = Server("inproc://s", _echo, deadline=1, context=context)
    runner = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    runner.kill()
    assert server.closed


@pytest.mark.parametrize("pending", ["REQ", "PUSH", "Client", "Server", "all"])
def test_a_script_that_ends_without_close_exits(pending: str) -> None:
    """A program that closes nothing ends after its last line, whatever is pending, and does not wait for messages to leave."""
    program = """
import sys, gevent, greensafe as zmq
from greensafe.green import _waiting
_waiting.DEFAULT_LINGER = _waiting.REQ_LINGER = 3_600_000  # milliseconds: who waits for it hangs
def REQ():
    s = zmq.Context().socket(zmq.REQ); s.connect("tcp://127.0.0.1:9"); s.send(b"x"); gevent.spawn(s.recv); return s
def PUSH():
    s = zmq.Context.instance().socket(zmq.PUSH); s.connect("tcp://127.0.0.1:9"); [s.send(b"y") for _ in range(100)]; return s
def Client():
    c = zmq.Client("tcp://127.0.0.1:9"); gevent.spawn(c.request, b"x"); gevent.sleep(0.01); return c
def Server():
    def handler(request): gevent.sleep(3600)
    s = zmq.Server("inproc://s", handler, deadline=30); s.start()
    c = zmq.Client("inproc://s"); gevent.spawn(c.request, b"x"); gevent.sleep(0.01); return s, c
kept = [globals()[name]() for name in (["REQ", "PUSH", "Client", "Server"] if sys.argv[1] == "all" else [sys.argv[1]])]
gevent.sleep(0.01)
"""
    result = run_python(program, pending)
    assert result.code == 0, result.err


@pytest.mark.parametrize("timeout", [0, 5 * MS])
def test_stop_refuses_what_was_not_read(context: zmq.Context, timeout: float) -> None:
    """Requests that have arrived but were not read for want of room are answered UNAVAILABLE, too."""
    server = Server("inproc://s", lambda request: gevent.sleep(LONG), deadline=None, max_inflight=1, context=context)
    server.start()
    raw = context.socket(zmq.DEALER)
    raw.connect("inproc://s")
    for _ in range(5):
        raw.send_multipart([b"", b"x"])
    wait_until(lambda: server.full)
    server.stop(timeout)
    answers = [raw.recv_multipart()[1] for _ in range(5)]
    assert all(b"UNAVAILABLE" in answer for answer in answers)
    assert not raw.poll(5)


def test_a_stop_ends_its_own_run_only(context: zmq.Context) -> None:
    """A stop that still waits does not close the server that was started again meanwhile."""
    hang = gevent.event.Event()

    def handler(request: Request) -> bytes:
        if request.body == b"hang":
            hang.wait()
        return request.body

    server = Server("inproc://s", handler, deadline=None, context=context)
    server.start()
    raw = context.socket(zmq.DEALER)
    raw.connect("inproc://s")
    raw.send_multipart([b"", b"hang"])
    wait_until(lambda: server._watchdog is not None and server._watchdog.load == 1)
    first = gevent.spawn(server.stop, LONG)
    wait_until(lambda: not server.started)
    with pytest.raises(RuntimeError, match="stopping"):
        server.start()
    server.close()
    server.start()
    first.get()
    assert server.started
    with Client("inproc://s", context=context) as client:
        assert client.request(b"x") == b"x"
    server.close()


def test_a_zombie_makes_room(context: zmq.Context) -> None:
    """A handler that survives its kill does not keep its place under max_inflight."""
    until = time.monotonic() + 2 * LONG

    def handler(request: Request) -> bytes:
        while request.body == b"zombie" and time.monotonic() < until:
            try:
                gevent.sleep(LONG)
            except BaseException:
                continue
        return request.body

    with Server("inproc://s", handler, deadline=5 * MS, grace=5 * MS, max_inflight=1, context=context) as server:
        with Client("inproc://s", context=context) as client:
            with pytest.raises(RemoteError):
                client.request(b"zombie")
            assert client.request(b"next", timeout=LONG) == b"next"
        until = 0.0
        wait_until(lambda: server._watchdog is not None and not server._watchdog.responder.zombies)


@pytest.mark.parametrize("max_zombies", [0, 3])
def test_zombies_are_bounded(context: zmq.Context, max_zombies: int) -> None:
    """Above max_zombies the server is not healthy; with max_inflight more it runs nothing, until some of them have ended."""
    until = time.monotonic() + 2 * LONG
    places, seen = 2, 0

    def handler(request: Request) -> bytes:
        nonlocal seen
        seen += 1
        while request.body == b"zombie" and time.monotonic() < until:
            try:
                gevent.sleep(LONG)
            except BaseException:
                continue
        return request.body

    limits: dict[str, Any] = {"deadline": 5 * MS, "grace": 5 * MS, "max_inflight": places, "max_zombies": max_zombies}
    with Server("inproc://s", handler, context=context, **limits) as server:
        peer = context.socket(zmq.DEALER)
        peer.connect("inproc://s")
        codes = []
        for number in range(max_zombies + places):
            assert server.healthy is server.stats.is_healthy is (number <= max_zombies)
            peer.send_multipart([b"", b"zombie"])
            codes.append(_code(peer.recv_multipart()[1]))
            wait_until(lambda number=number: server.stats.zombie_count == number + 1)
        assert codes == ["DEADLINE_EXCEEDED"] * (max_zombies + places)
        for _ in range(20):
            peer.send_multipart([b"", b"zombie"])
        assert {_code(peer.recv_multipart()[1]) for _ in range(20)} == {"UNAVAILABLE"}
        assert seen == server.stats.zombie_count == max_zombies + places
        assert server.stats.running == 0
        until = 0.0
        wait_until(lambda: not server.stats.zombie_count)
        assert server.healthy
        peer.send_multipart([b"", b"x"])
        assert peer.recv_multipart() == [b"", b"x"]


def _code(answer: bytes) -> str:
    error = RemoteError.from_reply(answer)
    return "" if error is None else error.code


@pytest.mark.parametrize("how", ["term", "destroy"])
def test_its_context_can_end(how: str) -> None:
    """The server is closed then, and its clients are told."""
    own = zmq.Context()
    server = Server("tcp://127.0.0.1:0", lambda request: gevent.sleep(LONG), deadline=None, context=own)
    server.start()
    assert server.endpoint is not None
    with zmq.Context() as other, other.socket(zmq.REQ) as req:
        req.connect(server.endpoint)
        req.send(b"x")
        wait_until(lambda: server._watchdog is not None and server._watchdog.load == 1)
        getattr(own, how)()
        assert server.closed
        assert b"UNAVAILABLE" in req.recv(timeout=LONG)


# Clients that vanish.


CLIENT = """
import sys, gevent, zmq, greensafe
kind, endpoint = sys.argv[1:]
if kind == "plain":
    sock = zmq.Context().socket(zmq.REQ)
    sock.connect(endpoint)
    sock.send(b"wait")
    print("asked", flush=True)
    sock.recv()
else:
    client = greensafe.Client(endpoint)
    asked = [gevent.spawn(client.request, b"wait") for _ in range(3)]
    print("asked", flush=True)
    gevent.joinall(asked)
"""


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
@pytest.mark.parametrize(("kind", "count"), [("greensafe", 3), ("plain", 1)])
def test_a_killed_clients_handlers_are_stopped(
    context: zmq.Context, tmp_path: Path, transport: str, kind: str, count: int
) -> None:
    """cancel_vanished: each gets Cancelled where it waits; handlers of other clients go on."""
    ended: list[str] = []
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        try:
            if request.body == b"wait":
                gevent.sleep(LONG)
            go.wait()
        except BaseException as error:
            ended.append(type(error).__name__)
            raise
        return request.body

    endpoint = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/s"
    with Server(endpoint, handler, deadline=None, cancel_vanished=True, context=context) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context) as other:
            asked = gevent.spawn(other.request, b"other")
            with running([sys.executable, "-c", CLIENT, kind, server.endpoint]) as (process, _):
                wait_until(lambda: server._watchdog is not None and server._watchdog.load == count + 1)
                process.kill()
                wait_until(lambda: len(ended) == count)
            assert server._watchdog is not None
            wait_until(lambda: server._watchdog is not None and server._watchdog.load == 1)
            assert server._watchdog.responder.cancelled == count
            go.set()
            assert asked.get() == b"other"


def test_handlers_go_on_without_cancel_vanished(context: zmq.Context) -> None:
    """By default a handler is run to its end, whether or not its client is still there."""
    done: list[bytes] = []
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        go.wait()
        done.append(request.body)
        return b""

    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=context) as server:
        assert server.endpoint is not None
        sock = context.socket(zmq.DEALER)
        sock.connect(server.endpoint)
        sock.send_multipart([b"", b"x"])
        wait_until(lambda: server._watchdog is not None and server._watchdog.load)
        sock.close(0)
        assert server._pump is not None
        go.set()
        wait_until(lambda: done == [b"x"])


def test_a_vanished_clients_requests_that_wait_are_not_run(context: zmq.Context) -> None:
    """Those that have no turn yet go with their client, and make room."""
    seen: list[bytes] = []
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        seen.append(request.body)
        go.wait()
        return request.body

    options: dict[str, Any] = {"max_inflight": 1, "cancel_vanished": True}
    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=context, **options) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context) as client:
            first = gevent.spawn(client.request, b"first")
            wait_until(lambda: seen)
            sock = context.socket(zmq.DEALER)
            sock.connect(server.endpoint)
            for _ in range(3):
                sock.send_multipart([b"", b"gone"])
            wait_until(lambda: server._watchdog is not None and server._watchdog.backlog == 3)
            sock.close(0)
            wait_until(lambda: server._watchdog is not None and server._watchdog.backlog == 0)
            go.set()
            assert first.get() == b"first"
            assert client.request(b"last") == b"last"
    assert seen == [b"first", b"last"]


# Requests that wait for their turn.


def test_requests_that_wait_are_not_forgotten(context: zmq.Context) -> None:
    """A client whose request has no turn yet hears of it, so a wait of several times its heartbeat is not taken for death."""
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        go.wait()
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=1, context=context) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context, heartbeat=500 * MS) as client:
            asked = [gevent.spawn(client.request, b"%d" % number) for number in range(3)]
            gevent.joinall(asked, timeout=1500 * MS)
            assert not any(each.ready() for each in asked)
            assert server._watchdog is not None
            assert server._watchdog.backlog == 2
            go.set()
            assert [each.get() for each in asked] == [b"0", b"1", b"2"]


def test_limits_of_requests_that_wait(context: zmq.Context) -> None:
    """The caller's limit runs while a request waits, and it is not run when that is over; the server's begins with its turn."""
    seen: list[bytes] = []
    gates = {body: gevent.event.Event() for body in (b"first", b"second", b"third")}

    def handler(request: Request) -> bytes:
        seen.append(request.body)
        gates[request.body].wait()
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=600 * MS, max_inflight=1, context=context) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context) as client:
            first = gevent.spawn(client.request, b"first")
            wait_until(lambda: seen)
            late = gevent.spawn(client.request, b"late", timeout=50 * MS)
            second = gevent.spawn(client.request, b"second")
            with pytest.raises(zmq.OperationTimeout):
                late.get()
            with pytest.raises(RemoteError, match="DEADLINE"):
                first.get()
            gates[b"second"].set()  # 600 ms after it came, but its own limit has just begun
            assert second.get() == b"second"
    assert seen == [b"first", b"second"]


def test_a_cancelled_request_that_waits_is_not_run(context: zmq.Context) -> None:
    """A caller that gives up before its turn costs its server nothing."""
    seen: list[bytes] = []
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        seen.append(request.body)
        go.wait()
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, max_inflight=1, context=context) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context) as client:
            first = gevent.spawn(client.request, b"first")
            wait_until(lambda: seen and client._channels[0].connection.is_known)
            asked = gevent.spawn(client.request, b"never")
            wait_until(lambda: server._watchdog is not None and server._watchdog.backlog == 1)
            asked.kill()
            wait_until(lambda: server._watchdog is not None and server._watchdog.backlog == 0)
            go.set()
            assert first.get() == b"first"
    assert seen == [b"first"]


def test_more_than_is_kept(context: zmq.Context, tmp_path: Path) -> None:
    """When much waits nothing is read any more, until there is room again; nobody is forgotten and the order stays."""
    seen: list[bytes] = []
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        seen.append(request.body[:8])
        go.wait()
        return b""

    count, size = 100, 2**20  # of 64 MiB
    with Server(f"ipc://{tmp_path}/s", handler, deadline=LONG, max_inflight=1, context=context) as server:
        sock = context.socket(zmq.DEALER)
        sock.connect(f"ipc://{tmp_path}/s")
        for number in range(count):
            sock.send_multipart([b"", b"%08d" % number + bytes(size)])
        wait_until(lambda: server._pump is not None and server._pump.inbox.is_paused)
        assert server._watchdog is not None
        assert server._watchdog.backlog < count - 1
        go.set()
        for _ in range(count):
            assert sock.recv_multipart(timeout=LONG) == [b"", b""]
    assert seen == [b"%08d" % number for number in range(count)]


# The end.


def test_clients_are_told_of_the_end_once(context: zmq.Context) -> None:
    """A client with requests that run is told DRAINING when stop() begins, one that asks then when it does; at last, CLOSED."""
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        go.wait()
        return request.body

    server = Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=context)
    server.start()
    assert server.endpoint is not None
    clients = [context.socket(zmq.DEALER) for _ in range(2)]
    for client in clients:
        client.connect(server.endpoint)

    def ask(client: Any, number: int) -> None:
        client.send_multipart([Header(Kind.REQUEST, number.to_bytes(16, "big")).encode(), b"", b"x"])

    def kinds(client: Any, count: int) -> list[int]:
        headers = [decode(client.recv_multipart()[0]) for _ in range(count)]
        return [header.kind for header in headers if isinstance(header, ServerHeader)]

    ask(clients[0], 1)
    wait_until(lambda: server._watchdog is not None and server._watchdog.load == 1)
    stopping = gevent.spawn(server.stop, LONG)
    assert kinds(clients[0], 1) == [Kind.DRAINING]
    for number in (2, 3):
        ask(clients[0], number)
        ask(clients[1], number)
    assert kinds(clients[1], 1) == [Kind.DRAINING]
    wait_until(lambda: server._watchdog is not None and server._watchdog.load == 5)
    go.set()
    assert kinds(clients[0], 4) == [Kind.REPLY] * 3 + [Kind.CLOSED]
    assert kinds(clients[1], 3) == [Kind.REPLY] * 2 + [Kind.CLOSED]
    stopping.get()


@pytest.mark.parametrize("why", ["it may", "a journal", "an answer was dropped", "an answer is owed"])
def test_the_last_word_is_true(context: zmq.Context, tmp_path: Path, why: str) -> None:
    """CLOSED is said if each request has had its answer, INTERRUPTED with a journal; not if one was dropped, or failed."""
    endpoint = f"ipc://{tmp_path}/s"
    journal = str(tmp_path / "journal") if why == "a journal" else None
    client = context.socket(zmq.DEALER)
    client.connect(endpoint)
    kinds: list[int] = []
    answered_by: set[bytes] = set()
    numbers = itertools.count(1)
    for count in (1, 2):
        with Server(endpoint, lambda request: request.body, deadline=LONG, journal=journal, context=context) as server:
            while len(answered_by) < count:
                if not client.poll(50):  # the first time; or what was sent before it has learned of the first server's end
                    header = Header(Kind.REQUEST, next(numbers).to_bytes(16, "big"), patience_ms=60_000)
                    client.send_multipart([header.encode(), b"", b"x"])
                    continue
                told = decode(client.recv_multipart()[0])
                assert isinstance(told, ServerHeader)
                kinds.append(told.kind)
                if told.kind == Kind.REPLY:
                    answered_by.add(told.instance)
            if why == "an answer was dropped":
                assert server._pump is not None
                server._pump.outbox.dropped += 1
            elif why == "an answer is owed":
                assert server._watchdog is not None
                server._watchdog.responder.inflight += 1
    assert (Kind.CLOSED in kinds) == (not why.startswith("an answer"))
