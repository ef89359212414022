"""Restarts of the library's own loops after a failure, which should never happen.

A server and a client have loops of their own: callbacks in the hub that go on for ever. `Restarts` looks after those of one
owner. Rules:

* A loop that fails is called again after a pause (`sansio.backoff`); if that happens more than three times within five seconds,
  all of the owner's loops together, its `give_up` is called with the error, once, and nothing is called again.
* Each failure is logged with its traceback, counted, and told to hooks.
* An Exception is a failure. What a signal's handler happens to raise in the hub is none, KeyboardInterrupt and SystemExit above
  all: it goes where gevent sends it, those two to the main greenlet, and the loop's turn is done again.

It does not know what the loops do, nor what giving up means; that one message's failure is not its loop's is up to the loop.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent

from ..hooks import LoopFailed, Tell
from ..hub.forks import generation
from ..hub.interruptions import is_interruption
from ..hub.log_limiter import write
from ..hub.timers import start_timer
from ..sansio.backoff import PERIOD, RESTARTS, Intensity

__all__ = ["Restarts"]

log = logging.getLogger("greensafe.restarts")


class Restarts:
    """The loops of one owner, in this thread's hub.

    Args:
        endpoint: What log lines and records call the owner.
        give_up: Called with the error of the loop that has failed too often, by whoever has met it.
        tell: Told of each failure.

    Attributes:
        counts: How often each loop was called again.
        error: What the owner was given up for; None as long as it was not.
    """

    def __init__(self, endpoint: str, give_up: Callable[[Exception], object], tell: Tell | None = None) -> None:
        self._endpoint = endpoint
        self._give_up = give_up
        self._tell = tell
        self._intensity = Intensity()
        self._hub = gevent.get_hub()
        self._generation = generation()
        self._pending: set[Any] = set()
        self._is_closed = False
        self.counts: dict[str, int] = {}
        self.error: Exception | None = None

    def __repr__(self) -> str:
        state = "given up" if self.error is not None else "closed" if self._is_closed else "open"
        return f"<Restarts {state} {self._endpoint} counts={self.counts}>"

    def run(self, loop: str, act: Callable[[], object]) -> None:
        """Do a turn of a loop; if it fails, again after a pause. In the hub nothing leaves this."""
        try:
            act()
        except BaseException as error:
            if isinstance(error, Exception) and not is_interruption(error):
                # What leaves a callback is reported at best, and ends a watcher for good.
                self.failed(loop, error, lambda: self.run(loop, act))
                return
            if gevent.getcurrent() is not self._hub:
                raise
            self._hub.handle_error(self, type(error), error, error.__traceback__)
            if not self._is_closed:
                self._start(0.0, lambda: self.run(loop, act))

    def failed(self, loop: str, error: Exception, again: Callable[[], object]) -> None:
        """Call `again` in the hub after a pause, as this loop has failed; not if it has failed too often."""
        if self.error is not None or self._is_closed:
            return
        pause = self._intensity.restart(monotonic(), random.random())
        if pause is not None:
            text = "%s: its loop %r has failed and goes on in %.3f s"
            write(log, logging.ERROR, text, self._endpoint, loop, pause, error=error, extra={"endpoint": self._endpoint})
            self._start(pause, again)
        else:
            text = "%s: its loop %r has failed after %d restarts within %.0f s: it is given up"
            details = {"endpoint": self._endpoint}
            write(log, logging.CRITICAL, text, self._endpoint, loop, RESTARTS, PERIOD, error=error, extra=details)
        self.note(loop, error, pause)

    def note(self, loop: str, error: Exception, pause: float | None) -> None:
        """A loop that restarts by itself, and logs, has failed: it goes on after so many seconds, or (None) no more."""
        if self.error is not None or self._is_closed:
            return
        if pause is not None:
            self.counts[loop] = self.counts.get(loop, 0) + 1
        else:
            self.error = error
        if self._tell is not None:
            self._tell(LoopFailed(self._endpoint, loop, pause, error))
        if pause is None:
            self.close()
            self._give_up(error)

    def close(self) -> None:
        """Call nothing again."""
        self._is_closed = True
        while self._pending:
            timer = self._pending.pop()
            timer.stop()
            timer.close()

    def _start(self, pause: float, again: Callable[[], object]) -> None:
        def fire() -> None:
            self._pending.discard(timer)
            timer.close()
            if self._generation == generation():  # a forked child's loops are not these
                again()

        timer = start_timer(self._hub, pause, fire)
        self._pending.add(timer)
