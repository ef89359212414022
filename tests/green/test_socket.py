"""Tests of greensafe.green.socket, with real sockets over tcp, ipc and inproc."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import DeadlineExceeded, Disconnected, OperationTimeout, deadline

pytestmark = pytest.mark.usefixtures("limit")

Pair = Callable[..., tuple[Any, Any]]


# Messages.


def test_a_message_is_sent_whole_or_not_at_all(context: zmq.Context) -> None:
    """send_multipart checks every frame before the first one leaves."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://whole")
    b.connect("inproc://whole")
    with pytest.raises(TypeError, match="Frame 1"):
        a.send_multipart([b"x", "not bytes"])
    with pytest.raises(ValueError, match="at least one frame"):
        a.send_multipart([])
    a.send_multipart([b"1", memoryview(b"2"), zmq.Frame(b"3")])
    assert b.recv_multipart() == [b"1", b"2", b"3"]
    assert [frame.bytes for frame in _sent(a, b)] == [b"x", b"y"]


def _sent(a: Any, b: Any) -> list[zmq.Frame]:
    a.send_multipart([b"x", b"y"])
    frames: list[zmq.Frame] = b.recv_multipart(copy=False)
    return frames


# REQ and REP.


def _echo(rep: Any, count: int) -> None:
    for _ in range(count):
        rep.send(b"re:" + rep.recv())


@pytest.mark.parametrize("how", ["timeout", "deadline", "Timeout", "kill", "reset"])
def test_req_works_after_an_interrupted_recv(pair: Pair, how: str) -> None:
    """A REQ whose recv was interrupted sends again without EFSM and never gets the old request's reply."""
    rep, req = pair(zmq.REP, zmq.REQ)
    for number in range(5):
        req.send(b"old")
        assert rep.recv() == b"old"
        if how == "timeout":
            with pytest.raises(OperationTimeout):
                req.recv(timeout=1 * MS)
        elif how == "deadline":
            with pytest.raises(DeadlineExceeded), deadline(1 * MS):
                req.recv()
        elif how == "Timeout":
            with pytest.raises(gevent.Timeout), gevent.Timeout(1 * MS):
                req.recv()
        elif how == "kill":
            waiter = gevent.spawn(req.recv)
            gevent.sleep(1 * MS)
            waiter.kill()
        else:
            req.reset()
        rep.send(b"old reply")
        request = b"new %d" % number
        req.send(request)
        assert rep.recv() == request
        rep.send(b"re:" + request)
        assert req.recv() == b"re:" + request


def test_req_can_go_on_waiting(pair: Pair) -> None:
    """After a timeout recv may be called again, and gets the reply that came late."""
    rep, req = pair(zmq.REP, zmq.REQ)
    req.send(b"x")
    for _ in range(3):
        with pytest.raises(OperationTimeout):
            req.recv(timeout=1 * MS)
    _echo(rep, 1)
    assert req.recv() == b"re:x"


def test_misuse_of_a_req_still_meets_efsm(pair: Pair) -> None:
    """Sending twice in a row is a mistake of the program, before and after a reset."""
    rep, req = pair(zmq.REP, zmq.REQ)
    for _ in range(2):
        req.send(b"1")
        with pytest.raises(zmq.ZMQError) as caught:
            req.send(b"2")
        assert caught.value.errno == zmq.EFSM
        req.reset()
    req.send(b"3")
    with pytest.raises(zmq.ZMQError):
        req.send(b"4")
    wait_until(lambda: rep.poll(1))
    with pytest.raises(zmq.ZMQError):
        rep.send(b"no request was read")


def test_req_whose_greenlet_died_between_send_and_recv(pair: Pair) -> None:
    """A request given up between send and recv (its greenlet was killed, its deadline passed) does not block the socket."""
    rep, req = pair(zmq.REP, zmq.REQ)

    def ask() -> None:
        req.send(b"1")
        gevent.sleep(LONG)

    asker = gevent.spawn(ask)
    gevent.sleep(1 * MS)
    asker.kill()
    del asker
    req.send(b"2")
    with zmq.move_on(5 * MS):
        gevent.sleep(LONG)
    assert rep.recv() in (b"1", b"2")
    rep.reset()
    with pytest.raises(DeadlineExceeded), deadline(5 * MS):
        req.reset()
        req.send(b"3")
        gevent.sleep(LONG)
    req.send(b"4")
    while (request := rep.recv()) != b"4":
        rep.reset()
    rep.send(request)
    assert req.recv() == b"4"


def test_req_interrupted_between_the_frames(pair: Pair) -> None:
    """A deadline between the frames of a request or of a reply leaves a REQ usable."""
    rep, req = pair(zmq.REP, zmq.REQ)
    with pytest.raises(DeadlineExceeded), deadline(1 * MS):
        req.send(b"half", zmq.SNDMORE)
        gevent.sleep(LONG)
    req.send(b"whole")
    request = rep.recv_multipart()
    if request == [b"half", b""]:
        rep.reset()
        request = rep.recv_multipart()
    assert request == [b"whole"]
    rep.send_multipart([b"1", b"2"])
    assert req.recv() == b"1"
    req.reset()
    req.send(b"next")
    assert rep.recv() == b"next"
    rep.send(b"x")
    assert req.recv() == b"x"


