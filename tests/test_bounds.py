"""What a Server and a Client keep for peers that send much, read nothing, or make up ids and routes."""

from __future__ import annotations

import gevent
import pytest
from gevent.event import Event
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import (
    Client,
    OperationTimeout,
    RemoteError,
    RemoteProtocolError,
    Request,
    Server,
    stats_of,
    supervise,
    supervised,
)
from greensafe.client import channel
from greensafe.sansio.envelope import Header, Kind, ServerHeader
from greensafe.server import answers, backlog
from greensafe.server.server import UNREAD
from greensafe.server.tally import tally_of
from greensafe.transport import outbox as _outbox

pytestmark = pytest.mark.usefixtures("limit")


def _echo(request: Request) -> list[bytes]:
    return request.frames


def _request(number: int, patience_ms: int = 0) -> bytes:
    return Header(Kind.REQUEST, number.to_bytes(16, "big"), patience_ms=patience_ms).encode()


def test_requests_of_too_many_frames(context: zmq.Context) -> None:
    """Clients of both kinds are told, and go on; the handler sees nothing of it."""
    with Server("tcp://127.0.0.1:0", _echo, deadline=LONG, max_frames=100, context=context) as server:
        with Client(str(server.endpoint), context=context) as client:
            with pytest.raises(RemoteError, match="more than 100 frames") as caught:
                client.request_multipart([b""] * 100)
            assert (caught.value.code, caught.value.type) == ("INVALID_ARGUMENT", "TooManyFrames")
            assert client.request_multipart([b""] * 97) == [b""] * 97
        plain = context.socket(zmq.REQ)
        plain.connect(server.endpoint)
        plain.send_multipart([b""] * 100)
        error = RemoteError.from_reply(plain.recv())
        assert error is not None
        assert error.type == "TooManyFrames"
        plain.send(b"x")
        assert plain.recv() == b"x"
        assert (server.stats.drops["malformed"], server.stats.received) == (2, 2)


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
@pytest.mark.parametrize("is_own_loop", [False, True])
def test_requests_of_too_many_frames_to_a_socket_of_the_programs(context: zmq.Context, kind: int, is_own_loop: bool) -> None:
    """They are answered, and neither a handler nor a block sees them."""
    sock = context.socket(kind)
    port = sock.bind_to_random_port("tcp://127.0.0.1")

    def loop() -> None:
        while True:
            with supervised(sock, deadline=LONG, max_frames=100) as request:
                request.reply(request.body)

    options = {"deadline": LONG, "max_frames": 100}
    serving = gevent.spawn(loop) if is_own_loop else gevent.spawn(supervise, sock, _echo, **options)
    plain = context.socket(zmq.REQ)
    plain.connect(f"tcp://127.0.0.1:{port}")
    plain.send_multipart([b"x"] * 100)
    error = RemoteError.from_reply(plain.recv())
    assert error is not None
    assert (error.code, error.type) == ("INVALID_ARGUMENT", "TooManyFrames")
    plain.send_multipart([b"x"] * 97)
    assert plain.recv_multipart() == [b"x"] * (1 if is_own_loop else 97)
    assert (stats_of(sock).received, stats_of(sock).drops["malformed"]) == (1, 1)
    serving.kill()


def test_replies_of_too_many_frames(context: zmq.Context) -> None:
    """The caller gets an error and does not wait for ever; the next reply is taken."""

    def many(request: Request) -> list[bytes]:
        return [b""] * int(request.body)

    with Server("tcp://127.0.0.1:0", many, deadline=LONG, context=context) as server:
        with Client(str(server.endpoint), max_frames=100, context=context) as client:
            with pytest.raises(RemoteProtocolError, match="more than 100 frames"):
                client.request_multipart([b"99"])
            assert client.request_multipart([b"98"]) == [b""] * 98
            assert client.stats.drops["malformed"] == 1


