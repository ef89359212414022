"""Tests of greensafe.client.pool: what may have run is sent again, to the journal that knows of it and to no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Client, Disconnected, RemoteError, Request, Server, Unreachable
from greensafe.hooks import CallRetried, ConnectionFailed
from greensafe.sansio.backoff import RESERVE
from greensafe.sansio.envelope import OTHER_JOURNAL, SERVER_STOPPED, Header, Kind, ServerHeader, decode
from greensafe.testing import FaultyLink

pytestmark = pytest.mark.usefixtures("limit")

ANY_PORT = "tcp://127.0.0.1:0"
J, OTHER = b"journal".ljust(16), b"other".ljust(16)


class Raw:
    """A server that says what the test wants, behind a link that dies when the test wants."""

    def __init__(self, context: zmq.Context) -> None:
        self.sock = context.socket(plain.ROUTER)
        self.sock.bind("tcp://127.0.0.1:*")
        self.link = FaultyLink(self.sock.last_endpoint.decode())
        self.endpoint = self.link.endpoint

    def receive(self) -> tuple[list[bytes], Header]:
        """The next request; a note is left out."""
        while True:
            frames = self.sock.recv_multipart(timeout=LONG)
            header = decode(frames[-3])
            assert isinstance(header, Header)
            if header.kind == Kind.REQUEST:
                return frames, header

    def say(self, frames: list[bytes], kind: Kind, body: bytes, journal: bytes = J, hops: int = 1) -> None:
        told = ServerHeader(kind, frames[-3][8:24], b"i" * 16, journal, hops).encode()
        self.sock.send_multipart([*frames[:-3], told, b"", body])

    def greet(self, frames: list[bytes], journal: bytes = J, hops: int = 1) -> None:
        self.say(frames, Kind.WORKING, frames[-3][8:24], journal, hops)

    def die(self) -> None:
        """As a killed process that is back at once."""
        self.link.reset()


@pytest.fixture
def build(context: zmq.Context) -> Iterator[Callable[[], Raw]]:
    with ExitStack() as stack:

        def build() -> Raw:
            made = Raw(context)
            stack.callback(made.link.close)
            return made

        yield build


Build = Callable[[], Raw]


def _ask(client: Client, **options: Any) -> gevent.Greenlet:
    return gevent.spawn(client.request, b"body", **options)


def _ended(asked: gevent.Greenlet) -> Any:
    asked.join()
    return asked.exception or asked.value


def test_sent_again_to_the_journal(context: zmq.Context, build: Build) -> None:
    """The same id, its age, its journal; as soon as somebody is there; and the answer is the caller's."""
    server = build()
    retries: list[CallRetried] = []
    hook = lambda record: retries.append(record) if isinstance(record, CallRetried) else None  # noqa: E731
    with Client(server.endpoint, context=context, retries=1, hooks=hook) as client:
        asked = _ask(client)
        frames, first = server.receive()
        assert (first.age_ms, first.journal) == (0, bytes(16))
        server.greet(frames)
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        server.die()
        frames, again = server.receive()
        assert again.request_id == first.request_id
        assert again.age_ms > 0
        assert again.journal == J
        server.say(frames, Kind.REPLY, b"answer")
        assert _ended(asked) == b"answer"
        assert client.stats.retries == 1
    assert [type(record.error) for record in retries] == [Disconnected]


def test_without_retries_the_caller_is_told(context: zmq.Context, build: Build) -> None:
    """A journal alone is no reason to send anything again."""
    server = build()
    with Client(server.endpoint, context=context) as client:
        asked = _ask(client)
        server.greet(server.receive()[0])
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        server.die()
        error = _ended(asked)
        assert isinstance(error, Disconnected)
        assert error.maybe_executed


@pytest.mark.parametrize("idempotent", [False, True])
def test_more_than_the_share_of_retries(context: zmq.Context, build: Build, idempotent: bool) -> None:
    """All that a journaling server has lost come back: it owes them in any case."""
    server = build()
    with Client(server.endpoint, context=context, retries=1) as client:
        asked = [_ask(client, idempotent=idempotent) for _ in range(50)]
        frames, header = server.receive()
        server.greet(frames)
        before = {header.request_id, *(server.receive()[1].request_id for _ in range(49))}
        server.die()
        frames, header = server.receive()
        server.greet(frames)
        after = {header.request_id}
        server.say(frames, Kind.REPLY, b"answer")
        for _ in range(49):
            frames, header = server.receive()
            after.add(header.request_id)
            assert header.journal == J or idempotent
            server.say(frames, Kind.REPLY, b"answer")
        assert [_ended(each) for each in asked] == [b"answer"] * 50
    assert before == after
    assert len(after) == 50


