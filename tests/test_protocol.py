"""Greensafe's protocol on the wire, against peers that know nothing of it: plain pyzmq processes and libzmq's own proxies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import gevent
import pytest
import zmq as plain
from gevent.event import Event
from helpers import LONG, MS, running, wait_until

import greensafe as zmq
from greensafe import Client, OperationTimeout, RemoteError, Request, Server
from greensafe.sansio.envelope import CALLER_LIMIT, GREET, Header, Kind, ServerHeader, decode

pytestmark = pytest.mark.usefixtures("limit")

#: What https://www.w3.org/TR/trace-context/ shows as an example.
TRACE = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

#: A chain of `hops` proxies in front of the targets, in a process of its own; "rep" stands for a plain REP in there.
PEERS = """
import sys, threading, zmq
context = zmq.Context()
def rep():
    sock = context.socket(zmq.REP)
    endpoint = sock.bind("tcp://127.0.0.1:*").addr
    def run():
        while True:
            sock.send_multipart([b"plain", *sock.recv_multipart()])
    threading.Thread(target=run, daemon=True).start()
    return endpoint
def proxy(targets):
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for target in targets:
        back.connect(target)
    endpoint = front.bind("tcp://127.0.0.1:*").addr
    threading.Thread(target=zmq.proxy, args=(front, back), daemon=True).start()
    return endpoint
targets = [rep() if target == "rep" else target for target in sys.argv[2:]]
for _ in range(int(sys.argv[1])):
    targets = [proxy(targets)]
print(targets[0], flush=True)
threading.Event().wait()
"""

Reach = Callable[..., str]


@pytest.fixture
def reach() -> Iterator[Reach]:
    """A function of the number of proxies and what is behind them; returns where clients connect."""
    with ExitStack() as stack:
        yield lambda hops, *targets: stack.enter_context(
            running([sys.executable, "-c", PEERS, str(hops), *map(str, targets)]),
        )[1]


hops = pytest.mark.parametrize("hops", [0, 1, 2])


class _Handler:
    """Echoes, hangs on "hang", and remembers what it has seen and how the hanging ended."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.ended: list[BaseException] = []
        self.go = Event()

    def __call__(self, request: Request) -> bytes:
        self.seen.append(request)
        if request.body == b"raise":
            raise ValueError("no")
        if request.body == b"wait":
            self.go.wait()
        if request.body == b"hang":
            try:
                gevent.sleep(100 * LONG)
            except BaseException as error:
                self.ended.append(error)
                raise
        return request.body


@pytest.fixture
def handler() -> _Handler:
    return _Handler()


@pytest.fixture
def server(context: zmq.Context, handler: _Handler) -> Iterator[Server]:
    with Server("tcp://127.0.0.1:0", handler, deadline=None, context=context) as server:
        yield server
        server.close()


def _raw(context: zmq.Context, endpoint: str) -> zmq.Socket:
    sock = context.socket(zmq.DEALER)
    sock.connect(endpoint)
    return sock


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _server_header(frame: bytes) -> ServerHeader:
    header = decode(frame)
    assert isinstance(header, ServerHeader)
    return header


# Plain peers.


@hops
def test_a_plain_rep_answers(context: zmq.Context, reach: Reach, hops: int) -> None:
    """A plain REP answers greensafe's requests, through any number of proxies; an error frame beside others is data there."""
    error = RemoteError("INTERNAL", "x").to_reply()
    with Client(reach(hops, "rep"), context=context, timeout=LONG) as client:
        for body in ([b"a"], [b"a", b"", b"b"], [b""], [error]):
            assert client.request_multipart(body, metadata=TRACE) == [b"plain", *body]
        asked = [gevent.spawn(client.request_multipart, [b"%d" % number]) for number in range(100)]
        assert [each.get() for each in asked] == [[b"plain", b"%d" % number] for number in range(100)]


