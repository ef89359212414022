"""Tests of greensafe.green.context."""

from __future__ import annotations

import time

import gevent
import pytest
from helpers import LONG, MS, wait_until

import greensafe as zmq

pytestmark = pytest.mark.usefixtures("limit")


def test_term_does_not_block_the_hub() -> None:
    """term() waits for open sockets cooperatively; who waits on one of them gets ContextTerminated."""
    context = zmq.Context()
    sock = context.socket(zmq.PULL)
    waiter = gevent.spawn(sock.recv)
    gevent.sleep(0)
    ending = gevent.spawn(context.term)
    waiter.join()
    assert isinstance(waiter.exception, zmq.ContextTerminated)
    assert not ending.ready()
    sock.close()
    ending.get()
    assert context.closed
    context.term()


def test_destroy_and_with() -> None:
    """destroy() closes what is left; leaving a `with` of closed sockets terminates."""
    context = zmq.Context()
    sock = context.socket(zmq.PUSH)
    sock.connect("tcp://127.0.0.1:9")
    sock.send(b"x")
    context.destroy(linger=0)
    assert sock.closed
    with zmq.Context() as context, context.socket(zmq.REQ):
        pass
    assert context.closed


def test_linger_is_bounded() -> None:
    """Unsent messages for a peer that is not there end with LINGER, by default 30 s, for a REQ 1 s."""
    with zmq.Context() as context:
        with context.socket(zmq.PUSH) as push, context.socket(zmq.REQ) as req:
            assert push.linger == 30_000
            assert req.linger == 1_000
            push.linger = 0
        context.setsockopt(zmq.LINGER, 7)
        with context.socket(zmq.PUSH) as push:
            assert push.linger == 7


def test_dropped_context_ends_elsewhere() -> None:
    """A context that is dropped warns and is terminated by a thread of its own: the collector never waits for a message."""
    context = zmq.Context()
    sock = context.socket(zmq.PUSH)
    sock.connect("tcp://127.0.0.1:9")
    sock.send(b"x")
    sock.close(50)
    del sock
    start = time.monotonic()
    with pytest.warns(ResourceWarning, match="Unclosed context"):
        del context
    assert time.monotonic() - start < LONG / 2
    gevent.sleep(60 * MS)


def test_instance() -> None:
    """Context.instance() is the same until it is terminated, and apart from pyzmq's own."""
    import zmq as plain

    first = zmq.Context.instance()
    assert zmq.Context.instance() is first
    assert isinstance(first, zmq.Context)
    assert plain.Context._instance is not first
    first.term()
    assert zmq.Context.instance() is not first


def test_shadow(context: zmq.Context) -> None:
    """A shadow context and a shadow socket share what is underneath and do not own it."""
    shadow = zmq.Context.shadow(context)
    sock = shadow.socket(zmq.PAIR)
    sock.bind("inproc://shadow")
    other = context.socket(zmq.PAIR)
    other.connect("inproc://shadow")
    copy = zmq.Socket.shadow(other)
    copy.send(b"x")
    assert sock.recv() == b"x"
    sock.close(0)
    del copy, shadow
    wait_until(lambda: not other.closed)
