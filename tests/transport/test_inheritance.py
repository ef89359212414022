"""Tests of greensafe.green._inheritance: what a forked child does not keep of its parent's libzmq, and what it does."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
import zmq as plain
from helpers import LONG, run_python, running, wait_until

import greensafe as zmq
from greensafe import Client, Disconnected, PeerError, Server
from greensafe.transport import binding as _binding, inheritance as _inheritance

pytestmark = [
    pytest.mark.usefixtures("limit"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what an epoll polls"),
]

SERVER = """
import multiprocessing, os, signal, sys, time
import gevent
import greensafe

read, write = os.pipe()

def sleep():
    signal.alarm(120)
    os.write(write, b"x")
    time.sleep(120)

def fork():
    child = os.fork()
    if not child:
        sleep()
    return child

def start():
    process = multiprocessing.get_context("fork").Process(target=sleep)
    process.start()
    return process.pid

def handler(request):
    if request.body == b"fork":
        child = {"os": fork, "multiprocessing": start}[sys.argv[2]]()
        os.read(read, 1)
        return b"%d" % child
    gevent.sleep(120)

server = greensafe.Server(sys.argv[1], handler, deadline=None)
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""

CLIENT = """
import os, signal, sys, time
import gevent
import greensafe
client = greensafe.Client(sys.argv[1])
req = greensafe.Context.instance().socket(greensafe.REQ)
req.connect(sys.argv[1])
req.send(b"req")
gevent.spawn(client.request, b"client")
while not client.stats.endpoints[0].inflight:
    gevent.sleep(0.001)
child = os.fork()
if not child:
    signal.alarm(120)
    time.sleep(120)
print(child, flush=True)
gevent.sleep(120)
"""

LEFT = """
import os, socket, sys
import gevent, zmq
import greensafe
from greensafe.transport import inheritance as _inheritance

def sockets():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink("/proc/self/fd/" + fd)
        except OSError:
            continue
        if target.startswith("socket:"):
            found[int(fd)] = target
    return found

def fork(check):
    child = os.fork()
    if not child:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
"""

CONTEXTS = (
    LEFT
    + """
before = sockets()
kind = sys.argv[1]
context = greensafe.Context(2) if kind == "green" else zmq.Context(2)
if kind == "begun":
    context.socket(zmq.PAIR)
with greensafe.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=30, context=context) as server:
    with greensafe.Client(server.endpoint, context=context, timeout=30) as client:
        client.request(b"x")
        dealer = greensafe.Socket(context, zmq.DEALER)
        dealer.bind("tcp://127.0.0.1:*")
        assert len(sockets()) == len(before) + 4, sockets()

        def check():
            assert sockets() == before, (before, sockets())

        while kind == "begun" and len(_inheritance._waited_on()) < 2:
            gevent.sleep(0.001)  # the program's threads have begun by then
        fork(check)
        assert client.request(b"x") == b"x"
        dealer.close()
context.term()
print("fine")
"""
)

OWN = (
    LEFT
    + """
listener = socket.create_server(("127.0.0.1", 0))
server = greensafe.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=30)
server.start()
host, port = server.endpoint[6:].rsplit(":", 1)
here = socket.create_connection(listener.getsockname())
there, _ = listener.accept()
raw = socket.create_connection((host, int(port)))
file = open(sys.argv[1], "w+")
passed_on = socket.create_server(("127.0.0.1", 0))
passed_on.set_inheritable(True)
given = greensafe.Context.instance().socket(zmq.DEALER)
given.set(zmq.USE_FD, passed_on.fileno())
given.bind("tcp://127.0.0.1:%d" % passed_on.getsockname()[1])
greeting = raw.recv(64)
gevent.sleep(0)

def check():
    here.sendall(b"x")
    assert there.recv(1) == b"x"
    more = socket.create_connection(listener.getsockname())
    assert listener.accept()
    raw.getpeername()
    assert passed_on.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    file.write("child")
    file.flush()
    gevent.sleep(0.001)
    assert gevent.spawn(lambda: 1).get() == 1
    with greensafe.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=30) as own:
        with greensafe.Client(own.endpoint, timeout=30) as client:
            assert client.request(b"x") == b"x"

fork(check)
assert open(sys.argv[1]).read() == "child"
with greensafe.Client(server.endpoint, timeout=30) as client:
    assert client.request(b"x") == b"x"
server.stop()
given.close(0)
passed_on.detach()
print("fine")
"""
)


