"""Tests of greensafe.supervision beyond the table of test_handlers: leaving early, misuse, one's own loop."""

from __future__ import annotations

import json
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Request, deadline, supervise, supervised

pytestmark = pytest.mark.usefixtures("limit")


def _handle(request: Request) -> bytes:
    if request.body == b"hang":
        gevent.sleep(LONG)
    return request.body


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

    peer.send_multipart([b"", b"hang"])
    runner = gevent.spawn(run)
    if how == "kill":
        wait_until(lambda: not peer.poll(0) and gevent.sleep(2 * MS) is None)
        runner.kill()
    else:
        with pytest.raises((zmq.DeadlineExceeded, gevent.Timeout)):
            runner.get()
    assert json.loads(peer.recv_multipart()[1])["error"]["code"] == "UNAVAILABLE"
    again = gevent.spawn(supervise, sock, _handle, deadline=LONG)
    peer.send_multipart([b"", b"again"])
    assert peer.recv_multipart() == [b"", b"again"]
    again.kill()


def test_supervise_ends_when_its_socket_is_closed(context: zmq.Context) -> None:
    """Also while a handler runs, whose answer has nowhere to go then."""
    sock, peer = _bound(context, zmq.ROUTER)
    runner = gevent.spawn(supervise, sock, _handle, deadline=5 * MS, grace=5 * MS)
    peer.send_multipart([b"", b"hang"])
    gevent.sleep(2 * MS)
    sock.close(0)
    runner.get()
    gevent.sleep(20 * MS)  # past deadline and grace: nothing fails in the hub


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
