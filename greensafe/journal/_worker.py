"""The thread of a journal, which does one piece of work at a time.

* `is_busy` from the moment at which it is given work until its result is there to be dealt with; and while the work pauses.
* Each result is dealt with once, though a signal's handler may raise anywhere: `recover` goes on then.
* A thread that does not come back is noticed (see `_stall`) as long as it is watched.

It does not know what the work is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import Hub
from gevent.threadpool import ThreadPool

from ..errors import JournalError
from ..hub.log_limiter import write
from ..hub.timers import Timer
from ._stall import Lookout

__all__ = ["Worker"]

log = logging.getLogger("greensafe.journal.commits")

Guarded = Callable[..., object]


class Worker:
    """One thread, in this thread's hub.

    Args:
        hub: This thread's hub.
        guarded: Makes a call, and sees to what it raises.
        on_result: Called when `result` is there.
        on_stalled: Called with the age of the work, in seconds, when the thread has stalled.
        on_look: Called now and then while work takes long.

    Attributes:
        is_busy: See above.
        is_watched: The thread is watched. Set it when the journal is open.
        began: When the thread was last given work.
        result: What is called with a result, and the result, until that was dealt with.
        stalled: The error for callers that come while the thread is stalled. It ends with the stall.
    """

    def __init__(
        self,
        hub: Hub,
        guarded: Guarded,
        on_result: Callable[[], object],
        on_stalled: Callable[[float], object],
        on_look: Callable[[], object],
    ) -> None:
        self._hub = hub
        self._guarded = guarded
        self._on_result = on_result
        self._pool = ThreadPool(1)
        self._process = os.getpid()
        #: What is called with the result, and what the thread does.
        self._doing: tuple[Callable[[Any], None] | None, Any] | None = None
        self._pause = Timer()
        self._lookout = Lookout(
            hub,
            is_watched=lambda: self.is_busy and self.is_watched and not self.is_inherited,
            is_in_thread=lambda: not self._pause.is_set,
            on_stalled=partial(guarded, on_stalled),
            on_look=partial(guarded, on_look),
        )
        self.is_busy = False
        self.is_watched = False
        self.began = 0.0
        self.result: tuple[Callable[[Any], None] | None, Any] | None = None
        self.stalled: JournalError | None = None

    def __repr__(self) -> str:
        return f"<Worker {'busy' if self.is_busy else 'idle'} {self._lookout!r}>"

    @property
    def is_inherited(self) -> bool:
        """Return whether this process is a forked child, and the thread its parent's."""
        return os.getpid() != self._process

    @property
    def is_stalled(self) -> bool:
        """Return whether the thread is at its work for too long."""
        return self._lookout.is_stalled

    @property
    def is_paused(self) -> bool:
        """Return whether the work pauses before it is tried again."""
        return self._pause.is_set

    @property
    def since(self) -> float:
        """The monotonic time at which the present work was first tried."""
        return self._lookout.since

    def start(
        self, then: Callable[[Any], None] | None, act: Callable[..., Any], *args: Any, since: float | None = None
    ) -> None:
        """Have the thread do something, first tried at `since` if not now. `then` is called with what it returns."""
        self.is_busy, self.began = True, monotonic()
        if self.is_watched:
            self._lookout.begin(self.began if since is None else since)
        self._attend(then, self._pool.spawn(act, *args))

    def spawn(self, act: Callable[..., Any], *args: Any) -> Any:
        """Have the thread do something that the caller waits for itself."""
        return self._pool.spawn(act, *args)

    def adopt(self, done: Any) -> None:
        """Take over what was spawned: its caller was ended."""
        self.is_busy = True
        self._attend(None, done)

    def _attend(self, then: Callable[[Any], None] | None, done: Any) -> None:
        self._doing = then, done
        done.rawlink(partial(self._guarded, self._on_done))

    def pause(self, seconds: float, then: Callable[[], object]) -> None:
        """Stay busy without work, and call `then` after a pause; it ends the pause first."""
        self.is_busy = True
        self._pause.set(self._hub, seconds, then)

    def end_pause(self) -> None:
        """Be free for work."""
        self._pause.stop()
        self.is_busy = False

    def unwatch(self) -> None:
        """Watch the thread no more."""
        self.is_watched = False
        self._lookout.stop()

    def check(self) -> bool:
        """See to a result whose own call has been lost; return whether there was one."""
        if self._doing is None or not self._doing[1].ready():
            return False
        self._guarded(self._on_done, self._doing[1])  # its own call was ended before the first line
        return True

    def recover(self) -> None:
        """Go on with what an exception from outside has interrupted in here."""
        if self._doing is not None:
            done = self._doing[1]
            if done.ready():
                self._on_done(done)
            else:
                done.rawlink(partial(self._guarded, self._on_done))  # if that was not done; twice is as once
        elif self.is_busy and not self._pause.is_set:
            self.is_busy = False  # the thread may have it all the same: what is written twice is as if once

    def end(self, ended: Event) -> None:
        """End the thread, and set `ended` then."""
        # In a greenlet: called in the hub, gevent neither ends nor awaits a thread that has handed over its result and is not
        # quite done with that task.
        gevent.spawn(self._pool.kill).rawlink(lambda _: ended.set())

    def _on_done(self, done: Any) -> None:
        if self._doing is None or self._doing[1] is not done:
            return  # it was dealt with when something had been interrupted
        result = done.get()
        if self._lookout.end():
            text = "the journal goes on again: what it was busy with has taken %.1f s"
            write(log, logging.WARNING, text, monotonic() - self._lookout.since)
            self.stalled = None
        # No call between these: an interruption before has all of it done again, and after it the result is kept.
        self.result = self._doing[0], result
        self._doing = None
        self.is_busy = False
        self._on_result()
