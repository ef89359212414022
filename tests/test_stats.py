"""Tests of greensafe.stats: what a server and a client say of themselves, while it is so and afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.event
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import LATER, Client, OperationTimeout, RemoteError, Request, Server, stats
from greensafe.client.options import check_heartbeat
from greensafe.hub.timers import TICK
from greensafe.sansio.envelope import Header, Kind
from greensafe.sansio.requester import Requester
from greensafe.sansio.responder import Responder
from greensafe.server.vanished import Vanished
from greensafe.server.watchdog import NAMED, Watchdog
from greensafe.stats import ClientStats, ServerStats, Zombie, trail, trail_of, where
from greensafe.transport.pump import Pump

pytestmark = pytest.mark.usefixtures("limit")

ENDPOINT = "inproc://s"

#: What somebody holds who will not answer.
_promised: list[Request] = []


def _handler(request: Request) -> Any:
    match request.body:
        case b"raise":
            raise ValueError("no")
        case b"hang":
            gevent.sleep(LONG)
        case b"promise":
            _promised.append(request)
            return LATER
    return request.body


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    _promised.clear()


def test_a_server_before_between_and_after(context: zmq.Context) -> None:
    """Before the first start nothing is counted; after stop the counts stay, until the next start begins anew."""
    server = Server(ENDPOINT, _handler, deadline=LONG, context=context)
    assert server.stats == ServerStats(ENDPOINT, "closed")
    for _ in range(2):
        with server, Client(ENDPOINT, context=context) as client:
            client.request(b"x")
            assert (server.stats.state, server.stats.received, server.stats.answered) == ("started", 1, 1)
        assert (server.stats.state, server.stats.answered, server.stats.unsent) == ("closed", 1, 0)


def test_requests_in_all_states(context: zmq.Context) -> None:
    """Running, promised, waiting for their turn: each is counted where it is, and the oldest has its age."""
    with (
        Server(ENDPOINT, _handler, deadline=LONG, max_inflight=2, context=context) as server,
        Client(ENDPOINT, context=context) as client,
    ):
        assert server.stats.oldest_seconds is None
        assert client.stats.oldest_seconds is None
        calls = [gevent.spawn(client.request, body) for body in (b"hang", b"promise", b"x", b"x", b"x")]
        wait_until(lambda: server.stats.received == 5)
        first = server.stats
        assert (first.inflight, first.running, first.backlog, first.answered) == (5, 2, 3, 0)
        assert (client.stats.inflight, client.stats.waiting, client.stats.answered) == (5, 0, 0)
        gevent.sleep(5 * MS)
        second = server.stats
        assert first.oldest_seconds is not None
        assert second.oldest_seconds is not None
        assert second.oldest_seconds > first.oldest_seconds
        assert client.stats.oldest_seconds is not None
        assert client.stats.oldest_seconds >= second.oldest_seconds >= 5 * MS - TICK
        assert first.backlog == 3
        gevent.killall(calls)
        wait_until(lambda: server.stats.inflight == 0)
        assert server.stats.cancelled == 5
        assert server.stats.failures == {"CANCELLED": 5}
        assert client.stats.failures == {"GreenletExit": 5}


def test_failures_by_code(context: zmq.Context) -> None:
    """Each error that is an answer is counted by its code there, and by its exception here."""
    with (
        Server(ENDPOINT, _handler, deadline=5 * MS, context=context) as server,
        Client(ENDPOINT, context=context) as client,
    ):
        for body in (b"raise", b"raise", b"hang", b"x"):
            try:
                client.request(body)
            except RemoteError:
                pass
        with pytest.raises(OperationTimeout):
            client.request(b"promise", timeout=2 * MS)
        wait_until(lambda: server.stats.answered == 5)
        codes = dict(server.stats.failures)
        assert codes.pop("CANCELLED", 0) + codes["DEADLINE_EXCEEDED"] == 2
        assert codes["INTERNAL"] == 2
        assert client.stats.failures == {"RemoteError": 3, "OperationTimeout": 1}
        assert (client.stats.answered, server.stats.received) == (1, 5)


def test_drops_of_a_server(context: zmq.Context) -> None:
    """What is thrown away is counted by its cause."""
    gates: list[gevent.event.Event] = []

    def handler(request: Request) -> Any:
        if request.body == b"twice":
            request.reply(b"once")
        elif request.body == b"wait":
            gates.append(gevent.event.Event())
            gates[-1].wait()
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=context) as server:
        peer = context.socket(zmq.DEALER)
        peer.connect(str(server.endpoint))
        peer.send_multipart([b"no delimiter"])
        peer.send_multipart([Header(Kind.CANCEL, bytes(16)).encode(), b"", b""])
        peer.send_multipart([b"", b"twice"])
        assert peer.recv_multipart() == [b"", b"once"]
        for _ in range(500):
            peer.send_multipart([b"", b"wait"])
        wait_until(lambda: len(gates) == 500)
        assert server.stats.drops == {
            "malformed": 1,
            "ignored": 1,
            "duplicates": 1,
            "unreachable": 0,
            "full_outbox": 0,
            "unsaid": 0,
            "misdirected": 0,
            "forgotten": 0,
        }
        peer.close(0)
        # No event says that the server's socket has noticed: one answer after the other, until one has nowhere to go.
        wait_until(lambda: server.stats.drops["unreachable"] or gates.pop().set())
        for gate in gates:
            gate.set()
        wait_until(lambda: not server.stats.running)
    assert server.stats.drops["unreachable"] >= 1


def test_zombies_are_named_and_bounded(context: zmq.Context) -> None:
    """Each says which request, whose handler, where it is and how old it is; the oldest hundred are enough."""
    go = gevent.event.Event()

    def stubborn(request: Request) -> None:
        while not go.is_set():
            try:
                go.wait()
            except BaseException:
                pass

    many = NAMED + 5
    with Server(ENDPOINT, stubborn, deadline=20 * MS, grace=5 * MS, context=context) as server:
        with Client(ENDPOINT, context=context) as client:
            calls = [gevent.spawn(client.request, b"x") for _ in range(many)]
            gevent.joinall(calls)
        assert all(isinstance(call.exception, RemoteError) for call in calls)
        wait_until(lambda: server.stats.zombie_count == many)
        found = server.stats
        assert (found.running, found.inflight, found.oldest_seconds) == (0, 0, None)
        assert len(found.zombies) == NAMED
        ages = [zombie.age_seconds for zombie in found.zombies]
        assert ages == sorted(ages, reverse=True)
        zombie = found.zombies[0]
        assert type(zombie) is Zombie
        assert zombie.handler.endswith("stubborn")
        assert zombie.where.startswith(f"{__file__}:")
        assert zombie.where.endswith(stubborn.__qualname__)
        assert zombie.greenlet.startswith("Greenlet-")
        assert zombie.age_seconds >= 20 * MS
        assert zombie.kills >= 2
        assert len({each.request_id for each in found.zombies}) == NAMED
        go.set()
        wait_until(lambda: not server.stats.zombie_count)
        assert server.stats.zombies == ()


def test_where_a_greenlet_is() -> None:
    """A frame of gevent is not what one looks for; one that runs has none to show."""

    def waits() -> None:
        gevent.sleep(LONG)

    sleeping = gevent.spawn(waits)
    gevent.sleep(0)
    assert where(sleeping.gr_frame).endswith("test_where_a_greenlet_is.<locals>.waits")
    sleeping.kill()
    assert where(sleeping.gr_frame) == where(None) == ""


def test_endpoints_of_a_client(context: zmq.Context) -> None:
    """Each endpoint says whether it is up, and what it has cost."""
    with Server("tcp://127.0.0.1:0", _handler, deadline=LONG, context=context) as server:
        nowhere = "tcp://127.0.0.1:9"
        client = Client(str(server.endpoint), nowhere, context=context)
        client.request(b"x")
        wait_until(lambda: client.stats.endpoints[1].failed_attempts)
        call = gevent.spawn(client.request, b"hang")
        wait_until(lambda: server.stats.running)
        up, down = client.stats.endpoints
        assert (up.endpoint, up.is_up, up.is_greensafe, up.inflight, up.losses) == (server.endpoint, True, True, 1, 0)
        assert up.trouble == ""
        assert (down.endpoint, down.is_up, down.is_greensafe, down.inflight) == (nowhere, False, False, 0)
        assert "nobody" in down.trouble
        call.kill()
        wait_until(lambda: not server.stats.inflight)
    wait_until(lambda: client.stats.endpoints[0].losses)
    assert not client.stats.endpoints[0].is_up
    client.close()
    assert client.stats.state == "closed"


def test_drops_of_a_client(context: zmq.Context) -> None:
    """Late, malformed and unknown messages are told apart."""
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with Client(f"tcp://127.0.0.1:{port}", context=context) as client:
        call = gevent.spawn(client.request, b"x")
        name, header, _, _ = router.recv_multipart()
        router.send_multipart([name, b"garbage"])
        router.send_multipart([name, Header(Kind.CANCEL, bytes(16)).encode(), b"", b""])
        router.send_multipart([name, header, b"", b"first"])
        router.send_multipart([name, header, b"", b"second"])
        assert call.get() == b"first"
        again = gevent.spawn(client.request, b"x")
        router.send_multipart([*router.recv_multipart()[:2], b"", b"third"])
        assert again.get() == b"third"
        assert client.stats.drops == {"late": 1, "malformed": 1, "ignored": 1, "unsaid": 0}


def test_retries_and_rejections_of_a_client(context: zmq.Context) -> None:
    """What is sent again is counted, and what came back unrun."""
    with (
        Server(ENDPOINT, _handler, deadline=LONG, max_inflight=1, overload="reject", context=context) as server,
        Client(ENDPOINT, retries=1, context=context) as client,
    ):
        client.request(b"x")
        holding = gevent.spawn(client.request, b"hang")
        wait_until(lambda: server.stats.running)
        with pytest.raises(RemoteError, match="RESOURCE_EXHAUSTED"):
            client.request(b"x")
        assert (client.stats.retries, client.stats.rejections) == (1, 2)
        assert server.stats.failures == {"RESOURCE_EXHAUSTED": 2}
        holding.kill()


def test_records_are_frozen_copies(context: zmq.Context) -> None:
    """They do not change with what they describe, nor by hand; json takes them but for the bytes."""
    with Server(ENDPOINT, _handler, deadline=LONG, context=context) as server, Client(ENDPOINT, context=context) as client:
        before = server.stats, client.stats
        texts = [json.dumps(dataclasses.asdict(record)) for record in before]
        with pytest.raises(RemoteError):
            client.request(b"raise")
        assert [json.dumps(dataclasses.asdict(record)) for record in before] == texts
        assert server.stats != before[0]
        for record in before:
            with pytest.raises(dataclasses.FrozenInstanceError):
                record.state = "x"  # type: ignore[misc]
    assert set(stats.__all__) == {kind.__name__ for kind in vars(stats).values() if dataclasses.is_dataclass(kind)}
    assert type(before[1]) is ClientStats


def test_a_forked_child_begins_anew(context: zmq.Context) -> None:
    """There the server is not started, and the parent's counts are not its own."""
    with Server("tcp://127.0.0.1:0", _handler, deadline=LONG, context=context) as server:
        with Client(str(server.endpoint), context=context) as client:
            client.request(b"x")
        child = os.fork()
        if child == 0:
            os._exit(server.stats != ServerStats("tcp://127.0.0.1:0", "closed"))
        _, status = gevent.os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert server.stats.answered == 1


