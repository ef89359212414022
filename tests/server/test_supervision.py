"""Tests of greensafe.server.supervision beyond the table of test_handlers: leaving early, misuse, one's own loop."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import pytest
import zmq as plain
from helpers import LONG, MS, check_freed_by_a_kill, wait_until

import greensafe as zmq
from greensafe import Request, deadline, supervise, supervised
from greensafe.hooks import RequestAnswered, RequestFailed, RequestStarted, ServerStarted, ServerStopped
from greensafe.sansio.responder import Responder
from greensafe.server import supervision

pytestmark = pytest.mark.usefixtures("limit")


def _handle(request: Request) -> bytes:
    if request.body == b"hang":
        _hanging.append(request)
        gevent.sleep(LONG)
    return request.body


#: The requests whose handlers hang.
_hanging: list[Request] = []


def _bound(context: zmq.Context, kind: int) -> tuple[Any, Any]:
    sock, peer = context.socket(kind), context.socket(zmq.DEALER)
    sock.bind("inproc://supervised")
    peer.connect("inproc://supervised")
    return sock, peer


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
@pytest.mark.parametrize("how", ["kill", "deadline", "gevent.Timeout"])
def test_leaving_supervise_early_answers_and_leaves_the_socket_usable(context: zmq.Context, kind: int, how: str) -> None:
    """What is unanswered is answered UNAVAILABLE; the socket stays open and can be supervised again."""
    sock, peer = _bound(context, kind)

    def run() -> None:
        with deadline(10 * MS if how == "deadline" else None), gevent.Timeout(10 * MS if how == "gevent.Timeout" else None):
            supervise(sock, _handle, deadline=LONG)

    _hanging.clear()
    peer.send_multipart([b"", b"hang"])
    runner = gevent.spawn(run)
    if how == "kill":
        wait_until(lambda: _hanging)
        runner.kill()
    else:
        with pytest.raises((zmq.DeadlineExceeded, gevent.Timeout)):
            runner.get()
    assert json.loads(peer.recv_multipart()[1])["error"]["code"] == "UNAVAILABLE"
    again = gevent.spawn(supervise, sock, _handle, deadline=LONG)
    peer.send_multipart([b"", b"again"])
    assert peer.recv_multipart() == [b"", b"again"]
    again.kill()


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_supervise_ends_when_its_socket_is_closed(context: zmq.Context, kind: int) -> None:
    """At once, also while it waits for handlers: they are killed, as their answers have nowhere to go."""
    sock, peer = _bound(context, kind)
    started, ended = [], []

    def handler(request: Request) -> bytes:
        started.append(request.body)
        try:
            return _handle(request)
        finally:
            ended.append(request.body)

    runner = gevent.spawn(supervise, sock, handler, deadline=None, max_inflight=1)
    for _ in range(2):
        peer.send_multipart([b"", b"hang"])
    wait_until(lambda: started)
    gevent.sleep(0)
    sock.close(0)
    runner.get()
    wait_until(lambda: ended)


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_supervise_killed_before_a_handler_started(context: zmq.Context, kind: int) -> None:
    """A request that was read and whose handler has not started is refused; it does not start any more."""
    sock, peer = _bound(context, kind)
    started = []
    runner = gevent.spawn(supervise, sock, lambda request: started.append(request) or b"", deadline=LONG)
    peer.send_multipart([b"", b"x"])

    def kill_in_between(watchdog: Any, frames: list[bytes], stopped: Any) -> None:
        runner.kill(block=False)  # it comes before the handler's start, which is scheduled next
        accept(watchdog, frames, stopped)

    accept = supervision._accept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervision, "_accept", kill_in_between)
        runner.join()
    assert started == []
    assert json.loads(peer.recv_multipart()[1])["error"]["code"] == "UNAVAILABLE"
    peer.send_multipart([b"", b"again"])
    assert sock.recv_multipart()[-1] == b"again"


def test_max_inflight_of_a_router(context: zmq.Context) -> None:
    """Beyond it nothing is read."""
    sock, peer = _bound(context, zmq.ROUTER)
    running: list[Request] = []

    def handler(request: Request) -> Any:
        running.append(request)
        return zmq.LATER

    runner = gevent.spawn(supervise, sock, handler, deadline=LONG, max_inflight=2)
    for body in (b"1", b"2", b"3"):
        peer.send_multipart([b"", body])
    wait_until(lambda: len(running) == 2)
    gevent.sleep(2 * MS)
    assert len(running) == 2
    running[0].reply(b"first")
    assert peer.recv_multipart() == [b"", b"first"]
    wait_until(lambda: len(running) == 3)
    for request in running[1:]:
        request.reply(b"rest")
    runner.kill()


@pytest.mark.parametrize("use", [supervise, supervised])
def test_wrong_arguments(context: zmq.Context, use: Any) -> None:
    """Each is named, before anything is read."""
    handler = [_handle] if use is supervise else []
    with plain.Context() as other, other.socket(zmq.REP) as foreign, pytest.raises(TypeError, match="greensafe socket"):
        use(foreign, *handler, deadline=1)
    with pytest.raises(TypeError, match="REP or ROUTER"):
        use(context.socket(zmq.DEALER), *handler, deadline=1)
    with pytest.raises(ValueError, match="deadline"):
        use(context.socket(zmq.REP), *handler, deadline=-1)
    with pytest.raises(TypeError):
        use(context.socket(zmq.REP), *handler)
    if use is supervise:
        with pytest.raises(TypeError, match="handler"):
            supervise(context.socket(zmq.REP), "no handler", deadline=1)
        for wrong in (0, -1, "x"):
            with pytest.raises(ValueError, match="max_inflight"):
                supervise(context.socket(zmq.ROUTER), _handle, deadline=1, max_inflight=wrong)
    with pytest.raises(TypeError, match="on_error"):
        use(context.socket(zmq.REP), *handler, deadline=1, on_error=5)


def test_a_rep_whose_request_was_read_before(context: zmq.Context) -> None:
    """supervise cannot receive from it, says so, and the request can still be answered by whoever read it."""
    sock, peer = _bound(context, zmq.REP)
    peer.send_multipart([b"", b"x"])
    assert sock.recv() == b"x"
    with pytest.raises(zmq.ZMQError) as caught:
        supervise(sock, _handle, deadline=LONG)
    assert caught.value.errno == zmq.EFSM
    sock.send(b"own")
    assert peer.recv_multipart() == [b"", b"own"]


def test_supervised_loop_answers_with_its_own_send(context: zmq.Context) -> None:
    """In a `while` loop over a REP the socket's own send answers; half a reply is ended, none is answered for."""
    rep, req = context.socket(zmq.REP), context.socket(zmq.REQ)
    rep.bind("inproc://own")
    req.connect("inproc://own")

    def run() -> None:
        for step in range(4):
            with supervised(rep, deadline=None) as request:
                assert request.body == b"%d" % step
                if step == 0:
                    rep.send(b"own")
                elif step == 1:
                    rep.send(b"half", zmq.SNDMORE)
                    raise ValueError("between the frames")
                elif step == 3:
                    request.reply(b"own")
                    with pytest.raises(zmq.ZMQError):
                        rep.send(b"twice")

    runner = gevent.spawn(run)
    answers = []
    for step in range(4):
        req.send(b"%d" % step)
        answers.append(req.recv_multipart())
    runner.get()
    assert answers[0] == [b"own"]
    assert answers[1] == [b"half", b""]
    assert json.loads(answers[2][0])["error"]["code"] == "INTERNAL"
    assert answers[3] == [b"own"]


