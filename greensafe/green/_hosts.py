"""The endpoints of one green socket that hold names.

Each name has a `ByName`, which gives libzmq numbers instead. Rules:

* The socket's monitor tells when an attempt fails or a connection is lost; the name is resolved anew then. Where there is no
  monitor (no descriptor left, or the program has one of its own) a name is resolved once.
* libzmq cannot send what is queued for one address to another one. So while a socket with a single connection (of a type in
  `KEEPING`) waits for it, what is sent is kept here as well, and sent again when the name has moved.
* Nothing is sent twice. What is kept is forgotten as soon as somebody accepts a connection: a handshake may follow that nobody
  reports (ZMTP 2). libzmq says CONNECTED before it can send, so what it has said once the old address is left is conclusive,
  with one I/O thread. With several the order of events is not known, and nothing is kept.
* Of a socket with several connections nobody knows which one a message is queued for. What is queued for an address that is
  left is lost with it; a REQ whose request was is told so, and one whose request somebody may have stays where it is.
* A socket is moved between messages only, and when all that has arrived is read: what a connection holds goes with it.
  Until then it stays where it is, and each attempt that fails is one more occasion. So a loss counts only from CONNECT_RETRIED
  on: then libzmq has handed over what it had read.
* A PAIR refuses a second connection as long as its first one ends, so it is not moved.
* The socket is held weakly; nothing here keeps the loop running.

It does not know how an operation waits.
"""

from __future__ import annotations

import logging
import weakref
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
import zmq
from zmq.backend import Socket as Backend

from ..deadlines import check
from ..errors import Unreachable
from ..hub.timers import start_timer
from ..transport.byname import ByName, leave
from ..transport.monitor import ConnectionEvent
from ..transport.names import Host
from ._connections import YOUNG
from ._waits import POLLIN, POLLOUT, Waiter, events_of

if TYPE_CHECKING:
    from ._monitors import MonitoredSocket

__all__ = ["PATIENCE", "Hosts"]

log = logging.getLogger("greensafe.green._hosts")

#: Seconds that connect() waits for a name's first address, at most. It is looked for in the background after that.
PATIENCE = 1.0

#: Messages that are kept before the monitor is asked whether they still have to be.
ASK_EVERY = 100

#: Types of sockets that may send before anybody is there, each message to one peer.
KEEPING = frozenset({zmq.REQ, zmq.DEALER, zmq.PUSH})

#: Types for which libzmq takes a second connect() to an endpoint for the same as the first.
_ONCE = frozenset({zmq.REQ, zmq.DEALER, zmq.SUB, zmq.PUB})

_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE = int(zmq.SNDMORE)
_RCVMORE = int(zmq.RCVMORE)
_LINGER = int(zmq.LINGER)
_IPV6 = int(zmq.IPV6)

_CONNECTED = zmq.Event.CONNECTED
_CLOSED = zmq.Event.CLOSED
_RETRIED = zmq.Event.CONNECT_RETRIED
_DISCONNECTED = zmq.Event.DISCONNECTED
_SUCCEEDED = zmq.Event.HANDSHAKE_SUCCEEDED
_STOPPED = zmq.Event.MONITOR_STOPPED


