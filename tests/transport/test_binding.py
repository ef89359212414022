"""Tests of greensafe.green._binding: how a socket gets an address, and gives it back."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, run_python

import greensafe as zmq
from greensafe import Server
from greensafe.transport import binding as _binding
from greensafe.transport.binding import listeners

pytestmark = pytest.mark.usefixtures("limit")

#: Enough for what libzmq gives back late to be met by who binds at once: one time in three over tcp, in thirty over inproc.
ROUNDS = {"inproc": 300}


def _name(sock: Any) -> str:
    name: str = sock.last_endpoint.rstrip(b"\0").decode()
    return name


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def lingers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The LINGER that each socket has while libzmq binds it."""
    seen: list[int] = []
    bind: Callable[..., Any] = plain.Socket.bind

    def note(self: plain.Socket[bytes], addr: str) -> Any:
        seen.append(plain.Socket.get(self, plain.LINGER))
        return bind(self, addr)

    monkeypatch.setattr(plain.Socket, "bind", note)
    return seen


@pytest.mark.parametrize("linger", [None, -1, 1234])
@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.REQ, zmq.PUB])
def test_linger_while_it_binds(context: zmq.Context, lingers: list[int], endpoint: str, kind: int, linger: int | None) -> None:
    """LINGER is 0 while libzmq binds, for connections that will be gone, and afterwards what it was."""
    sock = context.socket(kind)
    if linger is not None:
        sock.linger = linger
    before = sock.linger
    sock.bind(endpoint)
    assert lingers == [0]
    assert sock.linger == before != 0


def test_linger_after_a_bind_that_fails(context: zmq.Context, lingers: list[int]) -> None:
    """A bind that fails in libzmq leaves LINGER as it was."""
    sock = context.socket(zmq.ROUTER)
    with pytest.raises(zmq.ZMQError):
        sock.bind("pigeon://x")
    assert (lingers, sock.linger) == ([0], zmq.green.socket.DEFAULT_LINGER)


@pytest.mark.parametrize("way", ["shadow", "random port", "server", "authenticator", "patched"])
def test_linger_of_whatever_binds(context: zmq.Context, lingers: list[int], way: str) -> None:
    """Whatever binds in this package does it so: shadows, pyzmq's own helpers, servers, the authenticator's socket."""
    if way == "shadow":
        zmq.Socket(shadow=context.socket(zmq.ROUTER)).bind("tcp://127.0.0.1:*")
    elif way == "random port":
        context.socket(zmq.ROUTER).bind_to_random_port("tcp://127.0.0.1")
    elif way == "server":
        with Server("tcp://127.0.0.1:0", lambda request: b"", deadline=LONG, context=context):
            pass
    elif way == "authenticator":
        from greensafe.auth import Authenticator

        with Authenticator(context):
            pass
    else:
        from greensafe import monkey

        with monkey.Context() as other, other.socket(zmq.ROUTER) as sock:
            sock.bind("tcp://127.0.0.1:*")
    assert lingers == [0]


def test_what_lives_gets_its_messages(context: zmq.Context, endpoint: str) -> None:
    """LINGER 0 while it binds takes nothing from a peer that lives: what is queued at close() arrives."""
    push = context.socket(zmq.PUSH)
    push.sndhwm = 0
    push.bind(endpoint)
    pull = context.socket(zmq.PULL)
    pull.rcvhwm = 0
    pull.connect(_name(push))
    for number in range(2000):
        push.send(b"%d" % number)
    push.close()
    assert [pull.recv() for _ in range(2000)] == [b"%d" % number for number in range(2000)]


def test_what_was_sent_before_the_end_arrives(context: zmq.Context, endpoint: str) -> None:
    """LINGER 0 while it binds takes nothing from who sends and is gone: it is received."""
    pull = context.socket(zmq.PULL)
    pull.bind(endpoint)
    push = context.socket(zmq.PUSH)
    push.connect(_name(pull))
    for number in range(500):
        push.send(b"%d" % number)
    push.close()
    assert [pull.recv() for _ in range(500)] == [b"%d" % number for number in range(500)]


@pytest.mark.parametrize("transport", ["tcp", "tcp6", "abstract", "ipc", "inproc"])
@pytest.mark.parametrize("way", ["close", "unbind", "unbind by the other name"])
def test_bind_at_once(context: zmq.Context, tmp_path: Path, transport: str, way: str) -> None:
    """An address that this process has just given back can be bound at once, every time."""
    port = _free_port()
    address = {
        "tcp": f"tcp://*:{port}",
        "tcp6": f"tcp://127.0.0.1:{port}",
        "abstract": f"ipc://@{tmp_path.name}-{port}",
        "ipc": f"ipc://{tmp_path}/s",
        "inproc": "inproc://again",
    }[transport]
    sock = None
    for _ in range(ROUNDS.get(transport, 30)):
        if sock is None:
            sock = context.socket(zmq.REP)
            sock.ipv6 = transport == "tcp6"
        sock.bind(address)
        if way == "close":
            sock.close()
            sock = None
        else:
            sock.unbind(address if way == "unbind" else _name(sock))


