"""Tests of greensafe.client.client."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from time import sleep as plain_sleep
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, check_freed_by_a_kill, run_python, wait_until

import greensafe as zmq
from greensafe import (
    Cancelled,
    Client,
    DeadlineExceeded,
    Disconnected,
    OperationTimeout,
    Refused,
    RemoteError,
    Request,
    Server,
    Unreachable,
    deadline,
)
from greensafe.client.call import Call
from greensafe.client.calls import Waking
from greensafe.client.options import LONGEST_HEARTBEAT
from greensafe.client.problems import LOST
from greensafe.sansio.envelope import Kind, ServerHeader
from greensafe.sansio.requester import Asked
from greensafe.testing import FaultyLink
from greensafe.transport.pump import Pump

pytestmark = pytest.mark.usefixtures("limit")


def _handler(request: Request) -> Any:
    kind, _, rest = request.body.partition(b" ")
    if kind == b"sleep":
        gevent.sleep(float(rest))
    elif kind == b"raise":
        raise ValueError(rest.decode())
    elif kind == b"two":
        return [b"1", b"2"]
    return request.body


@pytest.fixture(params=["tcp://127.0.0.1:0", "ipc", "inproc://s"])
def endpoint(request: pytest.FixtureRequest, context: zmq.Context, tmp_path: Any) -> Any:
    address = f"ipc://{tmp_path}/s" if request.param == "ipc" else request.param
    with Server(address, _handler, deadline=LONG, context=context) as server:
        yield server.endpoint
        server.close()


def test_many_greenlets_on_one_client(context: zmq.Context, endpoint: str) -> None:
    """Any number of greenlets share a client, and each gets its own answer."""
    with Client(endpoint, context=context) as client:

        def ask(number: int) -> None:
            for turn in range(20):
                body = b"%d.%d" % (number, turn)
                assert client.request(body) == body

        gevent.joinall([gevent.spawn(ask, number) for number in range(50)], raise_error=True)
        assert "inflight=0" in repr(client)
        assert "late=0" in repr(client)


def test_replies_of_several_frames(context: zmq.Context, endpoint: str) -> None:
    """request_multipart returns all frames; request names it when there is more than one."""
    with Client(endpoint, context=context) as client:
        assert client.request_multipart([b"two", b"", b"x"]) == [b"1", b"2"]
        with pytest.raises(zmq.ProtocolError, match="request_multipart"):
            client.request(b"two")
        assert client.request(b"") == b""


def test_errors_of_the_server(context: zmq.Context, endpoint: str) -> None:
    """A handler's exception arrives as RemoteError, with code, type and message."""
    with Client(endpoint, context=context) as client:
        with pytest.raises(RemoteError) as caught:
            client.request(b"raise it broke")
        error = caught.value
        assert (error.code, error.type, error.message) == ("INTERNAL", "ValueError", "it broke")
        assert client.request(b"next") == b"next"


def test_timeout(context: zmq.Context, endpoint: str) -> None:
    """timeout= ends the wait with OperationTimeout; the late reply is counted, and the next request gets its own."""
    with Client(endpoint, context=context, timeout=10 * MS) as client:
        with pytest.raises(OperationTimeout):
            client.request(b"sleep %f" % (20 * MS))
        with pytest.raises(OperationTimeout):
            client.request(b"sleep %f" % (20 * MS), timeout=5 * MS)
        assert client.request(b"x", timeout=None) == b"x"
        with pytest.raises(OperationTimeout):
            client.request(b"x", timeout=0)


def test_deadline(context: zmq.Context, endpoint: str) -> None:
    """A deadline scope ends the wait with DeadlineExceeded, never with the server's echo of it."""
    with Client(endpoint, context=context) as client:
        for _ in range(10):
            with pytest.raises(DeadlineExceeded), deadline(5 * MS):
                client.request(b"sleep %f" % LONG)
        with pytest.raises(gevent.Timeout), gevent.Timeout(5 * MS):
            client.request(b"sleep %f" % LONG)
        asked = gevent.spawn(client.request, b"sleep %f" % LONG)
        wait_until(lambda: "inflight=1" in repr(client))
        asked.kill()
        with deadline(LONG), pytest.raises(OperationTimeout):
            client.request(b"sleep %f" % LONG, timeout=5 * MS)
        assert client.request(b"x") == b"x"