@contextlib.contextmanager
def _ended(process: int) -> Iterator[None]:
    """End a process that is nobody's child any more."""
    try:
        os.kill(process, 0)  # it lives
        yield
        os.kill(process, 0)
    finally:
        os.kill(process, signal.SIGKILL)


def _error_of(client: Client) -> PeerError | None:
    try:
        client.request(b"wait")
    except PeerError as error:
        return error
    return None


@pytest.mark.parametrize("how", ["os", "multiprocessing"])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_killed_server_whose_handler_had_forked(tmp_path: Path, context: zmq.Context, transport: str, how: str) -> None:
    """Its client is told that it is gone and the next server binds, while the child lives."""
    endpoint = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/s"
    with running([sys.executable, "-c", SERVER, endpoint, how]) as (process, address):
        with Client(address, heartbeat=None, context=context, timeout=LONG) as client:
            with _ended(int(client.request(b"fork"))):
                ended = gevent.spawn(_error_of, client)
                while not client.stats.endpoints[0].inflight:
                    gevent.sleep(0)
                process.kill()
                assert isinstance(ended.get(), Disconnected)
                process.wait()
                with Server(address, lambda request: b"next", deadline=LONG, context=context):
                    assert client.request(b"x") == b"next"


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_killed_client_that_had_forked(tmp_path: Path, context: zmq.Context, transport: str) -> None:
    """The server learns that it is gone, of a Client's and of a socket's connection alike, while the child lives."""
    ended: list[bytes] = []

    def handler(request: zmq.Request) -> None:
        try:
            gevent.sleep(LONG)
        finally:
            ended.append(request.body)
            if len(ended) == 2:
                over.set()

    over = gevent.event.Event()
    endpoint = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/s"
    with Server(endpoint, handler, deadline=None, cancel_vanished=True, context=context) as server:
        with running([sys.executable, "-c", CLIENT, str(server.endpoint)]) as (process, child), _ended(int(child)):
            while server.stats.running < 2:
                gevent.sleep(0)
            process.kill()
            assert over.wait(LONG)
            assert sorted(ended) == [b"client", b"req"]


@pytest.mark.parametrize("kind", ["green", "plain", "begun"])
def test_nothing_of_a_context_is_left(kind: str) -> None:
    """Listeners and both ends of connections are closed in the child, whoever began the context; the parent goes on."""
    result = run_python(CONTEXTS, kind)
    assert (result.code, result.out) == (0, "fine\n"), result.err


def test_what_is_the_programs_own(tmp_path: Path) -> None:
    """Its sockets, its files and its loop work in the child, and the socket that it gave to libzmq to be passed on."""
    result = run_python(OWN, str(tmp_path / "file"))
    assert (result.code, result.out) == (0, "fine\n"), result.err


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "tcp://*:*", "ipc://{}/s", "ipc://@greensafe-{}"])
def test_a_listener_is_known_when_bind_returns(context: zmq.Context, tmp_path: Path, endpoint: str) -> None:
    """No thread of libzmq's need have seen it: a child that is forked at once closes it, too."""
    sock = context.socket(plain.DEALER)
    before = _inheritance._descriptors()
    sock.bind(endpoint.format(tmp_path))
    (fd,) = _inheritance._descriptors() - before
    assert fd in _binding.listeners()


