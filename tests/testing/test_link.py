"""Tests of greensafe.testing.link: every command, with raw sockets that see each byte and each end, and with ZeroMQ's."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import socket
from helpers import LONG, MS, run_python, wait_until

import greensafe as zmq
from greensafe.testing import FaultyLink

if TYPE_CHECKING:  # at run time `conftest` is whichever folder's came first
    from conftest import Wire

pytestmark = pytest.mark.usefixtures("limit")

Receive = Callable[[Any, int], bytes]
End = Callable[[Any], str]
IsSilent = Callable[[Any], bool]
Run = Callable[..., Any]

#: A delay and a rate that no test waits for.
NEVER = 1000.0


# Sound.


def test_bytes_pass_and_are_counted(wire: Wire, receive: Receive, end: End) -> None:
    """A sound link passes everything both ways, ends too, and counts it."""
    client, server = wire.connect()
    client.sendall(b"ping")
    assert receive(server, 4) == b"ping"
    server.sendall(b"pong!")
    assert receive(client, 5) == b"pong!"
    link = wire.link
    assert (link.bytes_to_server, link.bytes_to_client, link.bytes_lost) == (4, 5, 0)
    assert (link.connections, link.accepted) == (1, 1)
    client.shutdown(socket.SHUT_WR)
    assert end(server) == "FIN"
    server.sendall(b"still here")
    assert receive(client, 10) == b"still here"
    server.close()
    assert end(client) == "FIN"
    wait_until(lambda: link.connections == 0)


def test_much_passes_both_ways_at_once(wire: Wire, receive: Receive, in_greenlet: Run) -> None:
    """50 MB in each direction at the same time arrive as they were sent."""
    client, server = wire.connect()
    data = os.urandom(1_000_000) * 50
    for sock in (client, server):
        in_greenlet(sock.sendall, data)
    got = [in_greenlet(lambda sock=sock: hashlib.sha256(receive(sock, len(data))).digest()) for sock in (client, server)]
    assert [each.get() for each in got] == [hashlib.sha256(data).digest()] * 2


def test_a_lost_connection_is_told_to_the_other_side(wire: Wire, end: End) -> None:
    """RST of one side is RST for the other; of a Unix socket, which has none, an ordinary end."""
    for gone, told in (wire.connect(), wire.connect()[::-1]):
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        assert end(told) == ("RST" if wire.is_tcp else "FIN")
        told.close()
    wait_until(lambda: wire.link.connections == 0)


def test_a_reply_before_the_end_is_not_lost(wire: Wire, receive: Receive, end: End) -> None:
    """A server that answers, leaves what else was sent unread and is gone: its answer arrives, then the end."""
    for _ in range(30):
        client, server = wire.connect()
        client.sendall(b"request and more")
        assert receive(server, 7) == b"request"
        server.sendall(b"reply")
        server.close()
        client.send(b"and more")
        assert receive(client, 5) == b"reply"
        assert end(client) in ("FIN", "RST")
    wait_until(lambda: wire.link.connections == 0)


def test_nobody_at_the_target(wire: Wire, end: End) -> None:
    """The client's connection is lost at once; when somebody is there, the next leads to him."""
    address = wire.server.getsockname()
    wire.server.close()
    assert end(wire.dial()) == ("RST" if wire.is_tcp else "FIN")
    wait_until(lambda: wire.link.connections == 0)
    if not wire.is_tcp:
        os.unlink(address)
    wire.server = wire.keep(socket.socket(wire.server.family))
    wire.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wire.server.bind(address)
    wire.server.listen()
    wire.connect()


# Cut.


def test_cut_loses_what_is_underway_and_what_comes(wire: Wire, receive: Receive, end: End, is_silent: IsSilent) -> None:
    """Nothing passes and nobody is told; heal() resets what has a hole, and new connections are sound."""
    client, server = wire.connect()
    wire.link.delay(NEVER)
    client.sendall(b"underway")
    wire.link.cut()
    server.sendall(b"coming")
    wait_until(lambda: wire.link.bytes_lost == 14)
    assert is_silent(client) and is_silent(server)
    wire.link.heal()
    expected = "RST" if wire.is_tcp else "FIN"
    assert (end(client), end(server)) == (expected, expected)
    assert (wire.link.bytes_to_server, wire.link.bytes_to_client) == (0, 0)
    client, server = wire.connect()
    client.sendall(b"x")
    assert receive(server, 1) == b"x"


