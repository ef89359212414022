"""Tests of greensafe.client.pool: which server a request goes to, and when it is sent again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Client, Disconnected, OperationTimeout, PeerSilent, RemoteError, Request, Server, Unreachable
from greensafe.sansio.backoff import RESERVE, SHARE
from greensafe.sansio.envelope import Header, Kind, ServerHeader, decode
from greensafe.testing import FaultyLink

pytestmark = pytest.mark.usefixtures("limit")

ANY_PORT = "tcp://127.0.0.1:0"

JOURNAL = b"journal".ljust(16)


class Site:
    """A server that answers with its name, behind a link of its own. A request of b"wait" is answered when `go` is called."""

    def __init__(self, name: bytes, context: zmq.Context, **options: Any) -> None:
        self.name = name
        self.seen: list[str] = []
        self._waiting = gevent.event.Event()
        self.server = Server(ANY_PORT, self._handle, deadline=LONG, context=context, **options)
        self.server.start()
        assert self.server.endpoint is not None
        self.link = FaultyLink(self.server.endpoint)
        self.endpoint = self.link.endpoint

    def _handle(self, request: Request) -> bytes:
        self.seen.append(request.id)
        if request.body == b"wait":
            self._waiting.wait()
        return self.name

    def go(self) -> None:
        self._waiting.set()

    def die(self) -> None:
        """As a killed process: connections are reset, new ones refused."""
        self.link.refuse()
        self.link.reset()

    def close(self) -> None:
        self.go()
        self.link.close()
        self.server.close()


Build = Callable[..., Site]


@pytest.fixture
def build(context: zmq.Context) -> Iterator[Build]:
    with ExitStack() as stack:

        def build(name: bytes, **options: Any) -> Site:
            site = Site(name, context, **options)
            stack.callback(site.close)
            return site

        yield build


class Raw:
    """A ROUTER that is asked by a Client, and does what the test says."""

    def __init__(self, context: zmq.Context, endpoint: str) -> None:
        self.sock = context.socket(plain.ROUTER)
        self.sock.bind(endpoint.replace(":0", ":*"))
        self.endpoint = self.sock.last_endpoint.decode()

    def receive(self) -> tuple[list[bytes], Header]:
        """A request's routing id, header, delimiter and body, and the header decoded."""
        frames = self.sock.recv_multipart()
        header = decode(frames[1])
        assert isinstance(header, Header)
        return frames, header

    def say(self, frames: list[bytes], kind: Kind, body: bytes, journal: bytes = bytes(16)) -> None:
        """Answer a request with a message of a greensafe server."""
        told = ServerHeader(kind, frames[1][8:24], b"i" * 16, journal).encode()
        self.sock.send_multipart([frames[0], told, b"", body])


def _up(client: Client, count: int) -> None:
    """Wait until all endpoints are connected to, so that the choice is the client's."""
    gevent.spawn(client.request, b"x").get()
    wait_until(lambda: f"up={count}" in repr(client))


def test_a_dead_server_is_replaced_and_comes_back(context: zmq.Context, build: Build) -> None:
    """Its own requests are told, those of others are not; the next go elsewhere; when it is back it gets its share again."""
    one, two = build(b"1"), build(b"2")
    with Client(one.endpoint, two.endpoint, context=context) as client:
        _up(client, 2)
        asked = [gevent.spawn(client.request, b"wait") for _ in range(10)]
        wait_until(lambda: "inflight=10" in repr(client))
        two.die()
        wait_until(lambda: "inflight=5" in repr(client))
        lost = [each for each in asked if each.ready()]
        assert {type(each.exception) for each in lost} == {Disconnected}
        assert {each.exception.endpoint for each in lost} == {two.endpoint}
        assert [client.request(b"x") for _ in range(5)] == [b"1"] * 5
        two.link.heal()
        wait_until(lambda: client.request(b"x") == b"2")
        one.go()
        assert {each.get() for each in asked if each not in lost} == {b"1"}


