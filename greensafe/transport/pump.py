"""How do messages get in and out of a socket that no greenlet waits on?

A pump drives a plain ROUTER or DEALER from callbacks in the hub: it reads what is there and hands each message to
`on_message`, sends at once what can be sent and keeps the rest for later. No greenlet, no switch and no timer per message.

Rules:

* Any libzmq call may consume the edge of ZMQ_FD, so every send is followed by one more read in this turn of the loop (many
  sends share it), and reading ends when libzmq says that nothing is there. A send by who was woken while messages are read
  asks for no such turn: the reading goes on behind it.
* At most `BATCH` messages are read at once, and no more than `TURN` allows. What the pump schedules while it runs is done in
  the same turn of the loop until `TURN` is over, and then in the next: timers and other sockets come in between.
* Each send may have to wake libzmq's I/O thread (10 µs and more, most of a request's cost). What `send_soon` sends goes out
  with the rest of this turn's, at the latest after `SOON` messages or `SOON_SECONDS` of reading: one wake-up for all.
* A message for a peer whose pipe is full waits in that peer's own queue, and only that peer's: `outbox` bytes at most, and
  `OUTBOXES` for all peers; what is beyond is dropped and counted. `send` never blocks. Whoever empties a list that he has
  handed to `send` takes the message back, if it has not left yet.
* Full peers are tried again a few at a time, in turn, so that thousands of them cost the others nothing.
* An exception of `on_message` goes to the hub's error handler; the pump goes on.
* When the pump itself fails it rests until `on_failure`, who is told, has it go on. No message is lost by that: one that was
  read halfway is read to its end, one that could not be sent waits like one whose peer is full.
* What a signal's handler raises is no failure of the pump's: it goes to the hub's error handler, or to the greenlet that has
  called, and the pump goes on at once. No message is torn by it (see `_whole`). One whose handing over it has interrupted is
  given to `on_interrupted`.
* A long message is read in parts, and one with too many frames is thrown away (see `_inlet`): `on_torn` is told.
* When the context is terminated or the socket closed, the pump stops and says so once, by `on_end`.

It does not know what is in the messages, but that a ROUTER's first frame names the peer.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent
import zmq
from zmq.backend import Socket as Backend

from ..hub.every import Every
from ..hub.forks import generation
from ..hub.interruptions import is_interruption
from ..hub.turns import TURN, call_in_next_turn
from ..sansio.weights import MESSAGE, weight
from .inlet import AT_ONCE, TOO_MANY, Inlet
from .whole import BYTES, FLAGS, consume, finish

__all__ = ["Pump"]

#: Messages read at once.
BATCH = 100

#: Messages after which, each time, the clock is asked whether reading goes on.
ASKED = 8

#: Messages that `send_soon` gathers, and seconds for which it does so while messages are read.
SOON = 32
SOON_SECONDS = 0.001

#: Bytes that a server keeps for one peer whose pipe is full, beyond its high-water mark: some 35,000 small messages.
OUTBOX = 16 * 2**20

#: The same for all peers of one socket together: so many may read slowly before what is for them is dropped.
OUTBOXES = 256 * 2**20

#: Bytes that wait for a peer beyond which it is not sent what is said again soon.
SPARE = 2**20

#: Messages that wait for a peer below which those that were taken back are not searched for.
SWEPT = 64

#: Seconds that reading all that has arrived may take at once: limits and others come then, whatever a peer sends.
DRAIN = 0.005

#: Messages that a socket about to close still reads in order to refuse them, and seconds for which it does so; who sends faster
#: than that learns by its end.
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
_SRCFD = int(zmq.SRCFD)

#: What libzmq says of a socket that cannot be used any more.
_ENDED = frozenset({zmq.ETERM, zmq.ENOTSOCK})
_UNREACHABLE = _ENDED | {zmq.EHOSTUNREACH}

#: Counts the frames that follow a message's first one, until it is long.
_FEW = (None,) * AT_ONCE

_get: Callable[[Any, int], Any] = Backend.get
_send: Callable[..., Any] = Backend.send


class _Queue:
    """The messages that wait for one peer, each with its weight in bytes."""

    __slots__ = ("messages", "size", "swept")

    def __init__(self) -> None:
        self.messages: deque[tuple[list[bytes], int]] = deque()
        self.size = 0
        #: Messages that were left when it was swept last.
        self.swept = SWEPT

    def sweep(self) -> int:
        """Forget the messages that were taken back; returns what they weighed. To be called when they may be half of it."""
        before = self.size
        self.messages = deque(entry for entry in self.messages if entry[0])
        self.size = sum(size for _, size in self.messages)
        self.swept = max(SWEPT, len(self.messages))
        return before - self.size


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
        dropped: Messages thrown away because their peer's queue was full.
        unsaid: Messages handed to `send_if_read` that were dropped.
        unreachable: Messages thrown away because their peer is gone (EHOSTUNREACH) or the socket is.
        is_started: It reads; the loop is kept alive.
        is_paused: No message is read while this is set, so peers feel backpressure; `resume` clears it.
        source: The descriptor by which the message came that `on_message` is called with; -1 on inproc.
    """

    __slots__ = (
        "__weakref__",
        "_first",
        "_generation",
        "_hub",
        "_inlet",
        "_is_closed",
        "_is_reading",
        "_is_resting",
        "_is_router",
        "_keeper",
        "_kept_last",
        "_limit",
        "_on_end",
        "_on_failure",
        "_on_gone",
        "_on_interrupted",
        "_on_message",
        "_on_torn",
        "_outbox",
        "_outbox_size",
        "_retry",
        "_scheduled",
        "_sent_last",
        "_since",
        "_sock",
        "_socks",
        "_soon",
        "_watcher",
        "dropped",
        "is_paused",
        "is_started",
        "unreachable",
        "unsaid",
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
        self._sock = sock
        self._socks = itertools.repeat(sock)
        self._on_message = on_message
        self._on_end = on_end
        self._on_gone = on_gone
        self._on_failure = on_failure
        self._on_torn = on_torn
        self._on_interrupted = on_interrupted
        self._inlet = Inlet(sock, most_frames)
        self._limit = outbox
        self._is_router = sock.type == zmq.ROUTER
        self._generation = generation()
        self._hub = gevent.get_hub()
        self._watcher = self._hub.loop.io(_get(sock, _FD), 1)
        #: A DEALER's owner looks after it; a server has nobody who does.
        self._keeper = Every(LOOK_AFTER, self, Pump.look_after) if self._is_router else None
        self._outbox: dict[bytes, _Queue] = {}
        self._outbox_size = 0
        self._soon: deque[list[bytes]] = deque()
        self._retry: Any = None
        self._scheduled = False
        #: While the pump runs: since when its callbacks follow from one another without a turn of the loop. Otherwise 0.
        self._since = 0.0
        self.is_started = False
        self._is_reading = False
        self._is_closed = False
        self._is_resting = False
        self.is_paused = False
        self.dropped = 0
        self.unreachable = 0
        self.unsaid = 0
        #: In this turn: what libzmq has taken, and what is kept for a peer that has no room.
        self._sent_last: list[bytes] | None = None
        self._kept_last: list[bytes] | None = None
        self._first: zmq.Frame | None = None

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "paused" if self.is_paused else "started" if self.is_started else "stopped"
        return f"<Pump {state} queued={self.queued} dropped={self.dropped} unreachable={self.unreachable}>"

    @property
    def source(self) -> int:
        if self._first is None:
            return -1
        try:
            return int(self._first.get(_SRCFD))
        except zmq.ZMQError:
            return -1

    @property
    def queued_size(self) -> int:
        """What the messages weigh that wait for a peer, in bytes."""
        return self._outbox_size

    @property
    def queued(self) -> int:
        """Messages that have not been handed to libzmq, nearly always because their peer's pipe is full."""
        return len(self._soon) + sum(len(queue.messages) for queue in self._outbox.values())

    @property
    def has_input(self) -> bool:
        """Whether messages have arrived that are not read yet; they are read in the next turn unless paused."""
        try:
            if not self._inlet.is_inside and not _get(self._sock, _EVENTS) & _POLLIN:
                return False
        except zmq.ZMQError:
            return False  # the context is terminated or the socket closed: nothing can be read any more
        if self.is_started and not self._scheduled and not self.is_paused:
            self._schedule()
        return True

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a forked child and the socket its parent's: it must not be used, nor closed."""
        return self._generation != generation()

    def start(self) -> None:
        """Begin to read. Also looks at once, since an edge may have passed before."""
        if not self.is_started:
            if not self._is_resting:
                self._watcher.start(self._run, True)
                self._schedule()
            self.is_started = True  # last, so that whoever was interrupted can do it again

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
        """Read again after `is_paused`."""
        if self.is_paused:
            self.is_paused = False
            self._schedule()

    def close(self, linger: int) -> None:
        """Stop and close the socket; what libzmq has queued may leave for `linger` milliseconds more."""
        self.stop()
        self._stop_retry()
        self._watcher.close()
        if self._keeper is not None:
            self._keeper.close()
        self._outbox.clear()
        self._soon.clear()
        self._is_closed = True
        self._sock.close(linger)

    def send(self, frames: list[bytes]) -> None:
        """Send now, or as soon as the peer has room. From any greenlet of this hub's thread, the hub included."""
        if self._soon:
            self._send_gathered()
        self._send(frames)
        if not self._is_reading and not self._scheduled and self.is_started:
            self._schedule()

    def send_soon(self, frames: list[bytes]) -> None:
        """Send in this turn of the loop, with what else there is. For who is about to leave the hub its turn."""
        if not self.is_started:
            self.send(frames)
            return
        self._soon += (frames,)  # no call, so nothing can come between it and who asks whether it is taken
        if len(self._soon) >= SOON:
            self._send_gathered()
        if not self._scheduled:
            self._schedule()

    def has_taken(self, frames: list[bytes]) -> bool:
        """Whether this message, whose sending was interrupted in this turn, leaves all the same, or has left."""
        return frames is self._sent_last or frames is self._kept_last or any(frames is each for each in self._soon)

    def _send_gathered(self) -> None:
        soon = self._soon
        while soon:
            frames = soon[0]
            if frames and frames is not self._sent_last and frames is not self._kept_last:
                self._send(frames)
            del soon[0]  # no call, so nothing comes between the two

    def _send(self, frames: list[bytes]) -> None:
        key = frames[0] if self._is_router else b""
        waiting = self._outbox.get(key) if self._outbox else None
        if waiting is not None:
            self._keep(waiting, frames)
        elif not self._try_send(frames):
            self._start_retry()
            self._outbox[key] = waiting = _Queue()
            self._keep(waiting, frames)

    def send_if_read(self, frames: list[bytes]) -> None:
        """Send, unless much waits for the peer already: for what is said again soon, and must not take the room of answers."""
        waiting = self._outbox.get(frames[0] if self._is_router else b"") if self._outbox else None
        if waiting is not None and waiting.size > SPARE:
            self.unsaid += 1
        else:
            self.send(frames)

    def unsent(self) -> list[list[bytes]]:
        """The messages that have not been handed to libzmq, as they were handed to `send`."""
        return [*self._soon, *(frames for queue in self._outbox.values() for frames, _ in queue.messages)]

    def drain(self) -> bool:
        """Read what has arrived, here and now, up to a batch; whether it has done so, or else has failed."""
        try:
            if not self._read():
                self._schedule()
        except Exception as error:
            if isinstance(error, zmq.ZMQError) and error.errno in _ENDED:
                self._schedule()  # the same error is met there, and dealt with
            elif is_interruption(error):
                self._schedule()
                raise
            else:
                self._fail(error)
            return False
        return True

    def drain_all(self) -> bool:
        """Read everything that has arrived, here and now, but for `DRAIN` at most; whether that was all.

        The rest is read in the turns that follow.
        """
        self.is_paused = False
        until = 0.0
        while not self._is_closed and self.has_input and self.drain():
            now = monotonic()
            until = until or now + DRAIN
            if now > until:
                return self._is_closed or not self.has_input
        return True

    def refuse(self, refuse: Callable[[list[bytes]], None]) -> None:
        """Read all that has arrived, paused or not, and hand it to `refuse` instead; for a socket that is about to close."""
        self.is_paused = False
        self._on_message = refuse
        until = monotonic() + REFUSED_SECONDS
        for _ in range(REFUSED // BATCH):
            if not self.has_input or monotonic() > until:
                return
            self.drain()

    def flush(self, peers: int | None = None) -> None:
        """Send what is about to be sent, and try again to send what is kept for so many peers; None for all."""
        self._send_gathered()
        for key in list(itertools.islice(self._outbox, peers)):
            waiting = self._outbox[key]
            del self._outbox[key]  # neither this nor the next `del` is a call: nothing comes between them and what follows
            messages = waiting.messages
            try:
                while messages:
                    frames, size = messages[0]
                    if frames and frames is not self._sent_last and not self._try_send(frames):
                        break
                    del messages[0]
                    waiting.size -= size
                    self._outbox_size -= size
            finally:
                if messages:
                    self._outbox[key] = waiting
        if not self._outbox:
            self._stop_retry()

    def _try_send(self, frames: list[bytes]) -> bool:
        """False if the peer has no room, or sending fails. Nothing switches in here, so a message goes out whole."""
        left = iter(frames)
        try:
            try:
                consume(map(_send, self._socks, left, FLAGS[len(frames)]))
            except zmq.Again as error:
                if type(error) is not zmq.Again:
                    raise  # by a signal's handler
                # libzmq throttles its commands: reading EVENTS processes them, then the second try tells the truth.
                left = iter(frames)
                _get(self._sock, _EVENTS)
                consume(map(_send, self._socks, left, FLAGS[len(frames)]))
        except BaseException as error:
            if finish(self._sock, frames, left, error):
                self._sent_last = frames
                raise
            return self._not_sent(error)
        self._sent_last = frames
        return True

    def _not_sent(self, error: BaseException) -> bool:
        """Nothing of a message has left: whether that is as if it had."""
        if type(error) is zmq.Again:
            return False
        if not isinstance(error, zmq.ZMQError) or is_interruption(error):
            raise error
        if error.errno not in _UNREACHABLE:
            self._fail(error)
            return False
        self.unreachable += 1
        return True

    def _keep(self, waiting: _Queue, frames: list[bytes]) -> None:
        size = MESSAGE + weight(frames)
        limit = self._limit
        if limit is None or (self._outbox_size < OUTBOXES and (not waiting.messages or waiting.size + size <= limit)):
            if len(waiting.messages) >= 2 * waiting.swept:
                self._outbox_size -= waiting.sweep()
            waiting.messages += ((frames, size),)  # no call; see flush
            waiting.size += size
            self._outbox_size += size
            self._kept_last = frames
        else:
            self.dropped += 1
            self._kept_last = frames

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
        if self._generation != generation():
            self._watcher.stop()
            return
        if not self.is_started or self._is_resting:
            return
        self._since = since or monotonic()
        try:
            if self._outbox or self._soon:
                self.flush(TRIED_EACH_TURN)
            self._sent_last = self._kept_last = None
            if not self.is_paused and not self._read(is_woken):
                self._schedule()
            if self._on_gone is None or self.is_inherited:
                return
            if self.is_started:
                self._ask_for_peer(self._on_gone)
        except BaseException as error:  # noqa: BLE001 - an exception that leaves a callback stops its watcher for good
            if isinstance(error, zmq.ZMQError) and error.errno in _ENDED:
                self.stop()
                self._on_end()
            else:
                self._fail(error)
        finally:
            self._since = 0.0

    def _ask_for_peer(self, on_gone: Callable[[], object]) -> None:
        events = _get(self._sock, _EVENTS)
        if events & _POLLIN:
            if not self.is_paused:
                self._schedule()  # it has come since all was read, and to ask has used up its edge
        elif not events & _POLLOUT:
            on_gone()

    def _fail(self, error: BaseException) -> None:
        """Not a message but the pump has failed, or was interrupted, here and now."""
        if self._is_closed or self._is_resting:
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
        if self.is_started and not self._is_closed and not self.is_inherited:
            self._watcher.start(self._run, True)
            self._schedule()

    def _read(self, is_likely: bool = False) -> bool:
        """Read up to a batch; True if there was no more, or no more is to be read."""
        outer, self._is_reading = self._is_reading, True
        try:
            return self._read_batch(is_likely)
        except BaseException as error:
            self._inlet.note(error)
            raise
        finally:
            self._is_reading = outer

    def _read_batch(self, is_likely: bool) -> bool:
        """See `_read`.

        To find nothing costs 4.8 µs by recv, which raises, and 2.0 by EVENTS. So EVENTS is asked where nothing is likely: at
        first, unless `is_likely`, and after a single message.
        """
        sock, inlet = self._sock, self._inlet
        parts, step = inlet.parts, inlet.step
        left = BATCH
        until = over = 0.0
        if inlet.is_inside and not self.is_paused and not self._read_on(inlet):
            return False
        while left:
            if self.is_paused or self._is_closed:
                return True
            if not is_likely and not _get(sock, _EVENTS) & _POLLIN:
                return True  # what is to be sent soon goes out in the turn that it has asked for
            try:
                next(step)
            except zmq.Again as error:
                if parts or type(error) is not zmq.Again:
                    raise  # by a signal's handler
                return True
            is_likely = left < BATCH
            left -= 1
            for _ in _FEW:
                if not parts[-1].more:
                    break
                next(step)
            else:
                if not self._read_on(inlet):
                    return False
                now = monotonic()
                over = over or now + TURN
                if now > over or self._generation != generation():
                    return False
                continue
            self._first = parts[0]
            frames = list(map(BYTES, parts))
            del parts[:]
            try:
                self._on_message(frames)
            except BaseException as error:  # noqa: BLE001 - one message's failure is reported and the next is read
                self._not_handed(frames, error)
            self._first = None
            if self._generation != generation():  # a greenlet that was switched to has forked, and this is the child
                return True
            if self._soon:
                now = monotonic()
                if not until:
                    until = now + SOON_SECONDS
                elif now > until:
                    self._send_gathered()
                    until = 0.0
            if not left % ASKED:
                now = monotonic()
                over = over or now + TURN
                if now > over:
                    return False
        return False

    def _read_on(self, inlet: Inlet) -> bool:
        """Read on in a message that is long, or was interrupted, and hand it over; whether it was read to its end."""
        if not inlet.read_on():
            return False
        why = inlet.why
        self._first = inlet.parts[0] if inlet.parts else None
        frames = inlet.take()
        try:
            if not why or why is TOO_MANY:
                self._on_message(frames)
            elif self._on_torn is not None:
                self._on_torn(frames, why)
        except BaseException as error:  # noqa: BLE001 - see _read_batch
            self._not_handed(frames, error)
        self._first = None
        return True

    def _not_handed(self, frames: list[bytes], error: BaseException) -> None:
        """`on_message` has raised."""
        try:
            if self._on_interrupted is not None and is_interruption(error):
                self._on_interrupted(frames)
        finally:
            self._hub.handle_error(self, type(error), error, error.__traceback__)

    def _start_retry(self) -> None:
        if self._retry is None:
            self._retry = self._hub.loop.timer(RETRY, RETRY)
            self._retry.start(self._on_retry)

    def _stop_retry(self) -> None:
        if self._retry is not None:
            self._retry.stop()
            self._retry.close()
            self._retry = None

    def _on_retry(self) -> None:
        if self.is_inherited:
            self._stop_retry()
            return
        try:
            if not self._is_resting:
                self.flush(TRIED_EACH_TIME)
        except BaseException as error:  # noqa: BLE001 - see _run
            self._fail(error)
        if self.is_started and not self._scheduled:
            self._schedule()
