"""Peers that know nothing of greensafe: a REQ and a REP in C on libzmq, and in node on the npm package zeromq.

Both ways over tcp, directly and through a proxy. The peers' sources are in `peers/`; they are built in a temporary folder.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, running

import greensafe as zmq
from greensafe import Client, Request, Server, supervise, supervised

pytestmark = [pytest.mark.check, pytest.mark.usefixtures("limit"), pytest.mark.timeout(300)]

SOURCES = Path(__file__).parent / "peers"
ANY_PORT = "tcp://127.0.0.1:*"

Message = list[bytes]

#: Requests as a peer may send them: an empty frame, every byte there is, several frames of which some are empty, a large one.
MESSAGES: list[Message] = [[b"hello"], [b""], [bytes(range(256))], [b"a", b"", b"b", b""], [b"x" * 300_000]]


@dataclass
class Peers:
    """How the peers of one language are started."""

    req: list[str]
    rep: list[str]

    def ask(self, endpoint: str, messages: list[Message]) -> list[Message]:
        """Have the REQ send each message, and return the replies; the hub turns meanwhile."""
        lines = "".join(",".join(frame.hex() for frame in message) + "\n" for message in messages)
        pool = gevent.get_hub().threadpool
        done = pool.apply(
            lambda: subprocess.run([*self.req, endpoint], input=lines, capture_output=True, text=True, timeout=LONG)
        )
        assert done.returncode == 0, done.stderr
        return [[bytes.fromhex(frame) for frame in line.split(",")] for line in done.stdout.splitlines()]

    def serve(self, endpoint: str = ANY_PORT) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
        """The REP, and where it is bound."""
        return running([*self.rep, endpoint])


def _run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


def _in_c(folder: Path) -> Peers:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev libzmq3-dev, or what your system calls them")
    seen = subprocess.run([compiler, "-E", "-include", "zmq.h", "-x", "c", "/dev/null"], capture_output=True)
    if seen.returncode:
        pytest.skip("no header zmq.h: apt-get install libzmq3-dev, or what your system calls it")
    for name in ("req", "rep"):
        _run(compiler, "-Wall", "-Wextra", "-Werror", "-o", folder / name, SOURCES / f"{name}.c", "-lzmq", cwd=folder)
    return Peers([str(folder / "req")], [str(folder / "rep")])


def _in_node(folder: Path) -> Peers:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no node with npm: apt-get install nodejs npm, or what your system calls them")
    # The addon is in the package, built: no script has to run.
    _run(npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "zeromq@6", cwd=folder)
    for name in ("req.mjs", "rep.mjs"):
        shutil.copy(SOURCES / name, folder)
    return Peers([node, str(folder / "req.mjs")], [node, str(folder / "rep.mjs")])


@pytest.fixture(scope="session", params=[_in_c, pytest.param(_in_node, marks=pytest.mark.slow)], ids=["C", "node"])
def peers(request: pytest.FixtureRequest) -> Iterator[Peers]:
    """The peers of each language in turn, or a skip that says what is missing."""
    with TemporaryDirectory() as folder:
        yield request.param(Path(folder))


# Between the peers.

Way = Callable[[zmq.Context, str], AbstractContextManager[str]]


@contextmanager
def _green_proxy(context: zmq.Context, endpoint: str) -> Iterator[str]:
    with context.socket(zmq.ROUTER) as front, context.socket(zmq.DEALER) as back:
        front.bind(ANY_PORT)
        back.connect(endpoint)
        copying = gevent.spawn(zmq.proxy, front, back)
        yield front.last_endpoint.decode()
        copying.kill()


@contextmanager
def _libzmq_proxy(context: zmq.Context, endpoint: str) -> Iterator[str]:
    program = """