def test_supervised_stands_inside_the_scopes_of_its_caller(context: zmq.Context) -> None:
    """An outer deadline counts inside the block and after it, also when its signal was swallowed in between."""
    sock, peer = _bound(context, zmq.REP)
    peer.send_multipart([b"", b"x"])
    with pytest.raises(zmq.DeadlineExceeded), deadline(20 * MS) as outer:
        with supervised(sock, deadline=LONG) as request:
            assert request.deadline.effective_at == outer.at
            with contextlib.suppress(BaseException):
                gevent.sleep(LONG)
            sock.send(b"own")
        assert deadline.current() is outer
        sock.recv()
    assert outer.expired
    assert peer.recv_multipart() == [b"", b"own"]


def test_supervised_inside_supervised(context: zmq.Context) -> None:
    """Two sockets, one block inside the other: each has its own limit, and the outer one goes on after the inner."""
    sock, peer = _bound(context, zmq.REP)
    other = context.socket(zmq.REP)
    other.bind("inproc://other")
    second = context.socket(zmq.DEALER)
    second.connect("inproc://other")
    peer.send_multipart([b"", b"x"])
    second.send_multipart([b"", b"y"])
    with supervised(sock, deadline=LONG) as request:
        with supervised(other, deadline=5 * MS):
            gevent.sleep(LONG)
        assert deadline.current() is request.deadline
        request.reply(b"outer")
    assert peer.recv_multipart() == [b"", b"outer"]
    assert json.loads(second.recv_multipart()[1])["error"]["code"] == "DEADLINE_EXCEEDED"


