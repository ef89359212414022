"""What a Server does when there is more than it can take: clients that flood, that never read, that are many."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import gevent
import pytest
import zmq as plain
from gevent.event import Event
from helpers import LONG, MS, ROOT, running, wait_until

import greensafe as zmq
from greensafe import Client, RemoteError, Request, Server
from greensafe.transport import outbox

pytestmark = pytest.mark.usefixtures("limit")


@pytest.mark.parametrize("has_ids", [False, True])
def test_clients_take_turns(context: zmq.Context, has_ids: bool) -> None:
    """One client with thousands of requests in the queue does not keep another waiting for more than its turn.

    Nor does it if it puts an id of its own before each, where a proxy puts its clients'.
    """
    order: list[bytes] = []
    go = Event()

    def handler(request: Request) -> bytes:
        go.wait()
        order.append(request.body)
        gevent.sleep(0)
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=1, context=context) as server:
        greedy, modest = context.socket(zmq.DEALER), context.socket(zmq.REQ)
        for sock in (greedy, modest):
            sock.connect(server.endpoint)
        for number in range(3000):
            greedy.send_multipart([*([b"%d" % number] if has_ids else []), b"", b"greedy %d" % number])
        watchdog = server._watchdog
        assert watchdog is not None
        wait_until(lambda: watchdog.backlog > 1000)
        modest.send(b"modest")
        wait_until(lambda: watchdog.backlog == 3000)
        go.set()
        assert modest.recv() == b"modest"
        assert order.index(b"modest") <= 2
        for number in range(3000):
            assert greedy.recv_multipart()[-2:] == [b"", b"greedy %d" % number]


@pytest.mark.parametrize("kind", ["plain", "greensafe"])
def test_reject(context: zmq.Context, kind: str) -> None:
    """overload="reject": what comes beyond max_inflight is answered RESOURCE_EXHAUSTED at once, and not run."""
    ran: list[bytes] = []
    go = Event()

    def handler(request: Request) -> bytes:
        ran.append(request.body)
        go.wait()
        return request.body

    with Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=2, overload="reject", context=context) as server:
        assert server.endpoint is not None
        with Client(server.endpoint, context=context) as client:
            asked = [gevent.spawn(client.request, b"%d" % number) for number in range(2)]
            wait_until(lambda: len(ran) == 2)
            assert server.full
            if kind == "greensafe":
                with pytest.raises(RemoteError) as caught:
                    client.request(b"too many")
                error = caught.value
            else:
                req = context.socket(zmq.REQ)
                req.connect(server.endpoint)
                req.send(b"too many")
                found = RemoteError.from_reply(req.recv())
                assert found is not None
                error = found
            assert (error.code, error.type) == ("RESOURCE_EXHAUSTED", "ServerFull")
            go.set()
            assert {each.get() for each in asked} == {b"0", b"1"}
            assert client.request(b"again") == b"again"
        assert b"too many" not in ran


def test_rejected_requests_go_elsewhere(context: zmq.Context) -> None:
    """What one server rejects another one takes, without an error and without a retry."""
    go = Event()

    def slow(request: Request) -> bytes:
        go.wait()
        return b"slow"

    options: dict[str, Any] = {"deadline": None, "max_inflight": 1, "overload": "reject", "context": context}
    with (
        Server("tcp://127.0.0.1:0", slow, **options) as full,
        Server("tcp://127.0.0.1:0", lambda request: b"free", **options) as free,
    ):
        assert full.endpoint is not None and free.endpoint is not None
        with Client(full.endpoint, context=context) as other, Client(full.endpoint, free.endpoint, context=context) as client:
            blocked = gevent.spawn(other.request, b"x")
            wait_until(lambda: full.full)
            assert {client.request(b"x") for _ in range(20)} == {b"free"}
            go.set()
            assert blocked.get() == b"slow"


def test_wrong_overload() -> None:
    """A wrong word is an error that names the right ones."""
    with pytest.raises(ValueError, match='"wait" or "reject"'):
        Server("tcp://127.0.0.1:0", lambda request: b"", deadline=1, overload="drop")


GREEDY = """
import socket, struct, sys, zmq
context = zmq.Context()
socks = []
for _ in range(int(sys.argv[2])):
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.RCVHWM, 1)
    sock.setsockopt(zmq.RCVBUF, 4096)
    sock.connect(sys.argv[1])
    socks.append(sock)