def test_bytes_on_the_wire_after_a_reset_are_those_of_a_req(context: zmq.Context) -> None:
    """After a timeout a ROUTER sees the plain frames of a REQ: routing id, delimiter, body."""
    router, req = context.socket(zmq.ROUTER), context.socket(zmq.REQ)
    router.bind("tcp://127.0.0.1:*")
    req.connect(router.last_endpoint)
    for number in range(3):
        req.send(b"%d" % number)
        frames = router.recv_multipart()
        assert frames[1:] == [b"", b"%d" % number]
        with pytest.raises(OperationTimeout):
            req.recv(timeout=1 * MS)


def test_reset_with_several_endpoints(context: zmq.Context) -> None:
    """All endpoints are reconnected, each as often as it was connected."""
    reps = [context.socket(zmq.REP) for _ in range(2)]
    req = context.socket(zmq.REQ)
    for rep in reps:
        rep.bind("tcp://127.0.0.1:*")
        req.connect(rep.last_endpoint)
    served = [gevent.spawn(_forever, rep, index) for index, rep in enumerate(reps)]
    answers = set()
    for _ in range(20):
        req.send(b"silent")
        with pytest.raises(OperationTimeout):
            req.recv(timeout=5 * MS)
        req.send(b"ask")
        answers.add(req.recv())
    assert answers == {b"0", b"1"} or len(answers) == 1
    gevent.killall(served)


def _forever(rep: Any, index: int) -> None:
    while True:
        if rep.recv() == b"silent":
            gevent.sleep(30 * MS)
        rep.send(b"%d" % index)


def test_bound_req_is_not_reset(context: zmq.Context) -> None:
    """A REQ that has bound stays in EFSM, and reset() says why."""
    req, rep = context.socket(zmq.REQ), context.socket(zmq.REP)
    req.bind("inproc://bound")
    rep.connect("inproc://bound")
    req.send(b"x")
    with pytest.raises(OperationTimeout):
        req.recv(timeout=1 * MS)
    with pytest.raises(zmq.ZMQError) as caught:
        req.send(b"y")
    assert caught.value.errno == zmq.EFSM
    with pytest.raises(zmq.ZMQError, match="bound"):
        req.reset()


def test_reset_of_a_rep_answers(pair: Pair) -> None:
    """REP.reset() answers the pending request with an error, and the requests of others are still there."""
    rep, req = pair(zmq.REP, zmq.REQ)
    rep.reset()
    req.send(b"x")
    assert rep.recv() == b"x"
    rep.reset()
    error = zmq.RemoteError.from_reply(req.recv())
    assert error is not None
    assert error.code == "ABORTED"
    req.send_multipart([b"half", b"read"])
    assert rep.recv() == b"half"
    rep.reset()
    assert zmq.RemoteError.from_reply(req.recv()) is not None


def test_reset_is_for_req_and_rep(context: zmq.Context) -> None:
    """reset() on another type says that there is nothing to reset."""
    with pytest.raises(zmq.ZMQError, match="REQ and REP"):
        context.socket(zmq.DEALER).reset()


def test_req_survives_a_dead_server(context: zmq.Context) -> None:
    """After its server was closed and another one bound, the same REQ works, though the first reply never came."""
    req, rep = context.socket(zmq.REQ), context.socket(zmq.REP)
    rep.bind("tcp://127.0.0.1:*")
    address = rep.last_endpoint.decode()
    req.connect(address)
    for number in range(3):
        req.send(b"to be lost")
        assert rep.recv() == b"to be lost"
        rep.close(0)
        with pytest.raises(Disconnected):
            req.recv()
        rep = context.socket(zmq.REP)
        wait_until(lambda rep=rep: _binds(rep, address))
        server = gevent.spawn(_echo, rep, 1)
        req.send(b"%d" % number)
        assert req.recv() == b"re:%d" % number
        server.get()


def _binds(sock: Any, endpoint: str) -> bool:
    try:
        sock.bind(endpoint)
    except zmq.ZMQError:
        return False
    return True


def test_plain_peer(context: zmq.Context) -> None:
    """A plain pyzmq REQ in a native thread talks to a green REP."""
    rep = context.socket(zmq.REP)
    rep.bind("tcp://127.0.0.1:*")
    address = rep.last_endpoint

    def ask() -> bytes:
        with plain.Context() as other, other.socket(plain.REQ) as req:
            req.connect(address)
            req.send(b"x")
            return bytes(req.recv())

    answer = gevent.get_hub().threadpool.spawn(ask)
    _echo(rep, 1)
    assert answer.get() == b"re:x"
