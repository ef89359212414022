"""Tests of greensafe.green.poll and Socket.poll."""

from __future__ import annotations

import os
import resource
import socket as sockets
import time
from decimal import Decimal
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, check_freed_by_a_kill

import greensafe as zmq
from greensafe import DeadlineExceeded, deadline

pytestmark = pytest.mark.usefixtures("limit")


def _pair(context: zmq.Context) -> tuple[Any, Any]:
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://p")
    b.connect("inproc://p")
    return a, b


def test_socket_poll(context: zmq.Context) -> None:
    """poll takes milliseconds, returns the mask, 0 when they are over, and lets others run."""
    a, b = _pair(context)
    assert a.poll(0) == 0
    start = time.monotonic()
    assert a.poll(5) == 0
    assert time.monotonic() - start >= 5 * MS / (MS / 0.001)
    assert a.poll(0, zmq.POLLOUT) == zmq.POLLOUT
    gevent.spawn_later(2 * MS, b.send, b"x")
    assert a.poll(LONG * 1000) == zmq.POLLIN
    assert a.poll(None, zmq.POLLIN | zmq.POLLOUT) == zmq.POLLIN | zmq.POLLOUT
    with pytest.raises(DeadlineExceeded), deadline(2 * MS):
        b.poll()


@pytest.mark.parametrize("poll", [lambda sock, ms: sock.poll(ms), lambda sock, ms: zmq.zmq_poll([(sock, zmq.POLLIN)], ms)])
def test_limits_beyond_all_measure(context: zmq.Context, poll: Any) -> None:
    """What is longer than anything is no limit; NaN, which would never come either, is a mistake."""
    a, b = _pair(context)
    for milliseconds in (1e300, float("inf"), 10**400):
        gevent.spawn_later(2 * MS, b.send, b"x")
        assert poll(a, milliseconds)
        a.recv()
    for milliseconds in (float("nan"), Decimal("nan")):
        with pytest.raises(ValueError, match="milliseconds"):
            poll(a, milliseconds)


def test_poll_of_zero_yields(context: zmq.Context) -> None:
    """`while not sock.poll(0)` lets others run."""
    a, b = _pair(context)
    gevent.spawn(b.send, b"x")
    assert any(a.poll(0) for _ in range(10))
    poller = zmq.Poller()
    poller.register(b, zmq.POLLIN)
    gevent.spawn(a.send, b"x")
    assert any(poller.poll(0) for _ in range(10))


def test_poller_of_everything(context: zmq.Context) -> None:
    """Green sockets, plain sockets, descriptors and things with fileno() in one Poller."""
    a, b = _pair(context)
    with plain.Context() as other, other.socket(plain.PULL) as pull, other.socket(plain.PUSH) as push:
        pull.bind("inproc://x")
        push.connect("inproc://x")
        left, right = sockets.socketpair()
        third, fourth = sockets.socketpair()
        try:
            poller = zmq.Poller()
            for thing in (a, pull, left, third.fileno()):
                poller.register(thing, zmq.POLLIN)
            assert poller.poll(1) == []
            for send, expected in (
                (lambda: b.send(b"x"), a),
                (lambda: push.send(b"x"), pull),
                (lambda: right.send(b"x"), left.fileno()),
                (lambda: fourth.send(b"x"), third.fileno()),
            ):
                gevent.spawn_later(1 * MS, send)
                ready = dict(poller.poll(LONG * 1000))
                assert list(ready.values()) == [zmq.POLLIN]
                assert next(iter(ready)) in (expected, left)
                for thing in (a, pull):
                    if thing in ready:
                        thing.recv()
                if expected == left.fileno():
                    left.recv(1)
            poller.unregister(a)
            assert a not in poller
        finally:
            for each in (left, right, third, fourth):
                each.close()