@hops
def test_a_plain_rep_returns_the_header_untouched(context: zmq.Context, reach: Reach, hops: int) -> None:
    """Metadata and all, as long as it may be."""
    raw = _raw(context, reach(hops, "rep"))
    for metadata in (b"", TRACE, bytes(65_477)):
        header = Header(Kind.REQUEST, _id(1), 1000, 5000, GREET, metadata).encode()
        raw.send_multipart([header, b"", b"x"])
        assert raw.recv_multipart() == [header, b"", b"plain", b"x"]


@hops
@pytest.mark.parametrize("correlate", [0, 1])
def test_a_plain_req_is_answered(server: Server, reach: Reach, hops: int, correlate: int) -> None:
    """A plain REQ, with CORRELATE or without, gets a plain reply, and an error as JSON."""
    endpoint = reach(hops, server.endpoint)

    def ask() -> list[list[bytes]]:
        with plain.Context() as own, own.socket(plain.REQ) as sock:
            sock.linger = 0
            sock.rcvtimeo = int(LONG * 1000)
            sock.setsockopt(plain.REQ_CORRELATE, correlate)
            sock.connect(endpoint)
            answers = []
            for body in ([b"a"], [b""], [b"raise"]):
                sock.send_multipart(body)
                answers.append(sock.recv_multipart())
            return answers

    first, second, third = gevent.get_hub().threadpool.apply(ask)
    assert [first, second] == [[b"a"], [b""]]
    assert len(third) == 1
    error = RemoteError.from_reply(third[0])
    assert error is not None
    assert (error.code, error.type) == ("INTERNAL", "ValueError")


def test_a_client_sends_nothing_but_requests_to_a_plain_peer(context: zmq.Context) -> None:
    """Whatever is given up there, by timeout, kill or close, with heartbeats: each message that arrives is a request."""
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    received: list[list[bytes]] = []

    def run() -> None:
        while True:
            rid, header, empty, body = router.recv_multipart()
            received.append([header, empty, body])
            if body == b"answer":
                router.send_multipart([rid, header, empty, body])

    serving = gevent.spawn(run)
    client = Client(f"tcp://127.0.0.1:{port}", context=context, heartbeat=100 * MS)
    assert client.request(b"answer") == b"answer"
    for limit in (OperationTimeout, zmq.DeadlineExceeded):
        with pytest.raises(limit):
            if limit is OperationTimeout:
                client.request(b"1", timeout=20 * MS)
            else:
                with zmq.deadline(20 * MS):
                    client.request(b"2")
    asked = gevent.spawn(client.request, b"3")
    wait_until(lambda: received[-1][-1] == b"3")
    asked.kill()
    closed = gevent.spawn(client.request, b"4")
    gevent.sleep(200 * MS)  # two heartbeats: whatever they are, they are no messages
    assert client.request(b"answer") == b"answer"
    client.close()
    closed.join()
    serving.kill()
    assert [body for _, _, body in received] == [b"answer", b"1", b"2", b"3", b"4", b"answer"]
    for frame, empty, _ in received:
        header = decode(frame)
        assert isinstance(header, Header)
        assert (header.kind, empty) == (Kind.REQUEST, b"")
    with pytest.raises(zmq.Again):
        router.recv(zmq.NOBLOCK)


def test_plain_and_greensafe_workers_behind_one_proxy(
    context: zmq.Context, server: Server, handler: _Handler, reach: Reach
) -> None:
    """Both answer, each in its own way; and after the plain one has, nothing but requests is sent by way of that proxy."""
    with Client(reach(1, "rep", server.endpoint), context=context, timeout=LONG) as client:
        answers = [client.request_multipart([b"%d" % number]) for number in range(20)]
        assert {len(answer) for answer in answers} == {1, 2}
        assert [answer[-1] for answer in answers] == [b"%d" % number for number in range(20)]
        assert client._channels[0].connection.is_known
        asked = [gevent.spawn(client.request_multipart, [b"hang"]) for _ in range(4)]
        wait_until(lambda: sum(each.ready() for each in asked) == 2)  # the plain one's
        gevent.killall(asked)
        answers = [client.request_multipart([b"%d" % number]) for number in range(20)]
        assert [answer[-1] for answer in answers] == [b"%d" % number for number in range(20)]
    assert server._watchdog is not None
    assert server._watchdog.responder.cancelled == 0


