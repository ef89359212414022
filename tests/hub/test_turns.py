"""Tests of greensafe.green._turns: greenlets that never have to wait, and whatever has to happen beside them.

What is due is due before the counting begins, so the tests count operations and no time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any

import gevent
import gevent.event
import pytest
import zmq as plain
from helpers import LONG, MS

import greensafe as zmq
from greensafe import DeadlineExceeded, OperationTimeout, deadline
from greensafe.hub.turns import FAIR_SHARE, FIRST_SHARE, TURN, call_in_next_turn, let_others_run, next_share
from greensafe.transport import pump as _pump

pytestmark = pytest.mark.usefixtures("limit")

Operation = Callable[[], object]

#: Operations after which nothing else has to be waited for: a share until the loop turns, another one where what is due then
#: (a greenlet that kills) has to be called in its turn.
ENOUGH = 2 * FAIR_SHARE + 1


def _spin(seconds: float) -> None:
    end = monotonic() + seconds
    while monotonic() < end:
        pass


def _joined(context: zmq.Context, bound: int, connected: int) -> tuple[Any, Any]:
    a, b = context.socket(bound), context.socket(connected)
    for sock in (a, b):
        sock.sndhwm = sock.rcvhwm = 0
    a.bind("inproc://turns")
    b.connect("inproc://turns")
    return a, b


def _receiving(receive: Callable[[Any], object]) -> Callable[[zmq.Context], Operation]:
    def make(context: zmq.Context) -> Operation:
        pull, push = _joined(context, zmq.PULL, zmq.PUSH)
        for _ in range(2 * ENOUGH):
            push.send(b"x", zmq.NOBLOCK)
        return lambda: receive(pull)

    return make


def _sending(send: Callable[[Any], object]) -> Callable[[zmq.Context], Operation]:
    return lambda context: partial(send, _joined(context, zmq.PULL, zmq.PUSH)[1])


def _by_frame(sock: Any) -> None:
    sock.send(b"x", zmq.SNDMORE)
    sock.send(b"y")


def _in_lockstep(context: zmq.Context) -> Operation:
    rep, req = _joined(context, zmq.REP, zmq.REQ)
    return lambda: (req.send(b"x"), rep.recv(), rep.send(b"y"), req.recv())


def _empty(sock: Any) -> None:
    with suppress(OperationTimeout):
        sock.recv(timeout=0)


def _events(context: zmq.Context) -> Operation:
    events = context.socket(zmq.PULL).connection_events()

    def operation() -> None:
        with suppress(OperationTimeout):
            events.get(timeout=0)

    return operation


def _request(context: zmq.Context) -> Operation:
    client = zmq.Client("inproc://nobody", context=context)

    def operation() -> None:
        with suppress(OperationTimeout):
            client.request(b"x", timeout=0)

    return operation


def _by_poller(context: zmq.Context) -> Operation:
    pull, _ = _joined(context, zmq.PULL, zmq.PUSH)
    poller = zmq.Poller()
    poller.register(pull, zmq.POLLIN)
    return lambda: poller.poll(0)


def _by_descriptor(context: zmq.Context) -> Operation:
    """Standard error can always be written to, or has an error, which is as good."""
    return lambda: zmq.select([], [2], [], LONG)


def _to_many(context: zmq.Context) -> Operation:
    socks = [context.socket(zmq.PUB) for _ in range(30)]
    return lambda: [sock.send(b"x") for sock in socks]


LOOPS: dict[str, Callable[[zmq.Context], Operation]] = {
    "send": _sending(lambda sock: sock.send(b"x")),
    "send_multipart": _sending(lambda sock: sock.send_multipart([b"x", b"y"])),
    "send by frame": _sending(_by_frame),
    "send_json": _sending(lambda sock: sock.send_json(1)),
    "recv": _receiving(lambda sock: sock.recv()),
    "recv_multipart": _receiving(lambda sock: sock.recv_multipart()),
    "recv_into": _receiving(lambda sock: sock.recv_into(bytearray(1))),
    "recv of what never comes": lambda context: partial(_empty, _joined(context, zmq.PULL, zmq.PUSH)[0]),
    "poll": _receiving(lambda sock: sock.poll()),
    "poll of zero": _receiving(lambda sock: sock.poll(0)),
    "Poller": _by_poller,
    "select of a descriptor": _by_descriptor,
    "events that never come": _events,
    "requests without any time": _request,
    "REQ and REP": _in_lockstep,
    "many sockets": _to_many,
}


@pytest.mark.parametrize("how", ["deadline", "gevent.Timeout", "kill"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_limit_ends_a_loop_that_never_waits(context: zmq.Context, loop: str, how: str) -> None:
    """It comes after a few hundred operations, whatever the operation (51 to 301 times as many it took)."""
    operation = LOOPS[loop](context)
    done = 0

    def work() -> None:
        nonlocal done
        operation()  # a greenlet that is to be killed has begun
        _spin(5 * MS + 2 * TURN)
        while done < 4 * ENOUGH:
            operation()
            done += 1

    if how == "deadline":
        with suppress(DeadlineExceeded), deadline(5 * MS):
            work()
    elif how == "gevent.Timeout":
        with gevent.Timeout(5 * MS, False):
            work()
    else:
        working = gevent.spawn(work)
        gevent.spawn_later(5 * MS, working.kill, block=False)
        working.join()
    assert done <= ENOUGH


def test_descriptors_are_polled_beside_a_loop_that_never_waits(context: zmq.Context) -> None:
    """Whoever waits for a descriptor is woken as soon."""
    operation = LOOPS["send"](context)
    readable, writable = os.pipe()
    woken: list[bool] = []
    watcher = gevent.get_hub().loop.io(readable, 1)
    watcher.start(lambda: (woken.append(True), watcher.stop()))
    os.write(writable, b"x")
    _spin(2 * TURN)
    done = 0
    while not woken and done < 4 * ENOUGH:
        operation()
        done += 1
    watcher.close()
    os.close(readable)
    os.close(writable)
    assert done <= ENOUGH


def test_the_share_follows_from_what_operations_take(context: zmq.Context) -> None:
    """A loop that computes for long before each send gives the loop its turn at each of them, not at each 256th."""
    operation = LOOPS["send"](context)
    beats: list[int] = []
    done = 0
    timer = gevent.get_hub().loop.timer(MS, MS)
    timer.start(lambda: beats.append(done))
    for _ in range(2 * FIRST_SHARE):
        _spin(3 * TURN)
        operation()
        done += 1
    timer.stop()
    timer.close()
    assert beats[0] <= FIRST_SHARE
    assert len(set(beats)) >= FIRST_SHARE / 2


def test_next_share() -> None:
    """Fewer operations if the loop was late, down to one; more if it was not, up to all."""
    assert [next_share(share, 0.0) for share in (1, 16, 256)] == [4, 64, FAIR_SHARE]
    assert [next_share(share, 4 * TURN) for share in (256, 16, 1)] == [64, 4, 1]


def test_nobody_who_yields_starves(context: zmq.Context) -> None:
    """Busy senders and a greenlet that yields by gevent's own means go on side by side."""
    counts = dict.fromkeys("abc", 0)
    operation = LOOPS["send"](context)

    def work(name: str, yielding: Callable[[], object]) -> None:
        while min(counts.values()) < 20 * FAIR_SHARE:
            yielding()
            counts[name] += 1

    gevent.joinall([gevent.spawn(work, name, act) for name, act in zip("abc", [operation, operation, _sleep], strict=True)])
    assert min(counts.values()) >= 20 * FAIR_SHARE


