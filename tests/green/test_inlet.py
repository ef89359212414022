"""Tests of greensafe.green._inlet: long messages are read in parts."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import wait_until

import greensafe as zmq
from greensafe.green import _in_parts, _lockstep
from greensafe.transport import inlet as _inlet
from greensafe.transport.pump import Pump

pytestmark = pytest.mark.usefixtures("limit")

#: Frames of a long message.
LONG_ONE = 20 * _inlet.AT_ONCE


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn as often as the clock is asked."""
    monkeypatch.setattr(_inlet, "TURN", -1.0)
    monkeypatch.setattr(_in_parts, "TURN", -1.0)
    monkeypatch.setattr(_lockstep, "TURN", -1.0)


@pytest.fixture
def pair(context: zmq.Context) -> tuple[Any, Any]:
    """Two green PAIRs."""
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.bind("inproc://pair")
    other.connect("inproc://pair")
    return one, other


def _counting(turns: list[int]) -> gevent.Greenlet:
    def count() -> None:
        while True:
            turns.append(1)
            gevent.sleep(0)

    return gevent.spawn(count)


def _pump(context: zmq.Context, got: list[Any], torn: list[Any]) -> tuple[Pump, Any]:
    sock: plain.Socket[bytes] = plain.Socket(context, zmq.DEALER)
    sock.bind("inproc://pump")
    peer = plain.Socket(context, zmq.DEALER)
    peer.connect("inproc://pump")
    return Pump(sock, got.append, lambda: None, on_torn=lambda *args: torn.append(args), most_frames=LONG_ONE), peer


def test_a_pump_reads_a_long_message_in_parts(context: zmq.Context) -> None:
    """Others run meanwhile; then it is handed over whole, and so is the one behind it."""
    got: list[list[bytes]] = []
    turns: list[int] = []
    pump, peer = _pump(context, got, [])
    peer.send_multipart([b"%d" % number for number in range(LONG_ONE)])
    peer.send_multipart([b"next"])
    counter = _counting(turns)
    pump.start()
    wait_until(lambda: len(got) == 2)
    assert got == [[b"%d" % number for number in range(LONG_ONE)], [b"next"]]
    assert len(turns) > LONG_ONE / _inlet.AT_ONCE / 2
    counter.kill()
    pump.close(0)
    peer.close(0)


def test_a_message_of_too_many_frames_is_thrown_away_in_parts(context: zmq.Context) -> None:
    """Of it one frame too many is handed over, others run meanwhile, and the next message is read as ever."""
    got: list[list[bytes]] = []
    torn: list[Any] = []
    turns: list[int] = []
    pump, peer = _pump(context, got, torn)
    peer.send_multipart([b"%d" % number for number in range(LONG_ONE + 20 * _inlet.THROWN_AT_ONCE)])
    peer.send_multipart([b"next"])
    counter = _counting(turns)
    pump.start()
    wait_until(lambda: len(got) == 2)
    assert got == [[b"%d" % number for number in range(LONG_ONE + 1)], [b"next"]]
    assert not torn
    assert len(turns) > 20
    counter.kill()
    pump.close(0)
    peer.close(0)


def test_a_drain_does_not_wait_for_a_long_message(context: zmq.Context) -> None:
    """`drain_all` returns between two parts, and says that there is more; nothing is lost."""
    got: list[list[bytes]] = []
    pump, peer = _pump(context, got, [])
    peer.send_multipart([b"x"] * LONG_ONE)
    assert not pump.drain() or not got
    wait_until(lambda: pump.drain() and got)
    assert got == [[b"x"] * LONG_ONE]
    pump.close(0)
    peer.close(0)


def test_recv_multipart_reads_a_long_message_in_parts(pair: tuple[Any, Any]) -> None:
    """Others run meanwhile, but none of them gets a frame of it: the next receiver has the next message."""
    one, other = pair
    turns: list[int] = []
    long = [b"%d" % number for number in range(LONG_ONE)]
    other.send_multipart(long)
    other.send_multipart([b"next", b"whole"])
    first, second = gevent.spawn(one.recv_multipart), gevent.spawn(one.recv_multipart)
    seen: list[type[BaseException]] = []

    def look() -> None:
        while not first.ready():
            turns.append(1)
            try:
                one.recv(zmq.NOBLOCK)
            except zmq.Again as error:
                seen.append(type(error))
            gevent.sleep(0)

    looker = gevent.spawn(look)
    gevent.joinall([first, second, looker], raise_error=True)
    assert (first.value, second.value) == (long, [b"next", b"whole"])
    assert len(turns) > 5


def test_a_receiver_that_is_killed_in_a_long_message(pair: tuple[Any, Any]) -> None:
    """What it had read stays with the socket: poll says so, and the next receiver gets the message whole."""
    one, other = pair
    long = [b"%d" % number for number in range(LONG_ONE)]
    other.send_multipart(long)
    receiver = gevent.spawn(one.recv_multipart)
    while one._waits.reader is None:
        gevent.sleep(0)
    receiver.kill()
    assert one.poll(0) == zmq.POLLIN
    assert one.recv() == b"0"
    assert one.rcvmore
    assert one.recv_multipart() == long[1:]
    other.send(b"next")
    assert one.recv() == b"next"


def test_a_bad_object_with_a_long_rest(pair: tuple[Any, Any]) -> None:
    """The rest of the message is read in parts, too, and is gone."""
    one, other = pair
    turns: list[int] = []
    other.send_multipart([b"no JSON"] + [b""] * (20 * _inlet.THROWN_AT_ONCE))
    other.send(b"1")
    counter = _counting(turns)
    with pytest.raises(ValueError, match="Expecting value"):
        one.recv_json()
    assert len(turns) > 5
    assert one.recv_json() == 1
    counter.kill()


def test_a_drain_ends_though_more_comes_all_the_while(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends faster than it is read does not keep `drain_all`: it says that there is more."""
    monkeypatch.setattr("greensafe.transport.pump.DRAIN", 0.0)
    most, got = 5000, []

    def on_message(frames: list[bytes]) -> None:
        got.append(frames)
        if len(got) < most:
            peer.send(b"one more")

    pump, peer = _pump(context, got, [])
    pump.inbox.on_message = on_message
    peer.send(b"first")
    assert not pump.drain_all()
    assert 0 < len(got) < most
    pump.close(0)
    peer.close(0)


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.REP])
def test_a_reset_throws_a_long_message_away_in_parts(context: zmq.Context, kind: int) -> None:
    """What is left of it when its first frame was received; others run meanwhile, and the socket works as ever."""
    sock, peer = context.socket(kind), context.socket(zmq.ROUTER if kind == zmq.REQ else zmq.DEALER)
    peer.bind("inproc://peer")
    sock.connect("inproc://peer")
    envelope = [b""]
    if kind == zmq.REQ:
        sock.send(b"first")
        envelope = peer.recv_multipart()[:2]
    peer.send_multipart([*envelope, *[b"x"] * (20 * _lockstep.AT_ONCE)])
    assert sock.recv() == b"x"
    turns: list[int] = []
    counter = _counting(turns)
    sock.reset()
    assert len(turns) >= 10
    counter.kill()
    if kind == zmq.REQ:
        sock.send(b"second")
        assert peer.recv_multipart()[2:] == [b"second"]
    else:
        assert peer.recv_multipart()[0] == b""
        peer.send_multipart([b"", b"next"])
        assert sock.recv() == b"next"
