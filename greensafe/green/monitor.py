"""What happens to the connections of a socket?

libzmq reports it on a PAIR socket; a `Monitor` reads that in the hub and hands on each event as a `ConnectionEvent`. An
application gets the events of a green socket from `sock.connection_events()`. tcp and ipc have events, inproc has none.

Rules, each of which keeps a whole context from stopping for good:

* libzmq's I/O thread blocks on a PAIR that is full, closed or not connected. So RCVHWM is 0, events are read even if nobody
  waits for anything, and the PAIR is closed only when libzmq has let go of it (`Monitor.close`).
* The PAIR is a backend socket: it has no finalizer, so that the garbage collector never closes it, whatever order it chooses.
* The PAIR's ZMQ_FD is edge-like: it is read once after connect, and each time until nothing is left.
* The loop holds weak references only. A monitor neither keeps the loop running nor its socket or its owner alive.
* libzmq has one monitor per socket: the users of a green socket share it (`Sharing`), and a program that calls pyzmq's own
  monitor functions takes it over.

It does not know what the events mean for a request.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import gevent
import zmq
from gevent.hub import Hub
from gevent.monkey import get_original
from zmq.backend import Socket as Backend

from ..deadlines import DeadlineSignal, check, to_seconds
from ..errors import OperationTimeout
from ..hub.forks import generation
from ..hub.threads import is_elsewhere
from ..hub.timers import start_timer
from ..hub.turns import call_in_next_turn, let_others_run
from ._waits import Waiter, call_soon

if TYPE_CHECKING:
    from ._monitors import MonitoredSocket

__all__ = ["ConnectionEvent", "ConnectionEvents", "Listener", "Monitor", "Sharing"]

_ALL = int(zmq.EVENT_ALL)

#: Said for each try to accept, and while no descriptor is left libzmq tries without a pause: more than any hub can read.
_ACCEPT_FAILED = int(zmq.EVENT_ACCEPT_FAILED)

_STOPPED = int(zmq.EVENT_MONITOR_STOPPED)
_EVENTS = int(zmq.EVENTS)
_FD = int(zmq.FD)
_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)

_get: Callable[[Any, int], Any] = Backend.get
_recv: Callable[..., bytes] = Backend.recv
_monitor: Callable[[Any, str | None, int], None] = Backend.monitor

#: Milliseconds in which another thread's loop has to turn, and between two looks whether it has.
TURN_LIMIT, TURN = 1_000, 20

#: Events that are delivered at once: some 10 ms.
MOST = 1000

#: The first frame of an event: its kind and its value.
_HEAD = struct.Struct("=HI")

_numbers = itertools.count(1)

Sock = zmq.Socket[Any]


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


#: The last event.
_END = ConnectionEvent(zmq.Event.MONITOR_STOPPED, 0, "")


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
        self._pair = _attach(sock, int(events))
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
                head, endpoint = _HEAD.pack(_STOPPED, 0), b""
            kind, value = _HEAD.unpack(head)
            if kind == _STOPPED:
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
        start = get_original("_thread", "start_new_thread")
        if _detach(sock):
            _in_thread_of(self._hub, _release, watcher, pair)
            if not pair.closed:
                start(_make_sure, (pair,))
        else:
            _in_thread_of(self._hub, _release, watcher, None)
            start(_see_off, (pair,))

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def keep_loop(self) -> None:
        """Keep the loop running for the events, until `let_loop` was called as often: somebody waits for one."""
        self._keepers += 1
        if self._watcher is not None:
            _set_ref(self._watcher, True)
        elif self._pair is not None:
            self._watch()

    def let_loop(self) -> None:
        """See `keep_loop`."""
        self._keepers -= 1
        if not self._keepers and self._watcher is not None:
            _set_ref(self._watcher, False)
            if not self._in_background:
                watcher, self._watcher = self._watcher, None
                _in_thread_of(self._hub, _release, watcher, None)

    def _watch(self) -> None:
        self._watcher = self._hub.loop.io(_get(self._pair, _FD), 1)
        _set_ref(self._watcher, self._keepers > 0)
        self._watcher.start(_on_readable, weakref.ref(self), self._hub)
        # What came before the first look gives no edge. Not here and now: the caller has nowhere to receive it yet.
        self._hub.loop.run_callback(_on_readable, weakref.ref(self), self._hub)

    def _move(self) -> None:
        with self._lock:  # the other thread's callback is not reading, and will not begin to
            _in_thread_of(self._hub, _release, self._watcher, None)
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


def _set_ref(watcher: Any, value: bool) -> None:
    """Say whether a watcher keeps the loop running. On libuv gevent forgets that, and only what it wraps knows `ref`."""
    getattr(watcher, "_watcher_ref", watcher).ref = value


def _attach(sock: Sock, events: int) -> Any:
    """Turn libzmq's monitor on; returns the PAIR that it writes to."""
    pair = Backend(sock.context, int(zmq.PAIR))
    try:
        pair.set(int(zmq.RCVHWM), 0)
        pair.set(int(zmq.LINGER), 0)
        # Not pyzmq's monitor.s-<descriptor>: descriptors come back sooner than libzmq lets go of the name.
        name = f"inproc://greensafe.monitor-{os.getpid()}-{next(_numbers)}"
        _monitor(sock, name, events | _STOPPED)
        try:
            pair.connect(name)
        except BaseException:
            _detach(sock)
            raise
    except BaseException:
        pair.close()
        raise
    return pair


def _detach(sock: Sock | None) -> bool:
    """Turn libzmq's monitor off; False if the socket is closed, but libzmq may not be done with it and with its monitor."""
    if sock is None or sock._closed:
        return False
    try:
        _monitor(sock, None, 0)
    except zmq.ZMQError as error:
        return error.errno == zmq.ETERM  # a terminated context waits for nobody, so nothing blocks any more
    return True


def _in_thread_of(hub: Hub, function: Callable[..., None], *args: Any) -> None:
    """Call at once if `hub` is this thread's or turns no more, else in its own thread."""
    is_here = hub.thread_ident == get_original("_thread", "get_ident")()
    if is_here or hub.loop is None or hub.dead or hub.thread_ident not in sys._current_frames():
        function(hub, *args)
    else:
        hub.loop.run_callback_threadsafe(function, hub, *args)


def _make_sure(pair: Any) -> None:
    """In a native thread: close a PAIR whose thread lives but turns its loop no more, such as a threadpool's worker."""
    pause = get_original("time", "sleep")
    for _ in range(TURN_LIMIT // TURN):
        if pair.closed:
            return
        pause(TURN / 1000)
    pair.close()


def _release(hub: Hub, watcher: Any, pair: Any) -> None:
    # The watcher first: libuv aborts the process if it finds a descriptor closed that it watches. A destroyed hub has taken
    # its loop along: libev would complain, libuv use freed memory.
    if watcher is not None and hub.loop is not None:
        watcher.stop()
        watcher.close()
    if pair is not None:
        pair.close()


def _see_off(pair: Any) -> None:
    """In a native thread: wait until libzmq has ended a monitor whose socket was closed before it; then close the PAIR."""
    try:
        while _HEAD.unpack(_recv(pair))[0] != _STOPPED:
            _recv(pair)
    except zmq.ZMQError:
        pass  # terminated
    pair.close()


class Listener(Protocol):
    """One who uses a shared monitor; held weakly."""

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
        self.monitor = Monitor(sock, self._publish, _ALL & ~_ACCEPT_FAILED, in_background=in_background)

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
        waiter = Waiter(gevent.getcurrent().switch, _POLLIN)
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