def test_supervised_once_at_a_time(context: zmq.Context) -> None:
    """One object can be used again and again, but not inside of itself: a RuntimeError, and the outer block goes on."""
    sock, peer = _bound(context, zmq.ROUTER)
    watched = supervised(sock, deadline=LONG)
    for body in (b"1", b"2"):
        peer.send_multipart([b"", body])
        with watched as request:
            with pytest.raises(RuntimeError, match="new one"), watched:
                pass
            request.reply(body)
        assert peer.recv_multipart() == [b"", body]


@pytest.mark.parametrize("use", [supervise, supervised])
def test_malformed_messages_affect_nobody(context: zmq.Context, caplog: pytest.LogCaptureFixture, use: Any) -> None:
    """What is no request is logged and dropped, and the loop goes on with the next."""
    sock, peer = _bound(context, zmq.ROUTER)
    for frames in ([b"x"], [b""], [b"a", b"b"], [b"", b"good"]):
        peer.send_multipart(frames)
    if use is supervise:
        runner = gevent.spawn(supervise, sock, _handle, deadline=LONG)
    else:
        with supervised(sock, deadline=LONG) as request:
            request.reply(request.body)
    assert peer.recv_multipart() == [b"", b"good"]
    assert caplog.text.count("malformed request dropped") == 1
    sock._lines.flush()
    assert "(the last of 2 more within" in caplog.text
    if use is supervise:
        runner.kill()


@pytest.mark.parametrize("error", [ValueError("on_error"), SystemExit(3)])
def test_supervised_whose_on_error_fails(context: zmq.Context, error: BaseException) -> None:
    """The client is answered all the same, and the loop can go on; what is no Exception is passed on after that."""
    sock, peer = _bound(context, zmq.REP)

    def on_error(request: Request, told: zmq.RemoteError) -> None:
        raise error

    peer.send_multipart([b"", b"x"])
    with contextlib.suppress(SystemExit), supervised(sock, deadline=None, on_error=on_error):
        raise KeyError("no")
    assert json.loads(peer.recv_multipart()[1])["error"]["type"] == "KeyError"
    peer.send_multipart([b"", b"again"])
    assert sock.recv() == b"again"


DECODERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "JSON": (lambda request: request.json(), "INVALID_ARGUMENT"),
    "text": (lambda request: request.body.decode(), "INTERNAL"),
    "a pickle": (lambda request: pickle.loads(request.body), "INTERNAL"),
    "frames": (lambda request: int(b"".join(request.frames)), "INTERNAL"),
}


@pytest.mark.parametrize("frames", [[b"\xff{"], [b"\xff{", b"", b"more"]])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_a_request_that_cannot_be_decoded_is_answered(
    context: zmq.Context, kind: int, decoder: str, frames: list[bytes]
) -> None:
    """The requester gets the error, under supervise and in a loop of supervised, and the next request is answered as ever."""
    sock = context.socket(kind)
    sock.bind("inproc://undecodable")
    req = context.socket(zmq.REQ)
    req.connect("inproc://undecodable")
    decode, code = DECODERS[decoder]

    def handle(request: Any) -> bytes:
        if request.body != b"fine":
            decode(request)
        return b"answer"

    def loop() -> None:
        for _ in range(2):
            with supervised(sock, deadline=LONG) as request:
                request.reply(handle(request))

    for serve in (lambda: supervise(sock, handle, deadline=LONG), loop):
        serving = gevent.spawn(serve)
        req.send_multipart(frames)
        assert json.loads(req.recv())["error"]["code"] == code
        req.send(b"fine")
        assert req.recv() == b"answer"
        serving.kill()