def _sleep() -> None:
    gevent.sleep(0)


def test_an_interrupted_turn_leaves_nothing() -> None:
    """Killed while it gives way a greenlet leaves no timer that would switch to it later."""
    _spin(TURN)
    greenlet = gevent.spawn(let_others_run)
    gevent.sleep(0)
    assert not greenlet.dead
    greenlet.kill()
    _spin(TURN)
    let_others_run()


def test_called_in_the_next_turn() -> None:
    """What is due by then is called before it, unlike a callback of a callback."""
    hub, order = gevent.get_hub(), list[str]()
    done = gevent.event.Event()

    def first() -> None:
        timer.start(lambda: order.append("due"), update=True)
        _spin(5 * MS)
        hub.loop.run_callback(order.append, "callback")
        call_in_next_turn(hub, lambda: (order.append("next turn"), done.set()))

    timer = hub.loop.timer(MS)
    hub.loop.run_callback(first)
    done.wait()
    timer.close()
    assert order == ["callback", "due", "next turn"]


def test_the_loop_turns_while_waiters_take_turns(context: zmq.Context) -> None:
    """Greenlets that receive from one socket and compute are woken by callbacks: those, too, let the loop turn."""
    pull, push = _joined(context, zmq.PULL, zmq.PUSH)
    got: list[int] = []
    total = 50

    def receive() -> None:
        while True:
            pull.recv()
            got.append(len(got))
            _spin(TURN)

    receivers = [gevent.spawn(receive) for _ in range(3)]
    gevent.sleep(0)
    timer = gevent.get_hub().loop.timer(MS, MS)
    beats: list[int] = []
    timer.start(lambda: beats.append(len(got)))
    for _ in range(total):
        push.send(b"x", zmq.NOBLOCK)
    while len(got) < total:
        gevent.sleep(MS)
    timer.stop()
    timer.close()
    gevent.killall(receivers)
    assert len([beat for beat in set(beats) if beat < total]) > total / 10