def test_a_server_that_refused_comes_back(context: zmq.Context, build: Build, tmp_path: Path) -> None:
    """Also one whose refusal was final for libzmq, while another does the work."""
    one = build(b"1")
    wrong = context.socket(plain.PUB)
    wrong.bind(f"ipc://{tmp_path}/s")
    with Client(one.endpoint, f"ipc://{tmp_path}/s", context=context, heartbeat=250 * MS) as client:
        _up(client, 1)
        wrong.close(0)
        two = Server(f"ipc://{tmp_path}/s", lambda request: b"2", deadline=LONG, context=context)
        wait_until(lambda: _starts(two))
        asked = gevent.spawn(client.request, b"wait")  # so that the second is the one with less to do
        wait_until(lambda: client.request(b"x") == b"2")
        one.go()
        asked.get()
        two.close()


def _starts(server: Server) -> bool:
    """libzmq gives an endpoint back some time after its socket's close."""
    try:
        server.start()
    except zmq.ZMQError as error:
        assert error.errno == zmq.EADDRINUSE
    return server.started


def test_nobody_is_left(context: zmq.Context, build: Build) -> None:
    """wait=False: Unreachable only when no endpoint can be reached."""
    one, two = build(b"1"), build(b"2")
    with Client(one.endpoint, two.endpoint, context=context, wait=False) as client:
        one.die()
        wait_until(lambda: _answer_or_error(client) == b"2")
        two.die()
        wait_until(lambda: isinstance(_answer_or_error(client), Unreachable))


def _answer_or_error(client: Client) -> Any:
    try:
        return client.request(b"x")
    except (zmq.PeerError, RemoteError) as error:
        return error


def test_several_dead_at_the_same_time(context: zmq.Context, build: Build) -> None:
    """With retries an idempotent request wanders from one to the next, under one id, until somebody answers."""
    sites = [build(b"%d" % number) for number in range(3)]
    with Client(*(site.endpoint for site in sites), context=context, retries=5) as client:
        _up(client, 3)
        asked = gevent.spawn(client.request, b"wait", idempotent=True)
        left = set(sites)
        for _ in range(2):
            (there,) = wait_until(lambda: [site for site in left if len(site.seen) and site.seen[-1] in _waits(client)])
            there.die()
            left.remove(there)
        (last,) = left
        last.go()
        assert asked.get() == last.name
        assert len({site.seen[-1] for site in sites}) == 1


def _waits(client: Client) -> set[str]:
    return {asked.request_id.hex() for asked in client._requester.asked()}


@pytest.mark.parametrize("endpoint", [ANY_PORT, "ipc"])
def test_retries_are_of_one_request(context: zmq.Context, tmp_path: Path, endpoint: str) -> None:
    """The same id and body, less time left, no more than `retries` of them, after pauses that grow."""
    raw = Raw(context, ANY_PORT if endpoint == ANY_PORT else f"ipc://{tmp_path}/s")
    with FaultyLink(raw.endpoint) as link, Client(link.endpoint, context=context, retries=3) as client:
        asked = gevent.spawn(client.request, b"x", timeout=LONG, idempotent=True)
        seen: list[tuple[bytes, bytes]] = []
        left: list[int] = []
        times: list[float] = []
        for _ in range(4):
            frames, header = raw.receive()
            times.append(monotonic())
            seen.append((header.request_id, frames[-1]))
            assert header.remaining_ms is not None
            left.append(header.remaining_ms)
            link.reset()
        with pytest.raises(Disconnected) as caught:
            asked.get()
        assert caught.value.request_id == seen[0][0].hex()
        assert len(set(seen)) == 1
        assert left == sorted(left, reverse=True)
        assert left[0] <= LONG * 1000
        pauses = [after - before for before, after in itertools.pairwise(times)]
        assert all(pause >= 0.025 * 2**number for number, pause in enumerate(pauses))
        assert not raw.sock.poll(0)


def test_retries_end_with_the_callers_limit(context: zmq.Context) -> None:
    """The limit is for all tries together, and what was not sent by then is not sent any more."""
    raw = Raw(context, ANY_PORT)
    with FaultyLink(raw.endpoint) as link, Client(link.endpoint, context=context, retries=1000) as client:
        asked = gevent.spawn(client.request, b"x", timeout=200 * MS, idempotent=True)
        start = monotonic()
        while not asked.ready():
            if raw.sock.poll(MS * 1000):
                raw.receive()
                link.reset()
        assert isinstance(asked.exception, OperationTimeout)
        assert monotonic() - start >= 200 * MS - 0.001
        assert not raw.sock.poll(200)