def test_extended_deadline(context: zmq.Context, endpoint: str) -> None:
    """A scope that is extended while a request waits does not lose it."""
    with Client(endpoint, context=context) as client:
        with deadline(30 * MS) as scope:
            gevent.spawn(scope.extend, LONG)
            with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
                client.request(b"sleep %f" % LONG)
            with pytest.raises(OperationTimeout):
                client.request(b"sleep %f" % LONG, timeout=10 * MS)


def test_server_limit_is_a_remote_error(context: zmq.Context) -> None:
    """The server's own deadline is its error; the caller's limit is the caller's."""
    with (
        Server("inproc://s", _handler, deadline=10 * MS, context=context),
        Client("inproc://s", context=context, timeout=LONG) as client,
        pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"),
    ):
        client.request(b"sleep %f" % LONG)


def test_nobody_there_yet(context: zmq.Context) -> None:
    """Servers and clients start in any order."""
    with Client("inproc://later", context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        wait_until(lambda: "inflight=1" in repr(client))
        with Server("inproc://later", _handler, deadline=LONG, context=context):
            assert asked.get() == b"x"


def test_more_than_the_pipe_holds(context: zmq.Context) -> None:
    """More requests at once than the high-water mark, before anybody is there: all are answered in the end."""
    with Server("tcp://127.0.0.1:0", _handler, deadline=LONG, max_inflight=10, context=context) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context) as client:
            asked = [gevent.spawn(client.request, b"%d" % number) for number in range(1800)]
            gevent.joinall(asked, raise_error=True)
            assert [greenlet.value for greenlet in asked] == [b"%d" % number for number in range(1800)]


def test_several_endpoints_share_the_load(context: zmq.Context) -> None:
    """Requests go to the endpoint with the fewest in flight."""
    seen: list[int] = []

    def handler(index: int) -> Any:
        def handle(request: Request) -> bytes:
            seen.append(index)
            gevent.sleep(5 * MS)
            return b""

        return handle

    with (
        Server("inproc://0", handler(0), deadline=LONG, context=context),
        Server("inproc://1", handler(1), deadline=LONG, context=context),
        Client("inproc://0", "inproc://1", context=context) as client,
    ):
        gevent.joinall([gevent.spawn(client.request, b"") for _ in range(20)], raise_error=True)
    assert seen.count(0) == seen.count(1) == 10


def test_close_ends_the_waits(context: zmq.Context, endpoint: str) -> None:
    """close() ends waiting requests with Cancelled, and so does asking a closed client."""
    client = Client(endpoint, context=context)
    asked = gevent.spawn(client.request, b"sleep %f" % LONG)
    wait_until(lambda: "inflight=1" in repr(client))
    client.close()
    client.close()
    with pytest.raises(Cancelled):
        asked.get()
    with pytest.raises(Cancelled):
        client.request(b"x")
    assert "closed" in repr(client)


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [
        (TypeError, (), {}),
        (TypeError, (b"tcp://127.0.0.1:1",), {}),
        (TypeError, ("tcp://127.0.0.1:1",), {"timeout": "1"}),
        (ValueError, ("tcp://127.0.0.1:1",), {"retries": -1}),
        (ValueError, ("tcp://127.0.0.1:1",), {"retries": True}),
        (ValueError, ("tcp://127.0.0.1:1",), {"heartbeat": 0}),
        (ValueError, ("tcp://127.0.0.1:1",), {"heartbeat": 0.06}),  # a server would have to say WORKING more often than it does
        (TypeError, ("tcp://127.0.0.1:1",), {"heartbeat": "1"}),
        (ValueError, ("nonsense",), {}),
        (ValueError, ("tcp://127.0.0.1:1", "nonsense"), {}),
        (ValueError, ("tcp://127.0.0.1:99999",), {}),
        (ValueError, ("tcp://127.0.0.1:0",), {}),
        (zmq.ZMQError, ("tcp://127.0.0.1:1", "pigeon://x"), {}),
    ],
)
def test_wrong_arguments(context: zmq.Context, kind: type[Exception], args: Any, options: Any) -> None:
    """A wrong argument is an error that names it, and leaves nothing behind."""
    with pytest.raises(kind, match=r"endpoint|limit|retries|heartbeat|addr|port"):
        Client(*args, context=context, **options)


