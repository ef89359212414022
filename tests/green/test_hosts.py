"""Tests of greensafe.green._hosts: sockets that are connected to names."""

from __future__ import annotations

import errno
import gc
import logging
import os
import socket as net
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, run_python, wait_until
from naming import NameService, name_service

import greensafe as zmq
from greensafe import OperationTimeout, Unreachable, deadline
from greensafe.green import _hosts, _lockstep
from greensafe.transport import byname as _byname, names

pytestmark = pytest.mark.usefixtures("limit")


def _bound(context: zmq.Context, kind: int, endpoint: str = "tcp://127.0.0.1:*") -> Any:
    """A socket that is bound there, as soon as nobody else is."""
    sock = context.socket(kind)
    sock.rcvtimeo = int(LONG * 1000)

    def is_bound() -> bool:
        try:
            sock.bind(endpoint)
        except zmq.ZMQError as error:
            assert error.errno == plain.EADDRINUSE
            return False
        return True

    wait_until(is_bound)
    return sock


def _named(sock: Any, name: str = "peer") -> str:
    endpoint: str = sock.last_endpoint.decode()
    return f"tcp://{name}:{endpoint.rpartition(':')[2]}"


def _lose(sock: Any, peer: Any) -> None:
    """Close the peer of a socket that is connected to it, until the socket knows."""
    wait_until(lambda: not sock._waits.keeps)
    peer.close(0)
    wait_until(lambda: sock._waits.keeps)


@pytest.fixture
def known(resolver: NameService) -> NameService:
    resolver.table["peer"] = ["127.0.0.1"]
    return resolver


# To connect, and to disconnect.


@pytest.mark.parametrize(
    ("here", "there"),
    [("PUSH", "PULL"), ("DEALER", "ROUTER"), ("REQ", "REP"), ("PAIR", "PAIR"), ("PUB", "XSUB"), ("SUB", "XPUB")],
)
def test_every_type(context: zmq.Context, known: NameService, here: str, there: str) -> None:
    """A socket that connects to a name is connected when connect returns; libzmq has the number."""
    peer = _bound(context, getattr(zmq, there))
    sock = context.socket(getattr(zmq, here))
    if here == "SUB":
        sock.subscribe(b"x")
    with sock.connect(_named(peer)):
        assert sock.last_endpoint == peer.last_endpoint
        if here == "SUB":
            assert peer.recv() == b"\1x"
        elif here == "PUB":
            peer.send(b"\1x")
        else:
            sock.send(b"x")
            assert peer.recv_multipart()[-1] == b"x"
    assert known.asked == ["peer"]


@pytest.mark.parametrize("by", ["name", "number", "LAST_ENDPOINT", "bytes"])
def test_disconnect(context: zmq.Context, known: NameService, by: str) -> None:
    """What was connected by its name is found again by that, and by its number; libzmq resolves nothing."""
    peer = _bound(context, zmq.PULL)
    sock = context.socket(zmq.PUSH)
    sock.connect(_named(peer))
    addresses: dict[str, Any] = {
        "name": _named(peer),
        "number": peer.last_endpoint.decode(),
        "LAST_ENDPOINT": sock.last_endpoint,
        "bytes": _named(peer).encode(),
    }
    sock.disconnect(addresses[by])
    assert not sock.poll(0, zmq.POLLOUT)
    with pytest.raises(zmq.ZMQError, match="not connected to") as caught:
        sock.disconnect(_named(peer))
    assert caught.value.errno == errno.ENOENT
    sock.connect(_named(peer))
    sock.send(b"x", timeout=LONG)
    assert peer.recv() == b"x"


def test_disconnect_before_there_is_an_address(context: zmq.Context, resolver: NameService) -> None:
    """Then the socket is not connected when it is found."""
    sock = context.socket(zmq.PUSH)
    sock.connect("tcp://peer:5555")
    sock.disconnect("tcp://peer:5555")
    known = len(resolver.asked)
    sock.connect("tcp://other:5555")
    assert set(resolver.asked[known:]) == {"other"}