def test_what_may_have_run_is_not_sent_again(context: zmq.Context) -> None:
    """Unless it is idempotent, or its server has said that it keeps a journal."""
    raw = Raw(context, ANY_PORT)
    with FaultyLink(raw.endpoint) as link, Client(link.endpoint, context=context, retries=9) as client:
        asked = gevent.spawn(client.request, b"x")
        raw.receive()
        link.reset()
        with pytest.raises(Disconnected):
            asked.get()
        asked = gevent.spawn(client.request, b"y")
        frames, first = raw.receive()
        raw.say(frames, Kind.WORKING, first.request_id, b"j" * 16)
        (call,) = client._requester.asked()
        wait_until(lambda: call.is_heard)
        link.reset()
        frames, again = raw.receive()
        assert again.request_id == first.request_id
        raw.say(frames, Kind.REPLY, b"done", b"j" * 16)
        assert asked.get() == b"done"


def test_retries_cannot_bring_a_server_down(context: zmq.Context) -> None:
    """However many retries each request may make: all of them together are a share of the requests, and a few."""
    raw = Raw(context, ANY_PORT)
    full = RemoteError("RESOURCE_EXHAUSTED", "full").to_reply()
    total, arrived = 100, 0

    def refuse() -> None:
        nonlocal arrived
        while True:
            frames, _ = raw.receive()
            arrived += 1
            raw.say(frames, Kind.REJECTED, full)

    refusing = gevent.spawn(refuse)
    with Client(raw.endpoint, context=context, retries=50) as client:
        asked = [gevent.spawn(_answer_or_error, client) for _ in range(total)]
        assert {type(each.get()) for each in asked} == {RemoteError}
    refusing.kill()
    assert total < arrived <= total * (1 + SHARE) + RESERVE


def test_an_endpoint_that_was_never_heard_gets_one_request(context: zmq.Context) -> None:
    """With retries the others wait unsent: if nobody answers there, they have not run and need no retry."""
    raw = Raw(context, ANY_PORT)
    with Client(raw.endpoint, context=context, retries=1) as client:
        asked = [gevent.spawn(client.request, b"%d" % number) for number in range(5)]
        frames, header = raw.receive()
        assert not raw.sock.poll(50)
        raw.say(frames, Kind.WORKING, header.request_id)
        rest = [raw.receive()[0] for _ in range(4)]
        for each in [frames, *rest]:
            raw.say(each, Kind.REPLY, each[-1])
        assert [each.get() for each in asked] == [b"%d" % number for number in range(5)]


# What a server refuses.


