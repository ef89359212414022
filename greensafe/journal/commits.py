"""How are many writes made durable at the price of few, without holding up anybody?

Group commit: what is written while one commit is under way is the next one's batch. Rules:

* The hub never waits for the journal: its methods run in a thread, one at a time. `then` is called in the hub, in the order of
  the writes, when a write is durable or has failed; or where `close` is called, if that comes first.
* The next batch is started before those are told whose writes the last one was: the disk works while the hub does. (Not from
  the thread itself, which would spare the way through the hub: smaller batches cost more than that.)
* A write that nobody waits for starts no batch: it goes with the next one, or when the timer comes.
* A batch that fails is tried again in halves, so that a write which cannot be stored fails alone.
* Between commits, however many there are, and now and then while nothing happens, the journal may tidy up.

It does not know what is written.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import Hub
from gevent.threadpool import ThreadPool

from ..deadlines import move_on
from ..errors import JournalError
from ..sansio.records import Write
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


class Commits:
    """The writes to one journal, for one server.

    Args:
        journal: Not open.
        running: The ids of the requests that must not be dropped.

    Attributes:
        count: Batches that were committed.
        failures: Writes that have failed.
        error: What the last batch has failed with, None if it has not.
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
        #: What undoes the writes of the batch under way, when they come too late.
        self._late: list[Write | None] = []
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
        opening = self._pool.spawn(_open, self._journal)
        try:
            error = opening.get()
        except BaseException:
            self._last, self._is_busy = [], True
            opening.rawlink(self._on_done)
            raise
        if error is not None:
            self._end()
            raise error
        self._is_open = True
        self._timer = self._hub.loop.timer(TIDY, TIDY, ref=False)
        self._timer.start(self._on_timer)

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

        Whoever waits is told that nobody knows whether it is stored.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._timer.stop()
        self._timer.close()
        self._last = [write for write, _, undo in self._waiting if undo is None]
        self._late = [undo for _, _, undo in self._batch]
        pending = (*self._batch, *self._waiting)
        self._waiting, self._batch = [], ()
        self._tell_all(pending, [JournalError("the server was stopped before this was known to be stored")] * len(pending))
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
            self._call(_finish, self._journal, last)
        else:
            self._pool.kill()
            self._closed.set()

    def _start(self) -> None:
        self._is_scheduled = False
        if not self._is_open or self._is_busy or not self._is_due or not self._waiting:
            return
        self._is_due = False
        self._batch, self._waiting = self._waiting, []
        self._call(_commit, self._journal, [write for write, _, _ in self._batch])

    def _call(self, act: Callable[..., Any], *args: Any) -> None:
        self._is_busy = True
        self._pool.spawn(act, *args).rawlink(self._on_done)

    def _on_done(self, done: Any) -> None:
        self._is_busy = False
        batch, self._batch = self._batch, ()
        if self._is_open and batch:
            self._guarded(self._go_on)
            self._guarded(self._tell, batch, done)
        elif self._is_open:
            self._guarded(self._on_tidied, done)
        if not self._is_busy:
            if self._is_open:
                self._guarded(self._go_on, not batch)
            else:
                self._guarded(self._undo_late, done)
                self._guarded(self._end)
        if not self.pending:
            self._done.set()

    def _undo_late(self, done: Any) -> None:
        late, self._late = self._late, []
        if late and self._last is not None:
            undone = [undo for undo, result in zip(late, done.get(), strict=True) if undo is not None and result is None]
            self._last = undone + self._last

    def _go_on(self, has_tidied: bool = False) -> None:
        """Start what is next: batches and the parts of a long tidying take turns."""
        if monotonic() >= self._tidy_at and not (has_tidied and self._is_due):
            self._tidy_at = monotonic() + TIDY
            self._call(_tidy, self._journal, frozenset(self._running()))
        else:
            self._start()

    def _guarded(self, act: Callable[..., object], *args: Any) -> None:
        """What fails is reported, and what comes next is done all the same."""
        try:
            act(*args)
        except BaseException:  # noqa: BLE001 - see above
            self._hub.handle_error(self, *sys.exc_info())

    def _tell(self, batch: Sequence[_Entry], done: Any) -> None:
        results = done.get()
        self.count += 1
        failures = [result for result in results if isinstance(result, JournalError)]
        self.failures += len(failures)
        self._note(failures[-1] if failures else None)
        self._tell_all(batch, results)

    def _tell_all(self, batch: Sequence[_Entry], results: Sequence[Any]) -> None:
        for (_, then, _), result in zip(batch, results, strict=True):
            if then is not None:
                if isinstance(result, JournalError):
                    self._guarded(then, None, result)
                else:
                    self._guarded(then, result, None)

    def _note(self, failed: JournalError | None) -> None:
        if failed is not None and self.error is None:
            log.error("the journal cannot be written: %s", failed)
        elif failed is None and self.error is not None:
            log.warning("the journal can be written again")
        self.error = failed

    def _on_tidied(self, done: Any) -> None:
        result = done.get()
        if isinstance(result, JournalError):
            log.error("the journal cannot be tidied: %s", result)
        elif result:
            self._tidy_at = 0.0

    def _on_timer(self) -> None:
        if os.getpid() != self._process:
            self._timer.stop()  # a forked child's, whose journal is closed
        elif not self._is_busy and self._is_open:
            self._is_due = bool(self._waiting)
            self._go_on()


# What is done in the thread. Nothing is raised there: gevent would print it as well.


def _open(journal: Journal) -> Exception | None:
    try:
        journal.open()
    except Exception as error:  # noqa: BLE001 - it is raised where open was called
        return error
    return None


def _commit(journal: Journal, writes: Sequence[Write]) -> list[Any]:
    """The result of each write, or its JournalError."""
    try:
        results = journal.commit(writes)
        if len(results) != len(writes):
            raise JournalError(f"{journal!r} has returned {len(results)} results for {len(writes)} writes")
        return results
    except JournalError as error:
        if len(writes) == 1:
            return [error]
    except BaseException as error:  # a fault of the journal's must not cost a request its answer
        log.exception("%r has failed", journal)
        return [_wrapped(error)] * len(writes)
    half = len(writes) // 2
    return _commit(journal, writes[:half]) + _commit(journal, writes[half:])


def _tidy(journal: Journal, running: Collection[bytes]) -> bool | JournalError:
    try:
        return journal.tidy(running)
    except JournalError as error:
        return error
    except Exception as error:  # a fault of the journal's must not end the tidying for good
        log.exception("%r has failed", journal)
        return _wrapped(error)


def _finish(journal: Journal, writes: Sequence[Write]) -> None:
    try:
        if writes:
            for result in _commit(journal, writes):
                if isinstance(result, JournalError):
                    log.error("the journal cannot be written: %s", result)
        journal.close()
    except Exception:
        log.exception("%r cannot be closed", journal)


def _wrapped(error: BaseException) -> JournalError:
    wrapped = JournalError(f"the journal has failed: {error!r}")
    wrapped.__cause__ = error
    return wrapped
