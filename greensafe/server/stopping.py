"""A server's stop: it drains in a greenlet of its own, so that a handler or the hub can ask for it as well.

Rules:

* One for each run of a server, however often it is asked to stop. The smallest limit counts.
* Neither the hub nor a handler of the server can wait for it: the hub must not block, and the drain waits for the handler. For
  them it begins, and they go on.
* At most a flag and a callback happen at once. A handler of a signal may run anywhere, between two frames of a message as well.
* Whatever fails, in the end the server is closed.

It does not know what a server is busy with.
"""

from __future__ import annotations

import logging
import math
from time import monotonic
from typing import Protocol

import gevent
from gevent.event import Event

from ..deadlines import move_on
from ..hub.log_limiter import write

__all__ = ["POLL", "Stop", "Stoppable"]

log = logging.getLogger("greensafe.stopping")

#: Seconds after which a server that stops looks by itself for what no event tells of: messages that libzmq has not shown yet.
POLL = 0.05


class Stoppable(Protocol):
    """One run of a server, as its stop sees it."""

    def drain(self) -> None:
        """Say to everybody that it stops."""

    def is_open(self) -> bool:
        """Whether it was not closed by somebody else."""

    def is_busy(self) -> bool:
        """Whether anything is still to be answered."""

    def flush(self) -> None:
        """Wait, for a bounded time, for what is answered and has not left."""

    def close(self) -> None:
        """Close it; called in the hub, where on_error and hooks cannot wait. `Stop.end` is called when that is done."""


class Stop:
    """The stop of one run of a server.

    Args:
        run: What is to be stopped.
        least: Seconds that it lasts at least, if its limit is not less, for those that have not heard of it yet.
    """

    def __init__(self, run: Stoppable, least: float) -> None:
        self._run = run
        self._least = least
        self._at = math.inf
        self._hub = gevent.get_hub()
        self._news = Event()
        self._ended = Event()
        gevent.spawn(self._go).rawlink(self._close)  # even if it is killed before it begins

    def __repr__(self) -> str:
        state = "ended" if self._ended.is_set() else "running"
        return f"<Stop {state}, {max(0.0, self._at - monotonic()):.3f} s left>"

    def end_by(self, at: float) -> None:
        """Have it end at this monotonic time, or earlier."""
        self._at = min(self._at, at)
        self.wake()

    def wake(self) -> None:
        """Something has changed. Called anywhere in the server's thread."""
        self._hub.loop.run_callback(self._news.set)

    def join(self) -> None:
        """Wait until the server is closed. Whatever ends the wait has it closed at once, and is raised then."""
        try:
            self._ended.wait()
        except BaseException:
            self.end_by(-math.inf)
            self._ended.wait()
            raise

    def end(self) -> None:
        """The server is closed."""
        self._ended.set()

    def _go(self) -> None:
        try:
            self._drain()
        except Exception as error:  # noqa: BLE001 - the server is closed, whatever it is
            write(log, logging.ERROR, "a drain has failed: the server is closed at once", error=error)

    def _close(self, _: object) -> None:
        if self._run.is_open():
            self._run.close()

    def _drain(self) -> None:
        run = self._run
        quiet, before = self._least, monotonic()
        run.drain()
        while run.is_open() and (now := monotonic()) < self._at:
            quiet -= min(now - before, 2 * POLL)  # if this process was stopped meanwhile, it has heard nobody
            if quiet <= 0 and not run.is_busy():
                break
            before = now
            self._news.clear()
            with move_on(min(POLL, self._at - now)):
                self._news.wait()
        if run.is_open():
            run.flush()