for _ in range(int(sys.argv[3])):
    for sock in socks:
        sock.send_multipart([b"", b"big"])
print("sent", flush=True)
sys.stdin.readline()
"""


def test_clients_that_never_read(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers for clients that never read are kept up to a limit, then dropped and counted; others are served meanwhile."""
    monkeypatch.setattr(outbox, "OUTBOXES", 20_000_000)

    def handler(request: Request) -> bytes:
        return bytes(50_000) if request.body == b"big" else request.body

    own = zmq.Context()
    own.setsockopt(plain.SNDHWM, 2)
    own.setsockopt(plain.SNDBUF, 50_000)  # or the kernel's buffers grow until they hold all that is kept here
    with own, Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=own) as server:
        command = [sys.executable, "-c", GREEDY, str(server.endpoint), "40", "100"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        greedy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        try:
            with Client(str(server.endpoint), context=context) as client:
                pump = server._pump
                assert pump is not None
                while pump.outbox.dropped < 500:
                    assert client.request(b"x") == b"x"
                assert pump.outbox.size < 20_000_000 + 60_000
                for _ in range(100):
                    assert client.request(b"x") == b"x"
        finally:
            greedy.kill()
            greedy.wait()
            for stream in (greedy.stdin, greedy.stdout):
                assert stream is not None
                stream.close()
        wait_until(lambda: not len(pump.outbox))  # what is for those that are gone is dropped, and counted
        assert pump.outbox.unreachable > 0
        assert pump.outbox.size == 0


def test_draining_server_takes_what_is_under_way(context: zmq.Context) -> None:
    """Two servers are stopped and started again in turn under load: no request fails."""
    answered = 0
    is_over = False

    def handler(request: Request) -> bytes:
        gevent.sleep(MS)
        return request.body

    servers = [Server("tcp://127.0.0.1:0", handler, deadline=LONG, context=context) for _ in range(2)]
    for server in servers:
        server.start()
    for server in servers:
        server._bind_to = str(server.endpoint)  # the same port again
    with Client(*(server._bind_to for server in servers), context=context) as client:

        def ask() -> None:
            nonlocal answered
            while not is_over:
                assert client.request(b"x") == b"x"
                answered += 1

        asking = [gevent.spawn(ask) for _ in range(20)]
        for _ in range(3):
            for server in servers:
                before = answered
                server.stop()
                wait_until(lambda before=before: answered > before + 50)
                server.start()
                wait_until(lambda: all(channel.is_up for channel in client._channels))
        is_over = True
        gevent.joinall(asking, raise_error=True)
    for server in servers:
        server.stop()


BUSY = """
import sys
from time import monotonic
from greensafe import Server

def handler(request):
    end = monotonic() + float(sys.argv[1])
    while monotonic() < end:
        pass
    return request.body

server = Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=int(sys.argv[2]))
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("max_inflight", [1, 1000])
def test_many_requests_that_compute_are_not_silence(context: zmq.Context, max_inflight: int) -> None:
    """Each holds the hub for a moment, and all of them for longer than the heartbeat limit: their clients hear of it."""
    command = [sys.executable, "-c", BUSY, str(20 * MS), str(max_inflight)]
    with running(command) as (_, endpoint), Client(endpoint, context=context, heartbeat=1000 * MS) as client:
        assert client.request(b"x") == b"x"
        asked = [gevent.spawn(client.request, b"%d" % number) for number in range(120)]
        assert [each.get() for each in asked] == [b"%d" % number for number in range(120)]
