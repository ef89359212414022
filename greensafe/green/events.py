"""The connection events of a green socket, as its program gets them and as the socket's own parts share them.

libzmq has one monitor per socket: the users of a green socket share it (`Sharing`). An application gets the events from
`sock.connection_events()`. tcp and ipc have events, inproc has none.

It does not know what the events mean for a request.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import gevent
import zmq
from gevent.hub import Hub

from ..deadlines import DeadlineSignal, check, to_seconds
from ..errors import OperationTimeout
from ..hub.threads import is_elsewhere
from ..hub.timers import start_timer
from ..hub.turns import let_others_run
from ..transport.monitor import ConnectionEvent as ConnectionEvent, Monitor
from ._waits import POLLIN, Waiter, call_soon

if TYPE_CHECKING:
    from ._monitors import MonitoredSocket

__all__ = ["ConnectionEvent", "ConnectionEvents", "Listener", "Sharing"]

#: Reported for each try to accept, and while no descriptor is left libzmq tries without a pause: more than any hub can read.
_ACCEPT_FAILED = int(zmq.EVENT_ACCEPT_FAILED)

_STOPPED = zmq.Event.MONITOR_STOPPED

#: The last event.
_END = ConnectionEvent(_STOPPED, 0, "")

Sock = zmq.Socket[Any]


class Listener(Protocol):
    """A user of a shared monitor; held weakly."""

    def on_event(self, event: ConnectionEvent) -> None:
        """Take an event, in the hub; see `Monitor`. The last one is MONITOR_STOPPED."""


class Sharing:
    """The one monitor of a green socket and its listeners."""

    __slots__ = ("__weakref__", "_listeners", "monitor")

    def __init__(self, sock: Sock) -> None:
        self._listeners: list[weakref.ref[Listener]] = []
        # gevent cannot destroy a thread's libuv loop in which a watcher is left running, so there one runs only while somebody
        # waits; what happens meanwhile is read at the socket's next use.
        hub = gevent.get_hub()
        in_background = hub.main_hub or "libuv" not in type(hub.loop).__module__
        self.monitor = Monitor(sock, self._publish, int(zmq.EVENT_ALL) & ~_ACCEPT_FAILED, in_background=in_background)

    def add(self, listener: Listener, *, first: bool = False) -> None:
        """Have events handed to `listener` until it is removed or collected.

        `first`: before the others, any of which may drain when it is told of an event. So this one gets all of them in order.
        """
        self._listeners.insert(0 if first else len(self._listeners), weakref.ref(listener))

    def remove(self, listener: Listener) -> bool:
        """Take a listener out; returns whether any is left."""
        self._listeners = [each for each in self._listeners if each() not in (None, listener)]
        return bool(self._listeners)

    def close(self, sock: Sock) -> None:
        """End the monitor; the listeners are told."""
        self.monitor.close_before(sock)
        self._publish(_END)
        self._listeners = []

    def _publish(self, event: ConnectionEvent) -> None:
        for each in list(self._listeners):
            listener = each()
            if listener is not None:
                try:
                    listener.on_event(event)
                except BaseException:  # noqa: BLE001 - the others get it all the same
                    gevent.get_hub().handle_error(listener, *sys.exc_info())


class ConnectionEvents:
    """The connection events of one green socket from now on, in order: an iterator, to be used in a `with` or closed.

    It ends when the socket is closed, the context is terminated or the program takes over the monitor with pyzmq's own
    functions. Events that nobody takes are kept.
    """

    def __init__(self, sock: MonitoredSocket) -> None:
        self._sock: MonitoredSocket | None = sock
        self._sharing = sock._share_monitor()
        self._sharing.add(self, first=True)
        self._events: deque[ConnectionEvent] = deque()
        self._waiters: list[Waiter] = []
        self._hub: Hub = gevent.get_hub()  # of those that wait

    def __repr__(self) -> str:
        state = "closed" if self._sock is None else f"of {self._sock!r}"
        return f"<ConnectionEvents {state}, {len(self._events)} to take>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ConnectionEvent:
        """Wait for the next event."""
        event = self._take(None)
        if event is None:
            raise StopIteration
        return event

    def get(self, timeout: float | None = None) -> ConnectionEvent:
        """Wait for the next event.

        Args:
            timeout: Seconds; None waits without limit, 0 takes only what has arrived.

        Raises:
            OperationTimeout: The limit ran out; no event is lost.
            zmq.ZMQError: ENOTSOCK if the events have ended.
        """
        event = self._take(to_seconds(timeout))
        if event is None:
            raise zmq.ZMQError(zmq.ENOTSOCK, "the events have ended: the socket or its context is closed")
        return event

    def close(self) -> None:
        """Stop collecting; what was not taken is dropped. Does nothing if done."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock._unshare_monitor(self)
            self._wake_all()
        self._events.clear()

    def on_event(self, event: ConnectionEvent) -> None:
        """Keep an event for whoever takes it."""
        if event.kind == _STOPPED:
            self._sock = None
            self._wake_all()
            return
        self._events.append(event)
        for waiter in self._waiters[: len(self._events)]:
            call_soon(self._hub, waiter.wake)

    def _take(self, seconds: float | None) -> ConnectionEvent | None:
        at = None if seconds is None else monotonic() + seconds
        if self._waiters and is_elsewhere(self._hub):
            raise RuntimeError("greenlets of another thread wait for these events: ask for events of your own there")
        self._sharing.monitor.drain()
        while not self._events and self._sock is not None:
            if at is not None and monotonic() >= at:
                if not seconds:
                    let_others_run()  # a loop of such calls must not stop the hub
                raise OperationTimeout(seconds, "connection_events", self._sock._endpoint())
            try:
                check(at is not None)
                self._wait(at)
            except DeadlineSignal as signal:
                if not self._events:
                    raise
                signal.put_back()
        return self._events.popleft() if self._events else None

    def _wait(self, at: float | None) -> None:
        hub = self._hub = gevent.get_hub()
        waiter = Waiter(gevent.getcurrent().switch, POLLIN)
        timer = None if at is None else start_timer(hub, at - monotonic(), waiter.wake)
        self._waiters.append(waiter)
        self._sharing.monitor.keep_loop()
        try:
            hub.switch()
        finally:
            waiter.end()
            self._waiters.remove(waiter)
            self._sharing.monitor.let_loop()
            if timer is not None:
                timer.stop()
                timer.close()

    def _wake_all(self) -> None:
        for waiter in self._waiters:
            call_soon(self._hub, waiter.wake)
