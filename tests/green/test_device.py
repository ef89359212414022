"""Tests of greensafe.green.device."""

from __future__ import annotations

import gevent
import pytest

import greensafe as zmq

pytestmark = pytest.mark.usefixtures("limit")


def test_one_direction(context: zmq.Context) -> None:
    """PULL to PUSH copies whole messages in the one direction that there is."""
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind("inproc://in")
    push.bind("inproc://out")
    source, sink = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    source.connect("inproc://in")
    sink.connect("inproc://out")
    device = gevent.spawn(zmq.device, zmq.STREAMER, pull, push)
    source.send_multipart([b"a", b"", b"b"])
    assert sink.recv_multipart() == [b"a", b"", b"b"]
    device.kill()


def test_ends_with_its_sockets(context: zmq.Context) -> None:
    """Closing one of the sockets ends the device with the error."""
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    device = gevent.spawn(zmq.device, zmq.QUEUE, front, back)
    gevent.sleep(0)
    gevent.sleep(0)
    front.close()
    device.join()
    assert isinstance(device.exception, zmq.ZMQError)


def test_nothing_to_copy(context: zmq.Context) -> None:
    """Two sockets that only receive are a mistake that is named."""
    with pytest.raises(ValueError, match="neither"):
        zmq.device(zmq.QUEUE, context.socket(zmq.PULL), context.socket(zmq.PULL))