def test_a_server_that_is_killed_before_it_says_anything(context: zmq.Context, build: Build) -> None:
    """What is known of the endpoint from before holds until somebody says otherwise."""
    server = build()
    with Client(server.endpoint, context=context, retries=2) as client:
        asked = _ask(client)
        server.greet(server.receive()[0])
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        for _ in range(2):
            server.die()
            frames, header = server.receive()
            assert header.journal == J
        server.say(frames, Kind.REPLY, b"answer")
        assert _ended(asked) == b"answer"


def test_a_server_without_a_journal(context: zmq.Context, build: Build) -> None:
    """A request that may have run there ends with Disconnected, unless it is idempotent, and then it is for anybody."""
    server = build()
    with Client(server.endpoint, context=context, retries=1) as client:
        asked = _ask(client)
        server.greet(server.receive()[0], bytes(16))
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        server.die()
        error = _ended(asked)
        assert isinstance(error, Disconnected)
        assert error.maybe_executed
        asked = _ask(client, idempotent=True)
        frames, _ = server.receive()
        server.greet(frames, bytes(16))
        server.die()
        frames, header = server.receive()
        assert header.age_ms > 0
        assert header.journal == bytes(16)
        server.say(frames, Kind.REPLY, b"answer", bytes(16))
        assert _ended(asked) == b"answer"


def test_another_journal_has_taken_the_place(context: zmq.Context, build: Build) -> None:
    """It refuses, and the caller is told what it would have been told without retries."""
    server = build()
    refusal = RemoteError("FAILED_PRECONDITION", "not mine", OTHER_JOURNAL).to_reply()
    with Client(server.endpoint, context=context, retries=5) as client:
        asked = _ask(client)
        server.greet(server.receive()[0])
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        server.die()
        frames, _ = server.receive()
        server.say(frames, Kind.REJECTED, refusal, OTHER)
        error = _ended(asked)
        assert isinstance(error, Disconnected)
        assert error.maybe_executed
        assert "another journal" in error.__notes__[0]


def _first(*servers: Raw) -> list[Raw]:
    """Who is asked comes first."""
    wait_until(lambda: any(server.sock.poll(0) for server in servers))
    return sorted(servers, key=lambda server: not server.sock.poll(0))


def test_never_to_another_endpoint_that_does_not_keep_it(context: zmq.Context, build: Build) -> None:
    """It waits for its own server while others are idle; those get all the new ones."""
    servers = build(), build()
    with Client(*(server.endpoint for server in servers), context=context, retries=1) as client:
        asked = _ask(client)
        one, two = _first(*servers)
        frames, first = one.receive()
        one.greet(frames)
        wait_until(lambda: any(endpoint.is_greensafe for endpoint in client.stats.endpoints))
        one.link.refuse()
        one.die()
        wait_until(lambda: client.stats.retries == 1)
        other = _ask(client)
        frames, header = two.receive()
        assert header.request_id != first.request_id
        two.say(frames, Kind.REPLY, b"two", OTHER)
        assert _ended(other) == b"two"
        assert client.stats.waiting == 1
        one.link.heal()
        frames, header = one.receive()
        assert header.request_id == first.request_id
        one.say(frames, Kind.REPLY, b"one")
        assert _ended(asked) == b"one"


def test_to_another_endpoint_that_keeps_the_same(context: zmq.Context, build: Build) -> None:
    """A second way to the same server will do."""
    servers = build(), build()
    with Client(*(server.endpoint for server in servers), context=context, retries=1) as client:
        first = _ask(client)
        one, two = _first(*servers)
        frames, header = one.receive()
        one.greet(frames)
        wait_until(lambda: all(endpoint.is_up for endpoint in client.stats.endpoints))
        second = _ask(client)
        more, _ = two.receive()
        two.greet(more)
        wait_until(lambda: all(endpoint.is_greensafe for endpoint in client.stats.endpoints))
        one.link.refuse()
        one.die()
        frames, again = two.receive()
        assert again.request_id == header.request_id
        two.say(frames, Kind.REPLY, b"first")
        two.say(more, Kind.REPLY, b"second")
        assert (_ended(first), _ended(second)) == (b"first", b"second")


def test_interrupted_at_a_stop(context: zmq.Context, build: Build) -> None:
    """The request is sent again after a pause; to who is there then."""
    server = build()
    body = RemoteError("UNAVAILABLE", "stopping", SERVER_STOPPED).to_reply()
    with Client(server.endpoint, context=context, retries=1) as client:
        asked = _ask(client)
        frames, first = server.receive()
        server.say(frames, Kind.INTERRUPTED, body)
        frames, again = server.receive()
        assert (again.request_id, again.journal) == (first.request_id, J)
        server.say(frames, Kind.INTERRUPTED, body)
        error = _ended(asked)
        assert isinstance(error, RemoteError)
        assert (error.code, error.type) == ("UNAVAILABLE", SERVER_STOPPED)


