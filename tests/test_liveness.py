"""What a Client is told when its server dies, freezes, is cut off or is only slow: with real processes, over real links."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, ROOT, wait_until

import greensafe as zmq
from greensafe import Client, Disconnected, OperationTimeout, PeerSilent, RemoteError, Unreachable
from greensafe.testing import FaultyLink

pytestmark = pytest.mark.usefixtures("limit")

#: Seconds of silence after which the clients here take a server for dead: enough for a busy machine not to be taken for that.
LIMIT = 1000 * MS

SERVER = """
import sys, time
import gevent, greensafe

def handle(request):
    what, _, rest = request.body.partition(b" ")
    print("got", request.id, flush=True)
    if what == b"sleep":
        gevent.sleep(float(rest))
    elif what == b"spin":
        until = time.monotonic() + float(rest)
        while time.monotonic() < until:
            pass
    elif what == b"big":
        return bytes(int(rest))
    return request.body

server = greensafe.Server(sys.argv[1], handle, deadline=float(sys.argv[2]))
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""


class Process:
    """A server as a process of its own."""

    def __init__(self, endpoint: str, deadline: float = 6 * LONG) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", SERVER, endpoint, str(deadline)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.endpoint = self.line()

    def line(self) -> str:
        """The next line that it prints, which is there or comes soon: then a request has arrived."""
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        self.kill()
        assert self._popen.stdout is not None
        self._popen.stdout.close()


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Process] = []

    def start(*args: Any) -> Process:
        started.append(Process(*args))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture(params=["tcp", "ipc"])
def address(request: pytest.FixtureRequest, tmp_path: Path, port: int) -> str:
    return f"tcp://127.0.0.1:{port}" if request.param == "tcp" else f"ipc://{tmp_path}/s"


def _asked(client: Client, process: Process, body: bytes, count: int = 1) -> list[gevent.Greenlet]:
    """Requests that have arrived at the server and wait there."""
    asked = [gevent.spawn(client.request, body) for _ in range(count)]
    gevent.sleep(0)
    wait_until(lambda: f"inflight={count}" in repr(client))
    with gevent.Timeout(LONG):
        gevent.get_hub().threadpool.apply(lambda: [process.line() for _ in range(count)])
    return asked


def _error(asked: gevent.Greenlet) -> Any:
    asked.join()
    assert asked.exception is not None, f"answered {asked.value!r}"
    return asked.exception


@pytest.mark.parametrize("count", [1, 100])
def test_killed(context: zmq.Context, start: Start, address: str, count: int) -> None:
    """All requests of a server that is killed are told so, though none has a limit; the next goes to the restarted server."""
    server = start(address)
    with Client(server.endpoint, context=context) as client:
        asked = _asked(client, server, b"sleep %f" % (6 * LONG), count)
        server.kill()
        errors = [_error(each) for each in asked]
        assert {type(error) for error in errors} == {Disconnected}
        assert all(error.endpoint == server.endpoint and error.maybe_executed for error in errors)
        assert len({error.request_id for error in errors}) == count
        again = gevent.spawn(client.request, b"again")
        restarted = start(server.endpoint)
        assert again.get() == b"again"
        assert restarted.line().startswith("got")


def test_nothing_is_delivered_behind_the_callers_back(context: zmq.Context, start: Start, address: str) -> None:
    """A request whose caller was told of the loss never reaches the restarted server."""
    server = start(address)
    with Client(server.endpoint, context=context) as client:
        asked = _asked(client, server, b"sleep %f" % (6 * LONG), 20)
        server.kill()
        lost = {_error(each).request_id for each in asked}
        restarted = start(server.endpoint)
        assert client.request(b"last") == b"last"
        got = restarted.line().partition(" ")[2]
        assert got not in lost


def test_what_was_still_queued_is_not_delivered_later(context: zmq.Context, start: Start, address: str) -> None:
    """Nor does one that libzmq had not sent yet: it would go out with the next connection."""
    server = start(address)
    with Client(server.endpoint, context=context, heartbeat=None) as client:
        assert client.request(b"x") == b"x"
        server.line()
        server.signal(signal.SIGSTOP)
        body = b"sleep 0 " + bytes(1_000_000)  # more in all than the kernels' buffers hold
        asked = [gevent.spawn(client.request, body) for _ in range(30)]
        wait_until(lambda: client._channels[0].load == 30)
        gevent.sleep(0)
        server.kill()
        lost = {_error(each).request_id for each in asked}
        restarted = start(server.endpoint)
        assert client.request(b"last") == b"last"
        assert restarted.line().partition(" ")[2] not in lost