def test_no_wake_up_is_lost_between_turns(context: zmq.Context) -> None:
    """While those who were woken compute, what arrives for the rest is not forgotten."""
    pull, push = _joined(context, zmq.PULL, zmq.PUSH)
    got: list[bytes] = []

    def receive() -> None:
        got.append(pull.recv())
        push.send(b"x", zmq.NOBLOCK)
        _spin(TURN)

    receivers = [gevent.spawn(receive) for _ in range(10)]
    gevent.sleep(0)
    push.send(b"x", zmq.NOBLOCK)
    gevent.joinall(receivers, raise_error=True)
    assert len(got) == len(receivers)


def test_a_pump_lets_the_loop_turn(context: zmq.Context) -> None:
    """However much has arrived, and whoever answers what is read: a pump does not go on in the same turn for long."""
    sock = plain.Socket(context, zmq.ROUTER)
    sock.bind("inproc://pump")
    total = 4 * _pump.BATCH
    peer = context.socket(zmq.DEALER)
    peer.connect("inproc://pump")
    peer.sndhwm = 0
    for _ in range(total):
        peer.send(b"x", zmq.NOBLOCK)
    got: list[bytes] = []

    def answer(frames: list[bytes]) -> None:
        got.append(frames[1])
        pump.send_soon(frames)
        _spin(TURN / 4)

    beats: list[int] = []
    timer = gevent.get_hub().loop.timer(MS, MS)
    timer.start(lambda: beats.append(len(got)))
    pump = _pump.Pump(sock, answer, lambda: None)
    pump.start()
    while len(got) < total:
        gevent.sleep(MS)
    pump.close(0)
    timer.stop()
    timer.close()
    steps = [after - before for before, after in zip([0, *beats], [*beats, total], strict=True)]
    assert max(steps) <= _pump.BATCH


def test_a_poll_of_zero_in_a_callback_of_the_hub(context: zmq.Context) -> None:
    """The hub's own callbacks cannot give way, and need not."""
    pull, push = _joined(context, zmq.PULL, zmq.PUSH)
    polled: list[int] = []
    hub = gevent.get_hub()
    hub.loop.run_callback(lambda: polled.extend(pull.poll(0) for _ in range(ENOUGH)))
    gevent.sleep(0)
    assert polled == ENOUGH * [0]
    push.send(b"x")
    assert pull.recv() == b"x"