def test_wrong_bodies(context: zmq.Context, endpoint: str) -> None:
    """A request that is not bytes is refused before anything is sent."""
    with Client(endpoint, context=context) as client:
        for call in (
            lambda: client.request("text"),  # type: ignore[arg-type]
            lambda: client.request_multipart(b"text"),  # type: ignore[arg-type]
            lambda: client.request_multipart([b"x", None]),  # type: ignore[list-item]
        ):
            with pytest.raises(TypeError):
                call()
        with pytest.raises(ValueError, match="at least one"):
            client.request_multipart([])
        assert client.request(bytearray(b"x")) == b"x"


PLAIN_REP = """
import sys, zmq
socket = zmq.Context().socket(zmq.REP)
print(socket.bind("tcp://127.0.0.1:*").addr, flush=True)
while True:
    frames = socket.recv_multipart()
    socket.send_multipart([b"plain"] + frames)
"""


def test_plain_rep(context: zmq.Context) -> None:
    """A plain REP answers a Client; an error frame beside others is data, since an error has one frame."""
    process = subprocess.Popen([sys.executable, "-c", PLAIN_REP], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        with Client(process.stdout.readline().strip(), context=context) as client:
            assert client.request_multipart([b"a", b"b"]) == [b"plain", b"a", b"b"]
            error = RemoteError("INTERNAL", "x").to_reply()
            assert client.request_multipart([error])[1] == error
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_garbage_from_a_server(context: zmq.Context) -> None:
    """Whatever a server sends: requests that are not answered wait on, others get their answers."""
    router = context.socket(plain.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    with Client(router.last_endpoint.decode(), context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        rid, header, empty, body = router.recv_multipart()
        for frames in ([b""], [b"x"], [b"", b"x"], [header], [header, b""], [header, b"x", b"y"], [b"\0" * 54, b"", b"x"]):
            router.send_multipart([rid, *frames])
        for kind in (Kind.WORKING, Kind.PONG, 0xFF):
            router.send_multipart([rid, ServerHeader(kind, header[8:24], bytes(16), hops=7).encode(), b"", b"not an id"])
        router.send_multipart([rid, header, empty, b"answer " + body])
        router.send_multipart([rid, header, empty, b"twice"])
        assert asked.get() == b"answer x"
        bad = gevent.spawn(client.request, b"y")
        rid, header, empty, body = router.recv_multipart()
        wait_until(lambda: "late=1" in repr(client))
        router.send_multipart([rid, ServerHeader(Kind.ERROR, header[8:24], bytes(16)).encode(), empty, b"not JSON"])
        with pytest.raises(zmq.RemoteProtocolError, match="not JSON"):
            bad.get()


def test_another_thread(context: zmq.Context) -> None:
    """A Client belongs to the thread that made it; elsewhere it is a RuntimeError."""
    with Client("inproc://x", context=context) as client:
        seen: list[str] = []

        def elsewhere() -> None:
            try:
                client.request(b"x")
            except RuntimeError as error:
                seen.append(str(error))
            gevent.get_hub().destroy(destroy_loop=True)

        thread = threading.Thread(target=elsewhere, daemon=True)
        thread.start()
        wait_until(lambda: not thread.is_alive())
        assert "thread" in seen[0]


def test_more_requests_than_any_queue_holds(context: zmq.Context, tmp_path: Path) -> None:
    """However many greenlets ask before a server is there, none is forgotten: each is answered when it comes."""
    count = 3500
    path = f"ipc://{tmp_path}/s"
    with Client(path, context=context) as client:
        asking = [gevent.spawn(client.request, b"%d" % number, timeout=LONG) for number in range(count)]
        wait_until(lambda: f"inflight={count}" in repr(client))
        with Server(path, lambda request: request.body, deadline=LONG, context=context):
            assert [greenlet.get() for greenlet in asking] == [b"%d" % number for number in range(count)]


def test_an_abandoned_request_need_not_leave_any_more(context: zmq.Context, tmp_path: Path) -> None:
    """What still waited for room when its caller gave up is not run when the server comes."""
    seen = []
    path = f"ipc://{tmp_path}/s"
    with Client(path, context=context) as client:
        asking = [gevent.spawn(client.request, b"%d" % number, timeout=5 * MS) for number in range(1500)]
        gevent.joinall(asking)
        assert {type(greenlet.exception) for greenlet in asking} == {zmq.OperationTimeout}
        with Server(path, lambda request: seen.append(request.body) or b"", deadline=LONG, context=context):
            assert client.request(b"last", timeout=LONG) == b""
    assert len(seen) < 1500


def test_frames_of_any_kind(context: zmq.Context, endpoint: str) -> None:
    """Buffers, also strided ones, and iterators are sent as what they hold; a released one is an error that touches nobody."""
    released = memoryview(b"gone")
    released.release()
    with Client(endpoint, context=context) as client:
        assert client.request(memoryview(b"abcdef")[::2]) == b"ace"
        assert client.request(bytearray(b"abc")) == b"abc"
        assert client.request_multipart(frame for frame in (b"abc",)) == [b"abc"]
        with pytest.raises(ValueError, match="released"):
            client.request(released)
        assert client.request(b"next") == b"next"
        assert "inflight=0" in repr(client)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_the_longest_heartbeat(context: zmq.Context, tmp_path: Any, transport: str) -> None:
    """All that libzmq is told of it fits."""
    address = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/s"
    with (
        Server(address, _handler, deadline=LONG, context=context) as server,
        Client(str(server.endpoint), heartbeat=LONGEST_HEARTBEAT, context=context) as client,
    ):
        assert client.request(b"x", timeout=LONG) == b"x"


@pytest.mark.parametrize("state", ["idle", "waiting"])
@pytest.mark.parametrize("how", ["term", "destroy"])
def test_its_context_can_end(state: str, how: str) -> None:
    """The client is closed then; whoever waits gets Cancelled, whatever its limit."""
    own = zmq.Context()
    client = Client("tcp://127.0.0.1:9", context=own)
    asked = gevent.spawn(client.request, b"x", timeout=LONG) if state == "waiting" else None
    if asked is not None:
        wait_until(lambda: "inflight=1" in repr(client))
    getattr(own, how)()
    assert "closed" in repr(client)
    if asked is not None:
        with pytest.raises(Cancelled):
            asked.get()


def test_a_dropped_client_is_collected(context: zmq.Context, endpoint: str) -> None:
    """Also when the limit of its last request, which was answered, is far away."""
    client = Client(endpoint, context=context)
    assert client.request(b"x", timeout=LONG) == b"x"
    gone = weakref.ref(client)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del client
        wait_until(lambda: (gc.collect(), gone() is None)[1])


def test_who_asks_again_at_once_finds_the_client_awake(
    context: zmq.Context, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request after the other, with a limit or without, neither stops and starts the pump nor makes a timer for each.

    As soon as the caller does something else the client rests: nothing of it keeps the loop running.
    """
    with Client(endpoint, context=context) as client:
        assert client.request(b"x") == b"x"
        gevent.sleep(0)
        pump = client._channels[0]._pump
        assert pump is not None
        stops: list[Pump] = []
        timers: list[float] = []
        stop, arm = Pump.stop, Waking.arm
        monkeypatch.setattr(Pump, "stop", lambda self: (stops.append(self), stop(self)))
        monkeypatch.setattr(Waking, "arm", lambda self, at: (timers.append(at), arm(self, at)))
        for number in range(100):
            assert client.request(b"x", timeout=None if number % 2 else LONG) == b"x"
        assert stops == []
        assert len(timers) == 1
        gevent.sleep(0)
        assert not pump.is_started
        assert client._waking._timer is None


@pytest.mark.parametrize("how", ["answered", "error", "timeout", "lost"])
def test_nothing_is_left_to_the_garbage_collector(context: zmq.Context, endpoint: str, how: str) -> None:
    """However a request ends, what it was made of is freed with it (or when its limit comes): no cycle holds it."""
    bodies = {"answered": b"x", "error": b"raise it broke", "timeout": b"sleep %f" % LONG, "lost": b"sleep %f" % LONG}
    with Client(endpoint, context=context) as client:
        assert client.request(b"x") == b"x"
        gc.collect()
        gc.disable()
        try:
            if how == "lost":
                gevent.get_hub().loop.run_callback(client._channels[0]._lose, LOST)
            errors: list[weakref.ref[BaseException]] = []
            try:
                client.request(bodies[how], timeout=10 * MS if how == "timeout" else None)
            except (RemoteError, OperationTimeout, Disconnected) as error:
                errors.append(weakref.ref(error))
            wait_until(lambda: not any(type(each) in (Call, Asked) for each in gc.get_objects()))
            assert len(errors) == (how != "answered")
            assert all(error() is None for error in errors)
        finally:
            gc.enable()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_killed_greenlet_takes_its_client_along(endpoint: str, is_there: bool) -> None:
    """The client, and its descriptors, go with the greenlet that held it, whether it waits for an answer or for a server."""
    with zmq.Context() as own:
        plain.Socket(own, zmq.PUSH).close()  # the context's own descriptors are there
        before = len(os.listdir("/proc/self/fd"))

        def act(track: Any) -> None:
            client = track(Client(endpoint if is_there else "ipc:///nobody/here", context=own))
            client.request(b"sleep %f" % LONG)

        check_freed_by_a_kill(act)
        # libzmq keeps a socket that waits for its peer on inproc until its context ends.
        wait_until(lambda: endpoint.startswith("inproc:") or len(os.listdir("/proc/self/fd")) <= before)


def test_a_client_that_is_dropped_is_closed(context: zmq.Context, endpoint: str) -> None:
    """At once, and not at the next collection."""
    gc.disable()
    try:
        client = Client(endpoint, context=context)
        assert client.request(b"x", timeout=LONG) == b"x"
        (channel,) = client._channels
        gone = weakref.ref(client)
        del client
        wait_until(lambda: gone() is None)
        assert channel._pump is None
    finally:
        gc.enable()


def test_who_is_told_may_close_the_client(context: zmq.Context, capfd: pytest.CaptureFixture[str]) -> None:
    """The first of several that are told that nobody will answer closes the client: the others are told that."""
    with context.socket(zmq.PUB) as wrong:
        port = wrong.bind_to_random_port("tcp://127.0.0.1")
        wrong.unbind(wrong.last_endpoint)
        client = Client(f"tcp://127.0.0.1:{port}", context=context, wait=True)

        def ask() -> type[BaseException] | None:
            try:
                client.request(b"x", timeout=LONG)
            except (Refused, Cancelled) as error:
                client.close()
                return type(error)
            return None

        asked = [gevent.spawn(ask) for _ in range(3)]
        wait_until(lambda: client.stats.waiting == 3)  # so that none of them learns of it while it asks
        wrong.bind(f"tcp://127.0.0.1:{port}")
        assert [greenlet.get() for greenlet in asked] == [Refused, Cancelled, Cancelled]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("how", ["timeout", "lost", "refused"])
def test_a_raw_greenlet_that_fails_takes_nobody_with_it(
    context: zmq.Context, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error that leaves a raw greenlet is reported by the hub: those behind it are woken, and the client rests."""
    with context.socket(zmq.PUB) as wrong, Server("tcp://127.0.0.1:0", _handler, deadline=LONG, context=context) as server:
        there = f"tcp://127.0.0.1:{wrong.bind_to_random_port('tcp://127.0.0.1')}" if how == "refused" else server.endpoint
        assert there is not None
        ended: list[type[BaseException]] = []
        with Client(there, context=context) as client:
            if how != "refused":
                assert client.request(b"x") == b"x"
            channel = client._channels[0]

            def ask(is_raw: bool = False) -> None:
                try:
                    client.request(b"sleep %f" % LONG, timeout=20 * MS if how == "timeout" else LONG)
                except (OperationTimeout, Disconnected, Refused) as error:
                    ended.append(type(error))
                    if is_raw:
                        raise

            gevent.spawn_raw(ask, True)
            gevent.spawn_raw(ask, True)
            others = [gevent.spawn(ask) for _ in range(3)]
            gevent.sleep(0)
            if how == "timeout":
                gevent.get_hub().loop.run_callback(plain_sleep, 50 * MS)  # all limits come in one turn of the loop
            elif how == "lost":
                gevent.get_hub().loop.run_callback(channel._lose, LOST)
            gevent.joinall(others)
            assert ended == [{"timeout": OperationTimeout, "lost": Disconnected, "refused": Refused}[how]] * 5
            assert client.restarts.counts == {}
            gevent.sleep(0)
            assert client._waking._timer is None
            assert channel._pump is None or not channel._pump.is_started
        server.close()
    assert capfd.readouterr().err.count("Traceback") >= 2


def test_nobody_is_told_of_a_new_connection_on_a_socket_that_is_given_up(tmp_path: Path) -> None:
    """Who gets the answer that is read at the connection's end, works long, and asks again: by the next connection, once."""
    path = f"ipc://{tmp_path}/s"
    got: list[bytes] = []
    may_reply, again, is_back = threading.Event(), threading.Event(), threading.Event()

    def serve() -> None:
        for number in range(2):
            with plain.Context() as native, native.socket(plain.REP) as sock:
                sock.bind(path)
                if number:
                    is_back.set()
                while sock.poll(int(1000 * (LONG if len(got) < 2 else 300 * MS))):
                    got.append(sock.recv())
                    assert number or may_reply.wait(LONG)
                    sock.send(got[-1])
                    if not number:
                        assert again.wait(LONG)
                        break

    thread = threading.Thread(target=serve)
    thread.start()
    with zmq.Context() as context, Client(path, context=context) as client:

        def ask() -> bytes:
            assert client.request(b"1") == b"1"
            again.set()
            assert is_back.wait(LONG)
            plain_sleep(500 * MS)  # libzmq connects again meanwhile
            return client.request(b"2")

        def lose() -> None:
            may_reply.set()
            plain_sleep(100 * MS)  # the answer is there, and not read
            client._channels[0]._lose(LOST)

        asked = gevent.spawn(ask)
        wait_until(lambda: got)
        gevent.get_hub().loop.run_callback(lose)
        assert asked.get() == b"2"
        assert client.stats.endpoints[0].lost_requests == 0
    thread.join()
    assert got == [b"1", b"2"]


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_nothing_is_left_of_a_retry_that_is_to_come(context: zmq.Context, endpoint: str, how: str) -> None:
    """Whoever waits for his next try may leave, or the client be closed: no timer is left, and nothing waits."""
    with Client(endpoint, context=context, retries=1) as client:
        assert client.request(b"x") == b"x"
        asked = gevent.spawn(client.request, b"sleep %f" % LONG, idempotent=True)
        wait_until(lambda: client._channels[0].load)
        call = client._requester.asked()[0].owner
        gevent.get_hub().loop.run_callback(client._channels[0]._lose, LOST)
        wait_until(lambda: call.pause is not None)
        if how == "closed":
            client.close()
        else:
            asked.kill(block=False)
        gevent.joinall([asked])
        assert call.pause is None
        assert not client._failover.waiting


def test_what_has_ended_before_its_limit_is_not_kept_until_then(context: zmq.Context, endpoint: str) -> None:
    """The table may keep a request with a limit until that comes, but neither its body nor who asked."""
    with Client(endpoint, context=context) as client:
        for number in range(100):
            asker = gevent.Greenlet(client.request, bytes(1000) + b"%d" % number, timeout=LONG)
            asker.start()
            asker.join()
        kept = [entry[2] for entry in client._requester._due._heap]
        assert kept
        assert [each for each in kept if each.body or each.owner is not None] == []


# Whoever leaves, whenever it is.


def _turns(count: int) -> None:
    for _ in range(count):
        gevent.sleep(0)


@pytest.mark.parametrize("how", ["kill", "throw", "timeout", "close"])
def test_leaving_at_every_moment(context: zmq.Context, endpoint: str, how: str) -> None:
    """Whenever in its life a request is given up, it ends as it should, and the next ones get their own answers."""
    client = Client(endpoint, context=context, timeout=LONG)
    for turns in range(25):
        asked = [gevent.spawn(client.request, b"%d.%d" % (turns, number)) for number in range(3)]
        _turns(turns % 13)
        if how == "kill":
            asked[1].kill(block=False)
        elif how == "throw":
            asked[1].kill(KeyError, block=False)
        elif how == "timeout":
            with pytest.raises((OperationTimeout, gevent.Timeout)), gevent.Timeout(MS):
                client.request(b"sleep %f" % LONG)
        else:
            client.close()
        gevent.joinall(asked)
        for number, each in enumerate(asked):
            error = each.exception if not isinstance(each.value, gevent.GreenletExit) else None
            if each.successful() and not isinstance(each.value, gevent.GreenletExit):
                assert each.value == b"%d.%d" % (turns, number)
            elif error is not None:
                assert type(error) is {"throw": KeyError, "close": Cancelled}[how]
        if how == "close":
            client = Client(endpoint, context=context, timeout=LONG)
        assert client.request(b"next %d" % turns) == b"next %d" % turns
        assert "inflight=0" in repr(client)
    client.close()


def test_closed_by_whoever_gets_an_answer(context: zmq.Context, endpoint: str) -> None:
    """A greenlet that is woken by its answer closes the client: the others get theirs, or Cancelled, and nobody hangs."""
    client = Client(endpoint, context=context)

    def ask(number: int) -> bytes:
        try:
            return client.request(b"%d" % number)
        finally:
            client.close()

    asked = [gevent.spawn(ask, number) for number in range(20)]
    gevent.joinall(asked)
    for number, each in enumerate(asked):
        assert each.value == b"%d" % number or type(each.exception) is Cancelled


@pytest.mark.parametrize("how", ["reset", "refuse", "answer"])
def test_closed_while_its_connection_goes(context: zmq.Context, how: str) -> None:
    """close() by a greenlet that was told of the loss, of nobody being there, or in the middle of the drain."""
    with Server("tcp://127.0.0.1:0", _handler, deadline=LONG, context=context) as server:
        assert server.endpoint is not None
        with FaultyLink(server.endpoint) as link:
            client = Client(link.endpoint, context=context, wait=how != "refuse")
            if how == "refuse":
                link.refuse()
                link.reset()

            def ask(number: int) -> Any:
                try:
                    return client.request(b"sleep %f" % (LONG if how == "reset" else number * MS))
                except zmq.PeerError as error:
                    return error
                finally:
                    client.close()

            asked = [gevent.spawn(ask, number) for number in range(5)]
            if how != "refuse":
                wait_until(lambda: server._watchdog is not None and server._watchdog.load)
                link.reset()
            gevent.joinall(asked)
            assert "closed" in repr(client)
            assert {type(each.value or each.exception) for each in asked} <= {Disconnected, Unreachable, Cancelled, bytes}
        server.close()


def test_a_client_in_each_thread(endpoint: str) -> None:
    """Threads with a client each, over one context, do not get in each other's way."""
    if endpoint.startswith("inproc"):
        return  # of the server's own context only
    made = zmq.Context()
    failures: list[BaseException] = []

    def work(name: bytes) -> None:
        try:
            with Client(endpoint, context=made, timeout=LONG) as client:

                def ask(number: int) -> None:
                    for turn in range(10):
                        body = b"%s %d %d" % (name, number, turn)
                        assert client.request(body) == body

                gevent.joinall([gevent.spawn(ask, number) for number in range(5)], raise_error=True)
        except BaseException as error:
            failures.append(error)
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    threads = [threading.Thread(target=work, args=(b"%d" % number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: not any(thread.is_alive() for thread in threads))  # the server is in this one
    made.term()
    assert not failures


def test_a_dropped_client_with_all_that_it_had(context: zmq.Context, endpoint: str) -> None:
    """Collected without a close, with its monitor, its heartbeats, and a request that was given up: no descriptor stays."""
    for heartbeat in (100 * MS, None):
        client = Client(endpoint, "tcp://127.0.0.1:9", context=context, heartbeat=heartbeat)
        assert client.request(b"x") == b"x"
        with pytest.raises(OperationTimeout):
            client.request(b"sleep %f" % LONG, timeout=30 * MS)
        gone = weakref.ref(client)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del client
            wait_until(lambda: (gc.collect(), gone() is None)[1])  # noqa: B023 - used at once


@pytest.mark.parametrize("state", ["idle", "never used", "unreachable", "server gone", "timed out"])
def test_a_script_ends_with_an_open_client(tmp_path: Path, state: str) -> None:
    """Nothing of a client that nobody waits for keeps the program running."""
    program = """
import sys, greensafe, gevent
state, path = sys.argv[1:]
server = greensafe.Server(path, lambda request: gevent.sleep(int(request.body)) or b"done", deadline=None)
server.start()
client = greensafe.Client("ipc://" + path.rpartition("/")[0] + "/nobody" if state == "unreachable" else path, heartbeat=0.2)
if state != "never used":
    try:
        print(client.request(b"0" if state in ("idle", "server gone") else b"9", timeout=0.2).decode())
    except greensafe.OperationTimeout:
        print("done")
else:
    print("done")
server.stop(0)
if state == "server gone":
    gevent.sleep(0.1)
"""
    result = run_python(program, state, f"ipc://{tmp_path}/s")
    assert result.out.split() == ["done"], result.err
    assert result.code == 0, result.err
    # The server says that it kills the handler, unless it has read before that its client has given up.
    assert not result.err or (state == "timed out" and re.search("stopped at|handlers still run", result.err)), result.err


FORKING = """
import os, sys, gevent
import greensafe as zmq

parent_endpoint, is_lost = sys.argv[1], sys.argv[2] == "lost"
client = zmq.Client(parent_endpoint, heartbeat=0.5, timeout=300)
if is_lost:
    server = zmq.Server("ipc://" + sys.argv[3], lambda request: request.body, deadline=None)
    server.start()
    client = zmq.Client("ipc://" + sys.argv[3], heartbeat=0.5, timeout=300)
    client.request(b"x")
    server.stop(0)
    while "up=1" in repr(client):
        gevent.sleep(0.01)
else:
    client.request(b"x")
waiting = gevent.spawn(client.request, b"sleep 0.6")
gevent.sleep(0.05)
first = client._prefix
child = os.fork()
if not child:
    try:
        if is_lost:
            client._endpoints = (parent_endpoint,)
        for number in range(5):
            assert client.request(b"%d" % number) == b"%d" % number
            gevent.sleep(0.15)
        assert client._prefix != first, "request ids of two processes must not be equal"
        assert "inflight=0" in repr(client), client
        client.close()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
if is_lost:
    server.start()
assert waiting.get() == b"sleep 0.6"
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("state", ["up", "lost"])
def test_a_child_forked_while_a_request_waits(context: zmq.Context, tmp_path: Path, state: str) -> None:
    """Parent and child each get their own answers, also when the fork finds the connection lost."""
    with Server(f"ipc://{tmp_path}/s", _handler, deadline=LONG, context=context):
        run = gevent.get_hub().threadpool.apply
        result = run(lambda: run_python(FORKING, f"ipc://{tmp_path}/s", state, f"{tmp_path}/own"))
    assert result.out.split() == ["0"], result.err


FORKING_IN_A_PAUSE = """
import os, sys, gevent
import greensafe as zmq
from greensafe.client import channel as channels
from greensafe.client import pool as failover
from greensafe.transport.outbox import Outbox
from greensafe.client.problems import LOST

endpoint, pause = sys.argv[1:]
failover.delay = channels.delay = lambda attempt, fraction: 0.3
client = zmq.Client(endpoint, heartbeat=0.5, timeout=300, retries=1)
assert client.request(b"x") == b"x"
waiting = gevent.spawn(client.request, b"sleep 0.2", idempotent=True)
gevent.sleep(0.05)
first = client._channels[0]
if pause == "retry":
    client._hub.loop.run_callback(first._lose, LOST)
    while not client._requester.asked()[0].owner.pause or not first.is_up:
        gevent.sleep(0.001)
elif pause == "reopen":
    first._losses = 1
    client._hub.loop.run_callback(first._lose, LOST)
    while not first._reopen:
        gevent.sleep(0.001)
else:
    client._hub.loop.run_callback(first._on_disconnected)
    while not first._settle:
        gevent.sleep(0)
child = os.fork()
if not child:
    used = []
    for owner, name in (Outbox, "_try_send"), (channels, "plain_socket"):
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, name=name, real=real: (used.append(name), real(*args))[1])
    try:
        gevent.sleep(0.6)
        assert used == [], used
        assert client.request(b"child") == b"child"
        assert client.stats.answered == 1 and not client._failover.waiting
        gevent.sleep(0.6)
        assert used == ["plain_socket", "_try_send"], used
        client.close()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
assert waiting.get() == b"sleep 0.2"
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
client.close()
"""


@pytest.mark.parametrize("pause", ["retry", "reopen", "settle"])
def test_a_child_forked_in_a_pause(context: zmq.Context, tmp_path: Path, pause: str) -> None:
    """What was to be done after a pause is the parent's: a child neither sends its requests again nor makes its connections."""
    with Server(f"ipc://{tmp_path}/s", _handler, deadline=LONG, context=context):
        run = gevent.get_hub().threadpool.apply
        result = run(lambda: run_python(FORKING_IN_A_PAUSE, f"ipc://{tmp_path}/s", pause))
    assert result.out.split() == ["0"], result.err