def test_cut_that_nobody_noticed(wire: Wire, receive: Receive, is_silent: IsSilent) -> None:
    """A connection that lost nothing goes on when the link is healed."""
    client, server = wire.connect()
    wire.link.cut()
    assert is_silent(server)
    wire.link.heal()
    client.sendall(b"x")
    assert receive(server, 1) == b"x"


def test_cut_hides_the_end(wire: Wire, end: End, is_silent: IsSilent) -> None:
    """Half open: a peer that has gone is not missed until the link is healed."""
    client, server = wire.connect()
    wire.link.cut()
    client.close()
    assert is_silent(server)
    assert wire.link.connections == 1
    wire.link.heal()
    assert end(server) == ("RST" if wire.is_tcp else "FIN")
    wait_until(lambda: wire.link.connections == 0)


def test_cut_in_one_direction(wire: Wire, receive: Receive, end: End, is_silent: IsSilent) -> None:
    """The request arrives and its reply does not; not even the server's end is told, though it is written to in vain."""
    client, server = wire.connect()
    wire.link.cut("to_client")
    client.sendall(b"request")
    assert receive(server, 7) == b"request"
    server.sendall(b"reply")
    wait_until(lambda: wire.link.bytes_lost == 5)
    server.close()
    client.sendall(b"again")
    assert is_silent(client)
    client.sendall(b"again")
    assert is_silent(client)
    wire.link.heal("to_server")
    assert is_silent(client)
    wire.link.heal("to_client")
    assert end(client) == ("RST" if wire.is_tcp else "FIN")


def test_connecting_while_cut(wire: Wire, receive: Receive, is_silent: IsSilent) -> None:
    """A new connection hangs, gets through when the link is healed, and was never there if its client has given up."""
    wire.link.cut()
    patient, hasty = wire.dial(), wire.dial()
    patient.sendall(b"patient")
    hasty.sendall(b"hasty")
    assert is_silent(patient)
    hasty.close()
    wait_until(lambda: (wire.link.accepted, wire.link.connections) == (2, 1))
    wire.link.heal()
    assert receive(wire.accept(), 7) == b"patient"
    wire.server.settimeout(20 * MS)
    with pytest.raises(TimeoutError):
        wire.server.accept()


# Stall.


def test_stall_holds_senders_up_and_loses_nothing(wire: Wire, receive: Receive, in_greenlet: Run, is_silent: IsSilent) -> None:
    """A sender does not get rid of 64 MB, its peer hears nothing; after heal() all of it arrives, and the end behind it."""
    client, server = wire.connect()
    data = os.urandom(1 << 20) * 64
    wire.link.stall("to_server")

    def send() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    sending = in_greenlet(send)
    assert is_silent(server)
    assert not sending.ready()
    assert (wire.link.bytes_to_server, wire.link.bytes_lost) == (0, 0)
    server.sendall(b"the other direction is free")
    assert receive(client, 27)
    wire.link.heal()
    assert receive(server, len(data)) == data
    assert server.recv(1) == b""


def test_stalled_connecting(wire: Wire, receive: Receive, is_silent: IsSilent) -> None:
    """A new connection leads nowhere while the link is stalled."""
    wire.link.stall()
    client = wire.dial()
    client.sendall(b"x")
    assert is_silent(client)
    wire.link.heal()
    assert receive(wire.accept(), 1) == b"x"


# Delay and throttle.


def test_delay_is_never_early_and_keeps_the_order(wire: Wire, receive: Receive, end: End) -> None:
    """Each byte is on its way for so long, and the end as well."""
    client, server = wire.connect()
    wire.link.delay(50 * MS, "to_server")
    start = monotonic()
    for number in range(200):
        client.send(bytes([number]))
    client.shutdown(socket.SHUT_WR)
    assert receive(server, 1) == b"\0"
    assert monotonic() - start >= 50 * MS
    assert receive(server, 199) == bytes(range(1, 200))
    assert end(server) == "FIN"


def test_delay_lets_much_be_underway(wire: Wire, receive: Receive) -> None:
    """A delay is not a rate: 4 MiB are sent while nothing has arrived yet; and what is underway comes at once with delay(0)."""
    client, server = wire.connect()
    wire.link.delay(NEVER)
    data = os.urandom(1 << 20) * 4
    client.sendall(data)
    assert wire.link.bytes_to_server == 0
    wire.link.delay(0)
    assert receive(server, len(data)) == data