def test_what_lives_long_says_how_it_is(context: zmq.Context) -> None:
    """State and counts, in one line."""
    sock: plain.Socket[bytes] = plain.Socket(context, zmq.ROUTER)
    client = Client(ENDPOINT, context=context)
    pump, vanished = Pump(sock, lambda frames: None, lambda: None), Vanished(sock, lambda client: None)
    watchdog = Watchdog(_handler, lambda frames: None, limit=None, grace=1.0, endpoint=ENDPOINT)
    said = {
        Responder(grace=1.0): "<Responder open received=0 inflight=0 running=0 zombies=0 answered=0>",
        Requester(): "<Requester open=0 late=0 malformed=0 ignored=0>",
        watchdog: "<Watchdog inproc://s load=0 backlog=0 answered=0 failed=0 zombies=0>",
        pump: "<Pump stopped queued=0 dropped=0 unreachable=0>",
        vanished: f"<Vanished connections=0 <Monitor of {sock!r}>>",
        client._channels[0]: "<Channel up inproc://s inflight=0 losses=0>",
        client._failover: "<Failover up=1 of 1 waiting=0 retried=0 rejected=0>",
        client: "<Client open inproc://s up=1 inflight=0 late=0>",
        Server(ENDPOINT, _handler, deadline=1): "<Server closed inproc://s>",
    }
    assert {repr(each): each for each in said} == {text: each for each, text in said.items()}
    vanished.close()
    client.close()
    pump.close(0)
    assert repr(pump).startswith("<Pump closed")
    assert repr(client) == "<Client closed inproc://s up=0 inflight=0 late=0>"


def _innermost() -> None:
    gevent.sleep(LONG)


def _middle() -> None:
    _innermost()


def _outer() -> None:
    _middle()


def test_a_trail_names_the_innermost_calls() -> None:
    """Where a greenlet waits, gevent left out, and the program's calls that lead there, up to two; nothing for no frame."""
    waiting = gevent.spawn(lambda: _outer())
    gevent.sleep(0)
    places = trail(waiting.gr_frame).split(", called at ")
    assert [place.split()[1] for place in places] == ["_innermost", "_middle", "_outer"]
    assert where(waiting.gr_frame) == places[0]
    waiting.kill()
    assert trail(None) == where(None) == ""


def test_a_trail_of_an_exception() -> None:
    """The same from its traceback; greensafe's own calls are left out, but for the one that has raised."""
    with pytest.raises(TypeError) as caught:
        check_heartbeat("no")
    raised, called = trail_of(caught.value).split(", called at ")  # what raises a deadline is none of either
    assert raised.split()[1] == "check_heartbeat"
    assert called.split()[1] == "test_a_trail_of_an_exception"
    assert trail_of(ValueError("never raised")) == ""
