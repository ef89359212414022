"""The health of a journal: whether its last batch could be written, and the timer that checks.

That it cannot is logged once, and once that it can again. A timer runs all the while: more often as long as it cannot.

It does not know what is done at each turn of the timer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from gevent.hub import Hub

from ..errors import JournalError
from ..hub.log_limiter import write

__all__ = ["Health"]

log = logging.getLogger("greensafe.journal.commits")


class Health:
    """The health of one journal.

    Args:
        hub: Whose loop it is.
        on_timer: Called every now and then between `start` and `stop`. Must not raise.

    Attributes:
        error: What the last try of a batch has failed with, None if it has not.
    """

    def __init__(self, hub: Hub, on_timer: Callable[[], None]) -> None:
        self._hub = hub
        self._on_timer = on_timer
        self._timer: Any = None
        self._seconds = self._seconds_when_ill = 0.0
        self.error: JournalError | None = None

    def __repr__(self) -> str:
        return f"<Health {'well' if self.error is None else self.error!r}>"

    def start(self, seconds: float, when_ill: float) -> None:
        """Start the timer, with its two periods."""
        self._seconds, self._seconds_when_ill = seconds, min(when_ill, seconds)
        self._run(seconds)

    def stop(self) -> None:
        """Stop the timer, for good; what is noted afterwards is logged all the same."""
        self._seconds = self._seconds_when_ill = 0.0
        self._end_timer()

    def note(self, failed: JournalError | None) -> None:
        """Note how a batch has ended."""
        if failed is not None and self.error is None:
            write(log, logging.ERROR, "the journal cannot be written: %s", failed)
            self._run(self._seconds_when_ill)
        elif failed is None and self.error is not None:
            write(log, logging.WARNING, "the journal can be written again")
            self._run(self._seconds)
        self.error = failed

    def _run(self, seconds: float) -> None:
        self._end_timer()
        if seconds:
            self._timer = self._hub.loop.timer(seconds, seconds, ref=False)
            self._timer.start(self._on_timer)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