def test_a_number_that_means_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was polled a child closes what is still that socket, and no file, no other socket and nothing inheritable."""
    mine, others = socket.socketpair()
    inherited = socket.socket()
    inherited.set_inheritable(True)
    with mine, others, inherited, open(os.devnull) as file:
        kept = [others, inherited, file]
        lines = [_line(mine.fileno(), mine.fileno()), _line(others.fileno(), inherited.fileno()), _line(10_000, file.fileno())]
        lines += [_line(each.fileno(), each.fileno()) for each in (inherited, file)]
        monkeypatch.setattr(_inheritance, "_polled", ["".join(lines).encode()])
        monkeypatch.setattr(_inheritance, "_marks", {})
        monkeypatch.setattr(_inheritance, "_seen", set())
        monkeypatch.setattr(_inheritance, "listeners", list)
        _inheritance._in_child()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(mine.detach())
        for each in kept:
            os.fstat(each.fileno())


def _line(fd: int, file: int) -> str:
    """Say as Linux does that an epoll polls the number `fd`, which is the open `file`."""
    inode = os.fstat(file).st_ino
    return f"tfd: {fd:8} events:       19 data:     7f0360001490  pos:0 ino:{inode:x} sdev:9\n"


def test_epolls_of_others(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """gevent's and Python's are not taken for libzmq's, also if they are made while a context makes its first socket."""
    mine, others = socket.socketpair()
    marks: dict[int, bytes] = {}
    monkeypatch.setattr(_inheritance, "_marks", marks)
    assert context not in _inheritance._seen
    with mine, others, contextlib.ExitStack() as stack:
        with _inheritance.noted(context):
            epolls = [stack.enter_context(select.epoll()) for _ in range(3)]
            epolls[0].register(mine)
            epolls[1].register(others)
            epolls[1].register(epolls[0])
            sock = context.socket(plain.DEALER)
        assert context in _inheritance._seen
        sock.bind("tcp://127.0.0.1:*")
        wait_until(lambda: any(len(_inheritance._TARGET.findall(info)) == 2 for info in _inheritance._polled_now()))
        assert not {each.fileno() for each in epolls} & set(marks)
        assert gevent.get_hub().loop.fileno() not in marks


def test_what_cannot_be_listed(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before is not taken for new because it could not be listed, but for libzmq's if its threads wait on it."""
    marks: dict[int, bytes] = {}
    monkeypatch.setattr(_inheritance, "_marks", marks)
    monkeypatch.setattr(_inheritance, "_are_some_begun", False)
    monkeypatch.setattr(_inheritance, "_waited_on", set)
    listed = _inheritance._descriptors
    monkeypatch.setattr(_inheritance, "_descriptors", set)
    with _inheritance.noted(context):
        context.socket(plain.DEALER)
        monkeypatch.setattr(_inheritance, "_descriptors", listed)
    assert not marks
    monkeypatch.undo()
    wait_until(_inheritance._waited_on)  # the thread has begun, and waits
    monkeypatch.setattr(_inheritance, "_marks", marks)
    monkeypatch.setattr(_inheritance, "_are_some_begun", True)
    _inheritance._before_fork()
    _inheritance._in_parent()
    assert marks


def test_an_epoll_that_has_ended() -> None:
    """What is polled by another epoll under the number of one of libzmq's that has ended is not taken for libzmq's."""
    made = zmq.Context()
    made.socket(plain.DEALER).close()
    assert made in _inheritance._seen
    made.destroy()
    ended = [fd for fd, mark in _inheritance._marks.items() if mark not in _inheritance._read_info(fd)]
    assert ended
    mine, others = socket.socketpair()
    with mine, others, contextlib.ExitStack() as stack:
        epolls = [stack.enter_context(select.epoll()) for _ in ended]
        for epoll in epolls:
            epoll.register(mine)
        polled = b"".join(_inheritance._polled_now())
        assert f"ino:{os.fstat(mine.fileno()).st_ino:x} ".encode() not in polled