def _serving(sock: Any, how: str, handler: Callable[[Request], Any], **options: Any) -> None:
    """Serve a socket with a handler, by `supervise` or in a loop of `supervised`."""
    if how == "supervise":
        supervise(sock, handler, deadline=LONG, **options)
    while not sock.closed:
        with supervised(sock, deadline=LONG, **options) as request:
            request.reply(handler(request))


def _served(sock: Any, how: str, handler: Callable[[Request], Any], **options: Any) -> Any:
    return gevent.spawn(_serving, sock, how, handler, **options)


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
@pytest.mark.parametrize("how", ["supervise", "supervised"])
def test_a_client_is_told_of_errors(context: zmq.Context, kind: int, how: str) -> None:
    """Client.request raises RemoteError for an error of a supervised REP or ROUTER; what merely looks like one stays data."""
    sock = context.socket(kind)
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    lookalike = b'{"error": {"code": "INTERNAL", "type": "ValueError", "message": "no"}}'

    def handler(request: Request) -> bytes:
        if request.body == b"fail":
            raise KeyError("no such thing")
        return request.body

    serving = _served(sock, how, handler)
    records: list[Any] = []
    with zmq.Client(f"tcp://127.0.0.1:{port}", context=context, retries=3, hooks=records.append) as client:
        for ask in (client.request, lambda body: client.request_multipart([body])):
            with pytest.raises(zmq.RemoteError) as caught:
                ask(b"fail")
            assert (caught.value.code, caught.value.type) == ("INTERNAL", "KeyError")
            assert (type(records[-1]), records[-1].error_name) == (zmq.hooks.CallFailed, "RemoteError")
        assert client.request(lookalike) == lookalike
        assert client.stats.failures == {"RemoteError": 2}
        assert client.stats.retries == 0
    serving.kill()


def test_a_client_of_a_rep_that_is_reset(context: zmq.Context) -> None:
    """What a program gives up by reset() is a RemoteError for its client."""
    sock = context.socket(zmq.REP)
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    with zmq.Client(f"tcp://127.0.0.1:{port}", context=context, timeout=LONG) as client:
        asked = gevent.spawn(client.request, b"x")
        sock.recv()
        sock.reset()
        with pytest.raises(zmq.RemoteError, match="ABORTED"):
            asked.get()


def test_an_error_that_is_passed_on(context: zmq.Context) -> None:
    """An error frame that a REP has received and returns is raised by its own client; as a Server's reply it is data."""
    frame = zmq.RemoteError("NOT_FOUND", "elsewhere").to_reply()
    sock = context.socket(zmq.REP)
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    serving = gevent.spawn(supervise, sock, lambda request: frame, deadline=LONG)
    with zmq.Client(f"tcp://127.0.0.1:{port}", context=context) as client:
        with pytest.raises(zmq.RemoteError, match="elsewhere"):
            client.request(b"x")
    serving.kill()
    with zmq.Server("inproc://s", lambda request: frame, deadline=LONG, context=context):
        with zmq.Client("inproc://s", context=context) as client:
            assert client.request(b"x") == frame


def test_on_error_of_a_rep(context: zmq.Context) -> None:
    """What on_error returns is data for a Client, unless it is an error's frame."""
    sock = context.socket(zmq.REP)
    port = sock.bind_to_random_port("tcp://127.0.0.1")

    def on_error(request: Request, error: zmq.RemoteError) -> bytes:
        return b"sorry" if request.body == b"own" else zmq.RemoteError("UNKNOWN", "another").to_reply()

    serving = gevent.spawn(supervise, sock, lambda request: None, deadline=LONG, on_error=on_error)
    with zmq.Client(f"tcp://127.0.0.1:{port}", context=context) as client:
        assert client.request(b"own") == b"sorry"
        with pytest.raises(zmq.RemoteError, match="another"):
            client.request(b"x")
    serving.kill()