def test_interrupted_without_retries(context: zmq.Context, build: Build) -> None:
    """The caller gets the error, as from a server without a journal."""
    server = build()
    with Client(server.endpoint, context=context) as client:
        asked = _ask(client)
        server.say(server.receive()[0], Kind.INTERRUPTED, RemoteError("UNAVAILABLE", "no disk", "JournalError").to_reply())
        error = _ended(asked)
        assert isinstance(error, RemoteError)
        assert error.code == "UNAVAILABLE"


def test_a_limit_ends_the_wait_for_a_server_that_does_not_come_back(context: zmq.Context, build: Build) -> None:
    """Retries have no limit of their own: the caller's holds."""
    server = build()
    with Client(server.endpoint, context=context, retries=100) as client:
        asked = _ask(client, timeout=300 * MS)
        server.greet(server.receive()[0])
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        server.link.refuse()
        server.die()
        assert isinstance(_ended(asked), zmq.OperationTimeout)
        assert (client.stats.inflight, client.stats.waiting) == (0, 0)


@pytest.mark.parametrize(("door", "error_name"), [("silent", "PeerSilent"), ("closing", "Refused")])
def test_to_wait_for_a_server_costs_nothing(context: zmq.Context, build: Build, door: str, error_name: str) -> None:
    """Somebody accepts in the server's place and is no server: that takes neither tries nor budget of what was not sent."""
    server, count = build(), int(RESERVE) + 2
    failed: list[str] = []
    hook = lambda record: failed.append(record.error_name) if isinstance(record, ConnectionFailed) else None  # noqa: E731
    with Client(server.endpoint, context=context, retries=1, heartbeat=300 * MS, hooks=hook) as client:
        asked = [_ask(client) for _ in range(count)]
        server.greet(server.receive()[0])
        for _ in range(count - 1):
            server.receive()
        if door == "silent":
            server.link.stall()
        else:
            target, server.link.target = server.link.target, "tcp://127.0.0.1:9"
        server.die()
        wait_until(lambda: error_name in failed)
        assert (client.stats.waiting, client.stats.retries) == (count, count)
        server.link.heal()
        if door == "closing":
            server.link.target = target
        server.die()
        for _ in range(count):
            frames, _ = server.receive()
            server.say(frames, Kind.REPLY, b"answer")
        assert [_ended(each) for each in asked] == [b"answer"] * count
        assert client.stats.retries == count


