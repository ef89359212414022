"""Tests of greensafe.green._lockstep: what each step of a reset is there for, against plain pyzmq peers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from greensafe.green._lockstep import Lockstep

pytestmark = pytest.mark.usefixtures("limit")

ENDPOINT = "inproc://lockstep"


@pytest.fixture
def plain_context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A context of pyzmq's own."""
    with zmq.Context() as made:
        yield made


@pytest.fixture
def router(plain_context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[zmq.Socket[bytes]]:
    """What a REQ talks to; it sees the bytes and can answer whom it likes."""
    with plain_context.socket(zmq.ROUTER) as sock:
        sock.linger, sock.rcvtimeo = 0, 1000
        sock.bind(ENDPOINT)
        yield sock


@pytest.fixture
def req(plain_context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes]) -> Iterator[zmq.Socket[bytes]]:
    """A plain REQ, connected."""
    with plain_context.socket(zmq.REQ) as sock:
        sock.linger, sock.rcvtimeo, sock.sndtimeo = 0, 1000, 1000
        sock.connect(ENDPOINT)
        yield sock


@pytest.fixture
def state(req: zmq.Socket[bytes]) -> Lockstep:
    """What greensafe keeps beside the REQ."""
    made = Lockstep(is_req=True)
    made.on_connect(req, ENDPOINT)
    return made


def _send(sock: zmq.Socket[bytes], state: Lockstep, body: bytes, flags: int = 0) -> None:
    sock.send(body, flags)
    state.on_sent(sock, bool(flags & zmq.SNDMORE))


def test_the_old_reply_never_arrives(router: zmq.Socket[bytes], req: zmq.Socket[bytes], state: Lockstep) -> None:
    """A reply that is queued already, or sent after the reset, is not taken for the new request's."""
    _send(req, state, b"old")
    route, _, body = router.recv_multipart()
    assert (body, state.is_open) == (b"old", True)
    router.send_multipart([route, b"", b"old reply"])
    state.reset(req)
    assert not state.is_open
    _send(req, state, b"new")
    route, _, body = router.recv_multipart()
    assert body == b"new"
    router.send_multipart([route, b"", b"new reply"])
    assert req.recv() == b"new reply"


def test_reset_between_the_frames_of_a_reply(router: zmq.Socket[bytes], req: zmq.Socket[bytes], state: Lockstep) -> None:
    """Without reading on first, libzmq would abort the process."""
    _send(req, state, b"old")
    route, *_ = router.recv_multipart()
    router.send_multipart([route, b"", b"1", b"2", b"3"])
    assert req.recv() == b"1"
    state.on_received(req)
    state.reset(req)
    _send(req, state, b"new")
    assert router.recv_multipart()[2] == b"new"


def test_reset_between_the_frames_of_a_request(router: zmq.Socket[bytes], req: zmq.Socket[bytes], state: Lockstep) -> None:
    """The half message is ended; the next request arrives as a message of its own."""
    _send(req, state, b"half", zmq.SNDMORE)
    assert state.is_half_sent
    state.reset(req)
    assert not state.is_half_sent
    _send(req, state, b"new")
    seen = router.recv_multipart()
    if seen[2] == b"half":  # it may have been on its way before the pipe was dropped
        seen = router.recv_multipart()
    assert seen[1:] == [b"", b"new"]


def test_after_the_next_send_the_socket_is_strict_again(
    router: zmq.Socket[bytes], req: zmq.Socket[bytes], state: Lockstep
) -> None:
    """REQ_RELAXED lasts for one send: sending twice is a mistake of the program again."""
    _send(req, state, b"old")
    state.reset(req)
    _send(req, state, b"new")
    with pytest.raises(zmq.ZMQError) as caught:
        req.send(b"twice")
    assert caught.value.errno == zmq.EFSM


def test_linger_and_endpoints_are_as_before(router: zmq.Socket[bytes], req: zmq.Socket[bytes], state: Lockstep) -> None:
    """A reset changes LINGER for its own purpose only, and both endpoints are connected again."""
    other = "inproc://other"
    with router.context.socket(zmq.ROUTER) as second:
        second.linger, second.rcvtimeo = 0, 1000
        second.bind(other)
        req.linger = 123
        req.connect(other)
        state.on_connect(req, other)
        _send(req, state, b"old")
        assert router.recv_multipart()[2] == b"old"
        state.reset(req)
        assert (req.linger, [address for address, _ in state._connects]) == (123, [ENDPOINT, other])
        asked = []
        for body in (b"1", b"2"):
            _send(req, state, body)
            ready = zmq.select([router, second], [], [], 1.0)[0][0]
            route, *_ = ready.recv_multipart()
            ready.send_multipart([route, b"", body])
            assert req.recv() == body
            state.on_received(req)
            asked.append(ready)
        assert set(asked) == {router, second}


def test_nothing_happens_to_a_socket_that_is_not_open(req: zmq.Socket[bytes], state: Lockstep) -> None:
    """reset() of a socket in its first state does nothing."""
    state.reset(req)
    assert not state._relaxed


def test_a_rep_is_put_back_by_an_answer(plain_context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """The requester gets an error; the request queued behind it is still there."""
    with plain_context.socket(zmq.REP) as rep, plain_context.socket(zmq.DEALER) as raw:
        for sock in (rep, raw):
            sock.linger, sock.rcvtimeo = 0, 1000
        rep.bind("inproc://rep")
        raw.connect("inproc://rep")
        for body in (b"1", b"2"):
            raw.send_multipart([b"", body])
        state = Lockstep(is_req=False)
        assert rep.recv() == b"1"
        state.on_received(rep)
        state.reset(rep)
        assert b"ABORTED" in raw.recv_multipart()[1]
        assert rep.recv() == b"2"