def test_unbind_one_of_two(context: zmq.Context) -> None:
    """Bound twice by one name, to two ports, a socket unbinds from one of them by that name, and from the other by its own."""
    sock = context.socket(zmq.REP)
    names = []
    for _ in range(2):
        sock.bind("tcp://127.0.0.1:*")
        names.append(_name(sock))
    sock.unbind("tcp://127.0.0.1:*")
    with pytest.raises(zmq.ZMQError):
        sock.unbind(names[0])
    sock.unbind(names[1])


def test_somebody_elses_address(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that somebody else has is EADDRINUSE at once: nothing is waited for."""
    monkeypatch.setattr(_binding.gevent, "sleep", lambda *_: pytest.fail("it has waited"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(zmq.ZMQError) as caught:
            context.socket(zmq.REP).bind(address)
    assert caught.value.errno == errno.EADDRINUSE
    assert address in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1


def test_the_hub_does_not_wait(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub, which cannot wait, an address that is being given back is EADDRINUSE."""
    monkeypatch.setattr(_binding._Listener, "is_open", True)
    first, second = context.socket(zmq.REP), context.socket(zmq.REP)
    first.bind("tcp://127.0.0.1:*")
    first._binding._listeners[0].leave()
    done: list[Any] = []

    def bind() -> None:
        try:
            done.append(second.bind(_name(first)))
        except zmq.ZMQError as error:
            done.append(error.errno)

    gevent.get_hub().loop.run_callback(bind)
    gevent.sleep(0)
    assert done == [errno.EADDRINUSE]


@pytest.fixture
def halfway(context: zmq.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A socket that was given back: the descriptor's number is free, and the system has not freed the address yet."""
    monkeypatch.setattr(_binding, "SETTLE", LONG)
    sock = context.socket(zmq.REP)
    sock.bind({"tcp": "tcp://127.0.0.1:*", "abstract": f"ipc://@{tmp_path.name}"}[request.param])
    binding, listener = sock._binding, sock._binding._listeners[0]
    listener._socket = (0, 0)  # as if another one had the number
    _binding._known[0, 0] = listener
    binding._leave([listener])
    return sock


@pytest.mark.parametrize("halfway", ["tcp", "abstract"], indirect=True)
def test_bind_while_the_system_frees_the_address(context: zmq.Context, halfway: Any) -> None:
    """Bind waits for an address whose descriptor is closed while the system is about to free it."""
    address, other = _name(halfway), context.socket(zmq.REP)
    binding = gevent.spawn(other.bind, address)
    gevent.sleep(0)
    assert not binding.ready()
    halfway.close()
    binding.get()
    assert _name(other) == address


@pytest.mark.parametrize("halfway", ["tcp", "abstract"], indirect=True)
def test_wait_while_the_system_frees_the_address(halfway: Any) -> None:
    """So does a server's stop, which returns when any process can have the address."""
    waiting = gevent.spawn(halfway._binding.wait)
    gevent.sleep(0)
    assert not waiting.ready()
    halfway.close()
    assert waiting.get()


def test_what_others_took_is_not_waited_for_long(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has given an address back, which somebody else has taken at once, waits no longer than the system may take."""
    monkeypatch.setattr(_binding, "SETTLE", 5 * MS)
    first = context.socket(zmq.REP)
    first.bind("tcp://127.0.0.1:*")
    address, port = _name(first), int(_name(first).rpartition(":")[2])
    first.close()
    assert first._binding.wait()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(zmq.ZMQError, match="in use"):
            context.socket(zmq.REP).bind(address)


def test_what_has_ended_is_forgotten(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses a process binds and gives back, only those that are open are kept in mind."""
    monkeypatch.setattr(_binding, "SETTLE", 0.0)
    kept = len(_binding._known)
    for _ in range(5):
        sock = context.socket(zmq.REP)
        sock.bind("tcp://127.0.0.1:*")
        sock.close()
        assert sock._binding.wait()
    assert len(_binding._known) <= kept + 1


def test_descriptors_are_known(context: zmq.Context, tmp_path: Path) -> None:
    """The descriptors by which libzmq listens are known as long as they are open."""
    before = set(listeners())
    sock = context.socket(zmq.ROUTER)
    for address in ("tcp://127.0.0.1:*", f"ipc://{tmp_path}/s", f"ipc://@{tmp_path.name}"):
        sock.bind(address)
    found = set(listeners()) - before
    assert len(found) == 3
    for descriptor in found:
        with socket.socket(fileno=os.dup(descriptor)) as listening:
            assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert not os.get_inheritable(descriptor)
    sock.close()
    assert sock._binding.wait()
    assert not found & set(listeners())


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://lo:*"])
@pytest.mark.parametrize("is_ipv6", [False, True])
def test_listener_is_as_libzmqs(address: str, is_ipv6: bool) -> None:
    """A listener has the address that libzmq would give it, of an interface too, and the options that the socket asks for."""
    names, options = [], []
    for module in (plain, zmq):
        with module.Context() as context, context.socket(zmq.ROUTER) as sock:
            sock.ipv6, sock.backlog, sock.tos, sock.rcvbuf, sock.sndbuf = is_ipv6, 7, 8, 20_000, 30_000
            sock.bind(address)
            names.append(_name(sock).rpartition(":")[0])
            options.append(_options_of(int(_name(sock).rpartition(":")[2])))
            assert sock.get(zmq.USE_FD) == -1
    assert names[0] == names[1]
    assert options[0] == options[1]


def _options_of(port: int) -> list[int]:
    """Of the one socket of this process that listens on a port."""
    asked = [
        (socket.SOL_SOCKET, socket.SO_REUSEADDR),
        (socket.SOL_SOCKET, socket.SO_RCVBUF),
        (socket.SOL_SOCKET, socket.SO_SNDBUF),
    ]
    asked.append((socket.IPPROTO_IP, socket.IP_TOS))
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:
            continue  # the list's own
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(int(name))) as found:
            is_it = found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port
            if is_it and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                if found.family == socket.AF_INET6:
                    asked.append((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
                return [found.getsockopt(*option) for option in asked]
    raise AssertionError(f"nobody listens on {port}")


def test_listening_socket_of_the_programs_own(context: zmq.Context) -> None:
    """A program that hands over a listening socket by USE_FD has that one used."""
    own = socket.create_server(("127.0.0.1", 0))
    port = own.getsockname()[1]
    sock = context.socket(zmq.REP)
    sock.set(zmq.USE_FD, own.detach())
    sock.bind("tcp://127.0.0.1:1")
    assert _name(sock) == f"tcp://127.0.0.1:{port}"


def test_plain_peers(context: zmq.Context, endpoint: str) -> None:
    """Plain sockets of libzmq connect to such a listener as to its own."""
    if endpoint.startswith("inproc:"):
        pytest.skip("a plain context is another one")
    rep = context.socket(zmq.REP)
    rep.bind(endpoint)
    with plain.Context() as other, other.socket(zmq.REQ) as req:
        req.linger = 0
        req.connect(_name(rep))
        req.send(b"ask")
        assert rep.recv() == b"ask"
        rep.send(b"answer")
        assert req.poll(LONG * 1000)
        assert req.recv() == b"answer"


PROGRAM = """
import errno, os, resource
import greensafe as zmq

context = zmq.Context()
socks = {address: context.socket(zmq.REP) for address in (
    "tcp://127.0.0.1:*", "tcp://lo:*", "tcp://nowhere:1", "tcp://127.0.0.1:99999", "ipc://FOLDER/s", "ipc://@FOLDER")}
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
held = []
while True:
    try:
        held.append(os.dup(0))
    except OSError:
        break
for address, sock in socks.items():
    for act in (sock.bind, sock.unbind):
        try:
            act(address)
        except zmq.ZMQError as error:
            assert error.errno == errno.EMFILE, error
            assert act == sock.unbind or "no descriptor left" in error.__notes__[0]
        else:
            raise AssertionError(address)
os.close(held.pop())
try:
    socks["tcp://lo:*"].bind("tcp://lo:*")  # asks by a socket, which takes the last one
except zmq.ZMQError as error:
    assert error.errno == errno.EMFILE, error
for descriptor in held:
    os.close(descriptor)
for address, sock in list(socks.items())[:2]:
    sock.bind(address)
context.destroy(linger=0)
print("fine")
"""


def test_out_of_descriptors(tmp_path: Path) -> None:
    """Without a descriptor bind is EMFILE, with a note, and no abort of the process; with one again it works."""
    result = run_python(PROGRAM.replace("FOLDER", str(tmp_path)))
    assert (result.code, result.out) == (0, "fine\n"), result.err
