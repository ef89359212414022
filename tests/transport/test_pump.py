"""Tests of greensafe.green._pump: a plain socket driven from the hub, with real peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, wait_until

import greensafe as zmq
from greensafe.sansio.weights import MESSAGE, weight
from greensafe.transport import inbox as _inbox, outbox as _outbox, pump as _pump
from greensafe.transport.inbox import Inbox
from greensafe.transport.outbox import SWEPT
from greensafe.transport.pump import Pump

pytestmark = pytest.mark.usefixtures("limit")

Maker = Callable[..., Pump]


@pytest.fixture
def got() -> list[list[bytes]]:
    """The messages that the pump has handed over."""
    return []


@pytest.fixture
def make(context: zmq.Context, got: list[list[bytes]]) -> Iterator[Maker]:
    """Makes a started pump on a bound ROUTER with these socket options; it is closed afterwards."""
    made: list[Pump] = []

    def pump(on_message: Callable[[list[bytes]], None] = got.append, outbox: int | None = None, **options: int) -> Pump:
        sock: plain.Socket[bytes] = plain.Socket(context, zmq.ROUTER)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        for name, value in options.items():
            sock.setsockopt(getattr(zmq, name), value)
        sock.bind("inproc://pump")
        made.append(Pump(sock, on_message, lambda: None, outbox))
        made[-1].start()
        return made[-1]

    yield pump
    for each in made:
        each.close(0)


def _peer(context: zmq.Context, name: bytes = b"peer", **options: int) -> Any:
    sock = context.socket(zmq.DEALER)
    sock.routing_id = name
    for option, value in options.items():
        setattr(sock, option, value)
    sock.connect("inproc://pump")
    return sock


def test_messages_go_in_and_out(context: zmq.Context, make: Maker, got: list[list[bytes]]) -> None:
    """Each message is handed over whole, and an answer leaves at once."""
    pump, peer = make(), _peer(context)
    peer.send_multipart([b"a", b"", b"b"])
    wait_until(lambda: got == [[b"peer", b"a", b"", b"b"]])
    pump.send([b"peer", b"answer", b""])
    assert peer.recv_multipart() == [b"answer", b""]


def test_what_is_sent_while_messages_are_read_loses_no_edge(context: zmq.Context, make: Maker) -> None:
    """An answer sent by `on_message` asks for no turn of its own, and what comes meanwhile is read all the same."""
    asked: list[bool] = []

    def answer(frames: list[bytes]) -> None:
        pump.send(frames)
        asked.append(pump._scheduled)

    pump, peer = make(answer, outbox=None), _peer(context)
    for number in range(300):
        for part in range(1 + number % 3):
            peer.send_multipart([b"%d" % number, b"%d" % part])
        for part in range(1 + number % 3):
            assert peer.recv_multipart(timeout=LONG) == [b"%d" % number, b"%d" % part]
    assert not any(asked[1:])


def test_the_loop_gets_a_turn_between_batches(context: zmq.Context, make: Maker, got: list[list[bytes]]) -> None:
    """However much has arrived, others run after a batch."""
    peer = _peer(context)
    for number in range(3 * _pump.BATCH):
        peer.send(b"%d" % number)
    make()
    seen = []
    while len(got) < 3 * _pump.BATCH:
        gevent.sleep(0)
        seen.append(len(got))
    assert max(after - before for before, after in zip([0, *seen], seen, strict=False)) <= _pump.BATCH
    assert [frames[1] for frames in got] == [b"%d" % number for number in range(3 * _pump.BATCH)]


def test_paused_it_reads_nothing_until_it_is_resumed(context: zmq.Context, make: Maker) -> None:
    """A pause set by `on_message` holds at once; what has arrived stays where it is and is read later."""
    got: list[list[bytes]] = []

    def on_message(frames: list[bytes]) -> None:
        got.append(frames)
        pump.inbox.is_paused = True

    pump, peer = make(on_message), _peer(context)
    peer.send(b"1")
    peer.send(b"2")
    wait_until(lambda: got)
    gevent.sleep(0)
    assert len(got) == 1
    assert pump.has_input
    pump.resume()
    wait_until(lambda: len(got) == 2)


def test_a_full_peer_has_a_queue_of_its_own(context: zmq.Context, make: Maker, got: list[list[bytes]]) -> None:
    """What a full pipe does not take waits, up to a limit that is counted; other peers are not affected, order is kept."""
    pump = make(outbox=5 * (MESSAGE + weight([b"full", b"00"])), SNDHWM=1)
    full, other = _peer(context, b"full", rcvhwm=1), _peer(context, b"other")
    full.send(b"hello")
    other.send(b"hello")
    wait_until(lambda: len(got) == 2)
    sent = 0
    while not pump.outbox.dropped:
        assert sent < 100
        pump.send([b"full", b"%02d" % sent])
        sent += 1
    assert len(pump.outbox) == 5
    pump.send([b"other", b"at once"])
    assert other.recv() == b"at once"
    answers = [full.recv() for _ in range(sent - 1)]
    assert answers == [b"%02d" % number for number in range(sent - 1)]
    assert (len(pump.outbox), pump.outbox.dropped) == (0, 1)


def test_a_message_that_is_taken_back_does_not_leave(context: zmq.Context, make: Maker, got: list[list[bytes]]) -> None:
    """Emptied while it waits for room, it is skipped; those behind it leave."""
    pump, peer = make(SNDHWM=1), _peer(context, rcvhwm=1)
    peer.send(b"hello")
    wait_until(lambda: got)
    messages: list[list[bytes]] = []
    while not len(pump.outbox):
        assert len(messages) < 100
        messages.append([b"peer", b"%d" % len(messages)])
        pump.send(messages[-1])
    pump.send([b"peer", b"last"])
    expected = [frames[1] for frames in messages[:-1]]
    messages[-1].clear()
    assert [peer.recv() for _ in expected] == expected
    assert peer.recv() == b"last"


def test_messages_that_were_taken_back_do_not_add_up(context: zmq.Context, make: Maker, got: list[list[bytes]]) -> None:
    """Whoever asks a peer that does not read again and again, and gives up each time, leaves nothing behind; order is kept."""
    pump = make(SNDHWM=1)
    full = _peer(context, b"full", rcvhwm=1)
    full.send(b"hello")
    wait_until(lambda: got)
    sent: list[bytes] = []
    while not len(pump.outbox):
        sent.append(b"%d" % len(sent))
        pump.send([b"full", sent[-1]])
    for number in range(10 * SWEPT):
        message = [b"full", bytes(1000)]
        pump.send(message)
        if number % SWEPT:
            message.clear()
        else:
            sent.append(message[1])
    assert len(pump.outbox) <= 2 * SWEPT + 1
    assert pump.outbox.size <= (2 * SWEPT + 1) * (MESSAGE + weight([b"full", bytes(1000)]))
    assert [full.recv() for _ in sent] == sent
    assert (len(pump.outbox), pump.outbox.size) == (0, 0)


def test_what_is_said_again_soon(
    context: zmq.Context, make: Maker, got: list[list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes behind what was sent before it, and is left out when much waits for its peer, which loses nothing else by it."""
    monkeypatch.setattr(_outbox, "SPARE", 3 * (MESSAGE + weight([b"full", b"00"])))
    pump = make(SNDHWM=1)
    full, other = _peer(context, b"full", rcvhwm=1), _peer(context, b"other")
    full.send(b"hello")
    other.send(b"hello")
    wait_until(lambda: len(got) == 2)
    sent = 0
    while not pump.outbox.unsaid:
        assert sent < 100
        pump.send_if_read([b"full", b"%02d" % sent])
        sent += 1
    assert len(pump.outbox) == 4
    pump.send([b"full", b"answer"])
    pump.send_if_read([b"full", b"left out"])
    assert (len(pump.outbox), pump.outbox.unsaid, pump.outbox.dropped) == (5, 2, 0)
    pump.send_soon([b"other", b"first"])
    pump.send_if_read([b"other", b"second"])
    assert [other.recv(), other.recv()] == [b"first", b"second"]
    assert [full.recv() for _ in range(sent)] == [*(b"%02d" % number for number in range(sent - 1)), b"answer"]


