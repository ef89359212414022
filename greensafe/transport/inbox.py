"""The messages that arrive at one socket: read in batches, and handed over one by one.

Rules:

* At most `BATCH` messages are read at once, for `TURN` at most. Reading ends when libzmq says that nothing is there.
* An exception of `on_message` goes to the hub's error handler, and the next message is read.
* What a signal's handler raises tears no message (see `whole`). A message whose handing over it has interrupted is given to
  `on_interrupted`.
* A long message is read in parts, and one with too many frames is thrown away (see `inlet`): `on_torn` is told.
* In a child that was forked while a message was handed over, nothing more is read or sent: the socket is the parent's.

It does not know what is in the messages, nor when to read.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import zmq
from gevent.hub import Hub
from zmq.backend import Socket as Backend

from ..hub.forks import forbid_in_child
from ..hub.interruptions import is_interruption
from ..hub.turns import TURN
from .inlet import AT_ONCE, TOO_MANY, Inlet
from .outbox import Outbox
from .whole import BYTES

__all__ = ["BATCH", "Inbox"]

#: Messages read at once.
BATCH = 100

#: Messages after which, each time, the clock is asked whether reading goes on.
ASKED = 8

#: Seconds for which the answers to what is read are gathered before they are sent.
SOON_SECONDS = 0.001

_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_SRCFD = int(zmq.SRCFD)

#: Counts the frames that follow a message's first one, until it is long.
_FEW = (None,) * AT_ONCE

_get: Callable[[Any, int], Any] = Backend.get


class Inbox:
    """The messages that arrive at one socket.

    Args:
        sock: A plain ROUTER or DEALER.
        hub: The hub of this thread, whose error handler is told of exceptions.
        outbox: Where answers are gathered while messages are read.
        on_message: Called in the hub with the frames of each message.
        on_torn: Called with the first frames of a message that was thrown away, and with the reason.
        on_interrupted: Called with the frames of a message if an exception from outside has ended `on_message` halfway.
        most_frames: Frames that a message may have; of one that has more, `on_torn` or `on_message` gets so many and one more.

    Attributes:
        on_message: See above; it may be replaced.
        is_reading: Somebody reads right now, further up the stack.
        is_paused: No message is read while this is set.
        is_closed: Nothing is read any more: the socket is closed.
        is_inherited: This process is a forked child, and the socket its parent's.
    """

    __slots__ = (
        "__weakref__",
        "_first",
        "_hub",
        "_inlet",
        "_on_interrupted",
        "_on_torn",
        "_outbox",
        "_sock",
        "_soon",
        "is_closed",
        "is_inherited",
        "is_paused",
        "is_reading",
        "on_message",
    )

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        hub: Hub,
        outbox: Outbox,
        on_message: Callable[[list[bytes]], None],
        on_torn: Callable[[list[bytes], str], object] | None,
        on_interrupted: Callable[[list[bytes]], object] | None,
        most_frames: float,
    ) -> None:
        self._sock = sock
        self._hub = hub
        self._outbox = outbox
        self._soon = outbox.soon
        self._on_torn = on_torn
        self._on_interrupted = on_interrupted
        self._inlet = Inlet(sock, most_frames)
        self._first: zmq.Frame | None = None
        self.on_message = on_message
        self.is_reading = self.is_paused = self.is_closed = self.is_inherited = False
        forbid_in_child(self)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "paused" if self.is_paused else "open"
        return f"<Inbox {state} {self._inlet!r}>"

    def on_fork(self) -> None:
        """Read nothing more: this process is a forked child."""
        self.is_inherited = True

    @property
    def source(self) -> int:
        """The descriptor by which the message came that `on_message` is called with; -1 on inproc."""
        if self._first is None:
            return -1
        try:
            return int(self._first.get(_SRCFD))
        except zmq.ZMQError:
            return -1

    @property
    def has_input(self) -> bool:
        """Return whether messages have arrived that are not read yet."""
        try:
            return self._inlet.is_inside or bool(_get(self._sock, _EVENTS) & _POLLIN)
        except zmq.ZMQError:
            return False  # the context is terminated or the socket closed: nothing can be read any more

    def read(self, is_likely: bool = False) -> bool:
        """Read up to a batch; True if there was no more, or no more is to be read."""
        outer, self.is_reading = self.is_reading, True
        try:
            return self._read_batch(is_likely)
        except BaseException as error:
            self._inlet.note(error)
            raise
        finally:
            self.is_reading = outer

    def _read_batch(self, is_likely: bool) -> bool:
        """Read up to a batch.

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
            if self.is_paused or self.is_closed:
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
                if now > over or self.is_inherited:
                    return False
                continue
            self._first = parts[0]
            frames = list(map(BYTES, parts))
            del parts[:]
            try:
                self.on_message(frames)
            except BaseException as error:  # noqa: BLE001 - one message's failure is reported and the next is read
                self._not_handed(frames, error)
            self._first = None
            if self.is_inherited:  # a greenlet that was switched to has forked, and this is the child
                return True
            if self._soon:
                now = monotonic()
                if not until:
                    until = now + SOON_SECONDS
                elif now > until:
                    self._outbox.send_gathered()
                    until = 0.0
            if not left % ASKED:
                now = monotonic()
                over = over or now + TURN
                if now > over:
                    return False
        return False

    def _read_on(self, inlet: Inlet) -> bool:
        """Read on in a message that is long, or was interrupted, and hand it over; return whether it was read to its end."""
        if not inlet.read_on():
            return False
        why = inlet.why
        self._first = inlet.parts[0] if inlet.parts else None
        frames = inlet.take()
        try:
            if not why or why is TOO_MANY:
                self.on_message(frames)
            elif self._on_torn is not None:
                self._on_torn(frames, why)
        except BaseException as error:  # noqa: BLE001 - see _read_batch
            self._not_handed(frames, error)
        self._first = None
        return True

    def _not_handed(self, frames: list[bytes], error: BaseException) -> None:
        """Report what `on_message` has raised."""
        try:
            if self._on_interrupted is not None and is_interruption(error):
                self._on_interrupted(frames)
        finally:
            self._hub.handle_error(self, type(error), error, error.__traceback__)