def test_delay_does_not_hold_everything(wire: Wire, in_greenlet: Run, is_silent: IsSilent) -> None:
    """A sender that is far ahead is held up: what is underway takes room, here 64 MB too much."""
    client, server = wire.connect()
    wire.link.delay(NEVER)

    def send() -> None:
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            client.sendall(bytes(64 << 20))

    sending = in_greenlet(send)
    sending.join(300 * MS)  # twice as long as 64 MB would need
    assert not sending.ready()
    assert is_silent(server)
    wire.link.reset()


def test_throttle_is_never_faster(wire: Wire, receive: Receive) -> None:
    """30 kB at 300 kB/s take no less than a tenth of a second, over two connections together."""
    one, to_one = wire.connect()
    two, to_two = wire.connect()
    wire.link.throttle(300_000, "to_server")
    start = monotonic()
    one.sendall(b"1" * 15_000)
    two.sendall(b"2" * 15_000)
    both = [gevent.spawn(receive, sock, 15_000) for sock in (to_one, to_two)]
    gevent.joinall(both, raise_error=True)
    assert monotonic() - start >= 0.1 * 0.95  # the system's own clock may be set right meanwhile
    assert [each.value for each in both] == [b"1" * 15_000, b"2" * 15_000]


def test_a_rate_that_is_lifted(wire: Wire, receive: Receive, is_silent: IsSilent) -> None:
    """What waits for a slow rate passes at once when there is none any more."""
    client, server = wire.connect()
    wire.link.throttle(0.001)
    client.sendall(b"x" * 100_000)
    assert is_silent(server)
    wire.link.throttle(None)
    assert receive(server, 100_000)


# Once.


def test_reset(wire: Wire, end: End) -> None:
    """Every connection is lost for both sides, also through a cut; the next is sound."""
    pairs = [wire.connect() for _ in range(3)]
    wire.link.cut()
    wire.link.reset()
    assert wire.link.connections == 0
    assert {end(sock) for pair in pairs for sock in pair} == {"RST" if wire.is_tcp else "FIN"}
    wire.link.heal()
    wire.connect()


def test_reset_while_it_connects(wire: Wire, end: End) -> None:
    """The connection to the target may have been made in the very turn of the hub in which all are reset; it is reset too."""
    client, server = wire.connect()  # the server has accepted before the link knows it
    wire.link.reset()
    assert (end(client), end(server)) == (("RST", "RST") if wire.is_tcp else ("FIN", "FIN"))


def test_hang_up(wire: Wire, receive: Receive, end: End) -> None:
    """Both sides get what was underway, and then the end."""
    client, server = wire.connect()
    wire.link.delay(20 * MS)
    client.sendall(b"last")
    server.sendall(b"words")
    gevent.sleep(5 * MS)  # both have to be underway
    wire.link.hang_up()
    assert (receive(server, 4), end(server)) == (b"last", "FIN")
    assert (receive(client, 5), end(client)) == (b"words", "FIN")
    wait_until(lambda: wire.link.connections == 0)


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_half_close(wire: Wire, receive: Receive, end: End, direction: Any) -> None:
    """One side gets an end and can still send; what the other sends later is lost."""
    client, server = wire.connect()
    ended, other = (server, client) if direction == "to_server" else (client, server)
    wire.link.half_close(direction)
    assert end(ended) == "FIN"
    other.sendall(b"in vain")
    wait_until(lambda: wire.link.bytes_lost == 7)
    ended.sendall(b"goes on")
    assert receive(other, 7) == b"goes on"
    ended.close()
    assert end(other) == "FIN"
    wait_until(lambda: wire.link.connections == 0)


def test_corrupt(wire: Wire, receive: Receive) -> None:
    """One byte in each direction is inverted: the next, or one behind it; then all is well."""
    client, server = wire.connect()
    wire.link.corrupt()
    wire.link.corrupt("to_server", skip=2)
    client.sendall(b"\x00abc")
    server.sendall(b"\x00abc")
    assert receive(server, 4) == b"\xffa\x9dc"
    assert receive(client, 4) == b"\xffabc"
    client.sendall(b"sound")
    assert receive(server, 5) == b"sound"


def test_refuse(wire: Wire, receive: Receive) -> None:
    """Connecting is refused, those connected go on, and heal() accepts again at the same address."""
    client, server = wire.connect()
    wire.link.refuse()
    gevent.sleep(0)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            wire.dial()
        wire.link.refuse()
    client.sendall(b"x")
    assert receive(server, 1) == b"x"
    wire.link.heal("to_client")
    with pytest.raises(ConnectionRefusedError):
        wire.dial()
    wire.link.heal()
    wire.connect()


# The link itself.


