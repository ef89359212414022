"""Tests of greensafe.client.second_look, and of a Client behind what takes a long request at once and passes it on slowly."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until
from hop import Hop
from zmtp import Listener

import greensafe as zmq
from greensafe import Client, OperationTimeout, PeerSilent, Request, Server
from greensafe.client.problems import FORGOTTEN, SILENT, STUCK, UNANSWERED, UNASKED, Trouble
from greensafe.client.second_look import SecondLook
from greensafe.sansio.liveness import LONG as LONG_MESSAGE, LOOKS, SILENT_LOOKS, SLOWEST, SLOWEST_UNCOUNTED, Pulse, Sample
from greensafe.transport.tcp_info import is_counted

pytestmark = [
    pytest.mark.usefixtures("limit"),
    pytest.mark.skipif(not is_counted("tcp://a:1"), reason="nobody counts elsewhere, so nobody judges"),
]

#: A heartbeat limit that has to pass several times.
SHORT = 500 * MS

BODY = bytes(2 * LONG_MESSAGE)


class Quiet:
    """A second look at an endpoint whose first connection has been silent for so many seconds, with so much under way."""

    def __init__(self, endpoint: str, context: Any, size: int = LONG_MESSAGE, seconds: float = 3.0) -> None:
        self.look = SecondLook(endpoint, context, LONG)
        self.pulse = Pulse(5.0)
        self.pulse.quiet_since = 100.0 - seconds
        self.size = size

    def judge(self, silent: str | None = "process", says_working: bool = True) -> Trouble | None:
        return self.look.judge(silent, self.pulse, lambda until: self.size, -1, 100.0, says_working)


@pytest.fixture
def router(context: zmq.Context) -> Iterator[Any]:
    with context.socket(plain.ROUTER) as sock:
        sock.bind("tcp://127.0.0.1:*")
        yield sock


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Connections to it stand, and nobody answers."""
    with Listener("tcp://127.0.0.1:0") as made:
        yield made


def _endpoint(sock: Any) -> str:
    endpoint: str = sock.last_endpoint.decode()
    return endpoint


def test_who_finishes_a_handshake(context: zmq.Context, router: Any) -> None:
    """The verdict waits; then the silence counts for nothing, and the second connection is closed, having sent nothing."""
    quiet = Quiet(_endpoint(router), context)
    assert quiet.judge() is None
    assert quiet.look.is_open
    wait_until(lambda: quiet.look._sock is None)  # not only at the next look: there may be many at once
    assert quiet.look.is_open
    assert quiet.judge() is None
    assert not quiet.look.is_open
    assert not router.poll(0)


def test_who_does_not(context: zmq.Context, listener: Listener) -> None:
    """Behind a long message it has as many looks as the limit has, behind a short one a single one; then the verdict stands."""
    for size, looks in ((LONG_MESSAGE, LOOKS), (LONG_MESSAGE - 1, 1)):
        quiet = Quiet(listener.endpoint, context, size)
        assert [quiet.judge() for _ in range(looks + 1)] == [None] * looks + [UNANSWERED["process"]]
        quiet.look.end()
    assert "stopped" not in UNANSWERED["process"].message


def test_a_cut_link(context: zmq.Context, listener: Listener) -> None:
    """Who makes a second connection is not cut off, whatever the first one's counts say; who makes none is."""
    for endpoint, verdict in ((listener.endpoint, UNANSWERED["process"]), ("tcp://127.0.0.1:9", SILENT["link"])):
        quiet = Quiet(endpoint, context)
        quiet.judge("link")
        wait_until(lambda: quiet.look._has_answer() or quiet.look._is_connected or endpoint != listener.endpoint)  # noqa: B023
        assert wait_until(lambda: quiet.judge("link")) == verdict  # noqa: B023
        quiet.look.end()


def test_what_does_not_explain_the_silence(context: zmq.Context) -> None:
    """Then there is no second look, and the verdict stands at once."""
    quiet = Quiet("tcp://127.0.0.1:9", context, size=3 * SLOWEST, seconds=3.0)
    for silent in ("process", "link"):
        assert quiet.judge(silent) == SILENT[silent]
    assert not quiet.look.is_open