def test_a_peer_that_is_gone_is_counted(make: Maker) -> None:
    """An answer to nobody is dropped, and the count says so."""
    pump = make()
    pump.send([b"nobody", b"x"])
    assert (pump.outbox.unreachable, len(pump.outbox)) == (1, 0)


def test_an_exception_of_on_message_is_reported_and_the_next_message_read(context: zmq.Context, make: Maker) -> None:
    """One bad message stops neither the watcher nor the messages behind it."""
    got, reported = [], []

    def on_message(frames: list[bytes]) -> None:
        if frames[1] == b"bad":
            raise ValueError("bad")
        got.append(frames[1])

    pump, peer = make(on_message), _peer(context)
    pump._hub.handle_error = lambda context, kind, *rest: reported.append(kind)
    try:
        for body in (b"1", b"bad", b"2"):
            peer.send(body)
        wait_until(lambda: got == [b"1", b"2"])
    finally:
        del pump._hub.handle_error
    assert reported == [ValueError]


@pytest.mark.parametrize("how", ["context terminated", "socket closed"])
def test_the_end_of_its_socket_is_told_once(how: str) -> None:
    """Then the pump has stopped, and what is sent is dropped and counted."""
    own = zmq.Context()
    sock: plain.Socket[bytes] = plain.Socket(own, zmq.DEALER)
    sock.connect("inproc://nobody")
    told: list[str] = []
    pump = Pump(sock, lambda frames: None, lambda: told.append(how))
    pump.start()
    ending = None
    if how == "context terminated":
        ending = gevent.spawn(own.term)
    else:
        sock.close(0)
        pump.send([b"x"])
    wait_until(lambda: told)
    pump.send([b"y"])
    gevent.sleep(0)
    assert told == [how]
    assert pump.outbox.unreachable >= 1
    pump.close(0)
    own.term() if ending is None else ending.get()


