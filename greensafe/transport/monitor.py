"""Read what happens to the connections of a socket.

libzmq reports it on a PAIR socket (`monitor_pair`); a `Monitor` reads that in the hub and hands on each event as a
`ConnectionEvent`. tcp and ipc have events, inproc has none.

Rules:

* Events are read even if nobody waits for any: libzmq never has to keep many.
* The PAIR's ZMQ_FD is edge-like: it is read once after connect, and each time until nothing is left.
* The loop holds weak references only. A monitor neither keeps the loop running nor its socket or its owner alive.
* libzmq has one monitor per socket, and a program that calls pyzmq's own monitor functions takes it over.

It does not know what the events mean for a request.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import gevent
import zmq
from gevent.hub import Hub
from gevent.monkey import get_original
from zmq.backend import Socket as Backend

from ..hub.forks import generation
from ..hub.turns import call_in_next_turn
from .monitor_pair import HEAD, STOPPED, Sock, attach, release, set_ref, stop_watching

__all__ = ["ConnectionEvent", "Monitor"]

_ALL = int(zmq.EVENT_ALL)

_EVENTS = int(zmq.EVENTS)
_FD = int(zmq.FD)
_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)

_get: Callable[[Any, int], Any] = Backend.get
_recv: Callable[..., bytes] = Backend.recv

#: Events that are delivered at once: some 10 ms.
MOST = 1000


@dataclass(frozen=True, slots=True)
class ConnectionEvent:
    """One event of one connection.

    Attributes:
        kind: A zmq.Event, such as CONNECTED, HANDSHAKE_SUCCEEDED or DISCONNECTED.
        value: CONNECTED, ACCEPTED, LISTENING, CLOSED, DISCONNECTED: the connection's file descriptor, which may be in use for
            something else by now. CONNECT_RETRIED: milliseconds until the next try. CONNECT_DELAYED, BIND_FAILED,
            ACCEPT_FAILED, CLOSE_FAILED, HANDSHAKE_FAILED_NO_DETAIL: an errno. HANDSHAKE_FAILED_PROTOCOL: a zmq.Event
            PROTOCOL_ERROR_*. HANDSHAKE_FAILED_AUTH: the ZAP status, 300, 400 or 500.
        endpoint: As libzmq writes it; a host name may have become an address.
    """

    kind: zmq.Event
    value: int
    endpoint: str


class Monitor:
    """The connection events of one socket, handed to a callback in the hub of the thread that made this.

    Args:
        sock: Any socket of this thread, plain or green. The monitor holds it weakly.
        on_event: Called in the hub, or in the caller of `drain`. A bound method is held weakly. An exception of it goes to
            the hub's error handler and the next event is delivered.
        in_background: Read events whenever the loop turns, or only in `drain` and between `keep_loop` and `let_loop`.
        events: A mask of zmq.Event. If the monitor ends by itself (the context is terminated, the socket closed, somebody else
            monitors it), MONITOR_STOPPED is the last event whatever the mask.

    Raises:
        zmq.ZMQError: EMFILE or another error of libzmq; nothing is left behind.
    """

    __slots__ = (
        "__weakref__",
        "_generation",
        "_hub",
        "_in_background",
        "_keepers",
        "_lock",
        "_on_event",
        "_pair",
        "_sock",
        "_watcher",
    )

    def __init__(
        self, sock: Sock, on_event: Callable[[ConnectionEvent], None], events: int = _ALL, *, in_background: bool = True
    ) -> None:
        self._in_background = in_background
        self._pair: Any = None
        self._watcher: Any = None
        self._keepers = 0
        self._generation = generation()
        self._hub: Hub = gevent.get_hub()
        self._lock = get_original("_thread", "allocate_lock")()
        self._sock = weakref.ref(sock)
        self._on_event: Callable[[], Callable[[ConnectionEvent], None] | None] = (
            weakref.WeakMethod(on_event) if isinstance(on_event, MethodType) else lambda: on_event
        )
        self._pair = attach(sock, int(events))
        if in_background:
            self._watch()

    def __repr__(self) -> str:
        return f"<Monitor of {self._sock()!r}{'' if self._pair is not None else ' closed'}>"

    @property
    def is_closed(self) -> bool:
        """Whether no event can come any more: closed, or the socket is, or somebody else monitors it now."""
        return self._pair is None

    def drain(self) -> bool:
        """Deliver what has arrived, here and now, `MOST` events at most: peers of a socket that binds can cause any number.

        May be called in any callback or greenlet, also by `on_event`. Called in another thread than before (a socket may move
        while it is idle) it takes the monitor along.

        Returns:
            Whether that was all. The rest is delivered in the turns that follow.
        """
        if self._pair is None or self._generation != generation():
            return True
        if self._hub is not gevent.get_hub():
            self._move()
        for _ in range(MOST):
            if self._pair is None:
                return True
            try:
                if not _get(self._pair, _EVENTS) & _POLLIN:
                    return True
                head, endpoint = _recv(self._pair, _NOBLOCK), _recv(self._pair, _NOBLOCK)
            except zmq.Again:
                return True
            except zmq.ZMQError:  # the context is terminated
                head, endpoint = HEAD.pack(STOPPED, 0), b""
            kind, value = HEAD.unpack(head)
            if kind == STOPPED:
                self.close()
            self._deliver(ConnectionEvent(zmq.Event(kind), value, endpoint.decode(errors="surrogateescape")))
        call_in_next_turn(self._hub, _on_readable, weakref.ref(self), self._hub)
        return False

    def close(self) -> None:
        """End, quietly and at once; to be called before the socket is closed. Does nothing if done."""
        self.close_before(self._sock())

    def close_before(self, sock: Sock | None) -> None:
        """As close, for a caller that has the socket at hand: in a finalizer weak references are dead."""
        pair, self._pair = self._pair, None
        if pair is None or self._generation != generation():
            return
        watcher, self._watcher = self._watcher, None
        release(pair, sock, self._hub, watcher)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def keep_loop(self) -> None:
        """Keep the loop running for the events, until `let_loop` was called as often: somebody waits for one."""
        self._keepers += 1
        if self._watcher is not None:
            set_ref(self._watcher, True)
        elif self._pair is not None:
            self._watch()

    def let_loop(self) -> None:
        """See `keep_loop`."""
        self._keepers -= 1
        if not self._keepers and self._watcher is not None:
            set_ref(self._watcher, False)
            if not self._in_background:
                watcher, self._watcher = self._watcher, None
                stop_watching(self._hub, watcher)

    def _watch(self) -> None:
        self._watcher = self._hub.loop.io(_get(self._pair, _FD), 1)
        set_ref(self._watcher, self._keepers > 0)
        self._watcher.start(_on_readable, weakref.ref(self), self._hub)
        # What came before the first check gives no edge. Not here and now: the caller has nowhere to receive it yet.
        self._hub.loop.run_callback(_on_readable, weakref.ref(self), self._hub)

    def _move(self) -> None:
        with self._lock:  # the other thread's callback is not reading, and will not begin to
            stop_watching(self._hub, self._watcher)
            self._hub, self._watcher = gevent.get_hub(), None
            if self._in_background or self._keepers:
                self._watch()

    def _run(self, hub: Hub) -> None:
        if self._generation != generation():
            if self._watcher is not None:
                self._watcher.stop()
            return
        with self._lock:
            if self._hub is hub:
                self.drain()

    def _deliver(self, event: ConnectionEvent) -> None:
        on_event = self._on_event()
        if on_event is not None:
            try:
                on_event(event)
            except BaseException:  # noqa: BLE001 - an exception that leaves a callback stops its watcher for good
                self._hub.handle_error(self, *sys.exc_info())


def _on_readable(monitor: weakref.ref[Monitor], hub: Hub) -> None:
    found = monitor()
    if found is not None:
        try:
            found._run(hub)
        except BaseException:  # noqa: BLE001 - see Monitor._deliver
            hub.handle_error(found, *sys.exc_info())