def test_a_silence_that_lasts_too_long(context: zmq.Context, router: Any) -> None:
    """However often a second connection is answered: what is under way explains so much silence and no more."""
    quiet = Quiet(_endpoint(router), context)
    quiet.judge()
    wait_until(quiet.look._has_answer)
    quiet.judge()
    assert quiet.judge() is None
    wait_until(quiet.look._has_answer)
    quiet.judge()
    quiet.pulse.quiet_since = 100.0 - LONG_MESSAGE / SLOWEST
    assert quiet.judge() == STUCK


def test_what_nobody_takes(context: zmq.Context, router: Any) -> None:
    """Where nothing on the first connection is acknowledged, nothing in between passes it on: an answer forgives nothing."""
    quiet = Quiet(_endpoint(router), context)
    for _ in range(SILENT_LOOKS + 1):
        quiet.pulse.look(Sample(received=100, acked=100, waiting=0, unacked=1), late=False)
    quiet.pulse.quiet_since = 97.0
    assert quiet.judge("link") is None
    wait_until(quiet.look._has_answer)
    assert quiet.judge("link") == FORGOTTEN
    assert not quiet.look.is_open


def test_a_sign_of_life_ends_it(context: zmq.Context, listener: Listener) -> None:
    """Also in the middle; and the next silence is a new one."""
    quiet = Quiet(listener.endpoint, context)
    quiet.judge()
    quiet.pulse.quiet_since = None
    assert quiet.judge(None) is None
    assert not quiet.look.is_open


def test_the_routing_id_stays_the_first_ones(router: Any) -> None:
    """A context that sets one does so for the second connection, too: a ROUTER that hands over would confuse the two."""
    router.router_handover = True
    with zmq.Context() as own:
        own.routing_id = b"me"
        first = plain.Socket(own, plain.DEALER)
        first.routing_id = b"me"
        first.connect(_endpoint(router))
        first.send(b"x")
        router.recv_multipart()
        quiet = Quiet(_endpoint(router), own)
        quiet.judge()
        wait_until(quiet.look._has_answer)
        router.send_multipart([b"me", b"y"])
        wait_until(lambda: first.poll(0))
        quiet.look.end()
        first.close(0)


