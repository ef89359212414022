"""The watch over a journal's thread, which may stall.

While the thread is at work it is looked at every `LOOK` seconds. It is stalled when its work has taken longer than `LIMIT`,
and has been looked at often enough meanwhile: time for which the process was stopped, or its hub was blocked, brings hardly
any looks, and is not the journal's. So a look that comes late judges nothing: what the thread has done meanwhile is not known
yet. Nor does one right behind another (libev fires a timer twice after a pause). The next one does, late or not: a hub that is
slow all the time looks less often.

It does not know what the thread does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent.hub import Hub

__all__ = ["LIMIT", "LOOK", "Lookout", "Stall", "log_if_slow"]

log = logging.getLogger("greensafe.journal.commits")

#: Seconds between two looks.
LOOK = 0.1

#: Seconds that a batch, or a tidying, may take.
LIMIT = 5.0

#: Looks at one piece of work before it may count as stalled: half of those that fit into the limit.
LOOKS = 25


class Stall:
    """The state of one journal's thread.

    Attributes:
        is_on: It is stalled.
    """

    __slots__ = ("_looks", "is_on")

    def __init__(self) -> None:
        self._looks = 0
        self.is_on = False

    def __repr__(self) -> str:
        return f"<Stall {'on' if self.is_on else 'off'} after {self._looks} looks>"

    def begin(self) -> None:
        """A new piece of work begins."""
        self._looks = 0

    def look(self, age: float) -> bool:
        """Note that the thread's work is this old, in seconds; return whether it has stalled just now."""
        self._looks += 1
        if self.is_on or age < LIMIT or self._looks < LOOKS:
            return False
        self.is_on = True
        return True

    def end(self) -> bool:
        """Note that the work has ended; return whether it was stalled."""
        was_on, self.is_on = self.is_on, False
        return was_on


def log_if_slow(opening: Any, journal: object) -> None:
    """Wait until a journal is open, but not longer than `LIMIT`; then log that it is not."""
    opening.wait(LIMIT)
    if not opening.ready():
        what = "%r could not be opened for %.0f s, and is still waited for: its disk, or its network, does not answer"
        log.error(what, journal, LIMIT)


class Lookout:
    """The looks at one journal's thread: a timer that runs from the beginning of some work until there is none.

    Args:
        hub: Whose loop it is.
        is_watched: Whether there is work, in the thread or in a pause before it is tried again.
        is_in_thread: Whether it is the thread's just now.
        on_stalled: Called with the age of the work, in seconds, when the thread has stalled. Must not raise.
        on_look: Called at each look at work that is older than `LOOK`. Must not raise.

    Attributes:
        since: When the work began, on the monotonic clock; all tries of a batch are one piece of work.
    """

    def __init__(
        self,
        hub: Hub,
        is_watched: Callable[[], bool],
        is_in_thread: Callable[[], bool],
        on_stalled: Callable[[float], object],
        on_look: Callable[[], object],
    ) -> None:
        self._hub = hub
        self._is_watched = is_watched
        self._is_in_thread = is_in_thread
        self._on_stalled = on_stalled
        self._on_look = on_look
        self._stall = Stall()
        self._timer: Any = None
        self._looked_at = 0.0
        self._was_late = False
        self.since = 0.0

    def __repr__(self) -> str:
        return f"<Lookout {'at rest' if self._timer is None else 'looking'} {self._stall!r}>"

    @property
    def is_stalled(self) -> bool:
        """Return whether the thread takes longer than `LIMIT`."""
        return self._stall.is_on

    def begin(self, since: float) -> None:
        """Note that the thread is given work, which was first tried at `since`."""
        self.since = since
        self._stall.begin()
        if self._timer is None:
            # Not stopped at the end of each piece of work: the next one mostly comes soon.
            self._looked_at = monotonic()
            self._timer = self._hub.loop.timer(LOOK, LOOK, ref=False)
            self._timer.start(self._look)

    def end(self) -> bool:
        """Note that the thread has come back; return whether it was stalled."""
        return self._stall.end()

    def stop(self) -> None:
        """Stop the timer. A thread that was stalled is so until its `end`."""
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _look(self) -> None:
        if not self._is_watched():
            self.stop()
            return
        if not self._is_in_time():
            return
        age = monotonic() - self.since
        if self._is_in_thread() and self._stall.look(age):
            self._on_stalled(age)
        if age >= LOOK:
            self._on_look()

    def _is_in_time(self) -> bool:
        """Return whether a look that is made now judges; see the module's head."""
        now = monotonic()
        gap = now - self._looked_at
        if gap < LOOK / 2:
            return False
        self._looked_at = now
        self._was_late = gap > 2 * LOOK and not self._was_late
        return not self._was_late
