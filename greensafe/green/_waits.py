"""Who waits on one ZeroMQ socket, and who is woken when?

Rules:

* ZMQ_FD is edge-like: it is readable while unprocessed *commands* wait, not while messages do, and reading EVENTS (or nearly
  any other call) consumes the edge. So whoever calls libzmq while somebody waits has to call `recheck` afterwards.
* Waiters are woken in the order in which they came, each only if EVENTS, read again for it, says so.
* A waiter is switched to straight from the hub's callback. It runs until it blocks again; then the next one has its turn.
* Nothing that a greenlet raises may leave a callback: libev would stop the watcher for good.
* The watcher runs only while somebody waits. So an idle socket neither keeps the loop alive nor is kept alive by it.

It does not know what the waiters want to do, nor any limit but the one it is handed as an absolute time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import gevent
import zmq
from gevent.hub import Hub
from zmq.backend import Socket as Backend

from ..hub.forks import forbid_in_child
from ..hub.timers import start_timer
from ..hub.turns import FIRST_SHARE, TURN, call_in_next_turn, let_others_run, next_share, seconds_since_turn

__all__ = ["Waiter", "Waits", "call_soon", "events_of", "poll_until"]

EVENTS = int(zmq.EVENTS)
FD = int(zmq.FD)
POLLIN = int(zmq.POLLIN)
POLLOUT = int(zmq.POLLOUT)

#: What a socket whose events cannot be read any more is said to be ready for: the waiter then meets the error itself.
_ALL = POLLIN | POLLOUT

#: What `straight_in` and `straight_out` are while one has to look first: who waits, or what is there.
LOOK = -1

#: Seconds between two tries of a waiter that EVENTS says is ready although it is not: a ROUTER with ROUTER_MANDATORY
#: is writable as soon as *one* peer is, and no event tells when the peer that is meant has room.
STUBBORN = 0.05

_get: Callable[[Any, int], Any] = Backend.get


class Waiter:
    """One sleeping greenlet: how to wake it, for which events, and whether it still sleeps."""

    __slots__ = ("asleep", "mask", "stubborn", "switch")

    def __init__(self, switch: Callable[[], object], mask: int, stubborn: bool = False) -> None:
        self.switch = switch
        self.mask = mask
        self.stubborn = stubborn
        self.asleep = True

    def wake(self) -> None:
        """Switch to the greenlet if it still sleeps; called in the hub, where an exception must not get out."""
        if self.asleep:
            self.asleep = False
            try:
                self.switch()
            except BaseException:  # noqa: BLE001 - the hub supervises: reported, never swallowed
                gevent.get_hub().handle_error(self.switch, *sys.exc_info())

    def end(self) -> None:
        """Let go of the greenlet, which does not sleep any more.

        A greenlet that was killed keeps its traceback, that the frames, and those their waiter: so it would keep itself, with
        all that it has, such as sockets, until the next collection.
        """
        self.asleep = False
        self.switch = _nobody


def _nobody() -> None:
    """Stand for the greenlet of a waiter that has ended."""


def events_of(sock: zmq.Socket[Any]) -> int:
    """Read EVENTS; everything is ready on a closed socket or a terminated context."""
    try:
        return int(_get(sock, EVENTS))
    except zmq.ZMQError:
        return _ALL


def poll_until(milliseconds: float | None) -> float | None:
    """When a poll with this timeout ends, on the monotonic clock; None for never."""
    if milliseconds is None:
        return None
    if milliseconds != milliseconds:
        raise ValueError("timeout is a number of milliseconds, or None for no limit, not NaN")
    if milliseconds < 0:
        return None
    try:
        return monotonic() + float(milliseconds) / 1000
    except OverflowError:
        return None


def call_soon(hub: Hub, callback: Callable[..., object], *args: Any) -> None:
    """Have something called in a hub, which may be another thread's and asleep."""
    if hub.loop is None:
        return  # destroyed, and its greenlets with it
    schedule = hub.loop.run_callback if hub is gevent.get_hub() else hub.loop.run_callback_threadsafe
    schedule(callback, *args)


class Keeper(Protocol):
    """A watcher besides the socket's own."""

    def drain(self) -> object:
        """Look now, and in this thread from now on."""

    def keep_loop(self) -> None:
        """Somebody waits."""

    def let_loop(self) -> None:
        """Nobody waits any more."""