def test_two_names_of_one_address(context: zmq.Context, known: NameService) -> None:
    """libzmq makes one connection of the two; it stands as long as one of them is wanted."""
    known.table["alias"] = ["127.0.0.1"]
    peer = _bound(context, zmq.ROUTER)
    sock = context.socket(zmq.DEALER)
    for name in ("peer", "peer", "alias"):
        sock.connect(_named(peer, name))
    sock.disconnect(_named(peer))
    sock.send(b"x", timeout=LONG)
    assert peer.recv_multipart()[-1] == b"x"
    sock.disconnect(_named(peer, "alias"))
    assert not sock.poll(0, zmq.POLLOUT)


@pytest.mark.parametrize("endpoint", ["tcp://a b:1", "tcp://peer", "tcp://peer:*"])
def test_what_is_malformed(context: zmq.Context, resolver: NameService, endpoint: str) -> None:
    """libzmq refuses it as ever."""
    with pytest.raises(zmq.ZMQError) as caught:
        context.socket(zmq.PUSH).connect(endpoint)
    assert caught.value.errno == plain.EINVAL
    assert not resolver.asked


# A name that has no address.


def test_a_name_that_is_not_known_yet(context: zmq.Context, resolver: NameService, caplog: pytest.LogCaptureFixture) -> None:
    """connect does not raise; a send waits, its limit tells why, and it is done as soon as the name is known."""
    peer = _bound(context, zmq.PULL)
    sock = context.socket(zmq.PUSH)
    sock.connect(_named(peer))
    with pytest.raises(zmq.Again):
        sock.send(b"x", zmq.NOBLOCK)
    with pytest.raises(OperationTimeout) as caught:
        sock.send(b"x", timeout=20 * MS)
    assert "not known" in "".join(caught.value.__notes__)
    assert _named(peer) in str(caught.value)
    sending = gevent.spawn(sock.send, b"x")
    resolver.table["peer"] = ["127.0.0.1"]
    assert peer.recv() == b"x"
    sending.get()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "cannot be resolved" in warnings[0]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_req_and_a_name_that_is_not_known(
    context: zmq.Context, resolver: NameService, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its send is Unreachable with what the resolver says, as often as it is tried; it is sent when the name is known."""
    monkeypatch.setattr(_hosts, "PATIENCE", 10 * MS)
    peer = _bound(context, zmq.REP)
    sock = context.socket(zmq.REQ)
    if when == "meanwhile":
        resolver.hang("peer")
        gevent.get_hub().loop.run_callback(lambda: gevent.spawn_later(20 * MS, resolver.answer, "peer"))
    sock.connect(_named(peer))
    for _ in range(2):
        with pytest.raises(Unreachable, match="not known") as caught:
            sock.send(b"x")
        assert not caught.value.maybe_executed
        assert caught.value.endpoint == _named(peer)
    resolver.table["peer"] = ["127.0.0.1"]

    def is_sent() -> bool:
        try:
            sock.send(b"x")
        except Unreachable:
            return False
        return True

    wait_until(is_sent)
    assert peer.recv() == b"x"
    peer.send(b"y")
    assert sock.recv() == b"y"


def test_a_name_service_that_does_not_answer(context: zmq.Context, known: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    """connect returns all the same, others are served meanwhile, and a REQ is told in the end. A late answer is used."""
    monkeypatch.setattr(_hosts, "PATIENCE", 10 * MS)
    monkeypatch.setattr(_byname, "LIMIT", 20 * MS)
    peer = _bound(context, zmq.REP)
    known.hang("peer")
    req, other = context.socket(zmq.REQ), context.socket(zmq.REQ)
    req.connect(_named(peer))
    other.connect(peer.last_endpoint)
    with pytest.raises(Unreachable, match="does not answer"):
        req.send(b"x")
    for _ in range(10):
        other.send(b"x")
        assert peer.recv() == b"x"
        peer.send(b"y")
        assert other.recv(timeout=LONG) == b"y"
    assert known.under_way == 1
    known.answer("peer")
    wait_until(lambda: req.poll(0, zmq.POLLOUT))
    req.send(b"x")
    assert peer.recv() == b"x"


def test_connect_in_the_hub(context: zmq.Context, known: NameService) -> None:
    """It cannot wait there: the name is resolved in the background."""
    peer = _bound(context, zmq.PULL)
    sock = context.socket(zmq.PUSH)
    gevent.get_hub().loop.run_callback(sock.connect, _named(peer))
    gevent.sleep(0)
    sock.send(b"x", timeout=LONG)
    assert peer.recv() == b"x"


@pytest.mark.parametrize("how", ["deadline", "Timeout", "kill", "close"])
def test_what_ends_the_wait_of_connect(context: zmq.Context, resolver: NameService, how: str) -> None:
    """A limit around connect and a kill leave the socket as it was; closed meanwhile it ends as well."""
    resolver.hang("peer")
    sock = context.socket(zmq.DEALER)

    def connect() -> None:
        if how == "deadline":
            with pytest.raises(zmq.DeadlineExceeded), deadline(10 * MS):
                sock.connect("tcp://peer:5555")
        elif how == "Timeout":
            with gevent.Timeout(10 * MS, False):
                sock.connect("tcp://peer:5555")
        elif how == "close":
            with pytest.raises(zmq.ZMQError):
                sock.connect("tcp://peer:5555")
        else:
            sock.connect("tcp://peer:5555")

    connecting = gevent.spawn(connect)
    wait_until(lambda: resolver.under_way)
    if how == "kill":
        connecting.kill()
    if how == "close":
        sock.close()
    connecting.get()
    resolver.table["peer"] = ["127.0.0.1"]
    resolver.answer("peer")
    wait_until(lambda: not resolver.under_way)
    gevent.sleep(MS)
    if how != "close":
        assert not sock.poll(0, zmq.POLLOUT)
        with pytest.raises(zmq.ZMQError):
            sock.disconnect("tcp://peer:5555")


def test_a_dropped_socket(context: zmq.Context, resolver: NameService) -> None:
    """Names keep no socket alive, also while they are resolved: no collection is needed."""
    resolver.hang("peer")
    gone = []

    def connect_and_drop() -> None:
        sock = zmq.Socket(context, zmq.PUSH)
        gone.append(weakref.ref(sock))
        sock.connect("tcp://peer:5555")

    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # one that is recorded would keep the socket
            connecting = gevent.spawn(connect_and_drop)
            wait_until(lambda: resolver.under_way)
            connecting.kill()
            del connecting
            wait_until(lambda: gone[0]() is None)
    finally:
        gc.enable()


# A name that moves.


@pytest.mark.parametrize("kind", ["DEALER", "PUSH"])
def test_what_was_sent_while_nobody_was_there(context: zmq.Context, known: NameService, kind: str) -> None:
    """It reaches the peer at the address to which the name has moved: all of it, once, in order, with what is sent then."""
    there = zmq.ROUTER if kind == "DEALER" else zmq.PULL
    peer = _bound(context, there)
    named = _named(peer)
    sock = context.socket(getattr(zmq, kind))
    sock.connect(named)
    sock.send(b"before")
    assert peer.recv_multipart()[-1] == b"before"
    _lose(sock, peer)
    sent = [b"%d" % number for number in range(20)]
    for body in sent:
        sock.send_multipart([b"", body])
    sock.send(zmq.Frame(b"a"), zmq.SNDMORE)
    sock.send(memoryview(b"b"))
    peer = _bound(context, there, named.replace("peer", "127.0.0.2"))
    known.table["peer"] = ["127.0.0.2"]
    assert [peer.recv_multipart()[-1] for _ in range(21)] == [*sent, b"b"]
    sock.send(b"after")
    assert peer.recv_multipart()[-1] == b"after"
    wait_until(lambda: not sock._waits.keeps)
    assert not peer.poll(0)


def test_what_was_sent_before_the_first_connection(context: zmq.Context, known: NameService) -> None:
    """A name may have moved before anybody was there at all."""
    with closing(net.create_server(("127.0.0.1", 0))) as taken:
        named = f"tcp://peer:{taken.getsockname()[1]}"
    sock = context.socket(zmq.PUSH)
    sock.connect(named)
    sock.send(b"x")
    peer = _bound(context, zmq.PULL, named.replace("peer", "127.0.0.2"))
    known.table["peer"] = ["127.0.0.2"]
    assert peer.recv() == b"x"


@pytest.fixture
def outside() -> Iterator[plain.Context[Any]]:
    """A context whose sockets block the hub."""
    with plain.Context() as made:
        yield made
        made.destroy(linger=0)


def _there(outside: Any, kind: int, endpoint: str) -> Any:
    sock = outside.socket(kind)
    sock.rcvtimeo = int(LONG * 1000)
    sock.bind(endpoint)
    return sock


def _nobody() -> str:
    with closing(net.create_server(("127.0.0.1", 0))) as taken:
        return f"tcp://peer:{taken.getsockname()[1]}"


@pytest.mark.parametrize(("here", "there"), [("PUSH", "PULL"), ("DEALER", "ROUTER")])
def test_a_peer_that_comes_while_the_hub_is_blocked(
    context: zmq.Context, known: NameService, outside: Any, here: str, there: str
) -> None:
    """What it has got is not sent to the next address as well, though the hub reads first that nobody was there."""
    known.table["peer"] = ["127.0.0.1", "127.0.0.2"]
    named = _nobody()
    sock = context.socket(getattr(zmq, here))
    sock.reconnect_ivl = int(10 * MS * 1000)
    sock.connect(named)
    events = sock.connection_events()
    sock.send(b"x")
    time.sleep(5 * MS)  # nobody is there yet, and nobody reads that: the hub is blocked
    peer = _there(outside, getattr(plain, there), named.replace("peer", "127.0.0.1"))
    with peer:
        assert peer.recv_multipart()[-1] == b"x"
        wait_until(lambda: not sock._waits.keeps)
        assert sock.last_endpoint == peer.last_endpoint.rstrip(b"\0")
        sock.send(b"y")
        assert peer.recv_multipart()[-1] == b"y"
    kinds = [event.kind for event in events._events]
    assert plain.Event.CLOSED not in kinds[kinds.index(plain.Event.CONNECTED) :]


@pytest.mark.parametrize("kind", ["PUSH", "REQ"])
def test_a_peer_that_comes_as_it_is_left(
    context: zmq.Context,
    known: NameService,
    outside: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """What it may have got is not sent again; a REQ is told that, and others are in the log."""
    named = _nobody()
    sock = context.socket(getattr(zmq, kind))
    sock.reconnect_ivl = int(10 * MS * 1000)
    sock.connect(named)
    sock.send(b"x")
    got: list[bytes] = []
    module = _hosts if kind == "PUSH" else _lockstep
    drop = "leave" if kind == "PUSH" else "_drop"
    real = getattr(module, drop)

    def late(sock: Any, number: str) -> None:
        if not got:
            with _there(outside, plain.PULL if kind == "PUSH" else plain.REP, number) as peer:
                got.append(peer.recv())
        real(sock, number)

    monkeypatch.setattr(module, drop, late)
    other = _bound(context, zmq.PULL if kind == "PUSH" else zmq.REP, named.replace("peer", "127.0.0.2"))
    known.table["peer"] = ["127.0.0.2"]
    wait_until(lambda: b"127.0.0.2" in sock.last_endpoint)
    assert got == [b"x"]
    assert "may not have arrived" in caplog.text
    if kind == "REQ":
        with pytest.raises(zmq.Disconnected) as caught:
            sock.recv()
        assert caught.value.maybe_executed
    sock.send(b"y")
    assert other.recv() == b"y"


def test_a_connection_whose_handshake_nobody_reports(context: zmq.Context, known: NameService) -> None:
    """As soon as it is accepted nothing is kept any more: a peer of ZMTP 2 gets what is sent, and libzmq does not say so."""
    with closing(net.create_server(("127.0.0.1", 0))) as peer:
        sock = context.socket(zmq.PUSH)
        sock.connect(f"tcp://peer:{peer.getsockname()[1]}")
        sock.send(b"x")
        wait_until(lambda: not sock._waits.keeps)
        assert not sock._waits.hosts._kept
        assert sock._waits.straight_out > 0


def test_with_several_io_threads(known: NameService) -> None:
    """The order of events is not known, so nothing is kept."""
    with zmq.Context(io_threads=2) as own, own.socket(zmq.PUSH) as sock:
        sock.linger = 0
        sock.connect(_nobody())
        assert not sock._waits.keeps


@pytest.mark.parametrize(("here", "there"), [("DEALER", "ROUTER"), ("PULL", "PUSH"), ("SUB", "XPUB"), ("REQ", "REP")])
def test_what_has_arrived_is_read_before_a_socket_moves(
    context: zmq.Context, known: NameService, monkeypatch: pytest.MonkeyPatch, here: str, there: str
) -> None:
    """A peer that answers and moves at once: its last messages are not lost with its connection."""
    monkeypatch.setattr(names, "FRESH", 0.0)
    peer = _bound(context, getattr(zmq, there))
    named = _named(peer)
    sock = context.socket(getattr(zmq, here))
    sock.reconnect_ivl = int(10 * MS * 1000)
    if here == "SUB":
        sock.subscribe(b"")
    sock.connect(named)
    if here in ("DEALER", "REQ"):
        sock.send(b"x")
    head = [] if there == "PUSH" else peer.recv_multipart()[:-1]
    sent = [b"1"] if here == "REQ" else [b"1", b"2", b"3"]
    for body in sent:
        peer.send_multipart([*head, body])
    wait_until(lambda: sock.poll(0))
    known.table["peer"] = ["127.0.0.2"]
    known.asked.clear()
    peer.close(int(LONG * 1000))
    wait_until(lambda: len(known.asked) > 2)
    assert [sock.recv(timeout=LONG) for _ in sent] == sent
    wait_until(lambda: b"127.0.0.2" in sock.last_endpoint)


def test_a_req_whose_request_somebody_else_has(
    context: zmq.Context, known: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that moves takes no request from a healthy peer; the socket moves when that has answered."""
    monkeypatch.setattr(names, "FRESH", 0.0)
    peer = _bound(context, zmq.REP)
    req = context.socket(zmq.REQ)
    req.reconnect_ivl = int(10 * MS * 1000)
    req.connect(peer.last_endpoint)
    req.connect(_nobody())
    req.send(b"x")
    assert peer.recv() == b"x"
    known.table["peer"] = ["127.0.0.2"]
    known.asked.clear()
    wait_until(lambda: len(known.asked) > 2)
    peer.send(b"y")
    assert req.recv() == b"y"
    wait_until(lambda: b"127.0.0.2" in req.last_endpoint)


@pytest.mark.parametrize("kind", ["REQ", "DEALER", "PUSH", "SUB"])
def test_a_number_costs_nothing(context: zmq.Context, resolver: NameService, kind: str) -> None:
    """No name service is asked, nothing is kept, and only a REQ has a monitor, as ever."""
    sock = context.socket(getattr(zmq, kind))
    sock.linger = 0
    sock.connect("tcp://127.0.0.1:1")
    waits = sock._waits
    assert (waits.hosts, waits.keeps, resolver.asked) == (None, False, [])
    assert (sock._sharing is None, waits.straight_out > 0) == (kind != "REQ",) * 2


def test_what_went_to_the_same_address_goes_there_once(context: zmq.Context, known: NameService) -> None:
    """A name that has not moved: libzmq sends what it has queued, and what was kept is forgotten."""
    peer = _bound(context, zmq.PULL)
    named = _named(peer)
    sock = context.socket(zmq.PUSH)
    sock.connect(named)
    for _ in range(2):
        endpoint = peer.last_endpoint.decode()
        _lose(sock, peer)
        sock.send(b"x")
        peer = _bound(context, zmq.PULL, endpoint)
        assert peer.recv() == b"x"
        wait_until(lambda: not sock._waits.keeps)
        assert not peer.poll(0)
    assert sock._waits.straight_out > 0


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_req_whose_peer_moves(context: zmq.Context, known: NameService, is_asked: bool) -> None:
    """A request that waits for its peer reaches it at its new address; one that comes later goes there, too."""
    peer = _bound(context, zmq.REP)
    named = _named(peer)
    req = context.socket(zmq.REQ)
    req.connect(named)
    req.send(b"x")
    peer.recv()
    peer.send(b"y")
    assert req.recv() == b"y"
    _lose(req, peer)
    if is_asked:
        req.send_multipart([b"1", b"2"])
    peer = _bound(context, zmq.REP, named.replace("peer", "127.0.0.2"))
    known.table["peer"] = ["127.0.0.2"]
    wait_until(lambda: b"127.0.0.2" in req.last_endpoint)
    if not is_asked:
        req.send_multipart([b"1", b"2"])
    with pytest.raises(zmq.ZMQError) as caught:
        req.send(b"again")
    assert caught.value.errno == plain.EFSM
    assert req._lockstep.is_open
    assert peer.recv_multipart() == [b"1", b"2"]
    peer.send(b"y")
    assert req.recv() == b"y"
    req.send(b"z")
    assert peer.recv() == b"z"


def test_a_req_that_lost_its_request_and_moves(context: zmq.Context, known: NameService) -> None:
    """The loss is told although the socket has moved meanwhile, and the next request goes to the new address."""
    peer = _bound(context, zmq.REP)
    named = _named(peer)
    req = context.socket(zmq.REQ)
    req.connect(named)
    req.send(b"x")
    peer.recv()
    peer.close(0)
    peer = _bound(context, zmq.REP, named.replace("peer", "127.0.0.2"))
    known.table["peer"] = ["127.0.0.2"]
    wait_until(lambda: b"127.0.0.2" in req.last_endpoint)
    with pytest.raises(zmq.Disconnected):
        req.recv()
    req.send(b"z")
    assert peer.recv() == b"z"


def test_a_message_half_sent_is_not_torn(context: zmq.Context, known: NameService) -> None:
    """The socket moves when it is whole."""
    peer = _bound(context, zmq.PULL)
    named = _named(peer)
    sock = context.socket(zmq.PUSH)
    sock.connect(named)
    sock.send(b"x")
    peer.recv()
    _lose(sock, peer)
    sock.send(b"1", zmq.SNDMORE)
    peer = _bound(context, zmq.PULL, named.replace("peer", "127.0.0.2"))
    asked = len(known.asked)
    known.table["peer"] = ["127.0.0.2"]
    wait_until(lambda: len(known.asked) > asked + 1)
    sock.send(b"2")
    assert peer.recv_multipart() == [b"1", b"2"]


def test_of_several_addresses_the_one_that_answers(context: zmq.Context, known: NameService) -> None:
    """They are tried in turn."""
    peer = _bound(context, zmq.PULL, "tcp://127.0.0.3:*")
    known.table["peer"] = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    sock = context.socket(zmq.PUSH)
    sock.connect(_named(peer))
    sock.send(b"x")
    assert peer.recv() == b"x"


def test_several_connections(context: zmq.Context, known: NameService) -> None:
    """Nobody knows for which of them a message is queued, so nothing is kept; names are followed all the same."""
    peer, other = _bound(context, zmq.PULL), _bound(context, zmq.PULL)
    named = _named(peer)
    sock = context.socket(zmq.PUSH)
    sock.connect(named)
    sock.connect(other.last_endpoint)
    assert not sock._waits.keeps
    peer.close(0)
    peer = _bound(context, zmq.PULL, named.replace("peer", "127.0.0.2"))
    known.table["peer"] = ["127.0.0.2"]

    def comes() -> bool:
        sock.send(b"x")
        return bool(peer.poll(int(10 * MS * 1000)))

    wait_until(comes)


def test_subscriptions_move_along(context: zmq.Context, known: NameService) -> None:
    """A SUB is subscribed at the new address."""
    peer = _bound(context, zmq.XPUB)
    named = _named(peer)
    sock = context.socket(zmq.SUB)
    sock.subscribe(b"x")
    sock.connect(named)
    assert peer.recv() == b"\1x"
    peer.close(0)
    peer = _bound(context, zmq.XPUB, named.replace("peer", "127.0.0.2"))
    known.table["peer"] = ["127.0.0.2"]
    assert peer.recv() == b"\1x"
    peer.send(b"xyz")
    assert sock.recv() == b"xyz"


def test_a_program_with_a_monitor_of_its_own(context: zmq.Context, known: NameService) -> None:
    """Names are resolved once then."""
    peer = _bound(context, zmq.PULL)
    sock = context.socket(zmq.PUSH)
    monitor = sock.get_monitor_socket()
    sock.connect(_named(peer))
    sock.send(b"x")
    assert peer.recv() == b"x"
    assert not sock._waits.keeps
    assert monitor.poll(int(LONG * 1000))


def test_a_socks_proxy(resolver: NameService) -> None:
    """It resolves names itself: libzmq hands them on."""
    with closing(net.create_server(("127.0.0.1", 0))) as proxy, zmq.Context() as own:  # libzmq aborts if its proxy goes first
        own.sockopts[zmq.SOCKS_PROXY] = f"127.0.0.1:{proxy.getsockname()[1]}".encode()
        with zmq.Client("tcp://peer:5555", context=own), own.socket(zmq.PUSH) as sock:
            sock.connect("tcp://peer:5555")
            assert sock.last_endpoint == b"tcp://peer:5555"
            sock.disconnect("tcp://peer:5555")
    assert not resolver.asked


def test_a_patched_program(context: zmq.Context, known: NameService) -> None:
    """A subclass, and a shadow, are no different."""

    class Own(zmq.Socket):
        pass

    peer = _bound(context, zmq.PULL)
    sock = Own(context, zmq.PUSH)
    shadow = zmq.Socket(sock)
    shadow.connect(_named(peer))
    sock.send(b"x")
    assert peer.recv() == b"x"
    sock.disconnect(_named(peer))
    assert not shadow.poll(0, zmq.POLLOUT)
    sock.close()


def test_what_is_kept_is_bounded(context: zmq.Context, known: NameService) -> None:
    """Whoever sends without a wait finds out by itself that the connection stands, so that nothing has to be kept."""
    peer = _bound(context, zmq.PULL)
    sock = context.socket(zmq.PUSH)
    sock.connect(_named(peer))
    sharing = sock._sharing
    sharing.monitor._watcher.stop()  # as in a thread with libuv's loop
    sock.send(b"x")
    assert peer.recv() == b"x"
    for _ in range(_hosts.ASK_EVERY):
        sock.send(b"x", zmq.NOBLOCK)
    assert not sock._waits.keeps


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child(context: zmq.Context, known: NameService) -> None:
    """It leaves the parent's sockets, lookups and timers alone, and resolves names for its own."""
    peer = _bound(context, zmq.PULL)
    known.hang("slow")
    sock, waiting = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
    sock.connect(_named(peer))
    connecting = gevent.spawn(waiting.connect, "tcp://slow:5555")
    wait_until(lambda: known.under_way)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own = zmq.Context()
            known.close()  # the parent's lookup ends here as well
            gevent.sleep(20 * MS)
            mine = own.socket(zmq.PUSH)
            mine.connect(_named(peer))
            mine.send(b"child")
            own.destroy(linger=int(LONG * 1000))
            code = 0
        finally:
            os._exit(code)
    assert peer.recv() == b"child"
    ended: list[tuple[int, int]] = []
    wait_until(lambda: ended.append(os.waitpid(child, os.WNOHANG)) or ended[-1][0])
    assert ended[-1] == (child, 0)
    sock.send(b"parent")
    assert peer.recv() == b"parent"
    known.table["slow"] = ["127.0.0.1"]
    known.answer("slow")
    connecting.get()
    assert waiting.last_endpoint == b"tcp://127.0.0.1:5555"


def test_in_another_thread(context: zmq.Context) -> None:
    """A thread has a hub of its own, and lookups of its own; it ends with them."""
    peer = _bound(context, zmq.PULL)

    def send() -> None:
        with name_service() as known, zmq.Context() as own, own.socket(zmq.PUSH) as sock:
            known.table["peer"] = ["127.0.0.1"]
            sock.connect(_named(peer))
            sock.send(b"x")
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=send)
    thread.start()
    assert peer.recv() == b"x"
    wait_until(lambda: not thread.is_alive())


def test_a_program_that_ends() -> None:
    """A name that has no address, and is asked for again and again, keeps no loop running and no program from its end."""
    program = """
import gevent, socket
import greensafe as zmq

class Resolver:
    def getaddrinfo(self, *args):
        raise socket.gaierror(socket.EAI_NONAME, "not known")
    def close(self):
        pass

gevent.get_hub().resolver = Resolver()
sock = zmq.Context().socket(zmq.PUSH)
sock.connect("tcp://peer:5555")
client = zmq.Client("tcp://peer:5555")
assert gevent.wait(timeout=20)
print("idle")
"""
    done = run_python(program)
    assert (done.code, done.out) == (0, "idle\n"), done.err
