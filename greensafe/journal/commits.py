"""How are many writes made durable at the price of few, without holding up anybody?

Group commit: what is written while one commit is under way is the next one's batch. Rules:

* The hub never waits for the journal: its methods run in a thread, one at a time. `then` is called in the hub, in the order of
  the writes, when a write is durable or has failed; or where `close` is called, if that comes first.
* The next batch is started before those are told whose writes the last one was: the disk works while the hub does. (Not from
  the thread itself, which would spare the way through the hub: smaller batches cost more than that.)
* A write that nobody waits for starts no batch: it goes with the next one, or when the timer comes.
* A batch that fails by what may be one write's fault is tried again in halves, so that a write which cannot be stored fails
  alone. If the place is at fault (JournalUnavailable) halves would not help, and each may wait as long as the whole: then the
  batch is tried again as a whole, for as long as `_patience` says, and what comes meanwhile waits. After that, all are told.
* That the place cannot be written to is logged, and `error` says so, from the first try on. While nothing is to be written an
  empty batch asks now and then whether that is over: a server that is not well may be asked nothing any more.
* Between commits, however many there are, and now and then while nothing happens, the journal may tidy up.

It does not know what is written.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import Hub
from gevent.threadpool import ThreadPool

from ..deadlines import move_on, start_timer
from ..errors import JournalError, JournalUnavailable
from ..sansio.records import Write
from ._acts import ask, commit as _commit, finish, open_it, tidy
from ._patience import LIMIT, Patience
from .base import Journal

__all__ = ["Commits", "Then"]

log = logging.getLogger(__name__)

#: Called with a write's result and None, or with None and the error.
Then = Callable[[Any, "JournalError | None"], None]

#: A write, who waits for it, and what undoes it.
_Entry = tuple[Write, "Then | None", "Write | None"]

#: Seconds between two times that the journal is asked to tidy up, if it had no more to do; and for which a write waits at most
#: that nobody waits for.
TIDY = 5.0

#: Seconds between two questions whether a journal that could not be written can be.
ASK = 1.0


class Commits:
    """The writes to one journal, for one server.

    Args:
        journal: Not open.
        running: The ids of the requests that must not be dropped.

    Attributes:
        count: Batches that were committed, or tried to.
        failures: Writes that have failed.
        error: What the last try of a batch has failed with, None if it has not.
    """

    def __init__(self, journal: Journal, running: Callable[[], Collection[bytes]]) -> None:
        self._journal = journal
        self._running = running
        self._hub: Hub = gevent.get_hub()
        self._pool = ThreadPool(1)
        self._process = os.getpid()
        self._waiting: list[_Entry] = []
        self._batch: Sequence[_Entry] = ()
        #: A batch is to be started as soon as that can be.
        self._is_due = False
        self._is_busy = False
        self._is_open = False
        self._is_scheduled = False
        self._done = Event()
        self._closed = Event()
        #: What is to be stored before the journal is closed, as long as that is to be done.
        self._last: list[Write] | None = None
        #: The batch that was under way when this was closed.
        self._late: Sequence[_Entry] = ()
        self._patience = Patience()
        #: When the thread was last given something to do.
        self._began = 0.0
        #: The timer of the pause before a batch is tried again. That is busy, too.
        self._pause: Any = None
        self._tidy_at = 0.0
        self._timer: Any = None
        self.count = 0
        self.failures = 0
        self.error: JournalError | None = None

    @property
    def pending(self) -> int:
        """Writes that are not durable yet."""
        return len(self._waiting) + len(self._batch)

    def __repr__(self) -> str:
        return f"<Commits {self._journal!r} pending={self.pending} count={self.count} failures={self.failures}>"

    def open(self) -> None:
        """Open the journal; waits, and lets others run. JournalError if it cannot be opened.

        Whoever ends the wait has it closed again as soon as it is open.
        """
        opening = self._pool.spawn(open_it, self._journal)
        try:
            error = opening.get()
        except BaseException:
            self._last, self._is_busy = [], True
            opening.rawlink(partial(self._on_done, None))
            raise
        if error is not None:
            self._end()
            raise error
        self._is_open = True
        self._set_timer(TIDY)

    def write(self, write: Write, then: Then | None = None, undo: Write | None = None) -> None:
        """Store something. From any greenlet of the server's thread, the hub included; for `then` see above.

        Without `then` it may take `TIDY` seconds before it is stored. With `undo` it is only wanted if `then` is told of it: if
        `close` is called first it is not stored; or undone, if it is by then and its result was None.
        """
        if not self._is_open:
            if then is not None:
                self._hub.loop.run_callback(then, None, JournalError("the journal is closed: its server was stopped"))
            return
        self._waiting.append((write, then, undo))
        if then is not None:
            self._is_due = True
            self._schedule()

    def _schedule(self) -> None:
        if not self._is_busy and not self._is_scheduled:
            # At the end of this turn, with all that comes in it.
            self._is_scheduled = True
            self._hub.loop.run_callback(self._start)

    def flush(self, seconds: float) -> bool:
        """Wait until nothing is pending, but not longer; returns whether that is so."""
        self._is_due = bool(self._waiting)
        self._schedule()
        with move_on(seconds):
            while self.pending:
                self._done.clear()
                self._done.wait()
        return not self.pending

    def close(self) -> None:
        """Store what is pending, then close the journal; does not wait for either.

        Whoever waits is told that nobody knows whether it is stored. A place that cannot be written to is tried once more.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._set_timer(None)
        batch, waiting = self._batch, self._waiting
        self._waiting, self._batch = [], ()
        if self._pause is None:
            self._late = batch
        else:
            self._end_pause()
            waiting = [*batch, *waiting]
            batch = ()
        self._last = [write for write, _, undo in waiting if undo is None]
        pending = (*batch, *waiting)
        self._tell_all(zip(pending, [JournalError("the server was stopped before this was known to be stored")] * len(pending)))
        self._done.set()
        if not self._is_busy:
            self._end()

    def join(self, seconds: float) -> bool:
        """Wait until the journal is closed, but not longer; returns whether it is."""
        with move_on(seconds):
            self._closed.wait()
        return bool(self._closed.is_set())

    def _end(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            self._call(None, finish, self._journal, last)
        else:
            # In a greenlet: called in the hub, gevent neither ends nor awaits a thread that has handed over its result and is
            # not quite done with that task.
            gevent.spawn(self._pool.kill).rawlink(lambda _: self._closed.set())

    def _start(self) -> None:
        self._is_scheduled = False
        if not self._is_open or self._is_busy or not self._is_due or not self._waiting:
            return
        self._is_due = False
        self._batch, self._waiting = self._waiting, []
        self._try()

    def _try(self) -> None:
        self._call(self._on_committed, _commit, self._journal, [write for write, _, _ in self._batch])

    def _call(self, then: Callable[[Any], None] | None, act: Callable[..., Any], *args: Any) -> None:
        """Have the thread do something; `then` is called with what it returns, unless this is closed meanwhile."""
        self._is_busy, self._began = True, monotonic()
        self._pool.spawn(act, *args).rawlink(partial(self._on_done, then))

    def _on_done(self, then: Callable[[Any], None] | None, done: Any) -> None:
        self._is_busy = False
        if self._is_open:
            if then is not None:
                self._guarded(then, done.get())
        else:
            self._guarded(self._see_to_late, done)
            self._guarded(self._end)
        if not self.pending:
            self._done.set()

    def _see_to_late(self, done: Any) -> None:
        """The batch under way when this was closed has ended: undo or store, with the last, what needs it."""
        late, self._late = self._late, ()
        if not late or self._last is None:
            return
        first = []
        for (write, _, undo), result in zip(late, done.get(), strict=True):
            if isinstance(result, JournalUnavailable):
                first += [write] if undo is None else []
            elif undo is not None and result is None:
                first.append(undo)
        self._last = first + self._last

    def _on_committed(self, results: list[Any]) -> None:
        batch, self._batch = self._batch, ()
        self.count += 1
        told: Iterable[tuple[_Entry, Any]] = zip(batch, results, strict=True)
        failures = [result for result in results if isinstance(result, JournalError)]
        if failures:
            told = self._try_again(list(told))
            self.failures += sum(isinstance(result, JournalError) for _, result in told)
        else:
            self._patience.ended()
        self._note(failures[-1] if failures else None)
        self._guarded(self._go_on)
        self._tell_all(told)
        self._guarded(self._go_on)

    def _try_again(self, told: list[tuple[_Entry, Any]]) -> list[tuple[_Entry, Any]]:
        """Keep what the place could not take for another try, unless it was waited for long enough; returns the rest."""
        kept = [entry for entry, result in told if isinstance(result, JournalUnavailable)]
        if not kept:
            self._patience.ended()
            return told
        was_spent = self._patience.is_spent
        pause = self._patience.failed(self._began, monotonic())
        if pause is None:
            if not was_spent:
                # What has come meanwhile was waiting as well. In a batch of its own it would wait for one more try, which takes
                # a second where the file is locked.
                late = self._take_waiting()
                told += zip(late, [told[-1][1]] * len(late))
                text = "the journal could not be written for %.0f s: %d writes have failed; until it can be, each is tried once"
                log.error(text, LIMIT, len(kept) + len(late))
            return told
        self._batch, self._is_busy = kept, True
        self._pause = start_timer(self._hub, pause, self._on_pause)
        return [each for each in told if not isinstance(each[1], JournalUnavailable)]

    def _take_waiting(self) -> list[_Entry]:
        """Take out what somebody waits for; the rest goes with the next batch."""
        waiting, self._waiting = self._waiting, []
        self._waiting = [entry for entry in waiting if entry[1] is None]
        self._is_due = False
        return [entry for entry in waiting if entry[1] is not None]

    def _on_pause(self) -> None:
        self._end_pause()
        if os.getpid() == self._process:  # in a forked child the journal is closed
            self._try()

    def _end_pause(self) -> None:
        self._pause.stop()
        self._pause.close()
        self._pause = None
        self._is_busy = False

    def _go_on(self, has_tidied: bool = False) -> None:
        """Start what is next: batches and the parts of a long tidying take turns."""
        if self._is_busy or not self._is_open:
            return
        if monotonic() >= self._tidy_at and self._patience.since is None and not (has_tidied and self._is_due):
            self._tidy_at = monotonic() + TIDY
            self._call(self._on_tidied, tidy, self._journal, frozenset(self._running()))
        else:
            self._start()

    def _guarded(self, act: Callable[..., object], *args: Any) -> None:
        """What fails is reported, and what comes next is done all the same."""
        try:
            act(*args)
        except BaseException:  # noqa: BLE001 - see above
            self._hub.handle_error(self, *sys.exc_info())

    def _tell_all(self, told: Iterable[tuple[_Entry, Any]]) -> None:
        for (_, then, _), result in told:
            if then is not None:
                if isinstance(result, JournalError):
                    self._guarded(then, None, result)
                else:
                    self._guarded(then, result, None)

    def _note(self, failed: JournalError | None) -> None:
        if failed is not None and self.error is None:
            log.error("the journal cannot be written: %s", failed)
            self._set_timer(min(ASK, TIDY))
        elif failed is None and self.error is not None:
            log.warning("the journal can be written again")
            self._set_timer(TIDY)
        self.error = failed

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
        if seconds is not None:
            self._timer = self._hub.loop.timer(seconds, seconds, ref=False)
            self._timer.start(self._on_timer)

    def _on_tidied(self, result: bool | JournalError) -> None:
        if isinstance(result, JournalUnavailable):
            self._patience.failed(self._began, monotonic())
            self._note(result)
        elif isinstance(result, JournalError):
            log.error("the journal cannot be tidied: %s", result)
        elif result:
            self._tidy_at = 0.0
        self._go_on(True)

    def _on_asked(self, error: JournalError | None) -> None:
        if error is None:
            self._patience.ended()
        elif isinstance(error, JournalUnavailable):
            self._patience.failed(self._began, monotonic())
        self._note(error)
        self._go_on()

    def _on_timer(self) -> None:
        if os.getpid() != self._process:
            self._set_timer(None)  # a forked child's, whose journal is closed
        elif not self._is_busy and self._is_open:
            self._is_due = bool(self._waiting)
            if self.error is not None and not self._is_due:
                self._call(self._on_asked, ask, self._journal)
            else:
                self._go_on()
