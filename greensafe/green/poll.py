"""How does one greenlet wait for several sockets and file descriptors at once?

A Poller queues one waiter on every green socket and starts one io watcher for every plain socket or descriptor, so any number
of them can be watched (no select(2), no limit of 1024) and nothing ticks while nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

import gevent
import zmq
from zmq.backend import zmq_poll as _look

from ..deadlines import check, to_seconds
from ..hub.timers import start_timer
from ..hub.turns import TURN, let_others_run, seconds_since_turn
from ._waits import POLLIN, POLLOUT, Waiter, poll_until
from .socket import Socket

__all__ = ["Poller", "select", "zmq_poll"]

_POLLERR = int(zmq.POLLERR)


class Poller(zmq.Poller):
    """A zmq.Poller whose poll lets other greenlets run."""

    def poll(self, timeout: float | None = None) -> list[tuple[Any, int]]:
        """Wait for events; returns (socket or descriptor, mask) pairs, an empty list if the limit ran out.

        Args:
            timeout: MILLISECONDS, as in pyzmq; None or negative: no limit of its own (a deadline scope still holds).

        Raises:
            zmq.ZMQError: ENOTSOCK if a registered socket is closed, before or while this waits.
        """
        at = poll_until(timeout)
        if self._is_greedy() or timeout == 0:
            let_others_run()
        while True:
            events = self._ready()
            if events or (at is not None and monotonic() >= at):
                return events
            check(at is not None)
            self._wait(at)

    def _is_greedy(self) -> bool:
        """Count this call for every socket; whether one of them has been used too often in a row without a wait.

        Where nothing can be counted the clock says so.
        """
        counted = [sock._waits for sock, _ in self.sockets if isinstance(sock, Socket)]
        for waits in counted:
            waits.share -= 1
        if counted and all(waits.share >= 0 for waits in counted):
            return False
        late = seconds_since_turn()
        for waits in counted:
            waits.adapt(late)
        return bool(counted) or late > TURN

    def _ready(self) -> list[tuple[Any, int]]:
        for sock, _ in self.sockets:
            if isinstance(sock, Socket):
                sock._waits.check_owner()
            if isinstance(sock, zmq.Socket) and sock.closed:
                # zmq_poll would look at descriptor 0 instead.
                raise zmq.ZMQError(zmq.ENOTSOCK, f"{sock!r} is closed: unregister it first")
        events: list[tuple[Any, int]] = _look(self.sockets, 0)
        for sock, flags in self.sockets:
            if isinstance(sock, Socket):
                sock._recheck()
                if sock._waits.lost(sock) & flags:
                    events = _with_input(events, sock)
        return events

    def _wait(self, at: float | None) -> None:
        hub = gevent.get_hub()
        waiter = Waiter(gevent.getcurrent().switch, POLLIN | POLLOUT)
        undo: list[Callable[[], None]] = []
        try:
            for sock, flags in self.sockets:
                undo.append(_have_woken(hub, sock, int(flags), waiter))
            if at is not None:
                timer = start_timer(hub, at - monotonic(), waiter.wake)
                undo += [timer.stop, timer.close]
            hub.switch()
        finally:
            waiter.end()
            for each in undo:
                each()


def _with_input(events: list[tuple[Any, int]], sock: Socket) -> list[tuple[Any, int]]:
    """Add POLLIN of one socket."""
    found = dict(events)
    found[sock] = found.get(sock, 0) | POLLIN
    return list(found.items())


def _have_woken(hub: Any, sock: Any, flags: int, waiter: Waiter) -> Callable[[], None]:
    """Have `waiter` woken by one socket or descriptor; returns what ends that."""
    if isinstance(sock, Socket):
        own, waits = Waiter(waiter.wake, flags), sock._waits
        waits.add(sock, own)

        def remove() -> None:
            own.asleep = False
            waits.remove(own)

        return remove
    if isinstance(sock, zmq.Socket):
        fd, mask = sock.FD, 1
    else:
        fd = sock if isinstance(sock, int) else sock.fileno()
        mask = (1 if flags & (POLLIN | _POLLERR) else 0) | (2 if flags & POLLOUT else 0)
    watcher = hub.loop.io(fd, mask)
    watcher.start(waiter.wake)

    def close() -> None:
        watcher.stop()
        watcher.close()

    return close


def zmq_poll(sockets: Iterable[tuple[Any, int]], timeout: float | None = -1) -> list[tuple[Any, int]]:
    """Wait for events once, as `Poller.poll` does; `timeout` in MILLISECONDS."""
    poller = Poller()
    for sock, flags in sockets:
        poller.register(sock, flags)
    return poller.poll(timeout)


def select(
    rlist: Iterable[Any], wlist: Iterable[Any], xlist: Iterable[Any], timeout: float | None = None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Wait until some of the sockets or descriptors are ready, as `select.select` does.

    Args:
        rlist, wlist, xlist: Watched for messages, for room to send, for errors.
        timeout: SECONDS; None or negative: no limit of its own (a deadline scope still holds).

    Returns:
        Those of each list that are ready, in its order; three empty lists if the limit ran out.
    """
    wanted = [(list(rlist), POLLIN), (list(wlist), POLLOUT), (list(xlist), _POLLERR)]
    flags: dict[Any, int] = {}
    for socks, flag in wanted:
        for sock in socks:
            flags[sock] = flags.get(sock, 0) | flag
    seconds = to_seconds(timeout)
    if timeout is not None and timeout < 0:
        seconds = None
    events = dict(zmq_poll(flags.items(), None if seconds is None else seconds * 1000))
    readable, writable, failed = ([sock for sock in socks if events.get(sock, 0) & flag] for socks, flag in wanted)
    return readable, writable, failed