class Hosts:
    """The names of one socket, and what is kept of what it has sent."""

    __slots__ = (
        "__weakref__",
        "_by_names",
        "_in_order",
        "_is_blind",
        "_is_moving",
        "_kept",
        "_lost",
        "_since",
        "_sock",
        "_torn",
        "_tried",
        "_up",
        "_waiters",
        "_warned",
    )

    def __init__(self, sock: MonitoredSocket) -> None:
        self._sock = weakref.ref(sock)
        self._by_names: list[ByName] = []
        self._waiters: list[Waiter] = []
        #: No monitor tells anything.
        self._is_blind = False
        #: What comes to light while the socket is moved has to wait.
        self._is_moving = False
        #: The context has one I/O thread, so events come in the order in which things happened.
        self._in_order = sock.context.get(zmq.IO_THREADS) == 1
        #: When the connections that stand were made, and which have finished their handshake.
        self._since: dict[ByName, float] = {}
        self._up: set[ByName] = set()
        #: libzmq has tried these, so CONNECT_RETRIED says no more than that it will again.
        self._tried: set[ByName] = set()
        #: Their connection is lost, and libzmq has not said yet that it will try again.
        self._lost: set[ByName] = set()
        self._kept: list[list[Any]] = []
        #: The frames of a message that is half sent; None if its first ones were not kept.
        self._torn: list[Any] | None = []
        self._warned: set[ByName] = set()
        try:
            sock._share_monitor().add(self)
        except zmq.ZMQError as error:
            self._is_blind = True
            log.debug("%r: names are resolved once, as it cannot be monitored: %s", sock, error)

    def __repr__(self) -> str:
        return f"<Hosts {self._by_names} kept={len(self._kept)}>"

    # What the program does.

    def connect(self, sock: MonitoredSocket, host: Host) -> None:
        """Connect to a name; waits for its address, unless in the hub, but not for long.

        An exception that is thrown into the wait leaves the socket as it was.
        """
        if sock.type in _ONCE and any(each.host == host for each in self._by_names):
            return
        by_name = ByName(host, self._on_trouble)
        self._by_names.append(by_name)
        sock._waits.ways += 1
        by_name.begin(bool(Backend.get(sock, _IPV6)), partial(_connect, weakref.ref(self)))
        if gevent.getcurrent() is gevent.get_hub():
            return
        try:
            self._await(by_name)
        except BaseException:
            if by_name in self._by_names:
                self._drop(sock, by_name)
            raise
        if sock.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)

    def _await(self, by_name: ByName) -> None:
        until = monotonic() + PATIENCE
        while by_name in self._by_names and by_name.number is None and not by_name.trouble and monotonic() < until:
            check(True)
            self._sleep(until - monotonic())

    def _sleep(self, seconds: float) -> None:
        """Wait for a change, or so many seconds."""
        waiter = Waiter(gevent.getcurrent().switch, POLLOUT)
        timer = start_timer(gevent.get_hub(), seconds, waiter.wake)
        self._waiters.append(waiter)
        try:
            gevent.get_hub().switch()
        finally:
            waiter.asleep = False
            self._waiters.remove(waiter)
            timer.stop()
            timer.close()
            del waiter, timer  # as in Waits.wait

    def _wake_all(self) -> None:
        for waiter in self._waiters:
            gevent.get_hub().loop.run_callback(waiter.wake)

    def disconnect(self, sock: MonitoredSocket, address: str) -> bool:
        """Disconnect from a name, or the number that it has; False if it is none of these."""
        for by_name in self._by_names:
            if address in (by_name.host.endpoint, by_name.number):
                self._drop(sock, by_name)
                return True
        return False

    def _drop(self, sock: MonitoredSocket, by_name: ByName) -> None:
        self._forget(by_name)
        self._by_names.remove(by_name)
        by_name.end()
        self._wake_all()
        if sock.closed:
            return
        sock._waits.ways -= 1
        self.on_ways(sock)
        number = by_name.number
        if number is None:
            return
        if not any(each.number == number for each in self._by_names):
            leave(sock, number)
        if sock._lockstep is not None:
            sock._lockstep.on_disconnect(sock, number)

    def close(self) -> None:
        """Resolve no more; the socket is closed."""
        for by_name in self._by_names:
            by_name.end()
        self._by_names = []
        self._kept.clear()
        self._wake_all()

    def on_sent(self, frame: Any, more: bool) -> None:
        """A frame was handed to libzmq while `waits.keeps` is set; `more`: with SNDMORE."""
        if self._torn is not None:
            self._torn.append(frame.bytes if isinstance(frame, zmq.Frame) else bytes(frame))
        if not more:
            if self._torn is not None:
                self._kept.append(self._torn)
            self._torn = []
            if self._kept and len(self._kept) % ASK_EVERY == 0:
                self._drain()  # in a thread with libuv's loop the monitor is read by those that wait, and nobody may

    def on_reset(self, sock: MonitoredSocket) -> None:
        """A REQ has given its request up, and all its endpoints are connected anew."""
        self._since.clear()
        self._up.clear()
        self._lost.clear()
        self._kept.clear()
        self._torn = []
        self.on_ways(sock)

    # What is known.

    @property
    def endpoint(self) -> str | None:
        """The name that was connected to last, as long as it has no number."""
        return self._by_names[-1].host.endpoint if self._by_names and self._by_names[-1].number is None else None

    @property
    def trouble(self) -> str:
        """Why nothing can be sent by any of the names; "" if it can."""
        if not self._by_names or any(each.number is not None for each in self._by_names):
            return ""
        return next((each.trouble for each in self._by_names if each.trouble), "its name is still being resolved")

    def unreachable(self, sock: MonitoredSocket) -> Unreachable | None:
        """The error for a REQ that is connected to names only, none of which has an address; None while it may get one."""
        if sock._waits.ways > len(self._by_names) or not self._by_names or not all(each.trouble for each in self._by_names):
            return None
        endpoint = self._by_names[0].host.endpoint
        return Unreachable(f"{endpoint}: {self._by_names[0].trouble}", endpoint=endpoint)

    # What happens.

    def on_event(self, event: ConnectionEvent) -> None:
        """Take an event of the socket's monitor."""
        if event.kind == _STOPPED:
            self._is_blind = True
            self._recount()
            return
        for by_name in list(self._by_names):
            if by_name.is_at(event.endpoint):
                self._on_event(by_name, event)

    def _on_event(self, by_name: ByName, event: ConnectionEvent) -> None:
        kind = event.kind
        if kind == _CONNECTED:
            self._since[by_name] = monotonic()
            by_name.on_connected()
            self._recount()
        elif kind == _SUCCEEDED:
            self._up.add(by_name)
            self._warned.discard(by_name)
        elif kind == _CLOSED:
            self._tried.add(by_name)
            by_name.on_failed()
        elif kind == _RETRIED and by_name not in self._tried:
            by_name.on_failed()
        elif kind == _RETRIED:
            self._tried.discard(by_name)
            if by_name in self._lost:
                self._lost.discard(by_name)
                by_name.on_lost()
        elif kind == _DISCONNECTED:
            self._on_disconnected(by_name)

    def _on_disconnected(self, by_name: ByName) -> None:
        self._tried.add(by_name)
        since = self._since.pop(by_name, None)
        was_up = by_name in self._up or (since is not None and monotonic() - since >= YOUNG)  # of ZMTP 2, see _connections
        self._up.discard(by_name)
        self._recount()
        if was_up:
            self._lost.add(by_name)
        else:
            by_name.on_failed()

    def _on_trouble(self, trouble: str) -> None:
        sock = self._sock()
        for by_name in self._by_names:
            if by_name.trouble and by_name not in self._warned:
                self._warned.add(by_name)
                endpoint = by_name.host.endpoint
                log.warning("%s: %s", endpoint, by_name.trouble, extra={"endpoint": endpoint})
            if by_name.number is None and by_name.trouble:
                by_name.ask_later()
        self._wake_all()
        if sock is not None:
            sock._waits.announce(POLLOUT)  # a REQ does not wait for what cannot be

    def move(self, number: str, old: str | None) -> bool:
        """Connect the socket to `number` instead of `old`; False if it has to stay as it is."""
        sock = self._sock()
        if sock is None or sock.closed or sock._waits.is_elsewhere or self._is_moving:
            return False
        self._is_moving = True
        try:
            if not self._connect(sock, number, old):
                return False
        finally:
            self._is_moving = False
            sock._recheck()
        self.on_ways(sock)
        self._wake_all()
        return True

    def _connect(self, sock: MonitoredSocket, number: str, old: str | None) -> bool:
        if old is None:
            Backend.connect(sock, number)
            if sock._lockstep is not None:
                sock._lockstep.on_connect(sock, number)
            self._torn = None if sock._waits.is_half_sent else []
        elif not self._may_move(sock, old):
            return False
        else:
            self._move(sock, number, old)
        return True

    def _may_move(self, sock: MonitoredSocket, old: str) -> bool:
        self._drain()  # also while an event is handled: more may have happened since, if the hub was blocked
        is_connected = any(each.number == old and each in self._since for each in self._by_names)
        is_torn = sock._waits.is_half_sent or Backend.get(sock, _RCVMORE) or events_of(sock) & POLLIN
        carrier = None if sock._lockstep is None else sock._lockstep.carrier
        is_busy = carrier is not None and carrier.is_busy
        return not (is_connected or is_torn or is_busy or sock.type == zmq.PAIR)

    def _move(self, sock: MonitoredSocket, number: str, old: str) -> None:
        if sock._lockstep is not None and sock._lockstep.is_req:
            self._kept = sock._lockstep.move(sock, old, number)
            return
        linger = Backend.get(sock, _LINGER)
        Backend.set(sock, _LINGER, 0)
        try:
            leave(sock, old)
            kept = self.take_unsent()
            Backend.connect(sock, number)
        finally:
            Backend.set(sock, _LINGER, linger)
        self._kept = []
        try:
            for frames in kept:
                for frame in frames[:-1]:
                    Backend.send(sock, frame, _NOBLOCK | _SNDMORE)
                Backend.send(sock, frames[-1], _NOBLOCK)
                self._kept.append(frames)
        except zmq.Again:  # there was room for all of them before: the program has set another SNDHWM
            log.warning("%r: %d messages have no room at %s and are lost", sock, len(kept) - len(self._kept), number)

    def take_unsent(self) -> list[list[Any]]:
        """What is kept, and was provably not sent to the address that has just been left. To be called before the next one."""
        kept = len(self._kept)
        self._drain()
        unsent, self._kept = self._kept, []
        if kept and not unsent:
            log.warning("%r: a connection stood as its name moved; %d messages may not have arrived", self._sock(), kept)
        return unsent

    def _drain(self) -> None:
        """Be told what has happened up to now."""
        sock = self._sock()
        if sock is not None and sock._sharing is not None:
            sock._sharing.monitor.drain()

    # What is kept.

    def on_ways(self, sock: MonitoredSocket) -> None:
        """Keep what is sent from now on, if it would be lost when a name moves; or do so no longer."""
        waits = sock._waits
        is_waiting = len(self._by_names) == 1 and not self._since
        is_told = self._in_order and not self._is_blind
        keeps = is_waiting and is_told and waits.ways == 1 and sock.type in KEEPING
        if keeps and not waits.keeps:
            self._torn = None if waits.is_half_sent else []
        elif not keeps:
            self._kept.clear()
        waits.set_keeps(keeps)

    def _recount(self) -> None:
        sock = self._sock()
        if sock is not None and not sock.closed:
            self.on_ways(sock)

    def _forget(self, by_name: ByName) -> None:
        self._since.pop(by_name, None)
        for known in (self._up, self._tried, self._lost, self._warned):
            known.discard(by_name)


def _connect(hosts: weakref.ref[Hosts], number: str, old: str | None) -> bool:
    found = hosts()
    return found is not None and found.move(number, old)
