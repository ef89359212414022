"""How is a socket watched without ever stopping libzmq's I/O thread?

libzmq hands every event to a PAIR socket and waits for room there: with the PAIR closed, not connected yet or full, the next
event stops the I/O thread and with it the whole context, for good; `monitor()` then stops whoever calls it. Rules:

* The PAIR is connected before the first event can come, and holds any number of events that nobody reads.
* The monitor stops before its PAIR or the socket is closed, in whichever order a program does that.
* Every monitor has a name of its own: libzmq frees one some time after the monitor has stopped, and descriptors come again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import weakref
from typing import Any, Self

import zmq

from ..transport.byname import has_proxy
from ..transport.names import Host, host_in
from ._carrier import Carrier
from ._hosts import Hosts
from ._objects import ObjectSocket
from .events import ConnectionEvents, Listener, Sharing

__all__ = ["MonitoredSocket"]

log = logging.getLogger("greensafe.green._monitors")

_numbers = itertools.count()


class MonitoredSocket(ObjectSocket):
    """The part of a green socket that knows monitors; see `socket.Socket`."""

    _monitor_socket: Any
    _monitored: weakref.ref[Any] | None = None  # of a monitor's PAIR: whose events it gets

    _sharing: Sharing | None = None
    _has_own_monitor: bool = False

    def connection_events(self) -> ConnectionEvents:
        """Collect what happens to the socket's tcp and ipc connections from now on.

        All events but ACCEPT_FAILED: while no descriptor is left, that one comes 100,000 times a second.

        Returns:
            An iterator and context manager: `for event in events`, `events.get(timeout=)`.

        Raises:
            zmq.ZMQError: EMFILE and the like, if libzmq cannot monitor the socket; EBUSY if the program monitors it by hand.
        """
        return ConnectionEvents(self._origin)

    @property
    def _origin(self) -> MonitoredSocket:
        """The socket that this one is a shadow of, or itself: libzmq has one monitor for both."""
        return self._shadow_obj if isinstance(self._shadow_obj, MonitoredSocket) else self

    def _before_connect(self, address: str) -> None:
        lockstep = self._lockstep
        if lockstep is not None and lockstep.is_req and isinstance(address, str):
            if lockstep.carrier is None:
                lockstep.carrier = Carrier(self._origin, lockstep)
                self._waits.look = lockstep.carrier.look
            lockstep.carrier.before_connect(self._origin, address)

    def _connect_to(self, host: Host) -> None:
        waits = self._waits
        waits.check_owner()
        if waits.hosts is None:
            waits.hosts = Hosts(self._origin)
            if self._lockstep is not None:
                self._lockstep.hosts = waits.hosts
        waits.hosts.connect(self._origin, host)

    def _count_ways(self, more: int) -> None:
        self._waits.ways += more
        if self._waits.hosts is not None:
            self._waits.hosts.on_ways(self._origin)

    def _disconnect_from(self, address: str) -> bool:
        """Disconnect from a name, or from the number that it has; False if the address is libzmq's alone.

        libzmq would resolve a name that it does not know, here and now.
        """
        hosts = self._waits.hosts
        if hosts is not None and hosts.disconnect(self._origin, address):
            return True
        if host_in(str(address)) is not None and not has_proxy(self):
            raise zmq.ZMQError(errno.ENOENT, f"the socket is not connected to {address}")
        return False

    def _share_monitor(self) -> Sharing:
        if self._has_own_monitor:
            raise zmq.ZMQError(errno.EBUSY, "the program monitors this socket itself, and libzmq has one monitor per socket")
        if self._sharing is None or self._sharing.monitor.is_closed:
            self._sharing = Sharing(self)
        return self._sharing

    def _unshare_monitor(self, listener: Listener) -> None:
        if self._sharing is not None and not self._sharing.remove(listener):
            self._end_sharing(None)

    def _end_sharing(self, reason: str | None) -> None:
        origin = self._origin
        sharing, origin._sharing = origin._sharing, None
        if sharing is not None:
            if reason is not None and not sharing.monitor.is_closed:
                log.warning("%r is not monitored any more: %s", self, reason)
            sharing.close(origin)

    def monitor(self, addr: str | bytes | None, events: int = zmq.EVENT_ALL) -> None:
        """Monitor the socket by hand, as in pyzmq: `connection_events` end, and a REQ no longer learns of disconnects."""
        self._end_sharing("the program monitors the socket itself")
        self._origin._has_own_monitor = addr is not None
        super().monitor(addr, events)

    def get_monitor_socket(self, events: int | None = None, addr: str | None = None) -> Self:
        """Return a PAIR that receives this socket's events, as in pyzmq; the same one until it is closed or disabled.

        What nobody reads is kept in memory. The monitor ends when either of the two sockets is closed. Of a socket that binds,
        `events` should not include ACCEPT_FAILED; see `connection_events`.
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
        self._end_sharing(None)
        monitored = None if self._monitored is None else self._monitored()
        for sock in (monitored, self):
            if sock is not None and sock._monitor_socket is not None and not sock.closed:
                with contextlib.suppress(zmq.ZMQError):  # ETERM
                    sock.disable_monitor()