@pytest.mark.parametrize(
    "command",
    ["heal", "cut", "stall", "delay", "throttle", "refuse", "reset", "hang_up", "half_close", "corrupt"],
)
def test_closing_ends_everything(wire: Wire, in_greenlet: Run, command: str) -> None:
    """Whatever the link was told and whatever is underway, close() ends it: the fixture finds no greenlet and no descriptor."""
    link = wire.link
    args: dict[str, tuple[Any, ...]] = {"delay": (NEVER,), "throttle": (1,), "half_close": ("to_server",)}
    pairs = [wire.connect() for _ in range(2)]
    getattr(link, command)(*args.get(command, ()))

    def send(sock: Any) -> None:
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe|not connected"):
            sock.sendall(bytes(1 << 25))

    for pair in pairs:
        for sock in pair:
            in_greenlet(send, sock)
    gevent.sleep(2 * MS)
    assert not link.closed
    link.close()
    link.close()
    assert link.closed
    assert link.connections == 0
    with pytest.raises(RuntimeError, match="closed"):
        link.cut()


def test_closing_while_it_dials(limit: None) -> None:
    """A target that does not answer does not hold the link's end up."""
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = [socket.socket() for _ in range(4)]  # a full backlog: the kernel drops what else wants to connect
    for sock in waiting:
        sock.setblocking(False)
        assert sock.connect_ex(full.getsockname()) in (0, errno.EINPROGRESS)
    with FaultyLink(f"tcp://127.0.0.1:{full.getsockname()[1]}") as link:
        client = socket.create_connection(("127.0.0.1", int(link.endpoint.rpartition(":")[2])))
        wait_until(lambda: link.connections == 1)
        gevent.sleep(2 * MS)
    for sock in (client, full, *waiting):
        sock.close()


def test_repr(wire: Wire) -> None:
    """One line tells state, faults and counts."""
    link = wire.link
    client, server = wire.connect()
    server.sendall(b"x")
    client.recv(1)
    link.delay(0.5, "to_server")
    link.stall("to_client")
    assert repr(link) == (
        f"<FaultyLink open {link.endpoint} -> {link.target} connections=1 accepted=1"
        " to_server=delayed 0.5 s (0 B) to_client=stalled (1 B) lost=0 B>"
    )
    link.refuse()
    assert "FaultyLink refusing" in repr(link)
    link.close()
    assert "FaultyLink closed" in repr(link)


@pytest.mark.parametrize(
    ("command", "args", "kind"),
    [
        ("cut", ("to server",), ValueError),
        ("half_close", ("both",), ValueError),
        ("delay", (-1,), ValueError),
        ("delay", (float("nan"),), ValueError),
        ("delay", (float("inf"),), ValueError),
        ("delay", ("1",), TypeError),
        ("throttle", (0,), ValueError),
        ("throttle", (True,), TypeError),
    ],
)
def test_what_cannot_be_commanded(wire: Wire, command: str, args: tuple[Any, ...], kind: type[Exception]) -> None:
    """It is refused with what is possible, and the link stays as it was."""
    with pytest.raises(kind, match="not"):
        getattr(wire.link, command)(*args)
    with pytest.raises(kind if kind is TypeError else ValueError, match="skip"):
        wire.link.corrupt(skip="1" if kind is TypeError else -1)  # type: ignore[arg-type]
    assert "to_server=sound" in repr(wire.link) and "to_client=sound" in repr(wire.link)


@pytest.mark.parametrize("args", [("inproc://x",), ("tcp://127.0.0.1:1", "inproc://x"), ("tcp://127.0.0.1:0",)])
def test_what_cannot_be_linked(args: tuple[str, ...]) -> None:
    """inproc passes through no kernel, and port 0 is no target; nothing is left open."""
    with pytest.raises(ValueError):
        FaultyLink(*args)


# ZeroMQ through it.


@pytest.fixture(params=["tcp", "ipc"])
def rep(request: pytest.FixtureRequest, context: zmq.Context, tmp_path: Any) -> Any:
    """A REP that echoes, in a greenlet of its own, and the link to it."""
    sock = context.socket(zmq.REP)
    sock.bind("tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{tmp_path}/rep")

    def echo() -> None:
        while True:
            sock.send(sock.recv())

    echoing = gevent.spawn(echo)
    listen = "tcp://127.0.0.1:0" if request.param == "tcp" else f"ipc://{tmp_path}/link"
    with FaultyLink(sock.last_endpoint.decode().rstrip("\0"), listen) as link:
        yield link
    echoing.kill()