def _act(request: Request) -> bytes:
    if request.body == b"fail":
        raise KeyError("no such thing")
    if request.body == b"hang":
        gevent.sleep(LONG)
    return request.body


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
@pytest.mark.parametrize("how", ["supervise", "supervised"])
def test_hooks(context: zmq.Context, kind: int, how: str) -> None:
    """Each request is told when it starts and when it is answered, with an id of its own and where it has come from."""
    sock = context.socket(kind)
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    endpoint = f"tcp://127.0.0.1:{port}"
    records: list[Any] = []
    ran_in: list[Any] = []

    def hook(record: Any) -> None:
        records.append(record)
        if type(record) is RequestStarted:
            ran_in.append(gevent.getcurrent())

    def handler(request: Request) -> bytes:
        ran_in.append(gevent.getcurrent())
        return _act(request)

    serving = _served(sock, how, handler, hooks=hook)
    req = context.socket(zmq.REQ)
    req.connect(endpoint)
    for body in (b"x", b"fail"):
        req.send(body)
        req.recv()
    wait_until(lambda: len(records) >= 4 + (how == "supervise"))
    if kind == zmq.ROUTER:
        with zmq.Client(endpoint, context=context) as client:
            client.request(b"y", metadata=b"trace")
        wait_until(lambda: len(records) >= 6 + (how == "supervise"))
        started, answered = records[-2:]
        assert (type(started), started.metadata) == (RequestStarted, b"trace")
        assert started.request_id == answered.request_id
        assert len(bytes.fromhex(started.request_id)) == 16
        del records[-2:]
    serving.kill()
    if how == "supervise":
        assert records.pop(0) == ServerStarted(endpoint)
        assert records.pop() == ServerStopped(endpoint, 2 if kind == zmq.REP else 3)
    assert [type(record) for record in records] == [RequestStarted, RequestAnswered, RequestStarted, RequestFailed]
    assert [record.request_id for record in records] == ["1", "1", "2", "2"]
    assert {record.endpoint for record in records} == {endpoint}
    assert len({record.client for record in records}) == 1
    if kind == zmq.REP:
        assert records[0].client == b"127.0.0.1"
    assert (records[3].code, records[3].type) == ("INTERNAL", "KeyError")
    assert 0 <= records[0].seconds <= records[1].seconds < LONG
    assert all(ran_in[each] is ran_in[each + 1] for each in range(0, len(ran_in), 2))


def test_hooks_of_a_block_that_sends_by_itself(context: zmq.Context) -> None:
    """The socket's own send is an answer like any other, also when the deadline comes behind it; half of one is not."""
    sock, peer = _bound(context, zmq.REP)
    records: list[Any] = []
    errors: list[Any] = []
    ways: list[tuple[Callable[[], object], float]] = [
        (lambda: sock.send(b"own"), LONG),
        (lambda: (sock.send(b"own"), gevent.sleep(LONG)), 20 * MS),
        (lambda: sock.send(b"own", zmq.SNDMORE), LONG),
    ]
    for act, limit in ways:
        peer.send_multipart([b"", b"x"])
        with supervised(sock, deadline=limit, hooks=records.append, on_error=lambda *args: errors.append(args)):
            act()
        assert peer.recv_multipart()[:2] == [b"", b"own"]
    ends = [type(record) for record in records if type(record) is not RequestStarted]
    assert ends == [RequestAnswered, RequestAnswered, RequestFailed]
    assert len(errors) == 1
    assert zmq.stats_of(sock).failures == {"INTERNAL": 1}


HOOK_ERRORS = [ValueError, SystemExit, KeyboardInterrupt, gevent.GreenletExit, gevent.Timeout]


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_a_client_that_gives_up(context: zmq.Context, kind: int) -> None:
    """A ROUTER's handler is stopped, and knows its client's limit and metadata; a REP's knows neither, and goes on."""
    sock = context.socket(kind)
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    may_end = gevent.event.Event()
    ended: list[Any] = []
    seen: list[Any] = []

    def handler(request: Request) -> bytes:
        if request.body == b"warm":
            return b""
        seen.append((request.metadata, request.deadline.at is None))
        try:
            may_end.wait()
        except BaseException as error:
            ended.append(type(error))
            raise
        ended.append(None)
        return b"late"

    serving = gevent.spawn(supervise, sock, handler, deadline=None)
    with zmq.Client(f"tcp://127.0.0.1:{port}", context=context) as client:
        client.request(b"warm")
        asked = gevent.spawn(client.request, b"x", timeout=LONG, metadata=b"trace")
        wait_until(lambda: seen)
        asked.kill()
        if kind == zmq.REP:
            gevent.sleep(5 * MS)
            assert not ended
            may_end.set()
        wait_until(lambda: ended)
        assert seen == ([(b"", True)] if kind == zmq.REP else [(b"trace", False)])
        assert ended == [None] if kind == zmq.REP else ended != [None]
        assert client.request(b"warm") == b""
    serving.kill()