def test_idempotent_request_survives_a_restart(context: zmq.Context, start: Start, address: str) -> None:
    """With retries an idempotent request is sent again under its id, within the caller's limit; its caller just waits."""
    server = start(address)
    with Client(server.endpoint, context=context, retries=50) as client:
        asked = gevent.spawn(client.request, b"sleep %f" % (500 * MS), LONG, idempotent=True)
        first = gevent.get_hub().threadpool.apply(server.line)
        server.kill()
        restarted = start(server.endpoint)
        assert asked.get() == b"sleep %f" % (500 * MS)
        assert restarted.line() == first


def test_frozen_process(context: zmq.Context, start: Start, address: str) -> None:
    """A stopped process is PeerSilent, over tcp told from others; when it goes on, so does the client."""
    server = start(address)
    with Client(server.endpoint, context=context, heartbeat=LIMIT) as client:
        (asked,) = _asked(client, server, b"sleep %f" % (6 * LONG))
        (call,) = client._requester.asked()
        wait_until(lambda: call.is_heard)  # stopped before that it could be a plain REP, which a second look tells from others
        server.signal(signal.SIGSTOP)
        error = _error(asked)
        assert isinstance(error, PeerSilent)
        assert error.silent == ("process" if address.startswith("tcp") else None)
        assert error.maybe_executed
        with pytest.raises(PeerSilent) as caught:
            client.request(b"x")
        assert not caught.value.maybe_executed  # nobody has answered the handshake
        server.signal(signal.SIGCONT)
        assert client.request(b"x") == b"x"


def test_blocked_hub(context: zmq.Context, start: Start, address: str) -> None:
    """A server whose event loop is blocked is PeerSilent, though libzmq's heartbeats go on."""
    server = start(address)
    with Client(server.endpoint, context=context, heartbeat=LIMIT) as client:
        assert client.request(b"x") == b"x"
        server.line()
        with pytest.raises(PeerSilent) as caught:
            client.request(b"spin %f" % (4 * LIMIT))
        assert caught.value.silent == ("hub" if address.startswith("tcp") else None)


def test_slow_is_not_dead(context: zmq.Context, start: Start, address: str) -> None:
    """A reply that takes three times the limit is waited for."""
    server = start(address)
    with Client(server.endpoint, context=context, heartbeat=LIMIT) as client:
        assert client.request(b"sleep %f" % (3 * LIMIT)).startswith(b"sleep")


def test_hanging_handler_is_its_servers_to_end(context: zmq.Context, start: Start) -> None:
    """A handler that hangs is reported as working until its server's deadline ends it."""
    server = start("tcp://127.0.0.1:0", 3 * LIMIT)
    with Client(server.endpoint, context=context, heartbeat=LIMIT) as client, pytest.raises(RemoteError) as caught:
        client.request(b"sleep %f" % (6 * LONG))
    assert caught.value.code == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_link_that_swallows_everything(context: zmq.Context, start: Start, fault: str) -> None:
    """Behind a link that lets nothing through a server is PeerSilent; when the link heals the client goes on."""
    server = start("tcp://127.0.0.1:0")
    with FaultyLink(server.endpoint) as link, Client(link.endpoint, context=context, heartbeat=LIMIT) as client:
        (asked,) = _asked(client, server, b"sleep %f" % (6 * LONG))
        getattr(link, fault)()
        assert isinstance(_error(asked), PeerSilent)
        link.heal()
        assert client.request(b"x") == b"x"


@pytest.mark.parametrize("fault", ["reset", "hang_up"])
def test_lost_connection(context: zmq.Context, start: Start, fault: str) -> None:
    """A connection that is reset or ended is Disconnected, and made anew."""
    server = start("tcp://127.0.0.1:0")
    with FaultyLink(server.endpoint) as link, Client(link.endpoint, context=context, heartbeat=LIMIT) as client:
        (asked,) = _asked(client, server, b"sleep %f" % (6 * LONG))
        getattr(link, fault)()
        assert isinstance(_error(asked), Disconnected)
        assert client.request(b"x") == b"x"


