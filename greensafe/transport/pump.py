"""The traffic of one socket that no greenlet waits on.

A pump drives a plain ROUTER or DEALER from callbacks in the hub: its `Inbox` reads what is there and hands each message to
`on_message`, its `Outbox` sends at once what can be sent and keeps the rest for later. No greenlet, no switch and no timer per
message. The pump decides when both have their turn.

Rules:

* Any libzmq call may consume the edge of ZMQ_FD, so every send is followed by one more read in this turn of the loop (many
  sends share it). A send made while messages are read asks for no such turn: the reading goes on behind it.
* What the pump schedules while it runs is done in the same turn of the loop until `TURN` is over, and then in the next: timers
  and other sockets come in between.
* What `send_soon` sends goes out with the rest of this turn's, at the latest after `SOON` messages or a millisecond of reading.
* Full peers are tried again a few at a time, in turn, so that thousands of them cost the others nothing.
* When the pump itself fails it rests until `on_failure`, which is called with the error, has it go on. No message is lost by
  that: one that was read halfway is read to its end, one that could not be sent waits like one whose peer is full.
* What a signal's handler raises is no failure of the pump's: it goes to the hub's error handler, or to the greenlet that has
  called, and the pump goes on at once.
* When the context is terminated or the socket closed, the pump stops and says so once, by `on_end`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent
import zmq
from zmq.backend import Socket as Backend

from ..hub.every import Every
from ..hub.interruptions import is_interruption
from ..hub.timers import Timer
from ..hub.turns import TURN, call_in_next_turn
from .inbox import BATCH, Inbox
from .outbox import ENDED, OUTBOX, Outbox

__all__ = ["Pump"]

#: Messages that `send_soon` gathers.
SOON = 32

#: Seconds that reading all that has arrived may take at once: limits and others come then, whatever a peer sends.
DRAIN = 0.005

#: Messages that a socket about to close still reads in order to refuse them, and seconds for which it does so. A client that
#: sends faster than that learns by the connection's end.
REFUSED = 10_000
REFUSED_SECONDS = 0.25

#: Seconds after which a full peer is tried again: a ROUTER is writable as soon as any peer is, so no event tells.
RETRY = 0.02

#: Seconds between two looks whether a server's socket is still watched.
LOOK_AFTER = 1.0

#: Full peers that are tried again then, and in each turn of the loop in which something is read or sent.
TRIED_EACH_TIME = 64
TRIED_EACH_TURN = 4

_EVENTS = int(zmq.EVENTS)
_FD = int(zmq.FD)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)

_get: Callable[[Any, int], Any] = Backend.get


class Pump:
    """The traffic of one plain socket.

    Args:
        sock: A plain ROUTER (with ROUTER_MANDATORY) or DEALER, which belongs to the pump from now on.
        on_message: Called in the hub with the frames of each message.
        on_end: Called when the context is terminated or somebody else has closed the socket; the pump has stopped by then.
        on_gone: Called when all is read and nobody is there to send to, which without a high-water mark means that the peer is
            gone: what an inproc socket has instead of a monitor.
        outbox: Bytes kept for a peer whose pipe is full; None for no limit.
        on_failure: Called with the error and with what makes the pump go on when it has failed and rests; by default the
            error goes to the hub's error handler, and the pump goes on.
        on_torn: Called with the first frames of a message that was thrown away, and with the reason.
        on_interrupted: Called with the frames of a message if an exception from outside has ended `on_message` halfway.
        most_frames: Frames that a message may have; of one that has more, `on_message` gets so many and one more.

    Attributes:
        inbox: What is read; `inbox.is_paused` stops reading, so that peers feel backpressure, and `resume` starts it again.
        outbox: What is sent, with the counts of what was dropped.
        is_started: It reads; the loop is kept alive.
        sock: See above.
    """

    __slots__ = (
        "__weakref__",
        "_hub",
        "_is_resting",
        "_keeper",
        "_on_end",
        "_on_failure",
        "_on_gone",
        "_retry",
        "_scheduled",
        "_since",
        "_watcher",
        "inbox",
        "is_started",
        "outbox",
        "sock",
    )

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        on_message: Callable[[list[bytes]], None],
        on_end: Callable[[], object],
        outbox: int | None = OUTBOX,
        on_gone: Callable[[], object] | None = None,
        on_failure: Callable[[Exception, Callable[[], None]], object] | None = None,
        on_torn: Callable[[list[bytes], str], object] | None = None,
        on_interrupted: Callable[[list[bytes]], object] | None = None,
        most_frames: float = math.inf,
    ) -> None:
        self.sock = sock
        self._on_end = on_end
        self._on_gone = on_gone
        self._on_failure = on_failure
        self._hub = gevent.get_hub()
        self._watcher = self._hub.loop.io(_get(sock, _FD), 1)
        self.outbox = Outbox(sock, outbox, self._start_retry, self._fail)
        self.inbox = Inbox(sock, self._hub, self.outbox, on_message, on_torn, on_interrupted, most_frames)
        #: A DEALER's owner looks after it. A server's pump does that itself.
        self._keeper = Every(LOOK_AFTER, self, Pump.look_after) if sock.type == zmq.ROUTER else None
        self._retry = Timer()
        self._scheduled = False
        #: While the pump runs: since when its callbacks follow from one another without a turn of the loop. Otherwise 0.
        self._since = 0.0
        self.is_started = False
        self._is_resting = False

    def __repr__(self) -> str:
        inbox, outbox = self.inbox, self.outbox
        state = "closed" if inbox.is_closed else "paused" if inbox.is_paused else "started" if self.is_started else "stopped"
        return f"<Pump {state} queued={len(outbox)} dropped={outbox.dropped} unreachable={outbox.unreachable}>"

    @property
    def has_input(self) -> bool:
        """Return whether messages have arrived that are not read yet; they are read in the next turn unless paused."""
        if not self.inbox.has_input:
            return False
        if self.is_started and not self._scheduled and not self.inbox.is_paused:
            self._schedule()
        return True

    @property
    def is_inherited(self) -> bool:
        """Return whether this process is a forked child and the socket its parent's: it must not be used, nor closed."""
        return self.inbox.is_inherited

    def start(self) -> None:
        """Begin to read. Also looks at once, since an edge may have passed before."""
        if not self.is_started:
            if not self._is_resting:
                self._watcher.start(self._run, True)
                self._schedule()
            self.is_started = True  # last, so that an interrupted caller can do it again

    def look_after(self) -> None:
        """Watch again, and have a turn, should both have ended by themselves.

        They do if a signal's handler raises in the moment in which the loop calls back, before the first line is run.
        """
        if self.is_started and not self._is_resting and not self.is_inherited:
            if not self._watcher.active:
                self._watcher.start(self._run, True)
            self._scheduled = False
            self._schedule()

    def stop(self) -> None:
        """Stop reading until `start`; messages stay where they are and the loop is not kept alive by this socket."""
        if self.is_started:
            self.is_started = False
            self._watcher.stop()

    def resume(self) -> None:
        """Read again after a pause."""
        if self.inbox.is_paused:
            self.inbox.is_paused = False
            self._schedule()

    def close(self, linger: int) -> None:
        """Stop and close the socket; what libzmq has queued may leave for `linger` milliseconds more."""
        self.stop()
        self._retry.stop()
        self._watcher.close()
        if self._keeper is not None:
            self._keeper.close()
        self.outbox.close()
        self.inbox.is_closed = True
        self.sock.close(linger)

    def send(self, frames: list[bytes]) -> None:
        """Send now, or as soon as the peer has room. From any greenlet of this hub's thread, the hub included."""
        outbox = self.outbox
        if outbox.soon:
            outbox.send_gathered()
        outbox.send(frames)
        if not self.inbox.is_reading and not self._scheduled and self.is_started:
            self._schedule()

    def send_soon(self, frames: list[bytes]) -> None:
        """Send in this turn of the loop, with what else there is: for a caller that is about to leave the hub its turn."""
        if not self.is_started:
            self.send(frames)
            return
        soon = self.outbox.soon
        soon += (frames,)  # no call, so nothing can come between it and the question whether it is taken
        if len(soon) >= SOON:
            self.outbox.send_gathered()
        if not self._scheduled:
            self._schedule()

    def send_if_read(self, frames: list[bytes]) -> None:
        """Send, unless much waits for the peer already: for what is said again soon, and must not take the room of answers."""
        if self.outbox.has_room(frames):
            self.send(frames)

    def drain(self) -> bool:
        """Read what has arrived, here and now, up to a batch; return False if reading has failed."""
        try:
            if not self.inbox.read():
                self._schedule()
        except Exception as error:
            if isinstance(error, zmq.ZMQError) and error.errno in ENDED:
                self._schedule()  # the same error is met there, and dealt with
            elif is_interruption(error):
                self._schedule()
                raise
            else:
                self._fail(error)
            return False
        return True

    def drain_all(self) -> bool:
        """Read everything that has arrived, here and now, but for `DRAIN` at most; return whether that was all.

        The rest is read in the turns that follow.
        """
        self.inbox.is_paused = False
        until = 0.0
        while not self.inbox.is_closed and self.has_input and self.drain():
            now = monotonic()
            until = until or now + DRAIN
            if now > until:
                return self.inbox.is_closed or not self.has_input
        return True

    def refuse(self, refuse: Callable[[list[bytes]], None]) -> None:
        """Read all that has arrived, paused or not, and hand it to `refuse` instead; for a socket that is about to close."""
        self.inbox.is_paused = False
        self.inbox.on_message = refuse
        until = monotonic() + REFUSED_SECONDS
        for _ in range(REFUSED // BATCH):
            if not self.has_input or monotonic() > until:
                return
            self.drain()

    def flush(self, peers: int | None = None) -> None:
        """Send what is about to be sent, and try again to send what is kept for so many peers; None for all."""
        self.outbox.retry(peers)
        if not self.outbox.peers:
            self._retry.stop()

    def _schedule(self) -> None:
        if self._scheduled:
            return
        self._scheduled = True
        since = self._since
        if since and monotonic() - since > TURN:
            call_in_next_turn(self._hub, self._run, False)
        else:
            self._hub.loop.run_callback(self._run, False, since)

    def _run(self, is_woken: bool, since: float = 0.0) -> None:
        """Called by the watcher (`is_woken`: something has probably arrived), or in the turn after a send.

        Args:
            is_woken: See above.
            since: The monotonic time at which a chain of such calls began that follow from one another; 0 if this is the first.
        """
        self._scheduled = False  # first of all: if this is interrupted it can be scheduled again
        if self.is_inherited:
            self._watcher.stop()
            return
        if not self.is_started or self._is_resting:
            return
        self._since = since or monotonic()
        try:
            outbox = self.outbox
            if outbox.peers or outbox.soon:
                self.flush(TRIED_EACH_TURN)
            outbox.sent_last = outbox.kept_last = None
            if not self.inbox.is_paused and not self.inbox.read(is_woken):
                self._schedule()
            if self._on_gone is None or self.is_inherited:
                return
            if self.is_started:
                self._ask_for_peer(self._on_gone)
        except BaseException as error:  # noqa: BLE001 - an exception that leaves a callback stops its watcher for good
            if isinstance(error, zmq.ZMQError) and error.errno in ENDED:
                self.stop()
                self._on_end()
            else:
                self._fail(error)
        finally:
            self._since = 0.0

    def _ask_for_peer(self, on_gone: Callable[[], object]) -> None:
        events = _get(self.sock, _EVENTS)
        if events & _POLLIN:
            if not self.inbox.is_paused:
                self._schedule()  # it has come since all was read, and to ask has used up its edge
        elif not events & _POLLOUT:
            on_gone()

    def _fail(self, error: BaseException) -> None:
        """Rest, or go on, after a failure of the pump itself (not of one message), or after an interruption."""
        if self.inbox.is_closed or self._is_resting:
            return  # this is known
        if self._on_failure is None or not isinstance(error, Exception) or is_interruption(error):
            self._hub.handle_error(self, type(error), error, error.__traceback__)
            self._schedule()  # the edge may be used up
        else:
            self._is_resting = True
            self._watcher.stop()
            self._on_failure(error, self._go_on)

    def _go_on(self) -> None:
        self._is_resting = False
        if self.is_started and not self.inbox.is_closed and not self.is_inherited:
            self._watcher.start(self._run, True)
            self._schedule()

    def _start_retry(self) -> None:
        if not self._retry.is_set:
            self._retry.set(self._hub, RETRY, self._on_retry, again=True)

    def _on_retry(self) -> None:
        self._retry.stop()
        if self.is_inherited:
            return
        try:
            if not self._is_resting:
                self.flush(TRIED_EACH_TIME)
        except BaseException as error:  # noqa: BLE001 - see _run
            self._fail(error)
        finally:
            if self.outbox.peers:
                self._start_retry()
        if self.is_started and not self._scheduled:
            self._schedule()