@pytest.mark.parametrize("when", [ServerStarted, RequestStarted, RequestAnswered, RequestFailed, ServerStopped])
@pytest.mark.parametrize("raised", HOOK_ERRORS)
@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
@pytest.mark.parametrize("how", ["supervise", "supervised"])
def test_exactly_one_answer_whatever_a_hook_raises(
    context: zmq.Context, kind: int, how: str, raised: type[BaseException], when: type
) -> None:
    """Each request gets one answer, and the socket can be supervised again."""
    sock, peer = _bound(context, kind)
    error = raised()
    left = [error]

    def hook(record: Any) -> None:
        if type(record) is when and left:
            raise left.pop()

    def serve() -> None:
        while not sock.closed:
            try:
                _serving(sock, how, _act, hooks=hook)
            except BaseException as caught:  # what has the form of a kill goes on its way
                if caught is not error and not sock.closed:
                    raise

    serving = gevent.spawn(serve)
    for body in (b"x", b"fail", b"x"):
        peer.send_multipart([b"", body])
        delimiter, answer = peer.recv_multipart()
        assert delimiter == b""
        if when is not RequestStarted:
            assert (answer == body) == (body == b"x")
    assert not peer.poll(1)
    sock.close(0)
    serving.join()
    assert zmq.stats_of(sock).received == zmq.stats_of(sock).answered == 3
    assert zmq.stats_of(sock).inflight == 0


def test_a_deadline_that_comes_in_a_hook(context: zmq.Context) -> None:
    """A hook that waits for too long costs its request the answer, the block is not entered for it, and the next one is."""
    sock, peer = _bound(context, zmq.REP)

    ids: list[str] = []

    def hook(record: Any) -> None:
        if type(record) is RequestStarted:
            ids.append(record.request_id)
            if len(ids) == 1:
                gevent.sleep(LONG)

    for body in (b"1", b"2"):
        peer.send_multipart([b"", body])
    with supervised(sock, deadline=20 * MS, hooks=hook) as request:
        assert request.body == b"2"
        sock.send(b"two")
    assert json.loads(peer.recv_multipart()[1])["error"]["code"] == "DEADLINE_EXCEEDED"
    assert peer.recv_multipart() == [b"", b"two"]
    assert deadline.current() is None
    assert ids == ["1", "2"]
    assert zmq.stats_of(sock).received == 2


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
@pytest.mark.parametrize("how", ["supervise", "supervised"])
def test_log_lines_name_the_request_and_its_client(
    context: zmq.Context, caplog: pytest.LogCaptureFixture, kind: int, how: str
) -> None:
    """In their text, and as attributes of the record."""
    sock = context.socket(kind)
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    serving = _served(sock, how, _act)
    peer = context.socket(zmq.DEALER)
    peer.routing_id = b"peer"
    peer.connect(f"tcp://127.0.0.1:{port}")
    for body in (b"x", b"fail"):
        peer.send_multipart([b"", body])
        peer.recv_multipart()
    serving.kill()
    (failed,) = caplog.records
    name = "127.0.0.1" if kind == zmq.REP else "peer"
    assert f"<Request 2 from {name} " in failed.getMessage()
    told = {key: failed.__dict__[key] for key in ("endpoint", "request_id", "client")}
    assert told == {"endpoint": f"tcp://127.0.0.1:{port}", "request_id": "2", "client": name}


@pytest.mark.parametrize("transport", ["ipc", "inproc"])
def test_a_rep_names_its_client_as_far_as_it_is_told(context: zmq.Context, tmp_path: Any, transport: str) -> None:
    """By ipc with user and process, by inproc not at all."""
    sock, peer = context.socket(zmq.REP), context.socket(zmq.DEALER)
    sock.bind("inproc://s" if transport == "inproc" else f"ipc://{tmp_path}/s")
    peer.connect(sock.last_endpoint.decode())
    peer.send_multipart([b"", b"x"])
    with supervised(sock, deadline=LONG) as request:
        client = request.client.decode()
        request.reply(b"")
    assert client == "REP" if transport == "inproc" else client.endswith(f":{os.getpid()}")


