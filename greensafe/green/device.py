"""How are two sockets joined into a device without stopping the hub?

One greenlet per direction copies whole messages; a side that is full holds up its own direction only.
"""

from __future__ import annotations

from typing import Any, NoReturn

import gevent
import zmq

from .socket import Socket

__all__ = ["device"]

_CANNOT_RECEIVE = frozenset({zmq.PUB, zmq.PUSH})
_CANNOT_SEND = frozenset({zmq.SUB, zmq.PULL})


def device(device_type: int, isocket: Socket, osocket: Socket) -> NoReturn:
    """Copy messages between two green sockets for ever, in each direction that their types allow.

    Args:
        device_type: zmq.QUEUE, zmq.FORWARDER or zmq.STREAMER; the sockets' types decide what is done.
        isocket: The frontend.
        osocket: The backend.

    Raises:
        zmq.ZMQError: What ended one of the two directions; the other is ended with it. The sockets stay open.
    """
    pairs = [(isocket, osocket), (osocket, isocket)]
    running = [
        gevent.spawn(_copy, source, sink)
        for source, sink in pairs
        if source.type not in _CANNOT_RECEIVE and sink.type not in _CANNOT_SEND
    ]
    if not running:
        raise ValueError(f"neither of {isocket!r} and {osocket!r} can receive what the other can send")
    try:
        for ended in gevent.iwait(running, count=1):
            ended.get()
    finally:
        gevent.killall(running)
    raise AssertionError("a direction of a device ends only by an exception")


def _copy(source: Any, sink: Any) -> None:
    while True:
        sink.send_multipart(source.recv_multipart(copy=False, timeout=None), copy=False, timeout=None)
