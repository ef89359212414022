"""Tests of greensafe.green.device: devices and proxies between green sockets, with real peers on both sides."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import gevent
import pytest
from helpers import LONG, wait_until

import greensafe as zmq
from greensafe.green.device import BATCH, _Proxy
from greensafe.hub import log_limiter as seldom

pytestmark = pytest.mark.usefixtures("limit")


def _bound(context: zmq.Context, *kinds: int) -> list[Any]:
    """Sockets of these types, bound to inproc://0, inproc://1, ..."""
    made = [context.socket(kind) for kind in kinds]
    for number, sock in enumerate(made):
        sock.bind(f"inproc://{number}")
    return made


def _connected(context: zmq.Context, kind: int, number: int, **options: Any) -> Any:
    sock = context.socket(kind)
    for name, value in options.items():
        setattr(sock, name, value)
    sock.connect(f"inproc://{number}")
    return sock


def test_one_direction(context: zmq.Context) -> None:
    """PULL to PUSH copies whole messages in the one direction that there is."""
    pull, push = _bound(context, zmq.PULL, zmq.PUSH)
    source, sink = _connected(context, zmq.PUSH, 0), _connected(context, zmq.PULL, 1)
    device = gevent.spawn(zmq.device, zmq.STREAMER, pull, push)
    source.send_multipart([b"a", b"", b"b"])
    assert sink.recv_multipart() == [b"a", b"", b"b"]
    device.kill()


@pytest.mark.parametrize("kind", [zmq.REP, zmq.DEALER])
def test_one_socket_as_both_sides(context: zmq.Context, kind: int) -> None:
    """A socket that is frontend and backend echoes; a REP too, although it has no room for a reply before it has received."""
    (both,) = _bound(context, kind)
    device = gevent.spawn(zmq.device, zmq.QUEUE, both, both)
    req = _connected(context, zmq.REQ if kind == zmq.REP else zmq.DEALER, 0)
    for frames in ([b"one"], [b"two", b"", b"frames"]):
        req.send_multipart(frames)
        assert req.recv_multipart() == frames
    device.kill()


def test_ends_with_its_sockets(context: zmq.Context) -> None:
    """Closing one of the sockets ends the device with the error."""
    front, back = _bound(context, zmq.ROUTER, zmq.DEALER)
    device = gevent.spawn(zmq.device, zmq.QUEUE, front, back)
    gevent.sleep(0)
    gevent.sleep(0)
    front.close()
    device.join()
    assert isinstance(device.exception, zmq.ZMQError)


@pytest.mark.parametrize("run", [zmq.proxy, lambda front, back: zmq.device(zmq.QUEUE, front, back)])
def test_nothing_to_copy(context: zmq.Context, run: Any) -> None:
    """Two sockets that only receive are a mistake that is named."""
    with pytest.raises(ValueError, match="neither"):
        run(context.socket(zmq.PULL), context.socket(zmq.PULL))


def test_a_proxy_carries_requests_and_the_hub_turns(context: zmq.Context) -> None:
    """ROUTER to DEALER: requests of several clients, their replies to the right ones, all in one thread."""
    front, back = _bound(context, zmq.ROUTER, zmq.DEALER)
    capture = context.socket(zmq.PUB)
    capture.bind("inproc://2")
    seen = _connected(context, zmq.SUB, 2, subscribe=b"")
    running = gevent.spawn(zmq.proxy, front, back, capture)
    rep = _connected(context, zmq.REP, 1)
    answering = gevent.spawn(lambda: [rep.send(b"re " + rep.recv()) for _ in range(20)])

    def ask(name: int) -> list[bytes]:
        req = _connected(context, zmq.REQ, 0)
        return [(req.send(b"%d.%d" % (name, step)), req.recv())[1] for step in range(10)]

    answers = [greenlet.get() for greenlet in [gevent.spawn(ask, name) for name in range(2)]]
    assert answers == [[b"re %d.%d" % (name, step) for step in range(10)] for name in range(2)]
    answering.get()
    copies = [seen.recv_multipart()[-1] for _ in range(40)]
    assert sorted(copies) == sorted(each for answer in answers for reply in answer for each in (reply, reply[3:]))
    running.kill()