# Greensafe peers.


@hops
def test_metadata(context: zmq.Context, server: Server, handler: _Handler, reach: Reach, hops: int) -> None:
    """A trace context arrives as it was sent, and comes back as it was sent, whatever the kind of what comes back."""
    endpoint = reach(hops, server.endpoint) if hops else server.endpoint
    assert endpoint is not None
    with Client(endpoint, context=context, timeout=LONG) as client:
        assert client.request(b"x", metadata=TRACE) == b"x"
        assert handler.seen[-1].metadata == TRACE
        assert client.request(b"x") == b"x"
        assert handler.seen[-1].metadata == b""
    raw = _raw(context, endpoint)
    for kind, body, expected in ((Kind.REQUEST, b"x", Kind.REPLY), (Kind.REQUEST, b"raise", Kind.ERROR), (3, b"", Kind.PONG)):
        raw.send_multipart([Header(kind, _id(7), metadata=TRACE).encode(), b"", body])
        header = _server_header(raw.recv_multipart()[0])
        assert (header.kind, header.request_id, header.metadata, header.hops) == (expected, _id(7), TRACE, hops + 1)


@hops
def test_ping(context: zmq.Context, server: Server, handler: _Handler, reach: Reach, hops: int) -> None:
    """PING is answered PONG with its body, and no handler sees it."""
    raw = _raw(context, reach(hops, server.endpoint) if hops else str(server.endpoint))
    raw.send_multipart([Header(Kind.PING, _id(9)).encode(), b"", b"a", b""])
    frame, *rest = raw.recv_multipart()
    assert _server_header(frame).kind == Kind.PONG
    assert rest == [b"", b"a", b""]
    assert handler.seen == []


def test_expired_on_arrival(context: zmq.Context, server: Server, handler: _Handler) -> None:
    """A request whose caller has stopped waiting is answered so, and not run."""
    raw = _raw(context, str(server.endpoint))
    raw.send_multipart([Header(Kind.REQUEST, _id(1), 0).encode(), b"", b"late"])
    frame, _, body = raw.recv_multipart()
    assert _server_header(frame).kind == Kind.ERROR
    error = RemoteError.from_reply(body)
    assert error is not None
    assert (error.code, error.type) == ("DEADLINE_EXCEEDED", CALLER_LIMIT)
    raw.send_multipart([Header(Kind.REQUEST, _id(2), int(LONG * 1000)).encode(), b"", b"in time"])
    raw.recv_multipart()
    assert [request.body for request in handler.seen] == [b"in time"]


def test_expired_before_its_turn(context: zmq.Context, handler: _Handler) -> None:
    """A request that waits for its turn until its caller's limit is over is answered then, and not run."""
    with (
        Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=1, context=context) as server,
        Client(str(server.endpoint), context=context, timeout=LONG) as client,
    ):
        first = gevent.spawn(client.request, b"wait")
        wait_until(lambda: handler.seen)
        with pytest.raises(OperationTimeout):
            client.request(b"late", timeout=20 * MS)
        wait_until(lambda: server._watchdog is not None and server._watchdog.backlog == 0)
        handler.go.set()
        assert first.get() == b"wait"
        assert client.request(b"next") == b"next"
    assert [request.body for request in handler.seen] == [b"wait", b"next"]


def test_cancelled_before_its_turn(context: zmq.Context, handler: _Handler) -> None:
    """A request whose caller goes away before its turn is not run when that comes."""
    with (
        Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=1, context=context) as server,
        Client(str(server.endpoint), context=context, timeout=LONG) as client,
    ):
        first, second = gevent.spawn(client.request, b"wait"), gevent.spawn(client.request, b"gone")
        wait_until(lambda: server._watchdog is not None and server._watchdog.backlog == 1)
        wait_until(lambda: client._channels[0].connection.is_known)
        second.kill()
        wait_until(lambda: "cancelled=1" in repr(server))
        handler.go.set()
        assert first.get() == b"wait"
        assert client.request(b"next") == b"next"
    assert [request.body for request in handler.seen] == [b"wait", b"next"]