@pytest.mark.parametrize("how", ["supervise", "supervised"])
def test_wrong_hooks(context: zmq.Context, how: str) -> None:
    """They are refused before anything is read."""
    with pytest.raises(TypeError, match="hooks"):
        _serving(context.socket(zmq.REP), how, _act, hooks=5)


@pytest.mark.parametrize("receive", ["recv_json", "recv_string", "recv_pyobj"])
def test_a_loop_of_its_own_that_cannot_decode(context: zmq.Context, receive: str) -> None:
    """A REP's program that receives by itself gets the error, and reset() answers the requester in its place."""
    rep, req = context.socket(zmq.REP), context.socket(zmq.REQ)
    rep.bind("inproc://undecodable")
    req.connect("inproc://undecodable")
    req.send_multipart([b"\xff{", b"more"])
    with pytest.raises((ValueError, pickle.UnpicklingError)) as caught:
        getattr(rep, receive)()
    assert "read whole" in caught.value.__notes__[0]
    rep.reset()
    assert json.loads(req.recv())["error"]["code"] == "ABORTED"
    req.send(b"fine")
    assert rep.recv() == b"fine"


def test_clients_of_a_supervised_router_wait_their_turn(context: zmq.Context) -> None:
    """What a loop of one's own has not received yet is not taken for forgotten, however long the requests before it take."""
    sock = context.socket(zmq.ROUTER)
    port = sock.bind_to_random_port("tcp://127.0.0.1")

    def loop() -> None:
        while True:
            with supervised(sock, deadline=LONG) as request:
                gevent.sleep(300 * MS)
                request.reply(request.body)

    looping = gevent.spawn(loop)
    with zmq.Client(f"tcp://127.0.0.1:{port}", context=context, heartbeat=250 * MS) as client:
        assert client.request(b"first") == b"first"
        asked = [gevent.spawn(client.request, b"%d" % number) for number in range(3)]
        assert [each.get() for each in asked] == [b"0", b"1", b"2"]
    looping.kill()


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
@pytest.mark.parametrize("count", [1, 10])
def test_a_watchdog_that_fails(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: int, count: int
) -> None:
    """Its timer goes on after a failure, so the deadline holds; after three restarts supervise answers and raises it."""
    sock, peer = _bound(context, kind)
    real, left = Responder.tick, [RuntimeError(str(number)) for number in range(count)]

    def tick(self: Responder, now: float, *effects: Any) -> Any:
        if left:
            raise left.pop(0)
        return real(self, now, *effects)

    monkeypatch.setattr(Responder, "tick", tick)
    runner = gevent.spawn(supervise, sock, _handle, deadline=10 * MS)
    peer.send_multipart([b"", b"hang"])
    code = json.loads(peer.recv_multipart()[1])["error"]["code"]
    if count == 1:
        assert code == "DEADLINE_EXCEEDED"
        peer.send_multipart([b"", b"x"])
        assert peer.recv_multipart() == [b"", b"x"]
        runner.kill()
    else:
        assert code == "UNAVAILABLE"
        runner.join()
        assert str(runner.exception) == "3"
        assert not sock.closed
    restarts = [record for record in caplog.records if record.name == "greensafe.restarts"]
    assert len(restarts) == min(count, 4)
    assert {record.__dict__["endpoint"] for record in restarts} == {"inproc://supervised"}
    assert zmq.stats_of(sock).restarts == {"watchdog": min(count, 3)}
    assert zmq.stats_of(sock).state == ("closed" if count == 1 else "failed")
    assert zmq.stats_of(sock).loop_error == ("" if count == 1 else "RuntimeError: 3")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_a_killed_greenlet_takes_its_supervised_socket_along(kind: int) -> None:
    """Nobody has to close it: it is freed with the greenlet that supervises it."""
    with zmq.Context() as own:

        def act(track: Any) -> None:
            sock = track(own.socket(kind))
            sock.linger = 0
            sock.bind("inproc://s")
            supervise(sock, _handle, deadline=None)

        check_freed_by_a_kill(act)
