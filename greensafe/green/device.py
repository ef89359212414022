"""How are two sockets joined into a proxy without stopping the hub?

One greenlet per direction copies whole messages. Rules:

* A message is taken from one side only when the other side and the capture socket have room for it, and nothing switches in
  between: whenever a proxy is killed or ends, each message is on one side or the other. (With a ROUTER_MANDATORY sink only
  libzmq knows which peer is full: then the message in hand waits for it.)
* A side that is full holds up its own direction only; however much is ready, the loop gets a turn after `BATCH` messages.
* What ends one direction ends the other, and is raised; the sockets stay open.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import gevent
import zmq
from gevent.event import Event

from ..hub.log_limiter import Seldom
from ..hub.turns import let_others_run
from .socket import Socket

__all__ = ["device", "proxy", "proxy_steerable"]

log = logging.getLogger("greensafe.green.device")

#: Messages that one direction copies before the loop gets a turn.
BATCH = 100

_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)
_NOBLOCK = int(zmq.NOBLOCK)

_CANNOT_RECEIVE = frozenset({zmq.PUB, zmq.PUSH, *(getattr(zmq, name) for name in ("RADIO", "SCATTER") if hasattr(zmq, name))})
_CANNOT_SEND = frozenset({zmq.SUB, zmq.PULL, *(getattr(zmq, name) for name in ("DISH", "GATHER") if hasattr(zmq, name))})


def proxy(frontend: Socket, backend: Socket, capture: Socket | None = None) -> None:
    """Copy messages between two green sockets until an exception, in each direction that their types allow.

    Args:
        frontend, backend: Bound or connected, and nobody else's meanwhile. They may be the same socket.
        capture: Gets a copy of every message; if it is full (a PUB never is) it holds the proxy up, as in libzmq.

    Raises:
        zmq.ZMQError: What ended one of the directions: ContextTerminated, or ENOTSOCK when a socket was closed.
        ValueError: The sockets' types allow no direction at all.
    """
    _Proxy(frontend, backend, capture).run(None)


def proxy_steerable(frontend: Socket, backend: Socket, capture: Socket | None = None, control: Socket | None = None) -> None:
    """As `proxy`, with commands of one frame on `control`: PAUSE, RESUME, TERMINATE (then this returns) and STATISTICS.

    STATISTICS is answered with eight frames of eight bytes each, in the machine's byte order: frames and bytes received and
    frames and bytes sent by the frontend, then the same by the backend. If `control` is a REP, every other command, known or
    not, is answered with an empty frame.
    """
    _Proxy(frontend, backend, capture).run(control)


def device(device_type: int, frontend: Socket, backend: Socket) -> NoReturn:
    """The old name of `proxy`; `device_type` (zmq.QUEUE, zmq.FORWARDER or zmq.STREAMER) changes nothing."""
    proxy(frontend, backend)
    raise AssertionError("a proxy without a control socket ends only by an exception")


@dataclass(slots=True)
class _Traffic:
    """Frames and bytes of one socket."""

    received: int = 0
    bytes_received: int = 0
    sent: int = 0
    bytes_sent: int = 0


@dataclass
class _Proxy:
    frontend: Any
    backend: Any
    capture: Any
    traffic: tuple[_Traffic, _Traffic] = field(default_factory=lambda: (_Traffic(), _Traffic()))
    flowing: Event = field(default_factory=Event)
    seldom: Seldom = field(default_factory=Seldom)

    def run(self, control: Any) -> None:
        """Run both directions and the commands until one of them ends."""
        front, back = self.traffic
        sides = [(self.frontend, front, self.backend, back), (self.backend, back, self.frontend, front)]
        if self.frontend is self.backend:
            sides.pop()
        allowed = [side for side in sides if side[0].type not in _CANNOT_RECEIVE and side[2].type not in _CANNOT_SEND]
        if not allowed:
            raise ValueError(f"neither of {self.frontend!r} and {self.backend!r} can receive what the other can send")
        self.flowing.set()
        running = [gevent.spawn(self._copy, *side) for side in allowed]
        if control is not None:
            running.append(gevent.spawn(self._obey, control))
        try:
            for ended in gevent.iwait(running, count=1):
                ended.get()
        finally:
            gevent.killall(running)
            self.seldom.flush()

    def _copy(self, source: Any, received: _Traffic, sink: Any, sent: _Traffic) -> None:
        outlets = [sink] if self.capture is None else [sink, self.capture]
        # A REP has room for a reply only once it has received, and then always: one that is both sides is not waited for.
        narrow = [outlet for outlet in outlets if not (outlet is source and source.type == zmq.REP)]
        copied = 0
        while True:
            self.flowing.wait()
            source.poll(None, _POLLIN)
            for outlet in narrow:
                outlet.poll(None, _POLLOUT)
            try:
                # Paused, or taken by somebody else, while this waited for room: then nothing is in hand.
                frames = source.recv_multipart(_NOBLOCK, copy=False) if self.flowing.is_set() else []
            except zmq.Again:
                continue
            if not frames:
                continue
            size = sum(map(len, frames))
            received.received += len(frames)
            received.bytes_received += size
            for outlet in reversed(outlets):
                self._pass_on(outlet, frames)
            sent.sent += len(frames)
            sent.bytes_sent += size
            copied += 1
            if copied % BATCH == 0:
                let_others_run()

    def _obey(self, control: Any) -> None:
        while True:
            command = control.recv_multipart(timeout=None)
            if command == [b"STATISTICS"]:
                control.send_multipart(
                    [
                        struct.pack("=Q", number)
                        for each in self.traffic
                        for number in (each.received, each.bytes_received, each.sent, each.bytes_sent)
                    ],
                    timeout=None,
                )
                continue
            if command == [b"PAUSE"]:
                self.flowing.clear()
            elif command == [b"RESUME"]:
                self.flowing.set()
            if control.type == zmq.REP:
                control.send(b"", timeout=None)
            if command == [b"TERMINATE"]:
                return

    def _pass_on(self, outlet: Any, frames: Sequence[Any]) -> None:
        try:
            outlet.send_multipart(frames, copy=False, timeout=None)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.seldom.say(log, logging.INFO, "message dropped by a proxy: its peer is gone")