@pytest.mark.parametrize("hops", [0, 1])
@pytest.mark.parametrize("how", ["timeout", "deadline", "gevent.Timeout", "kill", "close"])
def test_who_does_not_wait_any_more_stops_the_handler(
    context: zmq.Context, server: Server, handler: _Handler, reach: Reach, hops: int, how: str
) -> None:
    """However a caller's wait ends, its handler ends too; also of the first request of a connection."""
    with Client(reach(hops, server.endpoint) if hops else str(server.endpoint), context=context) as client:
        asking = gevent.spawn(_ask_until, client, how)
        wait_until(lambda: handler.seen and client._channels[0].connection.is_known)
        if how == "kill":
            asking.kill()
        elif how == "close":
            client.close()
        wait_until(lambda: handler.ended)
        asking.join()
        assert server._watchdog is not None
        responder = server._watchdog.responder
        wait_until(lambda: responder.running == 0)
        assert (responder.inflight, responder.zombies, responder.answered) == (0, 0, 1)
        if how != "close":
            assert client.request(b"next", timeout=LONG) == b"next"


def _ask_until(client: Client, how: str) -> None:
    ask = {
        "timeout": lambda: client.request(b"hang", timeout=100 * MS),
        "deadline": lambda: zmq.deadline(100 * MS)(client.request)(b"hang"),
        "gevent.Timeout": lambda: gevent.with_timeout(100 * MS, client.request, b"hang"),
    }.get(how, lambda: client.request(b"hang"))
    with pytest.raises((zmq.TimedOut, gevent.Timeout, zmq.Cancelled)):
        ask()


@pytest.mark.parametrize("hops", [0, 1])
def test_cancel_and_ack_for_others_are_ignored(
    context: zmq.Context, server: Server, handler: _Handler, reach: Reach, hops: int
) -> None:
    """Unknown ids, and those of another client, change nothing and are not answered."""
    endpoint = reach(hops, server.endpoint) if hops else str(server.endpoint)
    with Client(endpoint, context=context, timeout=LONG) as client:
        asked = gevent.spawn(client.request, b"wait")
        wait_until(lambda: handler.seen)
        raw = _raw(context, endpoint)
        for request_id in (_id(1), bytes.fromhex(handler.seen[0].id)):
            for kind in (Kind.CANCEL, Kind.ACK):
                raw.send_multipart([Header(kind, request_id).encode(), b"", b""])
        raw.send_multipart([Header(Kind.PING, _id(3)).encode(), b"", b""])
        assert _server_header(raw.recv_multipart()[0]).kind == Kind.PONG
        handler.go.set()
        assert asked.get() == b"wait"
    assert server._watchdog is not None
    assert (server._watchdog.responder.ignored, server._watchdog.responder.cancelled) == (4, 0)


def test_working_and_greeting(context: zmq.Context, server: Server, handler: _Handler) -> None:
    """Who asks to be greeted hears WORKING at once, then all a fifth of its patience apart, for all of its requests."""
    raw = _raw(context, str(server.endpoint))
    raw.send_multipart([Header(Kind.REQUEST, _id(1), None, 500, GREET).encode(), b"", b"wait"])
    raw.send_multipart([Header(Kind.REQUEST, _id(2), None, 500).encode(), b"", b"wait"])
    frame, _, body = raw.recv_multipart()
    assert (_server_header(frame).kind, body) == (Kind.WORKING, _id(1))
    for _ in range(2):
        frame, _, body = raw.recv_multipart()
        assert (_server_header(frame).kind, body) == (Kind.WORKING, _id(1) + _id(2))
    handler.go.set()
    answers = [raw.recv_multipart() for _ in range(2)]
    assert {_server_header(frame).request_id for frame, *_ in answers} == {_id(1), _id(2)}
    raw.send_multipart([Header(Kind.REQUEST, _id(3), None, 500, GREET).encode(), b"", b"quick"])
    assert [_server_header(raw.recv_multipart()[0]).kind for _ in range(2)] == [Kind.WORKING, Kind.REPLY]
    raw.send_multipart([b"a proxy's id", Header(Kind.REQUEST, _id(4), None, 500, GREET).encode(), b"", b"quick"])
    assert _server_header(raw.recv_multipart()[1]).kind == Kind.REPLY