def test_a_rejected_request_goes_elsewhere(context: zmq.Context, build: Build) -> None:
    """Without an error and without a retry; if there is nowhere else its caller gets the server's reason."""
    raw, other = Raw(context, ANY_PORT), build(b"2")
    reason = RemoteError("RESOURCE_EXHAUSTED", "full")
    with Client(raw.endpoint, other.endpoint, context=context) as client:
        wait_until(lambda: "up=2" in repr(client))
        for _ in range(3):
            asked = gevent.spawn(client.request, b"x")
            frames, _ = raw.receive()
            raw.say(frames, Kind.REJECTED, reason.to_reply())
            assert asked.get() == b"2"
    with Client(raw.endpoint, context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        frames, _ = raw.receive()
        raw.say(frames, Kind.REJECTED, reason.to_reply())
        with pytest.raises(RemoteError, match="full"):
            asked.get()


def test_a_server_that_stops_loses_no_request(context: zmq.Context, build: Build) -> None:
    """Under load one of two servers is stopped and started again, and again: with retries no client sees an error."""
    sites = [build(b"%d" % number) for number in range(2)]
    done = gevent.event.Event()
    with Client(*(site.endpoint for site in sites), context=context, retries=5) as client:

        def ask() -> int:
            count = 0
            while not done.is_set():
                assert client.request(b"x", idempotent=True) in (b"0", b"1")  # one may be on its way when the end comes
                count += 1
            return count

        asking = [gevent.spawn(ask) for _ in range(10)]
        _up(client, 2)
        for number in range(4):
            site = sites[number % 2]
            before = len(site.seen)
            wait_until(lambda: len(site.seen) > before)  # noqa: B023 - waited for at once
            endpoint = site.server.endpoint
            site.server.stop()
            site.server._bind_to = endpoint  # the port that its link leads to
            wait_until(lambda: _starts(site.server))  # noqa: B023
        done.set()
        assert all(each.get() for each in asking)


def test_a_request_on_its_way_when_its_server_closes(context: zmq.Context, build: Build) -> None:
    """It has not run, which the server's last word proves: it goes elsewhere, without an error and without a retry."""
    one, two = build(b"1"), build(b"2")
    with Client(one.endpoint, two.endpoint, context=context) as client:
        _up(client, 2)
        asked = [gevent.spawn(client.request, b"wait") for _ in range(6)]
        wait_until(lambda: len(one.seen) + len(two.seen) == 7)
        received = len(one.seen)
        one.link.stall("to_server")
        asked += [gevent.spawn(client.request, b"wait") for _ in range(4)]
        wait_until(lambda: len(two.seen) == 9 - received and client.stats.endpoints[0].inflight == 5)
        stopping = gevent.spawn(one.server.stop, LONG)
        wait_until(lambda: client.stats.endpoints[0].is_draining)
        one.go()
        two.go()
        assert sorted(each.get() for each in asked) == [b"1"] * 3 + [b"2"] * 7
        assert client.stats.endpoints[0].lost_requests == client.stats.retries == 0
        assert len(one.seen) == received
        stopping.get()


def test_a_draining_server_gets_no_more(context: zmq.Context, build: Build) -> None:
    """As soon as a server says that it is about to stop, requests go elsewhere; what it has accepted it answers."""
    one, two = build(b"1"), build(b"2")
    with Client(one.endpoint, two.endpoint, context=context) as client:
        _up(client, 2)
        asked = [gevent.spawn(client.request, b"wait") for _ in range(4)]
        wait_until(lambda: len(one.seen) + len(two.seen) >= 5)
        stopping = gevent.spawn(one.server.stop, LONG)
        wait_until(lambda: any(channel.connection.is_draining for channel in client._channels))
        before = len(one.seen)
        assert [client.request(b"x") for _ in range(5)] == [b"2"] * 5
        assert len(one.seen) == before
        one.go()
        two.go()
        assert sorted(each.get() for each in asked) == [b"1", b"1", b"2", b"2"]
        stopping.get()


def test_the_only_server_stops(context: zmq.Context, build: Build) -> None:
    """wait=True: the request waits for the next server there. wait=False: it is told at once.

    Unreachable, the server's UNAVAILABLE, or Disconnected if the request was on its way when the server ended.
    """
    site = build(b"1", max_inflight=1)
    assert site.server.endpoint is not None
    with Client(site.server.endpoint, context=context) as client:
        running = gevent.spawn(client.request, b"wait")
        wait_until(lambda: site.seen)
        stopping = gevent.spawn(site.server.stop, LONG)
        wait_until(lambda: client._channels[0].connection.is_draining)
        asked = gevent.spawn(client.request, b"x")
        with Client(site.server.endpoint, context=context, wait=False) as hasty:
            late = gevent.spawn(_answer_or_error, hasty)
            gevent.sleep(0)
            site.go()
            stopping.get()
            error = late.get()
            assert isinstance(error, (Unreachable, RemoteError, Disconnected)) or error == b"1"
        assert running.get() == b"1"
        site.server._bind_to = site.server.endpoint
        wait_until(lambda: _starts(site.server))
        assert asked.get() == b"1"


@pytest.fixture(params=["tcp", "ipc"])
def drained(request: pytest.FixtureRequest, context: zmq.Context, tmp_path: Path) -> Iterator[tuple[Raw, FaultyLink, Client]]:
    """A server that has said that it drains, and has nothing in flight; a link to it; and a client, which knows that."""
    raw = Raw(context, ANY_PORT)
    listen = ANY_PORT if request.param == "tcp" else f"ipc://{tmp_path}/link"
    with FaultyLink(raw.endpoint, listen) as link, Client(link.endpoint, context=context, heartbeat=400 * MS) as client:
        asked = gevent.spawn(client.request, b"x")
        frames, _ = raw.receive()
        raw.say(frames, Kind.DRAINING, b"", JOURNAL)
        raw.say(frames, Kind.REPLY, b"y", JOURNAL)
        assert asked.get() == b"y"
        assert raw.receive()[1].kind == Kind.ACK
        assert client.stats.endpoints[0].is_draining
        yield raw, link, client


def test_a_draining_server_that_is_cut_off(drained: tuple[Raw, FaultyLink, Client]) -> None:
    """What waits for it is told as soon as what it works on is; it is provably not run."""
    _, link, client = drained
    asked = gevent.spawn(client.request, b"x")
    wait_until(lambda: client.stats.waiting == 1)
    link.cut()
    with pytest.raises(PeerSilent) as caught:
        asked.get()
    assert not caught.value.maybe_executed
    found = client.stats.endpoints[0]
    assert (found.losses, found.failed_attempts) == (1, 0)  # not only when nobody has answered the next handshake


def test_a_draining_server_that_is_only_slow_to_end(drained: tuple[Raw, FaultyLink, Client]) -> None:
    """What waits for the next one goes on to wait, for several limits; nothing is sent to this one."""
    raw, _, client = drained
    asked = gevent.spawn(client.request, b"x")
    until = monotonic() + 2 * 400 * MS
    wait_until(lambda: monotonic() > until or asked.dead)
    assert not asked.dead
    assert client.stats.endpoints[0].losses == 0
    assert not raw.sock.poll(0)
    asked.kill()


def test_what_is_for_the_journal_of_a_draining_server(drained: tuple[Raw, FaultyLink, Client]) -> None:
    """It waits on when that server is cut off, and goes there when it can be reached again."""
    raw, link, client = drained
    asked = gevent.spawn(client.request, b"x")
    wait_until(lambda: client.stats.waiting == 1)
    client._requester.bind(client._requester.asked()[0], JOURNAL)
    link.cut()
    wait_until(lambda: client.stats.endpoints[0].losses)
    assert not asked.dead
    link.heal()
    frames, _ = raw.receive()
    raw.say(frames, Kind.REPLY, b"z", JOURNAL)
    assert asked.get() == b"z"


def test_the_only_server_is_stuck_for_a_while(context: zmq.Context) -> None:
    """Who cannot start a handler is not about to stop: callers are told at once, and it is asked again when it is well."""
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        while request.body == b"survive" and not go.is_set():
            with suppress(BaseException):
                go.wait()
        return request.body

    options = {"deadline": 5 * MS, "grace": 5 * MS, "max_inflight": 1, "max_zombies": 0}
    with (
        Server(ANY_PORT, handler, context=context, **options) as server,
        Client(str(server.endpoint), context=context) as client,
    ):
        with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
            client.request(b"survive")
        wait_until(lambda: server.stats.zombie_count == 1)
        for _ in range(2):
            with pytest.raises(RemoteError) as caught:
                client.request(b"x")
            assert (caught.value.code, caught.value.type) == ("UNAVAILABLE", "ServerStuck")
        go.set()
        wait_until(lambda: server.stats.zombie_count == 0)
        assert client.request(b"x") == b"x"


def test_metadata_of_a_retry(context: zmq.Context) -> None:
    """A retry carries the same metadata, and so does the answer."""
    raw = Raw(context, ANY_PORT)
    metadata = json.dumps({"traceparent": "00-" + "0" * 32}).encode()
    with FaultyLink(raw.endpoint) as link, Client(link.endpoint, context=context, retries=1) as client:
        asked = gevent.spawn(client.request, b"x", idempotent=True, metadata=metadata)
        assert raw.receive()[1].metadata == metadata
        link.reset()
        frames, header = raw.receive()
        assert header.metadata == metadata
        raw.say(frames, Kind.REPLY, b"done")
        assert asked.get() == b"done"


def test_a_request_of_which_one_try_was_lost_may_have_run(context: zmq.Context, build: Build) -> None:
    """Also if a later try finds nobody, and was itself not delivered."""
    one = build(b"one")
    with Client(one.endpoint, context=context, retries=2, wait=False) as client:
        _up(client, 1)
        asked = gevent.spawn(client.request, b"wait", idempotent=True)
        wait_until(lambda: one.seen)
        one.die()
        with pytest.raises(Unreachable) as caught:
            asked.get()
        assert caught.value.maybe_executed


def test_inproc_does_not_keep_what_others_can_take(context: zmq.Context, build: Build) -> None:
    """Nobody says whether somebody is there on inproc: so one that has not answered yet comes after those that are up."""
    one = build(b"one")
    with Client("inproc://nobody", one.endpoint, context=context) as client:
        wait_until(lambda: "up=2" in repr(client))
        assert [client.request(b"x") for _ in range(3)] == [b"one"] * 3