def test_no_socket_for_it(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    """The verdict stands, without a word of a second connection that was not answered; a log line says why there was none."""
    with plain.Context() as scarce:
        scarce.set(plain.MAX_SOCKETS, 1)
        with plain.Socket(scarce, plain.DEALER), caplog.at_level(logging.WARNING):
            assert Quiet(listener.endpoint, scarce).judge() == UNASKED["process"]
    assert "second look" in caplog.text


def test_a_name_whose_address_cannot_be_told(context: zmq.Context) -> None:
    """There is no second look then, for libzmq would resolve the name, in its I/O thread: the verdict stands."""
    quiet = Quiet("tcp://localhost:9", context)
    assert quiet.judge() == UNASKED["process"]
    assert not quiet.look.is_open


# A client behind a hop.


class Site:
    """A server that answers with a body's length, and b"wait" when `go` is set."""

    def __init__(self, context: zmq.Context, endpoint: str = "tcp://127.0.0.1:0") -> None:
        self.go = gevent.event.Event()
        self.seen: list[int] = []
        self.server = Server(endpoint, self._handle, deadline=LONG, context=context)
        self.server.start()
        self.endpoint = str(self.server.endpoint)

    def _handle(self, request: Request) -> bytes:
        self.seen.append(len(request.body))
        if request.body == b"wait":
            self.go.wait()
        return b"%d" % len(request.body)


@pytest.fixture
def site(context: zmq.Context) -> Iterator[Site]:
    made = Site(context)
    yield made
    made.go.set()
    made.server.close()


def _losses(client: Client) -> int:
    return client.stats.endpoints[0].losses


def test_a_long_request_is_not_mistaken_for_a_dead_server(context: zmq.Context, site: Site) -> None:
    """However often the limit passes while it is under way; nor are small ones behind it, and each is sent once."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT, retries=3) as client:
        assert client.request(b"x") == b"1"
        with hop.holding():
            asked = [gevent.spawn(client.request, body, idempotent=True) for body in (BODY, b"small")]
            wait_until(lambda: hop.accepted == 4)  # a second look each time
            assert _losses(client) == 0
        assert [each.get() for each in asked] == [b"%d" % len(BODY), b"5"]
    assert site.seen == [1, len(BODY), 5]


@pytest.mark.parametrize("source", ["127.0.0.1:{port}", "lo:0"])
def test_from_a_source(context: zmq.Context, site: Site, port: int, source: str) -> None:
    """A second connection comes from the same interface or address, but from a port of its own."""
    with Hop(site.endpoint) as hop:
        endpoint = hop.endpoint.replace("tcp://", f"tcp://{source.format(port=port)};")
        with Client(endpoint, context=context, heartbeat=SHORT) as client:
            assert client.request(b"x") == b"1"
            with hop.holding():
                asked = gevent.spawn(client.request, BODY)
                wait_until(lambda: hop.accepted == 3 or asked.dead)
            assert asked.get() == b"%d" % len(BODY)


def test_a_long_request_to_a_plain_server(context: zmq.Context) -> None:
    """A REP is not mistaken for dead either, and is sent nothing but the request."""
    rep = context.socket(plain.REP)
    rep.bind("tcp://127.0.0.1:*")
    with Hop(_endpoint(rep)) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        asked = gevent.spawn(client.request, b"first")
        rep.send(rep.recv())
        asked.get()
        with hop.holding():
            asked = gevent.spawn(client.request, BODY)
            wait_until(lambda: hop.accepted == 3)
        rep.send(b"%d" % len(rep.recv()))
        assert asked.get() == b"%d" % len(BODY)
        assert not rep.poll(0)


def test_behind_a_long_request_that_was_given_up(context: zmq.Context, site: Site) -> None:
    """Its caller's limit holds; what is asked after it has to wait behind it all the same."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        assert client.request(b"x") == b"1"
        with hop.holding():
            with pytest.raises(OperationTimeout):
                client.request(BODY, timeout=50 * MS)
            asked = gevent.spawn(client.request, b"small")
            wait_until(lambda: hop.accepted == 3)
            assert _losses(client) == 0
        assert asked.get() == b"5"


def test_a_server_that_works_on_others_meanwhile(context: zmq.Context, site: Site) -> None:
    """That it says nothing of what has not arrived yet does not make its event loop a blocked one."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        working = gevent.spawn(client.request, b"wait")
        wait_until(lambda: site.seen)
        (first,) = client._requester.asked()
        with hop.holding():
            asked = gevent.spawn(client.request, BODY)
            wait_until(lambda: len(client._requester.asked()) == 2)
            until = client._requester.asked()[1].heard_at + 2 * SHORT
            wait_until(lambda: first.heard_at > until)
            assert _losses(client) == 0
        assert asked.get() == b"%d" % len(BODY)
        site.go.set()
        assert working.get() == b"4"


def test_a_server_that_has_finished_others_meanwhile(context: zmq.Context, site: Site) -> None:
    """It has nothing to say WORKING of until the long request has arrived: a second connection tells, before the verdict."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        working = gevent.spawn(client.request, b"wait")
        wait_until(lambda: site.seen)
        (first,) = client._requester.asked()
        with hop.holding():
            asked = gevent.spawn(client.request, BODY)
            wait_until(lambda: len(client._requester.asked()) == 2)
            until = client._requester.asked()[1].heard_at + SHORT / 2
            wait_until(lambda: first.heard_at > until)
            site.go.set()
            assert working.get() == b"4"
            wait_until(lambda: hop.accepted == 3 or asked.dead)
            assert _losses(client) == 0
        assert asked.get() == b"%d" % len(BODY)


def test_a_server_that_is_dead_behind_the_hop(context: zmq.Context, site: Site, listener: Listener) -> None:
    """The hop takes everything and accepts, but no handshake comes: PeerSilent, which does not claim to know why."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        assert client.request(b"x") == b"1"
        with hop.holding():
            hop.target = listener.endpoint
            with pytest.raises(PeerSilent, match="second connection") as caught:
                client.request(BODY)
        assert caught.value.silent == "process"
        assert "stopped" not in str(caught.value)


def test_a_connection_that_something_in_between_has_forgotten(context: zmq.Context, site: Site) -> None:
    """A long request by it is PeerSilent soon: not after as long as so much may be under way. Another connection does."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        assert client.request(b"x") == b"1"
        hop.forget()
        with pytest.raises(PeerSilent, match="forgotten") as caught:
            client.request(BODY)
        assert caught.value.silent == "link"
        assert client.request(BODY) == b"%d" % len(BODY)


def test_a_small_request_takes_no_second_look(context: zmq.Context, site: Site) -> None:
    """There is nothing under way that could explain the silence: PeerSilent within the limit."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        assert client.request(b"x") == b"1"
        with hop.holding(), pytest.raises(PeerSilent, match="stopped"):
            client.request(b"y")
        assert hop.accepted == 1


@pytest.mark.skipif(not zmq.has("curve"), reason="this libzmq was built without CURVE")
def test_with_curve(context: zmq.Context) -> None:
    """The second connection has the first one's keys."""
    public, secret = plain.curve_keypair()
    with zmq.Context() as own:
        own.curve_publickey, own.curve_secretkey = plain.curve_keypair()
        own.curve_serverkey = public
        router = context.socket(plain.ROUTER)
        router.curve_server, router.curve_secretkey = True, secret
        router.bind("tcp://127.0.0.1:*")
        with Hop(_endpoint(router)) as hop, Client(hop.endpoint, context=own, heartbeat=SHORT) as client:
            asked = gevent.spawn(client.request, b"x")
            router.send_multipart(router.recv_multipart())
            asked.get()
            with hop.holding():
                asked = gevent.spawn(client.request, BODY)
                wait_until(lambda: hop.accepted == 3)
            router.send_multipart(router.recv_multipart())
            assert asked.get() == BODY


def test_nobody_waits_any_more(context: zmq.Context, site: Site, listener: Listener) -> None:
    """A second look that is under way is closed when its caller's limit comes, and with its client."""
    with Hop(site.endpoint) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        assert client.request(b"x") == b"1"
        (channel,) = client._channels
        with hop.holding():
            hop.target = listener.endpoint
            asked = gevent.spawn(client.request, BODY)
            wait_until(lambda: channel._second.is_open)
            asked.kill()
            wait_until(lambda: not channel._second.is_open)
            asked = gevent.spawn(client.request, BODY)
            wait_until(lambda: channel._second.is_open)
            client.close()
            assert not channel._second.is_open
            with pytest.raises(zmq.Cancelled):
                asked.get()


# Over ipc, where the kernel counts nothing.

#: Longer than the silences here may be.
LONGER = bytes(200 * SLOWEST_UNCOUNTED)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    """Endpoints of a server and of a hop to it."""
    return f"ipc://{tmp_path}/server", f"ipc://{tmp_path}/hop"


@pytest.fixture
def rep(context: zmq.Context, paths: tuple[str, str]) -> Any:
    sock = context.socket(plain.REP)
    sock.bind(paths[0])
    return sock


def test_a_long_request_over_ipc(context: zmq.Context, paths: tuple[str, str]) -> None:
    """Behind a hop that takes all of it a server that says WORKING is silent for several limits, and not taken for dead."""
    site = Site(context, paths[0])
    with Hop(*paths) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT, retries=3) as client:
        assert client.request(b"x") == b"1"
        with hop.holding():
            asked = [gevent.spawn(client.request, body, idempotent=True) for body in (LONGER, b"small")]
            wait_until(lambda: hop.accepted == 4 or any(each.dead for each in asked))
            assert _losses(client) == 0
        assert [each.get() for each in asked] == [b"%d" % len(LONGER), b"5"]
    assert site.seen == [1, len(LONGER), 5]
    site.server.close()