def test_a_long_wait_for_a_server_is_logged(
    context: zmq.Context, build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with how many wait and where: without a limit they would do so for ever, and nobody knew."""
    monkeypatch.setattr("greensafe.client.pool.NOTED", 0.0)
    server = build()
    with caplog.at_level("WARNING", "greensafe.failover"), Client(server.endpoint, context=context, retries=1) as client:
        asked = _ask(client)
        server.greet(server.receive()[0])
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        server.link.refuse()
        server.die()
        wait_until(lambda: client.stats.waiting)
        for _ in range(4):
            client._failover._on_look()
        server.link.heal()
        server.say(server.receive()[0], Kind.REPLY, b"answer")
        assert _ended(asked) == b"answer"
    (line,) = [record.getMessage() for record in caplog.records]
    assert server.endpoint in line
    assert "1 requests" in line


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_server_that_is_restarted(context: zmq.Context, tmp_path: Path, transport: str) -> None:
    """Its callers just wait: each gets its answer, once, and steps that were finished are not run again."""
    endpoint = ANY_PORT if transport == "tcp" else f"ipc://{tmp_path}/s"
    steps: list[bytes] = []
    blocked = gevent.event.Event()

    def handler(request: Request) -> bytes:
        request.step("a", steps.append, 1)
        if request.attempt == 1:
            blocked.wait()
        return b"re: " + request.body

    with ExitStack() as stack:
        server = Server(endpoint, handler, deadline=LONG, context=context, journal=tmp_path / "requests.db")
        server.start()
        assert server.endpoint is not None
        client = stack.enter_context(Client(server.endpoint, context=context, retries=3))
        asked = [gevent.spawn(client.request, b"%d" % number) for number in range(20)]
        wait_until(lambda: len(steps) == 20)
        server.close()
        again = Server(server.endpoint, handler, deadline=LONG, context=context, journal=tmp_path / "requests.db")
        stack.enter_context(again)
        assert [_ended(each) for each in asked] == [b"re: %d" % number for number in range(20)]
        assert again.stats.journal is not None
        assert again.stats.journal.rerun == 20
    assert len(steps) == 20


def _refuse(server: Raw, hops: int = 1) -> None:
    refusal = RemoteError("FAILED_PRECONDITION", "not mine", OTHER_JOURNAL).to_reply()
    server.say(server.receive()[0], Kind.REJECTED, refusal, OTHER, hops)


def test_all_that_were_lost_are_told_of_another_journal(context: zmq.Context, build: Build) -> None:
    """One has found out that another server is there; the others, which were not sent yet, do not wait for ever."""
    server = build()
    with Client(server.endpoint, context=context, retries=5) as client:
        asked = [_ask(client) for _ in range(3)]
        server.greet(server.receive()[0])
        for _ in range(2):
            server.receive()
        server.die()
        _refuse(server)
        errors = [_ended(each) for each in asked]
    assert [type(error) for error in errors] == [Disconnected] * 3
    assert all(error.maybe_executed and "another journal" in error.__notes__[0] for error in errors)


def test_nobody_waits_for_a_journal_who_does_not_wait_for_servers(context: zmq.Context, build: Build) -> None:
    """wait=False holds for a request that only one of two servers may run, although the other is there."""
    servers = build(), build()
    with Client(*(server.endpoint for server in servers), context=context, retries=2, wait=False) as client:
        wait_until(lambda: all(endpoint.is_up for endpoint in client.stats.endpoints))
        asked = _ask(client)
        one, _ = _first(*servers)
        one.greet(one.receive()[0])
        wait_until(lambda: any(endpoint.is_greensafe for endpoint in client.stats.endpoints))
        one.link.refuse()
        one.die()
        error = _ended(asked)
    assert isinstance(error, Unreachable)
    assert error.maybe_executed


def test_behind_a_proxy_the_last_that_answered_need_not_be_the_one(context: zmq.Context, build: Build) -> None:
    """Another worker has answered last, and what the first has lost is sent to the proxy all the same."""
    proxy = build()
    with Client(proxy.endpoint, context=context, retries=5, heartbeat=500 * MS) as client:
        asked = _ask(client)
        _, first = _greeted(proxy)
        wait_until(lambda: client.stats.endpoints[0].is_greensafe)
        other = _ask(client)
        proxy.say(proxy.receive()[0], Kind.REPLY, b"other", OTHER, hops=2)
        assert _ended(other) == b"other"
        # Its worker says nothing any more.
        frames, again = proxy.receive()
        assert (again.request_id, again.journal) == (first.request_id, J)
        proxy.say(frames, Kind.REPLY, b"answer", hops=2)
        assert _ended(asked) == b"answer"


def test_behind_a_proxy_all_are_sent_until_their_worker_is_back(context: zmq.Context, build: Build) -> None:
    """What other workers refuse meanwhile is not taken from the share of retries."""
    proxy = build()
    with Client(proxy.endpoint, context=context, retries=100, heartbeat=500 * MS) as client:
        asked = [_ask(client) for _ in range(20)]
        for _ in asked:
            _greeted(proxy)
        for _ in range(40):
            _refuse(proxy, hops=2)
        for _ in asked:
            proxy.say(proxy.receive()[0], Kind.REPLY, b"answer", hops=2)
        assert [_ended(each) for each in asked] == [b"answer"] * 20


def test_behind_a_proxy_nobody_knows_who_had_it(context: zmq.Context, build: Build) -> None:
    """A request of which no worker has said anything may be any worker's: it is not sent to the one that answered last."""
    proxy = build()
    with Client(proxy.endpoint, context=context, retries=5) as client:
        asked = _ask(client)
        proxy.say(proxy.receive()[0], Kind.REPLY, b"answer", hops=2)
        assert _ended(asked) == b"answer"
        proxy.die()
        wait_until(lambda: client.stats.endpoints[0].losses == 1)
        asked = _ask(client)
        proxy.receive()
        proxy.die()
        error = _ended(asked)
    assert isinstance(error, Disconnected)
    assert error.maybe_executed


def _greeted(proxy: Raw) -> tuple[list[bytes], Header]:
    """A request of which a worker behind the proxy has said that it works on it."""
    frames, header = proxy.receive()
    proxy.greet(frames, hops=2)
    return frames, header


def test_rejected_after_it_was_interrupted(context: zmq.Context, build: Build) -> None:
    """It has run, whatever the server says of the last try; the same answer to the first try says that it has not."""
    raw = build()
    not_now = RemoteError("RESOURCE_EXHAUSTED", "not now", "JournalError").to_reply()
    with Client(raw.endpoint, context=context, retries=1) as client:
        asked = _ask(client)
        for kind in (Kind.INTERRUPTED, Kind.REJECTED):
            raw.say(raw.receive()[0], kind, not_now)
        error = _ended(asked)
        assert (type(error), error.code, error.maybe_executed) == (RemoteError, "RESOURCE_EXHAUSTED", True)
    with Client(raw.endpoint, context=context, retries=0) as client:
        asked = _ask(client)
        raw.say(raw.receive()[0], Kind.REJECTED, not_now)
        assert not _ended(asked).maybe_executed
