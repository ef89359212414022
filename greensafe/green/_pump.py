"""How do messages get in and out of a socket that no greenlet waits on?

A pump drives a plain ROUTER or DEALER from callbacks in the hub: it reads what is there and hands each message to
`on_message`, sends at once what can be sent and keeps the rest for later. No greenlet, no switch and no timer per message.

Rules:

* Any libzmq call may consume the edge of ZMQ_FD, so every send schedules one look at EVENTS in this turn of the loop (many
  sends share it).
* At most `BATCH` messages are read before the loop gets a turn.
* A message for a peer whose pipe is full waits in that peer's own queue, and only that peer's: `OUTBOX` messages at most,
  what is beyond is dropped and counted. `send` never blocks.
* An exception of `on_message` goes to the hub's error handler; the pump goes on.

It does not know what is in the messages, but that a ROUTER's first frame names the peer.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
import zmq
from zmq.backend import Socket as Backend

__all__ = ["Pump"]

#: Messages read before the loop gets a turn.
BATCH = 100

#: Messages kept for one peer whose pipe is full, beyond its high-water mark.
OUTBOX = 1000

#: Seconds after which a full peer is tried again: a ROUTER is writable as soon as any peer is, so no event tells.
RETRY = 0.02

_EVENTS = int(zmq.EVENTS)
_FD = int(zmq.FD)
_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE = int(zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)
_MORE = _NOBLOCK | _SNDMORE

_get: Callable[[Any, int], Any] = Backend.get
_recv: Callable[..., Any] = Backend.recv
_send: Callable[..., Any] = Backend.send


class Pump:
    """The traffic of one plain socket.

    Attributes:
        dropped: Messages thrown away because their peer's queue was full.
        unreachable: Messages thrown away because their peer is gone (EHOSTUNREACH).
        is_paused: No message is read while this is set, so peers feel backpressure; `resume` clears it.
    """

    __slots__ = (
        "_hub",
        "_is_closed",
        "_is_router",
        "_on_message",
        "_outbox",
        "_retry",
        "_scheduled",
        "_sock",
        "_started",
        "_watcher",
        "dropped",
        "is_paused",
        "unreachable",
    )

    def __init__(self, sock: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        self._sock = sock
        self._on_message = on_message
        self._is_router = sock.type == zmq.ROUTER
        self._hub = gevent.get_hub()
        self._watcher = self._hub.loop.io(_get(sock, _FD), 1)
        self._outbox: dict[bytes, deque[list[bytes]]] = {}
        self._retry: Any = None
        self._scheduled = False
        self._started = False
        self._is_closed = False
        self.is_paused = False
        self.dropped = 0
        self.unreachable = 0

    @property
    def queued(self) -> int:
        """Messages that wait for a peer with a full pipe."""
        return sum(map(len, self._outbox.values()))

    @property
    def has_input(self) -> bool:
        """Whether messages have arrived that are not read yet; they are read in the next turn unless paused."""
        if not _get(self._sock, _EVENTS) & _POLLIN:
            return False
        if self._started and not self._scheduled and not self.is_paused:
            self._schedule()
        return True

    def start(self) -> None:
        """Begin to read. Also looks at once, since an edge may have passed before."""
        if not self._started:
            self._started = True
            self._watcher.start(self._run)
            self._schedule()

    def stop(self) -> None:
        """Stop reading until `start`; messages stay where they are and the loop is not kept alive by this socket."""
        if self._started:
            self._started = False
            self._watcher.stop()

    def resume(self) -> None:
        """Read again after `is_paused`."""
        if self.is_paused:
            self.is_paused = False
            self._schedule()

    def close(self, linger: int) -> None:
        """Stop and close the socket; what libzmq has queued may leave for `linger` milliseconds more."""
        self.stop()
        self._stop_retry()
        self._watcher.close()
        self._outbox.clear()
        self._is_closed = True
        self._sock.close(linger)

    def send(self, frames: list[bytes]) -> None:
        """Send now, or as soon as the peer has room. From any greenlet of this hub's thread, the hub included."""
        key = frames[0] if self._is_router else b""
        waiting = self._outbox.get(key) if self._outbox else None
        if waiting is not None:
            self._keep(waiting, frames)
        elif not self._try_send(frames):
            self._outbox[key] = deque([frames])
            self._start_retry()
        if not self._scheduled and self._started:
            self._schedule()

    def drain(self) -> None:
        """Read what has arrived, here and now."""
        self._read()

    def flush(self) -> None:
        """Try again to send what is kept."""
        for key, waiting in list(self._outbox.items()):
            while waiting and self._try_send(waiting[0]):
                waiting.popleft()
            if not waiting:
                del self._outbox[key]
        if not self._outbox:
            self._stop_retry()

    def _try_send(self, frames: list[bytes]) -> bool:
        """False if the peer has no room. Nothing switches in here, so a message goes out whole."""
        sock = self._sock
        last = len(frames) - 1
        try:
            try:
                _send(sock, frames[0], _MORE if last else _NOBLOCK)
            except zmq.Again:
                # libzmq throttles its commands: reading EVENTS processes them, then the second try tells the truth.
                _get(sock, _EVENTS)
                _send(sock, frames[0], _MORE if last else _NOBLOCK)
            for frame in frames[1:last]:
                _send(sock, frame, _MORE)
            if last:
                _send(sock, frames[last], _NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.unreachable += 1
        return True

    def _keep(self, waiting: deque[list[bytes]], frames: list[bytes]) -> None:
        if len(waiting) < OUTBOX:
            waiting.append(frames)
        else:
            self.dropped += 1

    def _schedule(self) -> None:
        self._scheduled = True
        self._hub.loop.run_callback(self._run)

    def _run(self) -> None:
        self._scheduled = False
        if not self._started:
            return
        try:
            if self._outbox:
                self.flush()
            events = _get(self._sock, _EVENTS)
            if events & _POLLIN and not self.is_paused:
                self._read()
                if self._started and not self._scheduled and not self.is_paused and _get(self._sock, _EVENTS) & _POLLIN:
                    self._schedule()
        except BaseException:  # noqa: BLE001 - an exception that leaves a callback stops its watcher for good
            self._hub.handle_error(self, *sys.exc_info())

    def _read(self) -> None:
        sock = self._sock
        for _ in range(BATCH):
            if self.is_paused or self._is_closed:
                return
            try:
                frame = _recv(sock, _NOBLOCK, False)
            except zmq.Again:
                return
            frames = [frame.bytes]
            while frame.more:
                frame = _recv(sock, _NOBLOCK, False)
                frames.append(frame.bytes)
            try:
                self._on_message(frames)
            except BaseException:  # noqa: BLE001 - one message's failure is reported and the next is read
                self._hub.handle_error(self, *sys.exc_info())

    def _start_retry(self) -> None:
        if self._retry is None:
            self._retry = self._hub.loop.timer(RETRY, RETRY)
            self._retry.start(self._on_retry)

    def _stop_retry(self) -> None:
        if self._retry is not None:
            self._retry.stop()
            self._retry.close()
            self._retry = None

    def _on_retry(self) -> None:
        try:
            self.flush()
        except BaseException:  # noqa: BLE001 - see _run
            self._hub.handle_error(self, *sys.exc_info())
        if self._started and not self._scheduled:
            self._schedule()