@pytest.mark.parametrize("body", [LONGER, b"small"])
def test_a_plain_server_over_ipc(context: zmq.Context, paths: tuple[str, str], rep: Any, body: bytes) -> None:
    """A REP that works on a request for several limits, or has not got it yet, is not taken for dead either."""
    with Hop(*paths) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        with hop.holding():
            asked = gevent.spawn(client.request, body)
            wait_until(lambda: hop.accepted == 4 or asked.dead)
            assert _losses(client) == 0
        rep.send(b"%d" % len(rep.recv()))
        assert asked.get() == b"%d" % len(body)
        assert not rep.poll(0)


def test_a_plain_server_that_is_silent_over_ipc(context: zmq.Context, paths: tuple[str, str], rep: Any, tmp_path: Path) -> None:
    """Who accepts a second connection, and does not finish its handshake: PeerSilent."""
    with Hop(*paths) as hop, Client(hop.endpoint, context=context, heartbeat=SHORT) as client:
        asked = gevent.spawn(client.request, b"first")
        rep.send(rep.recv())
        asked.get()
        with Listener(f"ipc://{tmp_path}/silent") as silent, hop.holding():
            hop.target = silent.endpoint
            with pytest.raises(PeerSilent) as caught:
                client.request(b"x")
        assert caught.value.silent == "process"
        assert caught.value.maybe_executed