def test_stopped_it_leaves_messages_where_they_are(context: zmq.Context, make: Maker, got: list[list[bytes]]) -> None:
    """stop() and start() lose nothing; `drain` reads without the loop."""
    pump, peer = make(), _peer(context)
    pump.stop()
    peer.send(b"1")
    gevent.sleep(0)
    assert got == []
    pump.drain()
    assert [frames[1] for frames in got] == [b"1"]
    peer.send(b"2")
    pump.start()
    wait_until(lambda: len(got) == 2)


def test_what_comes_while_it_is_asked_whether_the_peer_is_gone(
    context: zmq.Context, got: list[list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking uses up the edge of a message that has come since all was read: it is read all the same, and nobody is gone."""
    gone: list[bool] = []
    peer = plain.Socket(context, zmq.DEALER)
    peer.bind("inproc://peer")
    sock: plain.Socket[bytes] = plain.Socket(context, zmq.DEALER)
    sock.connect("inproc://peer")
    pump = Pump(sock, got.append, lambda: None, on_gone=lambda: gone.append(True))
    pump.start()
    peer.send(b"first")
    wait_until(lambda: got)
    gevent.sleep(0)
    read, ask = Inbox.read, _pump._get
    is_read = False

    def note(self: Inbox, is_likely: bool = False) -> bool:
        nonlocal is_read
        is_read = read(self, is_likely)
        return is_read

    def ask_late(sock: Any, option: int) -> Any:
        nonlocal is_read
        if is_read:
            is_read = False
            peer.send(b"%d" % len(got))
        return ask(sock, option)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(Inbox, "read", note)
            patched.setattr(_pump, "_get", ask_late)
            patched.setattr(_inbox, "_get", ask_late)
            pump._schedule()
            wait_until(lambda: len(got) > 20)
        assert got[:4] == [[b"first"], [b"1"], [b"2"], [b"3"]]
        assert gone == []
    finally:
        pump.close(0)
        peer.close(0)
