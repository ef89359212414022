"""Tests of routing ids that peers announce to a Server: whose they are, and what becomes of who announces one that is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
import zmtp
from gevent.event import Event
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Client, Disconnected, Request, Server
from greensafe.green.context import plain_socket
from greensafe.testing import FaultyLink

pytestmark = pytest.mark.usefixtures("limit")


class _Slow:
    """A handler that answers b"slow" when it may, b"who" with its client's routing id, and anything else at once."""

    def __init__(self) -> None:
        self.may = Event()
        self.asked: list[bytes] = []

    def __call__(self, request: Request) -> bytes:
        self.asked.append(request.body)
        if request.body == b"slow":
            self.may.wait()
            return b"secret"
        return request.client if request.body == b"who" else request.body


@contextmanager
def _serving(handler: Any, **options: Any) -> Iterator[str]:
    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, **options) as server:
        assert server.endpoint is not None
        yield server.endpoint


@contextmanager
def _peer(endpoint: str, routing_id: bytes = b"") -> Iterator[zmtp.Connection]:
    made = zmtp.connect(endpoint, routing_id=routing_id)
    try:
        yield made
    finally:
        made.close()


def _ask(peer: zmtp.Connection, body: bytes) -> bytes:
    peer.send([b"", body])
    return peer.receive()[-1]


def _is_heard(endpoint: str, peer: zmtp.Connection, handler: _Slow) -> bool:
    """Whether the server has read what this peer has sent: not if all that others send later is read, and that is not."""
    peer.send([b"", b"hear me"])
    with _peer(endpoint) as other:
        for _ in range(3):
            _ask(other, b"later")
    return b"hear me" in handler.asked


def test_id_of_another_peer() -> None:
    """Who announces the routing id of a peer that is there gets nothing that is for that one, and is not read."""
    handler = _Slow()
    with _serving(handler) as endpoint, _peer(endpoint, b"agent") as agent:
        agent.send([b"", b"slow"])
        wait_until(lambda: handler.asked)
        with _peer(endpoint, b"agent") as thief:
            assert not _is_heard(endpoint, thief, handler)
            handler.may.set()
            assert agent.receive() == [b"", b"secret"]
            assert _ask(agent, b"still here") == b"still here"
            with gevent.Timeout(20 * MS, False):
                pytest.fail(f"the other one got {thief.receive()}")


def test_automatic_id_of_another_peer() -> None:
    """Nor does who has learned, and announces, the automatic id of a client; when he leaves, no handler is cancelled."""
    handler = _Slow()
    with _serving(handler, cancel_vanished=True) as endpoint, Client(endpoint) as client:
        known = client.request(b"who")
        assert known[:1] == b"\0"
        asking = gevent.spawn(client.request, b"slow")
        wait_until(lambda: b"slow" in handler.asked)
        with _peer(endpoint, known) as thief:
            assert not _is_heard(endpoint, thief, handler)
        with _peer(endpoint) as other:  # the thief's end was seen by now
            _ask(other, b"later")
        handler.may.set()
        assert asking.get() == b"secret"


def test_peer_that_comes_back() -> None:
    """While its old connection is there it is not heard, on that connection never; on a new one as soon as the old is gone."""
    handler = _Slow()
    with _serving(handler) as endpoint:
        with _peer(endpoint, b"agent") as old, _peer(endpoint, b"agent") as early:
            assert _ask(old, b"1") == b"1"
            old.close()
            # Not by itself: libzmq does not look at it again.
            assert not _is_heard(endpoint, early, handler)

        def comes_back() -> bool:
            with _peer(endpoint, b"agent") as peer, gevent.Timeout(100 * MS, False):
                return _ask(peer, b"2") == b"2"
            return False

        wait_until(comes_back)