def test_a_path_that_is_gone(context: zmq.Context, paths: tuple[str, str], rep: Any) -> None:
    """Nobody can make a second connection; who reads what the first one carries is not silent."""
    with Client(paths[0], context=context, heartbeat=SHORT) as client:
        (channel,) = client._channels
        asked = gevent.spawn(client.request, b"x")
        request = rep.recv()
        os.unlink(paths[0].removeprefix("ipc://"))
        for _ in range(2):
            wait_until(lambda: channel._second.is_open or asked.dead)
            wait_until(lambda: not channel._second.is_open)
        rep.send(request)
        assert asked.get() == b"x"


def _unread(quiet: Quiet, count: int) -> None:
    """Look so often that a peer is silent, with so many bytes that it has not read."""
    for _ in range(SILENT_LOOKS + 1):
        quiet.pulse.look(Sample.of_messages(0, count), late=False)
    quiet.pulse.quiet_since = 97.0


def test_a_path_that_is_gone_and_what_is_not_read(context: zmq.Context, paths: tuple[str, str]) -> None:
    """Then nobody is there any more to read it."""
    quiet = Quiet(paths[0], context)
    _unread(quiet, 9)
    found = [quiet.judge("link", says_working=False) for _ in range(LOOKS + 1)]
    assert found == [None] * LOOKS + [UNANSWERED["process"]]
    quiet.look.end()


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_path_that_is_another_process_s(
    context: zmq.Context, paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, is_answered: bool
) -> None:
    """Whether that one answers or not says nothing of the first: it has read all that was sent to it, or it has not."""
    monkeypatch.setattr("greensafe.client.second_look.listener", lambda descriptor: descriptor)
    with Listener(paths[0]) if not is_answered else context.socket(plain.REP) as other:
        if is_answered:
            other.bind(paths[0])
        for unread, verdict in ((0, None), (9, UNANSWERED["process"])):
            quiet = Quiet(paths[0], context)
            _unread(quiet, unread)
            found = [quiet.judge(says_working=False) for _ in range(LOOKS + 1)]
            assert found == [None] * LOOKS + [verdict]
            assert quiet.look.is_open is (verdict is not None)
            quiet.look.end()


def test_nothing_to_spare_for_a_second_look_over_ipc(paths: tuple[str, str]) -> None:
    """Then, too, what the peer has not read decides."""
    with plain.Context() as scarce:
        scarce.set(plain.MAX_SOCKETS, 1)
        with plain.Socket(scarce, plain.DEALER):
            quiet = Quiet(paths[0], scarce)
            assert quiet.judge(says_working=False) is None
            _unread(quiet, 9)
            assert quiet.judge("link", says_working=False) == UNASKED["process"]


def test_a_server_that_says_working_over_ipc(context: zmq.Context, paths: tuple[str, str]) -> None:
    """As long as nothing under way explains its silence, that is a verdict of its own: nobody looks twice."""
    quiet = Quiet(paths[0], context, size=3 * SLOWEST_UNCOUNTED, seconds=3.0)
    assert quiet.judge() is None
    assert not quiet.look.is_open
    assert quiet.judge(says_working=False) is None
    assert quiet.look.is_open
    quiet.look.end()