@pytest.fixture
def req(rep: FaultyLink, context: zmq.Context) -> zmq.Socket:
    """A REQ that has been answered through the link."""
    sock = context.socket(zmq.REQ)
    sock.connect(rep.endpoint)
    assert _ask(sock, b"hello") == b"hello"
    return sock


def _ask(req: zmq.Socket, body: bytes, timeout: float = LONG) -> bytes:
    req.send(body, timeout=LONG)
    return req.recv(timeout=timeout)


def test_zmq_large_messages(rep: FaultyLink, req: zmq.Socket) -> None:
    """50 MB there and back."""
    body = os.urandom(1_000_000) * 50
    assert _ask(req, body) == body
    assert rep.bytes_to_client >= len(body)


@pytest.mark.parametrize("command", ["cut", "stall"])
def test_zmq_silence(rep: FaultyLink, req: zmq.Socket, command: str) -> None:
    """A peer that is cut off or frozen costs the caller his limit; afterwards the same socket is answered."""
    getattr(rep, command)()
    with pytest.raises(zmq.OperationTimeout):
        _ask(req, b"lost", timeout=30 * MS)
    rep.heal()
    assert _ask(req, b"found") == b"found"


@pytest.mark.parametrize("command", ["reset", "hang_up"])
def test_zmq_lost_connection(rep: FaultyLink, req: zmq.Socket, command: str) -> None:
    """A lost connection is made again by ZeroMQ; the link sees it come."""
    getattr(rep, command)()
    wait_until(lambda: (rep.accepted, rep.connections) == (2, 1))
    assert _ask(req, b"again") == b"again"


def test_zmq_refused_then_accepted(rep: FaultyLink, context: zmq.Context) -> None:
    """A server that comes late is connected to when it is there."""
    rep.refuse()
    req = context.socket(zmq.REQ)
    req.reconnect_ivl = 5
    req.connect(rep.endpoint)
    req.send(b"early")
    with pytest.raises((zmq.OperationTimeout, zmq.PeerError)):
        req.recv(timeout=30 * MS)
    rep.heal()
    assert _ask(req, b"late") == b"late"


def test_zmq_corrupt_reply(rep: FaultyLink, req: zmq.Socket) -> None:
    """One byte of the body is another: ZeroMQ has no checksum. (Before it: the delimiter's frame, and flags and length.)"""
    rep.corrupt("to_client", skip=4)
    assert _ask(req, b"abc") == b"\x9ebc"


def test_zmq_delay(rep: FaultyLink, req: zmq.Socket) -> None:
    """A round trip takes the delay of both directions, and no less."""
    rep.delay(20 * MS)
    start = monotonic()
    assert _ask(req, b"slow") == b"slow"
    assert monotonic() - start >= 40 * MS


# Programs.

CLIENT = """
import sys, zmq
with zmq.Context() as context, context.socket(zmq.REQ) as req:
    req.connect(sys.argv[1])
    req.send(b"from another process")
    assert req.poll(30_000), "no answer"
    print(req.recv().decode())
"""


def test_a_client_in_another_process(rep: FaultyLink) -> None:
    """A plain REQ of a program that knows nothing of greensafe."""
    result = gevent.get_hub().threadpool.apply(run_python, (CLIENT, rep.endpoint))
    assert result.out == "from another process\n", result.err


PATCHED = """
import gevent.monkey; gevent.monkey.patch_all()
import socket, threading
from greensafe.testing import FaultyLink
server = socket.create_server(("127.0.0.1", 0))
def echo():
    peer, _ = server.accept()
    while data := peer.recv(1000):
        peer.sendall(data)
    peer.close()
serving = threading.Thread(target=echo)
serving.start()
with FaultyLink("tcp://127.0.0.1:%d" % server.getsockname()[1]) as link:
    client = socket.create_connection(("127.0.0.1", int(link.endpoint.rpartition(":")[2])))
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    link.stall()
    client.settimeout(0.05)
    client.sendall(b"y")
    try:
        client.recv(1)
    except TimeoutError:
        link.heal()
    client.settimeout(None)
    print(client.recv(1))
    client.close()
    serving.join()
server.close()
"""


def test_in_a_monkey_patched_program() -> None:
    """With patched sockets and threads it is the same."""
    result = run_python(PATCHED, env={"PYTHONWARNINGS": "error"})
    assert (result.out, result.err) == ("b'y'\n", "")


def test_it_is_loaded_on_demand() -> None:
    """Programs that do not test do not load it."""
    result = run_python("import sys, greensafe; print('greensafe.testing' in sys.modules)")
    assert result.out == "False\n", result.err