def test_requests_that_wait_are_weighed_with_their_metadata(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """With empty bodies as well nothing is read any more when what is kept weighs too much; all are served in the end."""
    monkeypatch.setattr(backlog, "BACKLOG_BYTES", 1_000_000)
    go = Event()

    def handler(request: Request) -> bytes:
        go.wait()
        return b"done"

    with Server("tcp://127.0.0.1:0", handler, deadline=LONG, max_inflight=1, context=context) as server:
        with Client(str(server.endpoint), heartbeat=None, context=context) as client:
            calls = [gevent.spawn(client.request, b"", metadata=bytes(60_000)) for _ in range(20)]
            wait_until(lambda: server._pump is not None and server._pump.inbox.is_paused)
            assert server.stats.backlog == 9
            go.set()
            assert [call.get() for call in calls] == [b"done"] * 20


def test_a_client_that_does_not_read_has_no_queue_of_workings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is said again soon little is kept for it, however many ids it makes up; its answers are kept."""
    monkeypatch.setattr(_outbox, "SPARE", 5000)
    go = Event()

    def handler(request: Request) -> bytes:
        go.wait()
        return request.body

    with zmq.Context() as context:
        context.setsockopt(zmq.SNDHWM, 1)
        context.setsockopt(zmq.RCVHWM, 1)
        with Server("inproc://bounds", handler, deadline=LONG, context=context) as server:
            peer = context.socket(zmq.DEALER)
            peer.connect("inproc://bounds")
            for number in range(100):
                peer.send_multipart([b"%d" % number, _request(number, patience_ms=1), b"", b"%d" % number])
            wait_until(lambda: server.stats.drops["unsaid"] > 200)
            assert 5 < server.stats.unsent < 30
            assert server.stats.drops["full_outbox"] == 0
            go.set()
            wait_until(lambda: server.stats.answered == 100)
            got = set()
            while len(got) < 100:
                *_, _, body = peer.recv_multipart()
                if len(body) < 16:
                    got.add(int(body))
            assert got == set(range(100))
            peer.close(0)


def test_giving_up_on_a_server_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives up again and again keeps neither what it has asked nor one CANCEL more for each."""
    with zmq.Context() as context:
        context.setsockopt(zmq.SNDHWM, 1)
        context.setsockopt(zmq.RCVHWM, 1)
        context.setsockopt(zmq.SNDBUF, 50_000)
        context.setsockopt(zmq.RCVBUF, 50_000)
        server = Server("tcp://127.0.0.1:0", _echo, deadline=LONG, context=context)
        server.start()
        with server, Client(str(server.endpoint), heartbeat=None, context=context) as client:
            assert client.request(b"x") == b"x"
            reading, writing = server._pump, client._channels[0]._pump
            assert reading is not None
            assert writing is not None
            reading.inbox.is_paused = True
            while len(writing.outbox) < 20:
                with pytest.raises(OperationTimeout):
                    client.request(bytes(1_000_000), timeout=1 * MS)
            tries = 0
            monkeypatch.setattr(channel, "OUTBOX", 20_000)
            while client.stats.drops["unsaid"] < 100:
                with pytest.raises(OperationTimeout):
                    client.request(b"small", timeout=0.1 * MS)
                tries += 1
                assert tries < 1000
            assert len(writing.outbox) < 300
            reading.resume()
            assert client.request(b"y") == b"y"
            assert (len(writing.outbox), writing.outbox.size) == (0, 0)


def test_what_libzmq_keeps_unread_is_little() -> None:
    """It counts messages, however large: so few that they are no backlog of their own, unless the Context says otherwise."""
    with zmq.Context() as context, Server("tcp://127.0.0.1:0", _echo, deadline=LONG, context=context) as server:
        assert server._socket.getsockopt(zmq.RCVHWM) == UNREAD
        server.stop()
        context.setsockopt(zmq.RCVHWM, 1000)
        server.start()
        assert server._socket.getsockopt(zmq.RCVHWM) == 1000


def test_a_supervised_router_keeps_little_for_a_client_that_does_not_read(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers up to a weight, in a greenlet each, and hardly a WORKING; others are served."""
    monkeypatch.setattr(answers, "OUTBOX", 10 * (answers.WAITING + 1000))
    monkeypatch.setattr(answers, "SPARE", 3 * (answers.WAITING + 1000))
    sock = context.socket(zmq.ROUTER)
    sock.sndhwm = sock.rcvhwm = sock.router_mandatory = 1
    sock.bind("inproc://supervised")
    go, waiting = Event(), tally_of(sock).waiting

    def handler(request: Request) -> bytes:
        go.wait()
        return request.body

    greedy, other = context.socket(zmq.DEALER), context.socket(zmq.REQ)
    for peer in (greedy, other):
        peer.sndhwm = peer.rcvhwm = 1
        peer.connect("inproc://supervised")
    serving = gevent.spawn(supervise, sock, handler, deadline=LONG)
    try:
        for number in range(50):
            greedy.send_multipart([b"%d" % number, _request(number, patience_ms=1), b"", b"x"])
        wait_until(lambda: not sock.poll(0))
        wait_until(lambda: waiting)
        gevent.sleep(200 * MS)  # as often as WORKING is said in this time it is not kept
        assert sum(waiting.values()) <= answers.SPARE
        go.set()
        other.send(b"other")
        assert other.recv() == b"other"
        assert len(waiting) == 1
        assert 5 * answers.WAITING < sum(waiting.values()) <= answers.OUTBOX
        while waiting:
            greedy.recv_multipart()
    finally:
        serving.kill()


def test_journals_that_a_server_makes_up(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy there may be many; whoever names another one in each message ends at a number."""
    monkeypatch.setattr(channel, "NAMED", 10)
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with Client(f"tcp://127.0.0.1:{port}", context=context) as client:
        call = gevent.spawn(client.request, b"x")
        name, header, *_ = router.recv_multipart()
        for number in range(50):
            said = ServerHeader(Kind.WORKING, header[8:24], bytes(16), number.to_bytes(16, "big"), hops=2)
            router.send_multipart([name, said.encode(), b"", header[8:24]])
        router.send_multipart([name, header, b"", b"answer"])
        assert call.get() == b"answer"
        assert len(client._channels[0]._named) == 10