def test_a_context_that_ends_is_raised(context: zmq.Context) -> None:
    """As libzmq's own proxy: ContextTerminated."""
    own = zmq.Context()
    front, back = _bound(own, zmq.ROUTER, zmq.DEALER)
    running = gevent.spawn(zmq.proxy, front, back)
    gevent.sleep(0)
    gevent.sleep(0)
    ending = gevent.spawn(own.term)
    with pytest.raises(zmq.ContextTerminated):
        running.get()
    front.close()
    back.close()
    ending.get()


def test_no_message_is_lost_when_a_proxy_is_killed(context: zmq.Context) -> None:
    """However often it is killed and started again, every message arrives once and in order."""
    pull, push = _bound(context, zmq.PULL, zmq.PUSH)
    source = _connected(context, zmq.PUSH, 0)
    sink = _connected(context, zmq.PULL, 1, rcvhwm=1)
    count = 300
    feeding = gevent.spawn(lambda: [source.send(b"%d" % number) for number in range(count)])
    got: list[bytes] = []
    taking = gevent.spawn(lambda: [got.append(sink.recv()) for _ in range(count)])
    while len(got) < count:
        running = gevent.spawn(zmq.proxy, pull, push)
        before = len(got)
        wait_until(lambda before=before: len(got) >= min(before + 7, count))
        running.kill()
    assert got == [b"%d" % number for number in range(count)]
    gevent.joinall([feeding, taking], raise_error=True)


def test_a_busy_proxy_lets_others_run(context: zmq.Context) -> None:
    """However much is ready on both sides, no more than a batch is copied in one turn."""
    pull, push = _bound(context, zmq.PULL, zmq.PUSH)
    source, sink = _connected(context, zmq.PUSH, 0), _connected(context, zmq.PULL, 1)
    count = 5 * BATCH
    for _ in range(count):
        source.send(b"x")
    proxy = _Proxy(pull, push, None)
    running = gevent.spawn(proxy.run, None)
    copied = [0]
    while copied[-1] < count:
        gevent.sleep(0)
        copied.append(proxy.traffic[0].received)
    assert max(after - before for before, after in itertools.pairwise(copied)) <= BATCH
    assert [sink.recv() for _ in range(count)] == [b"x"] * count
    running.kill()


@pytest.mark.parametrize("kind", [zmq.REP, zmq.PAIR])
def test_a_steerable_proxy_obeys(context: zmq.Context, kind: int) -> None:
    """PAUSE stops the messages where they are, RESUME lets them go, STATISTICS counts them, TERMINATE returns."""
    front, back, control = _bound(context, zmq.ROUTER, zmq.DEALER, kind)
    steering = _connected(context, {zmq.REP: zmq.REQ, zmq.PAIR: zmq.PAIR}[kind], 2)
    running = gevent.spawn(zmq.proxy_steerable, front, back, None, control)

    def command(word: bytes) -> list[bytes]:
        steering.send(word)
        if kind == zmq.REP or word == b"STATISTICS":
            return steering.recv_multipart()
        return [b""]

    client, worker = _connected(context, zmq.REQ, 0), _connected(context, zmq.REP, 1)
    client.send(b"hello")
    assert worker.recv() == b"hello"
    worker.send(b"wo")
    assert client.recv() == b"wo"
    numbers = [struct.unpack("=Q", frame)[0] for frame in command(b"STATISTICS")]
    assert numbers == [3, 10, 3, 7, 3, 7, 3, 10]  # what libzmq's own says of this exchange
    assert command(b"PAUSE") == [b""]
    command(b"STATISTICS")
    client.send(b"again")
    assert not worker.poll(5)
    assert command(b"NO SUCH COMMAND") == [b""]
    assert command(b"RESUME") == [b""]
    assert worker.recv(timeout=LONG) == b"again"
    assert command(b"TERMINATE") == [b""]
    running.get()


def test_peers_that_are_gone_do_not_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message for one is dropped: a line a second, and the number of the others."""

    class Gone:
        def send_multipart(self, frames: Any, **options: Any) -> None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)

    monkeypatch.setattr(seldom, "PERIOD", LONG)
    caplog.set_level("INFO", "greensafe.green.device")
    proxy = _Proxy(None, None, None)
    for _ in range(100):
        proxy._pass_on(Gone(), [b"x"])
    assert [record.getMessage() for record in caplog.records] == ["message dropped by a proxy: its peer is gone"]
    proxy.seldom.flush()
    assert "(the last of 99 more" in caplog.text
