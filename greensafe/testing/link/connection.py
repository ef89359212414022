"""One connection through a link: bytes and ends of streams pass on, late or never if the link is set to fail.

A connection has two pipes, one in each direction. In each a greenlet reads and puts what it got in a queue, and another passes
it on as the direction's faults allow. Not only bytes queue there but also what TCP tells besides them: SYN (somebody connects),
FIN (its end) and RST (its loss). So all that one side can learn of the other comes in order and under the same faults.

Rules:

* A stream never has a hole: of a connection that has lost something, nothing passes any more. When its direction is healed,
  both sides get RST, as from a host that has forgotten them.
* While a direction is cut a SYN is kept, since TCP repeats it. Whoever has given up by then was never there.
* What was read is passed on before the end that came behind it, also if it cannot be answered any more.
* A pipe that cannot pass anything on does not read on: that is how a sender notices.

It does not know what the bytes mean, nor how sockets are opened.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent
from gevent import socket
from gevent.event import Event

from ...hub.timers import TICK
from .faults import Faults
from .sockets import close, reset

__all__ = ["Connection", "Mark", "Pipe"]

#: Bytes read at a time, and held by a pipe that is not told to be slow.
CHUNK = 256 * 1024

#: Bytes held by a pipe with a delay: so many may be underway.
WINDOW = 8 * 1024 * 1024


class Mark(enum.Enum):
    """The ends that pass on besides bytes."""

    SYN = "somebody connects"
    FIN = "nothing comes any more"
    RST = "the connection is lost"


class State(enum.Enum):
    """Return whether anything can still pass through a pipe."""

    OPEN = "bytes pass"
    ENDED = "a FIN has passed: nothing but a RST can follow"
    OVER = "a RST has passed, or whoever should get it is gone"


class Pipe:
    """One direction of a connection.

    Attributes:
        faults: What the link does in this direction.
        source: The socket that is read; None as long as there is none.
        sink: The socket that is written to; None until a SYN has passed.
        state: See State.
    """

    def __init__(self, connection: Connection, faults: Faults) -> None:
        self.faults = faults
        self.state = State.OPEN
        self.source: Any = None
        self.sink: Any = None
        self._connection = connection
        self._queue: deque[tuple[float, bytes | memoryview | Mark]] = deque()
        self._held = 0
        self._has_end = False
        self._is_torn = False
        self._room = Event()
        self._work = Event()
        self._reader: Any = None
        self._writer = gevent.spawn(self._write)

    @property
    def twin(self) -> Pipe:
        """The pipe of the other direction."""
        to_server, to_client = self._connection.pipes
        return to_client if self is to_server else to_server

    @property
    def greenlets(self) -> list[Any]:
        return [greenlet for greenlet in (self._reader, self._writer) if greenlet is not None]

    def read_from(self, source: Any) -> None:
        """Begin to read."""
        self.source = source
        self._reader = gevent.spawn(self._read)

    def put(self, packet: bytes | Mark) -> None:
        """Queue what is to be passed on; what comes after an end is lost, except for a RST."""
        if self._has_end and packet is not Mark.RST:
            self.faults.lost += _size(packet)
            return
        self._has_end = packet in (Mark.FIN, Mark.RST)
        self._held += _size(packet)
        self._queue.append((monotonic(), packet))
        self._work.set()

    def look_again(self) -> None:
        """Have the greenlets look at the faults: they have changed."""
        self._work.set()
        self._room.set()

    def mend(self) -> None:
        """Give up a stream that has a hole, as the direction was healed."""
        if self._is_torn:
            self._is_torn = False
            self._queue.clear()
            self._held = 0
            self.put(Mark.RST)  # and when it has passed, the twin's reader ends with one for the other side
        self.look_again()

    # Reading.

    def _read(self) -> None:
        while True:
            try:
                data = self.source.recv(CHUNK)
            except OSError:
                self.put(Mark.RST)
                return
            if not data:
                # Whoever was written to in vain is lost; its error may have been told to that write, once.
                self.put(Mark.RST if self.twin.state is State.OVER else Mark.FIN)
                return
            self.put(data)
            while self._held >= (WINDOW if self.faults.delay else CHUNK):
                self._room.clear()
                self._room.wait()

    # Passing on.

    def _write(self) -> None:
        while self.state is not State.OVER:
            seconds = self._step()
            if seconds:
                self._work.clear()
                self._work.wait(None if seconds == math.inf else max(seconds, TICK))

    def _step(self) -> float:
        """Do what can be done now with the first in the queue.

        Returns:
            Seconds until something can be done; infinite if that needs a command or a packet.
        """
        if not self._queue:
            return math.inf
        read_at, packet = self._queue[0]
        if self.faults.is_cut:
            return self._lose(packet)
        seconds = self.faults.wait(read_at, _size(packet), monotonic())
        if seconds == 0:
            if isinstance(packet, Mark):
                self._queue.popleft()
                self._pass_mark(packet)
            else:
                self._pass_bytes(read_at, packet)
        return seconds

    def _lose(self, packet: bytes | memoryview | Mark) -> float:
        if packet is Mark.SYN:
            if not self._has_end:
                return math.inf
            self._connection.close()
            return 0
        self._queue.popleft()
        self._free(_size(packet))
        self.faults.lost += _size(packet)
        self._is_torn = True
        return 0

    def _pass_bytes(self, read_at: float, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        piece = self.faults.spoil(rest[: self.faults.share(len(rest))])
        try:
            sent = self.sink.send(piece, 0, 0.0)  # now or not at all: the faults may change while it is waited for
        except BlockingIOError:
            socket.wait_write(self.sink.fileno())
            return
        except OSError:
            self._lose_sink()
            return
        self.faults.count(sent)
        self._queue[0] = (read_at, rest[sent:])
        if sent == len(rest):
            self._queue.popleft()
        self._free(sent)

    def _free(self, size: int) -> None:
        self._held -= size
        self._room.set()

    def _pass_mark(self, mark: Mark) -> None:
        if mark is Mark.SYN:
            self._pass_syn()
        elif mark is Mark.FIN:
            self.state = State.ENDED
            with contextlib.suppress(OSError):  # it is gone; the pipe that reads from it will find out
                self.sink.shutdown(socket.SHUT_WR)
        else:
            self.state = State.OVER
            reset(self.sink)  # its reader, the twin's, ends by that with a RST for the other side
        self._connection.check()

    def _pass_syn(self) -> None:
        try:
            sink = self._connection.dial()
        except OSError:
            self._lose_sink()
            return
        if self.state is State.OVER:
            reset(sink)  # closed meanwhile: the kill is on its way, but this came first
            return
        self.sink = sink
        self.twin.read_from(sink)

    def _lose_sink(self) -> None:
        """Drop what is for a side that is gone. What that side sent before comes first; its own pipe passes on its end."""
        self.state = State.OVER
        if self.twin._reader is None or self.twin._reader.dead:
            self.twin.put(Mark.RST)
        self._connection.check()


class Connection:
    """A client's connection through the link, and the one to the target that belongs to it.

    Args:
        client: The accepted socket.
        dial: Connects to the target.
        faults: Of the two directions: to the server, to the client.
        on_close: Called once with this, when both sockets are closed or about to be.
    """

    def __init__(
        self, client: Any, dial: Callable[[], Any], faults: tuple[Faults, Faults], on_close: Callable[[Connection], object]
    ) -> None:
        self.dial = dial
        self._on_close = on_close
        self._is_closed = False
        self.pipes = (Pipe(self, faults[0]), Pipe(self, faults[1]))
        to_server, to_client = self.pipes
        to_client.sink = client
        to_server.put(Mark.SYN)
        to_server.read_from(client)

    @property
    def greenlets(self) -> list[Any]:
        return [greenlet for pipe in self.pipes for greenlet in pipe.greenlets]

    def check(self) -> None:
        """Close if both directions have come to their end."""
        if all(pipe.state is not State.OPEN for pipe in self.pipes):
            self.close()

    def close(self, *, is_reset: bool = False) -> None:
        """Close both sockets, with FIN or with RST; what is queued is lost. Does not wait for the greenlets' end."""
        if self._is_closed:
            return
        self._is_closed = True
        here = gevent.getcurrent()
        # First the greenlets, then the sockets: both happen in the hub, in this order, so no descriptor is waited for in vain.
        gevent.killall([greenlet for greenlet in self.greenlets if greenlet is not here], block=False)
        for pipe in self.pipes:
            pipe.state = State.OVER
            if pipe.sink is not None:
                (reset if is_reset else close)(pipe.sink)
        self._on_close(self)


def _size(packet: bytes | memoryview | Mark) -> int:
    return 0 if isinstance(packet, Mark) else len(packet)
