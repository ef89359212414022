"""The faults of zmq.green that programs met in ten years, and what a review of our own sockets found, a test for each."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from helpers import run_python, wait_until

import greensafe as zmq
from greensafe.green._waiting import FAIR_SHARE

pytestmark = pytest.mark.usefixtures("limit")

Pair = Callable[..., tuple[Any, Any]]


def _run(program: str, **environment: str) -> None:
    """Run a program of its own, every warning an error; it says nothing and fails if it has something to say."""
    result = run_python(textwrap.dedent(program), env={"PYTHONWARNINGS": "error", **environment})
    assert (result.code, result.err) == (0, "")


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


def test_a_frame_that_cannot_be_tracked(context: zmq.Context) -> None:
    """It is found before the frames in front of it have left; they were taken for the beginning of the next message."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://untracked")
    b.connect("inproc://untracked")
    for copy in (True, False):
        with pytest.raises(ValueError, match="frame 1 "):
            b.send_multipart([b"a", zmq.Frame(b"untracked"), b"c"], copy=copy, track=True)
    b.send(b"next")
    assert a.recv_multipart() == [b"next"]


def test_zero_copy_messages_do_not_mix_under_patch_all() -> None:
    """pyzmq's garbage collector is a greenlet then, and switched between the frames of a message that it was to keep."""
    _run("""
        from gevent import monkey; monkey.patch_all()
        import gevent
        import greensafe as zmq

        def send(number):
            text = b"%d" % number
            sent.append(b.send_multipart([text, text * 100_000, text], copy=False, track=True))

        sent = []
        with gevent.Timeout(10), zmq.Context() as context:
            a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
            a.bind("inproc://a"), b.connect("inproc://a")
            senders = [gevent.spawn(send, number) for number in range(10)]
            for _ in senders:
                head, body, tail = a.recv_multipart()
                assert head == tail and body == head * 100_000, (head, tail)
            del body
            [tracker.wait(5) for tracker in sent]
            a.close(), b.close()
        """)
