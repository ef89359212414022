"""The faults of zmq.green that programs met in ten years, and what a review of our own sockets found, a test for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import pytest
from helpers import wait_until

import greensafe as zmq
from greensafe.green._waiting import FAIR_SHARE

pytestmark = pytest.mark.usefixtures("limit")

Pair = Callable[..., tuple[Any, Any]]

# A message is whole.


def _send_by_frame(sock: Any, name: bytes, count: int) -> list[list[bytes]]:
    """Send messages of three frames that belong together, each frame by a send of its own."""
    messages = [[b"%s%d" % (name, number), b"", b"%s%d" % (name, number)] for number in range(count)]
    for head, middle, tail in messages:
        sock.send(head, zmq.SNDMORE)
        sock.send(middle, zmq.SNDMORE)
        sock.send(tail)
    return messages


@pytest.mark.parametrize("is_read", [True, False])
def test_two_greenlets_send_frame_by_frame(pair: Pair, is_read: bool) -> None:
    """Their messages do not mix, whether another greenlet waits in recv on the socket or the loop gets its turn in between."""
    a, b = pair(zmq.DEALER, zmq.DEALER)
    reader = gevent.spawn(a.recv) if is_read else None
    gevent.sleep(0)
    senders = [gevent.spawn(_send_by_frame, a, name, FAIR_SHARE) for name in (b"x", b"y")]
    got = [b.recv_multipart() for _ in range(2 * FAIR_SHARE)]
    assert sorted(got) == sorted(message for sender in senders for message in sender.get())
    if reader is not None:
        reader.kill()


def test_two_greenlets_receive_frame_by_frame(pair: Pair) -> None:
    """Each gets whole messages, although the other one waits in the queue before it asks for its second frame."""
    a, b = pair(zmq.DEALER, zmq.DEALER)
    got: list[list[bytes]] = []

    def receive() -> None:
        while True:
            message = [a.recv()]
            while a.rcvmore:
                message.append(a.recv())
            got.append(message)

    receivers = [gevent.spawn(receive) for _ in range(2)]
    gevent.sleep(0)
    sent = _send_by_frame(b, b"z", FAIR_SHARE)
    wait_until(lambda: len(got) == len(sent))
    assert got == sent
    gevent.killall(receivers)