def test_another_greenlet_works_on_the_polled_socket(context: zmq.Context) -> None:
    """One greenlet polls a DEALER while another sends on it: the poll wakes at once."""
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.bind("tcp://127.0.0.1:*")
    dealer.connect(router.last_endpoint)
    poller = zmq.Poller()
    poller.register(dealer, zmq.POLLIN)
    for _ in range(20):
        polled = gevent.spawn(poller.poll, LONG * 1000)
        gevent.sleep(0)
        dealer.send(b"x")
        router.send_multipart(router.recv_multipart())
        time.sleep(1 * MS)  # natively: the reply arrives, as a rule, and the hub has not looked yet
        dealer.send(b"y", zmq.NOBLOCK)  # consumes the edge
        assert polled.get() == [(dealer, zmq.POLLIN)]
        assert dealer.recv() == b"x"
        router.recv_multipart()


def test_closed_socket(context: zmq.Context) -> None:
    """A closed socket in a Poller is an error that names it, not a look at standard input."""
    a, _ = _pair(context)
    poller = zmq.Poller()
    poller.register(a)
    a.close()
    with pytest.raises(zmq.ZMQError, match="unregister"):
        poller.poll(1)
    with pytest.raises(zmq.ZMQError):
        a.poll(1)


def test_limits_of_a_poller(context: zmq.Context) -> None:
    """A deadline and a kill end a poll, and nothing is left registered."""
    a, b = _pair(context)
    poller = zmq.Poller()
    poller.register(a, zmq.POLLIN)
    with pytest.raises(DeadlineExceeded), deadline(1 * MS):
        poller.poll()
    killed = gevent.spawn(poller.poll)
    gevent.sleep(0)
    killed.kill()
    assert not a._waits.queue
    b.send(b"x")
    assert poller.poll() == [(a, zmq.POLLIN)]


def test_descriptors_above_1024(context: zmq.Context) -> None:
    """Sockets whose descriptor select(2) cannot take can be polled."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1300:
        pytest.skip("the hard limit of descriptors is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
    padding = []
    try:
        while not padding or padding[-1].fileno() < 1030:
            padding.append(sockets.socket())
        a, b = _pair(context)
        assert a.FD > 1024
        gevent.spawn_later(1 * MS, b.send, b"x")
        poller = zmq.Poller()
        poller.register(a, zmq.POLLIN)
        assert poller.poll(LONG * 1000) == [(a, zmq.POLLIN)]
        a.close(0)
        b.close(0)
    finally:
        for each in padding:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_select(context: zmq.Context) -> None:
    """Sockets and descriptors, each in the list it was given in; empty lists when the limit runs out."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://select")
    b.connect("inproc://select")
    reading, writing = os.pipe()
    try:
        assert zmq.select([a, reading], [], [], 0) == ([], [], [])
        assert zmq.select([a, reading], [b, writing], [a], 2 * MS) == ([], [b, writing], [])
        gevent.spawn(b.send, b"x")
        assert zmq.select([a, reading], [], []) == ([a], [], [])
        os.write(writing, b"x")
        assert zmq.select([a, reading], [a], [a], LONG) == ([a, reading], [a], [])
    finally:
        os.close(reading)
        os.close(writing)


def test_zmq_poll(context: zmq.Context) -> None:
    """The function below Poller waits cooperatively, too, in milliseconds."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://poll")
    b.connect("inproc://poll")
    assert zmq.zmq_poll([(a, zmq.POLLIN)], 2) == []
    gevent.spawn_later(2 * MS, b.send, b"x")
    assert zmq.zmq_poll([(a, zmq.POLLIN), (b, zmq.POLLIN)]) == [(a, zmq.POLLIN)]


def _in_poller(sock: zmq.Socket) -> None:
    poller = zmq.Poller()
    poller.register(sock, zmq.POLLIN)
    poller.register(0, zmq.POLLIN)
    poller.poll(None)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "wait",
    [
        _in_poller,
        lambda sock: zmq.zmq_poll([(sock, zmq.POLLIN)], LONG * 1000),
        lambda sock: zmq.select([sock], [], [sock]),
        lambda sock: sock.poll(),
        lambda sock: sock.recv(),
    ],
    ids=["poller", "zmq_poll", "select", "poll", "recv"],
)
def test_a_killed_greenlet_takes_its_socket_along(wait: Any) -> None:
    """What it held is freed with it: in a web server nobody closes the socket of a browser that is gone."""
    with zmq.Context() as own:

        def act(track: Any) -> None:
            sock = track(own.socket(zmq.SUB))
            sock.linger = 0
            wait(sock)

        check_freed_by_a_kill(act)