import signal, sys, zmq
signal.alarm(120)  # in case nobody ends it
front, back = zmq.Context.instance().socket(zmq.ROUTER), zmq.Context.instance().socket(zmq.DEALER)
front.bind(sys.argv[1])
back.connect(sys.argv[2])
print(front.last_endpoint.decode(), flush=True)
zmq.proxy(front, back)
"""
    with running([sys.executable, "-c", program, ANY_PORT, endpoint]) as (_, bound):
        yield bound


@pytest.fixture(
    params=[lambda _, endpoint: nullcontext(endpoint), _green_proxy, _libzmq_proxy], ids=["direct", "proxy", "zmq_proxy"]
)
def way(request: pytest.FixtureRequest) -> Way:
    """Connects to an endpoint, directly or through a proxy; gives the endpoint to connect to."""
    made: Way = request.param
    return made


# What greensafe has to answer with, and to ask with.


def _handler(request: Request) -> list[bytes]:
    if request.body == b"fail":
        raise ValueError("no")
    if request.body == b"hang":
        gevent.sleep(LONG)
    if request.body == b"{":
        request.json()
    return request.frames


@contextmanager
def _server(context: zmq.Context) -> Iterator[str]:
    with Server(ANY_PORT, _handler, deadline=100 * MS, context=context) as server:
        assert server.endpoint is not None
        yield server.endpoint


@contextmanager
def _socket(context: zmq.Context, kind: int, serve: Callable[[Any], None]) -> Iterator[str]:
    """A green socket on which `serve` answers in a greenlet."""
    with context.socket(kind) as sock:
        sock.bind(ANY_PORT)
        serving = gevent.spawn(serve, sock)
        yield sock.last_endpoint.decode()
        serving.kill()


def _loop(rep: Any) -> None:
    while True:
        rep.send_multipart(rep.recv_multipart())


def _watched_loop(rep: Any) -> None:
    while True:
        with supervised(rep, deadline=100 * MS) as request:
            rep.send_multipart(_handler(request))


def _watched(sock: Any) -> None:
    supervise(sock, _handler, deadline=100 * MS)


WATCHED = {
    "Server": _server,
    "supervise a REP": lambda context: _socket(context, zmq.REP, _watched),
    "supervise a ROUTER": lambda context: _socket(context, zmq.ROUTER, _watched),
    "supervised loop": lambda context: _socket(context, zmq.REP, _watched_loop),
}
ANSWERING = {**WATCHED, "REP": lambda context: _socket(context, zmq.REP, _loop)}


def _by_client(context: zmq.Context, endpoint: str, messages: list[Message]) -> list[Message]:
    """All at once, from a greenlet each, through one Client."""
    with Client(endpoint, context=context) as client:
        asking = [gevent.spawn(client.request_multipart, message) for message in messages]
        gevent.joinall(asking, raise_error=True)
        return [each.value for each in asking]


def _by_req(context: zmq.Context, endpoint: str, messages: list[Message]) -> list[Message]:
    with context.socket(zmq.REQ) as req:
        req.connect(endpoint)
        return [(req.send_multipart(message), req.recv_multipart())[1] for message in messages]


ASKING = {"Client": _by_client, "REQ": _by_req}


@pytest.mark.parametrize("answering", ANSWERING)
def test_peer_asks(context: zmq.Context, peers: Peers, way: Way, answering: str) -> None:
    """A REQ in another language gets for each request its reply, whole."""
    with ANSWERING[answering](context) as endpoint, way(context, endpoint) as reached:
        assert peers.ask(reached, MESSAGES) == MESSAGES


@pytest.mark.parametrize("answering", WATCHED)
def test_peer_is_told_of_errors(context: zmq.Context, peers: Peers, way: Way, answering: str) -> None:
    """A handler that fails, hangs or gets garbage reaches a REQ in another language as one frame of JSON, and it may go on."""
    with WATCHED[answering](context) as endpoint, way(context, endpoint) as reached:
        replies = peers.ask(reached, [[b"fail"], [b"hang"], [b"{"], [b"and", b"on"]])
    assert replies.pop() == [b"and", b"on"]
    errors = [json.loads(frame)["error"] for (frame,) in replies]
    assert [error["code"] for error in errors] == ["INTERNAL", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"]
    assert errors[0] == {"code": "INTERNAL", "type": "ValueError", "message": "no"}


@pytest.mark.parametrize("asking", ASKING)
def test_peer_answers(context: zmq.Context, peers: Peers, way: Way, asking: str) -> None:
    """A REP in another language answers a Client's and a green REQ's requests, and outlives them."""
    with peers.serve() as (process, endpoint), way(context, endpoint) as reached:
        for _ in range(3):
            assert ASKING[asking](context, reached, MESSAGES) == MESSAGES
        assert process.poll() is None


def test_peers_on_both_sides(context: zmq.Context, peers: Peers) -> None:
    """A REQ and a REP in another language talk through greensafe.proxy, while several clients do."""
    with peers.serve() as (_, endpoint), _green_proxy(context, endpoint) as reached:
        asking = [gevent.spawn(peers.ask, reached, MESSAGES) for _ in range(3)]
        gevent.joinall(asking, raise_error=True)
        assert [each.value for each in asking] == [MESSAGES] * 3


def test_client_after_a_timeout(context: zmq.Context, peers: Peers) -> None:
    """A request that a frozen REP did not answer in time is not mistaken for the next one once it goes on."""
    with peers.serve() as (process, endpoint), closing(Client(endpoint, context=context)) as client:
        assert client.request(b"before") == b"before"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(zmq.OperationTimeout):
            client.request(b"old", timeout=50 * MS)
        asking = gevent.spawn(client.request, b"new")
        gevent.sleep(0)
        process.send_signal(signal.SIGCONT)  # now it answers both
        assert asking.get() == b"new"


def test_req_after_a_timeout(context: zmq.Context, peers: Peers) -> None:
    """A green REQ that gave up on a frozen REP sends again, and gets the new request's reply."""
    with peers.serve() as (process, endpoint), context.socket(zmq.REQ) as req:
        req.connect(endpoint)
        req.send(b"before")
        assert req.recv() == b"before"
        process.send_signal(signal.SIGSTOP)
        req.send(b"old")
        with pytest.raises(zmq.OperationTimeout):
            req.recv(timeout=50 * MS)
        req.send(b"new")
        process.send_signal(signal.SIGCONT)  # now it answers both
        assert req.recv() == b"new"


@pytest.mark.parametrize("asking", ASKING)
def test_peer_restarts(context: zmq.Context, peers: Peers, asking: str) -> None:
    """A REP that is killed and started again answers the next request of the same Client or green REQ."""
    with context.socket(zmq.REQ) as req:

        def by_req(body: bytes, timeout: float) -> bytes:
            req.send(body)
            return req.recv(timeout=timeout)

        with peers.serve() as (process, endpoint):
            req.connect(endpoint)
            client = Client(endpoint, context=context)
            ask = client.request if asking == "Client" else by_req
            assert ask(b"before", timeout=LONG) == b"before"
            process.kill()
            process.wait()
            with pytest.raises(zmq.GreensafeError):
                ask(b"nobody is there", timeout=50 * MS)
        with peers.serve(endpoint), client:
            assert ask(b"after", timeout=LONG) == b"after"
