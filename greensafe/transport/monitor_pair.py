"""Attach the PAIR socket that libzmq writes the events of a monitored socket to, and release it.

Rules, each of which keeps a whole context from stopping for good:

* libzmq's I/O thread blocks on a PAIR that is full, closed or not connected. So RCVHWM is 0, and the PAIR is closed only when
  libzmq has let go of it (`release`).
* The PAIR is a backend socket: it has no finalizer, so that the garbage collector never closes it, whatever order it chooses.

It does not know what an event means.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

import zmq
from gevent.hub import Hub
from gevent.monkey import get_original
from zmq.backend import Socket as Backend

__all__ = ["HEAD", "STOPPED", "Sock", "attach", "release", "set_ref", "stop_watching"]

Sock = zmq.Socket[Any]

#: The first frame of an event: its kind and its value.
HEAD = struct.Struct("=HI")

#: The kind of the last event.
STOPPED = int(zmq.EVENT_MONITOR_STOPPED)

#: Milliseconds in which another thread's loop has to turn, and between two checks whether it has.
TURN_LIMIT, TURN = 1_000, 20

_get: Callable[[Any, int], Any] = Backend.get
_recv: Callable[..., bytes] = Backend.recv
_monitor: Callable[[Any, str | None, int], None] = Backend.monitor

_numbers = itertools.count(1)


def attach(sock: Sock, events: int) -> Any:
    """Turn libzmq's monitor on; returns the PAIR that it writes to."""
    pair = Backend(sock.context, int(zmq.PAIR))
    try:
        pair.set(int(zmq.RCVHWM), 0)
        pair.set(int(zmq.LINGER), 0)
        # Not pyzmq's monitor.s-<descriptor>: descriptors come back sooner than libzmq lets go of the name.
        name = f"inproc://greensafe.monitor-{os.getpid()}-{next(_numbers)}"
        _monitor(sock, name, events | STOPPED)
        try:
            pair.connect(name)
        except BaseException:
            _detach(sock)
            raise
    except BaseException:
        pair.close()
        raise
    return pair


def set_ref(watcher: Any, value: bool) -> None:
    """Say whether a watcher keeps the loop running. On libuv gevent forgets that, and only what it wraps knows `ref`."""
    getattr(watcher, "_watcher_ref", watcher).ref = value


def stop_watching(hub: Hub, watcher: Any) -> None:
    """Stop a watcher, or None, of this hub, in its thread."""
    _in_thread_of(hub, _end, watcher, None)


def release(pair: Any, sock: Sock | None, hub: Hub, watcher: Any) -> None:
    """Turn libzmq's monitor off, and close the PAIR as soon as libzmq has let go of it.

    Args:
        pair: What `attach` has returned.
        sock: The monitored socket; None if it is gone.
        hub, watcher: What reads the PAIR, and its watcher or None.
    """
    start = get_original("_thread", "start_new_thread")
    if _detach(sock):
        _in_thread_of(hub, _end, watcher, pair)
        if not pair.closed:
            start(_make_sure, (pair,))
    else:
        stop_watching(hub, watcher)
        start(_see_off, (pair,))


def _detach(sock: Sock | None) -> bool:
    """Turn libzmq's monitor off; False if the socket is closed, but libzmq may not be done with it and with its monitor."""
    # pyzmq's own flag: `closed` asks libzmq, which a finalizer in another thread must not.
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


def _end(hub: Hub, watcher: Any, pair: Any) -> None:
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
        while HEAD.unpack(_recv(pair))[0] != STOPPED:
            _recv(pair)
    except zmq.ZMQError:
        pass  # terminated
    pair.close()
