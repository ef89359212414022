"""Tests of greensafe.green._waits: who waits on a socket, and who is woken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe.green import _waits
from greensafe.green._waits import POLLIN, POLLOUT, Waits, events_of

pytestmark = pytest.mark.usefixtures("limit")


@pytest.fixture
def pull(context: zmq.Context) -> Iterator[plain.Socket[bytes]]:
    """A plain socket that only these tests wait on."""
    sock: plain.Socket[bytes] = plain.Socket(context, zmq.PULL)
    sock.bind("inproc://waits")
    yield sock
    sock.close(0)


@pytest.fixture
def push(context: zmq.Context, pull: plain.Socket[bytes]) -> Any:
    """The other side."""
    sock = context.socket(zmq.PUSH)
    sock.connect("inproc://waits")
    return sock


def test_waiters_are_woken_in_turn(pull: plain.Socket[bytes], push: Any) -> None:
    """One message wakes the first of them; it takes the message, and the second sleeps on."""
    waits, woken = Waits(), []

    def wait(name: str) -> None:
        while not events_of(pull) & POLLIN:
            waits.wait(pull, POLLIN, None)
        woken.append((name, pull.recv(zmq.NOBLOCK)))

    greenlets = [gevent.spawn(wait, name) for name in "ab"]
    wait_until(lambda: len(waits.queue) == 2)
    push.send(b"1")
    wait_until(lambda: woken)
    assert woken == [("a", b"1")]
    assert len(waits.queue) == 1
    push.send(b"2")
    gevent.joinall(greenlets, raise_error=True)
    assert woken == [("a", b"1"), ("b", b"2")]
    assert waits.watcher is not None
    assert not waits.watcher.active


def test_nobody_is_woken_for_what_he_does_not_wait_for(pull: plain.Socket[bytes], push: Any) -> None:
    """A waiter for POLLOUT on a socket that never sends sleeps on, or until its limit, whatever arrives."""
    waits = Waits()
    waiter = gevent.spawn(waits.wait, pull, POLLOUT, None)
    wait_until(lambda: waits.queue)
    push.send(b"x")
    wait_until(lambda: events_of(pull) & POLLIN)
    waits.recheck(pull)
    for _ in range(5):
        gevent.sleep(MS)
    assert not waiter.dead
    waiter.kill()
    at = monotonic() + 5 * MS
    while monotonic() < at:  # libuv rounds down
        waits.wait(pull, POLLOUT, at)
    assert waits.queue == []
    waits.abort()()


def test_an_edge_that_a_call_consumed_is_given_back(pull: plain.Socket[bytes], push: Any) -> None:
    """Whoever reads EVENTS consumes the edge of ZMQ_FD; after `recheck` the waiter is woken all the same."""
    waits = Waits()
    waiter = gevent.spawn(lambda: (events_of(pull), waits.wait(pull, POLLIN, None)))
    wait_until(lambda: waits.queue)
    push.send(b"x")
    assert events_of(pull) & POLLIN
    waits.recheck(pull)
    waiter.get()


def test_abort_wakes_everybody(pull: plain.Socket[bytes]) -> None:
    """Each meets the error of the closed socket in its own next try."""
    waits = Waits()
    waiters = [gevent.spawn(waits.wait, pull, POLLIN, None) for _ in range(3)]
    wait_until(lambda: len(waits.queue) == 3)
    waits.abort()()
    pull.close(0)
    gevent.joinall(waiters, raise_error=True)
    assert (waits.queue, waits.watcher, events_of(pull)) == ([], None, POLLIN | POLLOUT)


def test_a_kill_leaves_nothing_behind(pull: plain.Socket[bytes]) -> None:
    """Killed or overdue, a waiter is out of the queue, and the last one stops the watcher."""
    waits = Waits()
    waiter = gevent.spawn(waits.wait, pull, POLLIN, monotonic() + LONG)
    wait_until(lambda: waits.queue)
    waiter.kill()
    assert waits.queue == []
    assert not waits.watcher.active
    waits.abort()()


def test_two_threads_cannot_wait_on_one_socket(pull: plain.Socket[bytes]) -> None:
    """The second one is told, and the first sleeps on."""
    waits, errors = Waits(), []
    waiter = gevent.spawn(waits.wait, pull, POLLIN, None)
    wait_until(lambda: waits.queue)

    def other() -> None:
        try:
            waits.wait(pull, POLLIN, None)
        except RuntimeError as error:
            errors.append(str(error))
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    wait_until(lambda: not thread.is_alive())
    assert ["another thread" in text for text in errors] == [True]
    assert not waiter.dead
    waiter.kill()
    waits.abort()()


def test_what_comes_late_is_for_who_was_first(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that arrive while the queue is gone through go to those who were passed over, not to those behind them."""
    a, b = context.socket(plain.PAIR), context.socket(plain.PAIR)
    a.bind("inproc://turn")
    b.connect("inproc://turn")
    waiters = [gevent.spawn(a.recv) for _ in range(4)]
    wait_until(lambda: len(a._waits.queue) == 4)
    looks = 0

    def events_of(sock: Any) -> int:
        nonlocal looks
        looks += 1
        found = real(sock)
        if looks == 2:
            for number in range(4):
                b.send(b"%d" % number, plain.NOBLOCK)
        return found

    real = _waits.events_of
    monkeypatch.setattr(_waits, "events_of", events_of)
    gevent.get_hub().loop.run_callback(a._waits._on_readable, a)
    gevent.joinall(waiters, timeout=LONG)
    assert [waiter.value for waiter in waiters] == [b"%d" % number for number in range(4)]
