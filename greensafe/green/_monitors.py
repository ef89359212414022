"""How is a socket watched without ever stopping libzmq's I/O thread?

libzmq hands every event to a PAIR socket and waits for room there: with the PAIR closed, not connected yet or full, the next
event stops the I/O thread and with it the whole context, for good; `monitor()` then stops whoever calls it. Rules:

* The PAIR is connected before the first event can come, and holds any number of events that nobody reads.
* The monitor stops before its PAIR or the socket is closed, in whichever order a program does that.
* Every monitor has a name of its own: libzmq frees one some time after the monitor has stopped, and descriptors come again.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from typing import Any, Self

import zmq

from ._objects import ObjectSocket

__all__ = ["MonitoredSocket"]

_numbers = itertools.count()


class MonitoredSocket(ObjectSocket):
    """The part of a green socket that knows monitors; see `socket.Socket`."""

    _monitor_socket: Any
    _monitored: weakref.ref[Any] | None = None  # of a monitor's PAIR: whose events it gets

    def get_monitor_socket(self, events: int | None = None, addr: str | None = None) -> Self:
        """Return a PAIR that receives this socket's events, as in pyzmq; the same one until it is closed or disabled.

        What nobody reads is kept in memory. The monitor ends when either of the two sockets is closed.
        """
        known = self._monitor_socket
        if known is not None and not known.closed:
            return known  # type: ignore[no-any-return]
        if addr is None:
            addr = f"inproc://monitor.s-{self.FD}.{next(_numbers)}"
        pair = self.context.socket(zmq.PAIR)
        try:
            pair.setsockopt(zmq.RCVHWM, 0)
            pair.connect(addr)
            self.monitor(addr, zmq.EVENT_ALL if events is None else events)
        except BaseException:
            pair.close(0)
            raise
        pair.__dict__["_monitored"] = weakref.ref(self)
        self._monitor_socket = pair
        return pair  # type: ignore[return-value]  # a socket of its context's class, as in pyzmq

    def disable_monitor(self) -> None:
        """Stop the monitor; its PAIR is closed when nobody else has it."""
        if self._monitor_socket is None or not self._monitor_socket.closed:
            self.monitor(None, 0)
        self._monitor_socket = None

    def _end_monitors(self) -> None:
        """Before this socket is closed: stop whoever sends it events, and whoever gets its own."""
        monitored = None if self._monitored is None else self._monitored()
        for sock in (monitored, self):
            if sock is not None and sock._monitor_socket is not None and not sock.closed:
                with contextlib.suppress(zmq.ZMQError):  # ETERM
                    sock.disable_monitor()