def test_long_reply_over_a_slow_link(context: zmq.Context, start: Start) -> None:
    """A single frame that takes several times the limit to arrive is not mistaken for death."""
    server = start("tcp://127.0.0.1:0")
    with FaultyLink(server.endpoint) as link, Client(link.endpoint, context=context, heartbeat=LIMIT) as client:
        assert client.request(b"x") == b"x"  # now it is known that who answers says WORKING, and cannot say it behind the frame
        link.throttle(400_000 / (1000 * MS), "to_client")
        assert len(client.request(b"big 1600000")) == 1_600_000


def test_long_request_over_a_slow_link(context: zmq.Context, start: Start) -> None:
    """Nor is one that takes as long to leave."""
    server = start("tcp://127.0.0.1:0")
    body = bytes(32_000_000)  # the buffers on the way hold 11 MB of it, which take their second to empty when all has left
    with FaultyLink(server.endpoint) as link, Client(link.endpoint, context=context, heartbeat=LIMIT) as client:
        assert client.request(b"x") == b"x"
        link.throttle(12_000_000 / (1000 * MS), "to_server")
        assert client.request(body) == body


def test_suspended_client(start: Start) -> None:
    """A client that was itself stopped for longer than the limit gets its answer."""
    server = start("tcp://127.0.0.1:0")
    program = f"""
import greensafe
with greensafe.Client({server.endpoint!r}, heartbeat={LIMIT}) as client:
    print(client.request(b"x"), flush=True)
    print(client.request(b"sleep {3 * LIMIT}")[:5], flush=True)
"""
    command = [sys.executable, "-c", program]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "b'x'\n"
        server.line()
        server.line()  # the second request has arrived
        client.send_signal(signal.SIGSTOP)
        gevent.sleep(2 * LIMIT)
        client.send_signal(signal.SIGCONT)
        assert client.stdout.readline() == "b'sleep'\n"
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


def _proxy(context: zmq.Context) -> tuple[gevent.Greenlet, str, str]:
    front, back = context.socket(plain.ROUTER), context.socket(plain.DEALER)
    front.bind("tcp://127.0.0.1:*")
    back.bind("tcp://127.0.0.1:*")
    return gevent.spawn(zmq.proxy, front, back), front.last_endpoint.decode(), back.last_endpoint.decode()


BEHIND = """
import sys, gevent, zmq, greensafe
context = greensafe.Context()
sock = context.socket(zmq.ROUTER if sys.argv[2] == "greensafe" else zmq.REP)
sock.connect(sys.argv[1])
def handle(request):
    print("got", flush=True)
    gevent.sleep(1000)
greensafe.supervise(sock, handle, deadline=None)
"""


@pytest.mark.parametrize("kind", ["greensafe", "plain"])
def test_killed_behind_a_proxy(context: zmq.Context, kind: str) -> None:
    """A greensafe server that is killed behind a proxy is missed; of a plain REP only the caller's limit can tell."""
    proxy, front, back = _proxy(context)
    command = [sys.executable, "-c", BEHIND, back, kind]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert server.stdout is not None
    try:
        with Client(front, context=context, heartbeat=LIMIT) as client:
            asked = gevent.spawn(client.request, b"x", None if kind == "greensafe" else 3 * LIMIT)
            gevent.get_hub().threadpool.apply(server.stdout.readline)
            if kind == "greensafe":
                call = client._requester.asked()[0]
                wait_until(lambda: call.is_heard)
            server.kill()
            error = _error(asked)
            if kind == "greensafe":
                assert isinstance(error, PeerSilent)
                assert error.silent == "hub"
            else:
                assert isinstance(error, OperationTimeout)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        proxy.kill()


def test_nobody_there(context: zmq.Context, address: str) -> None:
    """wait=False: Unreachable at once, also from the same client again; nothing was delivered."""
    with Client(address, context=context, wait=False) as client:
        for _ in range(3):
            with pytest.raises(Unreachable) as caught:
                client.request(b"x")
            assert caught.value.endpoint == address
            assert not caught.value.maybe_executed
    with Client(address, context=context) as client, pytest.raises(OperationTimeout) as late:
        client.request(b"x", timeout=100 * MS)
    assert "nobody can be reached" in late.value.__notes__[0]