@pytest.mark.parametrize("kind", [0x05, 0x7F])
def test_a_kind_of_tomorrow(context: zmq.Context, server: Server, handler: _Handler, kind: int) -> None:
    """A kind that the server does not know is answered UNIMPLEMENTED, and not run."""
    raw = _raw(context, str(server.endpoint))
    raw.send_multipart([Header(kind, _id(1)).encode(), b"", b"x"])
    frame, _, body = raw.recv_multipart()
    assert _server_header(frame).kind == Kind.ERROR
    error = RemoteError.from_reply(body)
    assert error is not None
    assert error.code == "UNIMPLEMENTED"
    assert handler.seen == []


def test_a_version_of_tomorrow(context: zmq.Context, server: Server, handler: _Handler) -> None:
    """A header of another version is somebody's id: the request is run, and the frame goes back byte for byte."""
    raw = _raw(context, str(server.endpoint))
    other = bytearray(Header(Kind.REQUEST, _id(1), 0).encode())
    other[4] = 2
    raw.send_multipart([bytes(other), b"", b"x"])
    assert raw.recv_multipart() == [bytes(other), b"", b"x"]
    assert handler.seen[0].metadata == b""


def test_a_worker_that_drains_behind_a_proxy(context: zmq.Context, server: Server, handler: _Handler, reach: Reach) -> None:
    """DRAINING of one of two workers does not close the way to the other."""
    with (
        Server("tcp://127.0.0.1:0", handler, deadline=None, context=context) as other,
        Client(reach(1, server.endpoint, other.endpoint), context=context, timeout=LONG) as client,
    ):
        waiting = [gevent.spawn(client.request, b"wait") for _ in range(2)]
        wait_until(lambda: len(handler.seen) == 2)
        stopping = gevent.spawn(other.stop, LONG)
        wait_until(lambda: not other.started)
        for number in range(10):
            assert client.request(b"%d" % number) == b"%d" % number
        handler.go.set()
        assert [each.get() for each in waiting] == [b"wait"] * 2
        stopping.join()


def test_a_rejection_from_behind_a_proxy(context: zmq.Context, reach: Reach) -> None:
    """What one worker rejects because it is stopping is asked again by the same way, on which others stand."""
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    stopping = RemoteError("UNAVAILABLE", "the server is stopping", "ServerStopped").to_reply()
    ids = []
    with Client(reach(1, f"tcp://127.0.0.1:{port}"), context=context, timeout=LONG, retries=1) as client:
        asked = gevent.spawn(client.request, b"y")
        for kind, body in ((Kind.REJECTED, stopping), (Kind.REPLY, b"z")):
            *route, frame, empty, _ = router.recv_multipart()
            ids.append(frame[8:24])
            router.send_multipart([*route, ServerHeader(kind, ids[-1], bytes(16), hops=len(route)).encode(), empty, body])
        assert asked.get() == b"z"
    assert ids[0] == ids[1]


def test_an_answer_that_comes_after_all(context: zmq.Context) -> None:
    """A reply that comes while its request waits to be sent again is delivered, and nothing of that request stays."""
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with Client(f"tcp://127.0.0.1:{port}", context=context, heartbeat=200 * MS, retries=1) as client:
        asked = gevent.spawn(client.request, b"x", timeout=LONG, idempotent=True)
        rid, frame, empty, _ = router.recv_multipart()
        request_id = frame[8:24]

        def say(kind: Kind, body: bytes, hops: int) -> None:
            router.send_multipart([rid, ServerHeader(kind, request_id, bytes(16), hops=hops).encode(), empty, body])

        say(Kind.DRAINING, b"", 1)  # so that there is no place to send it to again
        say(Kind.WORKING, request_id, 2)
        wait_until(lambda: client._failover.waiting)
        say(Kind.REPLY, b"late", 2)
        assert asked.get() == b"late"
        assert (len(client._requester), client._failover.waiting) == (0, {})
        assert client._channels[0].connection.sent == {}