class Waits:
    """The greenlets that wait on one socket, in order of arrival.

    The socket is handed to every method instead of being kept: no reference cycle, so a dropped socket is closed at once.
    """

    __slots__ = (
        "__weakref__",
        "fair",
        "held",
        "hosts",
        "hub",
        "is_half_sent",
        "is_inherited",
        "is_lockstep",
        "keeps",
        "kept",
        "look",
        "looks_first",
        "monitor",
        "queue",
        "reader",
        "scheduled",
        "share",
        "straight_in",
        "straight_out",
        "watcher",
        "ways",
    )

    def __init__(self) -> None:
        #: The socket is the parent's of this forked process.
        self.is_inherited = False
        self.queue: list[Waiter] = []
        self.hub: Hub | None = None
        self.watcher: Any = None
        self.scheduled = False
        #: A frame went out with SNDMORE and the last one did not yet.
        self.is_half_sent = False
        #: Operations in a row that may find their message at once before the socket gives way.
        self.fair = FIRST_SHARE
        #: Those of them that are left, the long way.
        self.share = FIRST_SHARE
        #: Receives that may be tried straight away, before anything is looked at; 0: the socket gives way first; or LOOK.
        self.straight_in = FIRST_SHARE
        #: The same for sends.
        self.straight_out = FIRST_SHARE
        #: The last receive had to wait, so the next one probably has to: it looks at EVENTS before it tries, which costs a
        #: quarter of the exception. Only once libzmq has said EAGAIN, since EVENTS does not tell of any other error.
        self.looks_first = False
        #: A REQ or REP always goes the long way: what it sends and receives is kept account of.
        self.is_lockstep = False
        #: Of a REQ: tells why its request is lost, if it is.
        self.look: Callable[[zmq.Socket[Any]], object | None] | None = None
        #: Of a REQ: the monitor of its connections, which has to run while somebody waits.
        self.monitor: Keeper | None = None
        #: Of a socket that is connected to names: the `Hosts` that resolves them.
        self.hosts: Any = None
        #: What is sent is handed to `hosts`, too; so every send goes the long way.
        self.keeps = False
        #: The frames that were read of a message whose receiver was interrupted: the next one gets them first.
        self.kept: list[Any] = []
        #: The greenlet that reads a long message in parts: nobody else receives meanwhile.
        self.reader: Any = None
        #: One of the two: so every receive goes the long way.
        self.held = False
        #: How often the socket was connected or bound.
        self.ways = 0
        forbid_in_child(self)

    def set_lockstep(self) -> None:
        """Have every operation go the long way."""
        self.is_lockstep = True
        self.straight_in = self.straight_out = LOOK

    def look_first(self) -> None:
        """Note that a receive found nothing."""
        self.looks_first = True
        self.straight_in = LOOK

    def has_input(self, sock: zmq.Socket[Any]) -> bool:
        """Look whether a message is there; called while nobody waits and `looks_first`."""
        if events_of(sock) & POLLIN:
            self.looks_first = False
            self.straight_in = LOOK if self.held else self.fair
        return not self.looks_first

    def note_sent(self, more: bool) -> None:
        """A frame went out the long way; `more`: with SNDMORE, and then the next one goes that way, too."""
        if more is not self.is_half_sent:
            self.is_half_sent = more
            self.straight_out = LOOK if more or self.queue or self.is_lockstep or self.keeps else self.fair

    def hold(self, reader: Any, kept: list[Any]) -> None:
        """Note who reads a long message, and what is kept of one; (None, []) for neither."""
        self.kept = kept
        self.reader = reader
        self.held = bool(kept) or reader is not None
        if not self.is_lockstep and not self.is_inherited:
            self.straight_in = LOOK if self.held or self.queue or self.looks_first else self.fair
        if reader is None:
            self.announce(POLLIN)

    def set_keeps(self, keeps: bool) -> None:
        """Have what is sent from now on handed to `hosts`, too, or no longer."""
        if keeps is not self.keeps:
            self.keeps = keeps
            if not self.is_lockstep and not self.is_inherited:
                self.straight_out = LOOK if keeps or self.is_half_sent or self.queue else self.fair

    def is_spent(self, mask: int) -> bool:
        """Count an operation that goes the long way; True if the socket should give way before it."""
        self.share -= 1
        return self.share < 0 or (self.straight_in if mask == POLLIN else self.straight_out) == 0

    def renew(self) -> None:
        """Count anew: the socket gives way, or somebody has slept."""
        self.share = self.fair
        self.straight_in = self.straight_in or self.fair
        self.straight_out = self.straight_out or self.fair

    def give_way(self) -> None:
        """Let others run, and the loop turn, before the next operation; whatever ends that leaves the socket as it is."""
        if gevent.getcurrent() is gevent.get_hub():
            self.renew()  # a callback cannot wait
            return
        late = seconds_since_turn()
        self.adapt(late)
        let_others_run(late)

    def adapt(self, late: float) -> None:
        """Count anew, according to the seconds since the loop has turned, before whoever uses the socket gives way."""
        self.fair = next_share(self.fair, late)
        self.renew()

    def wait(self, sock: zmq.Socket[Any], mask: int, at: float | None, stubborn: bool = False) -> None:
        """Sleep until `mask` may be ready or the monotonic time `at` has come; wakes spuriously, never too late.

        EVENTS has to be read by the caller before, unless others wait already.
        """
        hub = gevent.get_hub()
        if stubborn:
            retry = monotonic() + STUBBORN
            at = retry if at is None else min(at, retry)
        waiter = Waiter(gevent.getcurrent().switch, mask, stubborn)
        timer = None
        self.add(sock, waiter)
        try:
            if at is not None:
                timer = start_timer(hub, at - monotonic(), waiter.wake)
            hub.switch()
        finally:
            waiter.asleep = False
            self.remove(waiter)
            if timer is not None:
                timer.stop()
                timer.close()
            del waiter, timer  # a killed greenlet keeps its traceback, this frame and so itself, and the socket
        self.renew()
        if self.is_inherited:
            self.check_owner()

    def add(self, sock: zmq.Socket[Any], waiter: Waiter) -> None:
        """Queue a waiter.

        Raises:
            RuntimeError: Greenlets of another thread's hub wait on this socket, or it is the parent's of this forked process.
        """
        self.check_owner()
        hub = gevent.get_hub()
        if hub is not self.hub:
            self._move(sock, hub)
        if not self.queue:
            self.watcher.start(self._on_readable, sock)
            self.straight_in = self.straight_out = LOOK
        self.queue.append(waiter)
        if len(self.queue) > 1:
            self.recheck(sock)

    def remove(self, waiter: Waiter) -> None:
        """Take a waiter out, wherever it stands; the last one stops the watcher."""
        if waiter in self.queue:
            self.queue.remove(waiter)
        if self.queue:
            return
        if not self.is_lockstep and not self.is_inherited:
            self.straight_in = LOOK if self.looks_first or self.held else self.fair
            self.straight_out = LOOK if self.is_half_sent or self.keeps else self.fair
        if self.watcher is not None:
            self.watcher.stop()
            if self.hub is not None and not self.hub.main_hub:
                # A thread may end, and its loop with it, before this socket does.
                self._close_watcher()
                self.hub = None
                if self.monitor is not None:
                    self.monitor.let_loop()

    def on_fork(self) -> None:
        """In a child that has inherited the socket: its next operation is refused, since it asks whose turn it is."""
        self.is_inherited = True
        self.straight_in = self.straight_out = LOOK

    def check_owner(self) -> None:
        """Refuse what would be done to the socket in the wrong place: none of libzmq's stands two threads or processes.

        Raises:
            RuntimeError: Greenlets of another thread's hub wait on this socket, or it is the parent's of this forked process.
        """
        if self.is_inherited:
            raise RuntimeError("this socket was made before a fork: the child has to make its own")
        if self.queue and self.hub is not gevent.get_hub():
            raise RuntimeError("greenlets of another thread wait on this socket; use one socket per thread")

    @property
    def is_elsewhere(self) -> bool:
        """Whether the socket is in use in another thread, or another process."""
        return self.is_inherited or (bool(self.queue) and self.hub is not gevent.get_hub())

    def is_anyone_first(self, mask: int) -> bool:
        """Whether who wants one of these events has to queue, since others wait for them."""
        return any(waiter.mask & mask for waiter in self.queue)

    def recheck(self, sock: zmq.Socket[Any]) -> None:
        """Give back an edge that a call of ours may have consumed: wake, in the hub, whoever can go on now."""
        if self.queue and not self.scheduled and not self.is_inherited and self._is_anyone_ready(self.events(sock)):
            assert self.hub is not None
            self.scheduled = True
            call_soon(self.hub, self._on_scheduled, sock, None)

    def events(self, sock: zmq.Socket[Any]) -> int:
        """What the socket is ready for."""
        return events_of(sock) if self.look is None and not self.kept else events_of(sock) | self.lost(sock)

    def lost(self, sock: zmq.Socket[Any]) -> int:
        """POLLIN if there is what EVENTS does not tell of: a message that is kept, or a REQ's request that is lost; else 0."""
        if self.kept:
            return POLLIN
        return 0 if self.look is None or self.look(sock) is None else POLLIN

    def announce(self, mask: int) -> None:
        """Wake, in the hub, whoever waits for one of these events: there is an error to raise. Called in any thread's hub."""
        if self.hub is not None:
            for waiter in self.queue:
                if waiter.mask & mask:
                    call_soon(self.hub, waiter.wake)

    def abort(self) -> Callable[[], None]:
        """Stop watching, because the socket is about to be closed.

        Returns:
            Wakes everybody; each meets the error in its own next try. To be called when the socket is closed: if another thread
            closes it, who is woken before may try before that, and wait again.
        """
        self._close_watcher()
        hub, self.hub = self.hub, None
        waiters, self.queue = self.queue, []

        def wake() -> None:
            if hub is not None:
                for waiter in waiters:
                    call_soon(hub, waiter.wake)

        return wake

    def _move(self, sock: zmq.Socket[Any], hub: Hub) -> None:
        self._close_watcher()
        self.hub, self.scheduled = hub, False
        self.watcher = hub.loop.io(_get(sock, FD), 1)
        if self.monitor is not None and not hub.main_hub:
            self.monitor.drain()
            self.monitor.keep_loop()

    def _close_watcher(self) -> None:
        # A hub that was destroyed has taken its loop with it: libev would complain, libuv use freed memory.
        has_loop = self.hub is not None and self.hub.loop is not None
        if self.watcher is not None and has_loop and not self.is_inherited:
            self.watcher.stop()
            self.watcher.close()
        self.watcher = None

    def _is_anyone_ready(self, events: int) -> bool:
        return any(waiter.asleep and waiter.mask & events and not waiter.stubborn for waiter in self.queue)

    def _on_scheduled(self, sock: zmq.Socket[Any], since: float | None) -> None:
        """Wake the waiters that can go on, and see to it that those behind them are woken.

        Args:
            since: The monotonic time at which a chain of such calls began that follow from one another, which must not keep the
                loop from its turn; None if this is the first.
        """
        hub = self.hub
        try:
            self._on_readable(sock)  # a recheck meanwhile schedules nothing: that is decided below
        finally:
            if hub is self.hub:  # else the socket was closed meanwhile, or greenlets of another thread wait on it
                self.scheduled = False
        if hub is not self.hub or hub is None or not self.queue or self.is_inherited:
            return
        if self._is_anyone_ready(self.events(sock)):
            self.scheduled = True
            now = monotonic()
            if since is not None and now - since > TURN:
                call_in_next_turn(hub, self._on_scheduled, sock, None)
            else:
                hub.loop.run_callback(self._on_scheduled, sock, now if since is None else since)

    def _on_readable(self, sock: zmq.Socket[Any]) -> None:
        if len(self.queue) == 1 and not self.is_inherited:
            # Whoever comes while it runs has looked for itself; an edge that it leaves alone brings us here again.
            waiter = self.queue[0]
            if waiter.mask == POLLIN or waiter.mask & self.events(sock):
                waiter.wake()
            return
        passed_over = 0
        for waiter in list(self.queue):
            if self.is_inherited:  # perhaps only since the one before was woken
                self.watcher.stop()  # the parent's: a look at EVENTS would eat what the parent waits for
                return
            # What comes while this goes through the queue is for those it has passed over: they were here first.
            wanted = waiter.mask & ~passed_over
            if not waiter.asleep or not wanted:
                continue
            if wanted & self.events(sock):
                waiter.wake()
            elif not waiter.stubborn:
                passed_over |= wanted
        self.recheck(sock)