def test_old_connection_that_is_dead() -> None:
    """HEARTBEAT_IVL on the server's Context ends it, and makes room for the peer that comes back."""
    with zmq.Context() as context:
        context.heartbeat_ivl = max(1, round(20 * MS * 1000))
        handler = _Slow()
        with _serving(handler, context=context) as endpoint:
            with _peer(endpoint, b"agent") as dead:  # it answers no PING
                assert _ask(dead, b"1") == b"1"
                with pytest.raises((EOFError, ConnectionError)):
                    dead.receive()
            with _peer(endpoint, b"agent") as back:
                back.send([b"", b"2"])
                wait_until(lambda: b"2" in handler.asked)


def test_handover() -> None:
    """With handover=True a peer that comes back is served at once, and the connection that had its id is read no more."""
    handler = _Slow()
    with _serving(handler, handover=True) as endpoint, _peer(endpoint, b"agent") as old:
        assert _ask(old, b"1") == b"1"
        old.send([b"", b"slow"])
        wait_until(lambda: b"slow" in handler.asked)
        with _peer(endpoint, b"agent") as back:
            assert _ask(back, b"2") == b"2"
            assert not _is_heard(endpoint, old, handler)
            handler.may.set()
            assert back.receive() == [b"", b"secret"]  # what the option is for, and what it costs


def test_req_that_gave_up(context: zmq.Context) -> None:
    """A REQ with a ROUTING_ID that asks again is read by a later try at the latest, and never gets the answer that it gave up.

    With handover=True it got that: the new connection took over the old one's name, and what was owed to it.
    """
    handler = _Slow()
    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=context) as server:
        assert server._pump is not None
        sock = context.socket(zmq.REQ)
        sock.routing_id = b"agent"
        with sock.connection_events() as events:
            sock.connect(server.endpoint)
            sock.send(b"slow")
            wait_until(lambda: handler.asked)
            server._pump.inbox.is_paused = True
            with pytest.raises(zmq.OperationTimeout):
                sock.recv(timeout=MS)
            sock.send(b"again")
            for _ in range(2):
                while events.get().kind != zmq.Event.HANDSHAKE_SUCCEEDED:
                    pass
        handler.may.set()
        gevent.sleep(MS)
        server._pump.resume()

        def answer() -> Any:
            try:
                return sock.recv(timeout=50 * MS)
            except zmq.OperationTimeout:
                sock.send(b"again")
                return None

        assert wait_until(answer) == b"again"


def test_option_of_the_context() -> None:
    """Server's argument decides, and not ROUTER_HANDOVER among the options of its Context."""
    handler = _Slow()
    with zmq.Context() as context:
        context.router_handover = True
        with _serving(handler, context=context) as endpoint:
            with _peer(endpoint, b"agent") as agent, _peer(endpoint, b"agent") as thief:
                assert _ask(agent, b"1") == b"1"
                assert not _is_heard(endpoint, thief, handler)


def test_client_announces_no_id() -> None:
    """A Client does not take ROUTING_ID from its Context: a server that had it still would never read its next connection."""
    with zmq.Context() as context:
        context.routing_id = b"agent"
        with _serving(_Slow()) as endpoint, Client(endpoint, context=context) as one, Client(endpoint, context=context) as two:
            found = {one.request(b"who"), two.request(b"who")}
        assert len(found) == 2
        assert b"agent" not in found
        with plain_socket(context, zmq.ROUTER) as router:
            assert router.routing_id == b"agent"


def test_client_that_comes_back_to_a_busy_server() -> None:
    """Its connection is lost while the server has something of it to read: it is served by the next one all the same."""
    handler = _Slow()
    with zmq.Context() as context, Server("tcp://127.0.0.1:0", handler, deadline=LONG, max_inflight=1) as server:
        context.routing_id = b"agent"
        with FaultyLink(server.endpoint) as link, Client(link.endpoint, context=context) as client:
            assert client.request(b"1") == b"1"
            server._pump.inbox.is_paused = True
            lost = gevent.spawn(pytest.raises, Disconnected, client.request, b"2")
            wait_until(lambda: server._pump.has_input)
            link.reset()
            lost.join()
            asking = gevent.spawn(client.request, b"3")
            wait_until(lambda: client._channels[0].is_up)
            server._pump.resume()
            assert asking.get() == b"3"
