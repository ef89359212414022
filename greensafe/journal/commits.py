"""Group commit: many writes made durable at the price of few, in a thread that holds up no greenlet.

What is written while one commit is under way is the next one's batch. Rules:

* The hub never waits for the journal: its methods run in a thread, one at a time. `then` is called in the hub, in the order of
  the writes, when a write is durable or has failed; or where `close` is called, if that comes first.
* The next batch is started before those are told whose writes the last one was: the disk works while the hub does. (Not from
  the thread itself, which would spare the way through the hub: smaller batches cost more than that.)
* A write that nobody waits for starts no batch: it goes with the next one, or when the timer comes.
* A batch that fails by what may be one write's fault is tried again in halves, so that a write which cannot be stored fails
  alone. If the place is at fault (JournalUnavailable) halves would not help, and each may wait as long as the whole: then the
  batch is tried again as a whole, for as long as `_patience` says, and what comes meanwhile waits. After that, all are told;
  what nobody waits for stays, and goes with each further try: an answer or a rejection may have left that relies on it.
* That the place cannot be written to is logged, and `error` says so, from the first try on. While nothing is to be written an
  empty batch asks now and then whether that is over: a server that is not well may be asked nothing any more.
* Between commits, however many there are, and now and then while nothing happens, the journal may tidy up.
* A thread that does not come back (a disk that hangs, an effect that does not end) makes nobody wait late: once it counts as
  stalled (`_stall`) all callers are notified, except that of the effect, and so are later ones until the thread is back.
* What nobody wants any more is withdrawn, see `_queue`.

It does not know what is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import Hub

from ..deadlines import move_on
from ..errors import JournalError, JournalUnavailable, Unstorable
from ..hub.interruptions import is_interruption
from ..hub.log_limiter import write
from ..sansio.records import Write
from . import _stall
from ._acts import ask, commit as _commit, finish, open_it, tidy
from ._health import Health
from ._patience import LIMIT, Patience
from ._queue import Entry, Queue, Then
from ._reports import Reports
from ._stall import LOOK
from ._worker import Worker
from .base import Journal

__all__ = ["LOOK", "Commits", "Then"]

log = logging.getLogger("greensafe.journal.commits")

#: Seconds between two tidyings, if there was no more to do; and for which a write waits at most that no caller waits for.
TIDY = 5.0

#: Seconds between two questions whether a journal that could not be written can be.
ASK = 1.0


def _ignore() -> None:
    pass


class Commits:
    """The writes to one journal, for one server.

    Args:
        journal: Not open.
        running: The ids of the requests that must not be dropped.

    Attributes:
        count: Batches that were committed, or tried to.
        failures: Writes that have failed.
        queue: What waits, and what is being written.
        on_look: Called every `LOOK` seconds while the thread is at work for longer than that.
        on_interrupted: Called after something from outside has ended one of the callbacks, in a turn of its own.
        on_room: Called once, when the weight of what waits has become less.
    """

    def __init__(self, journal: Journal, running: Callable[[], Collection[bytes]]) -> None:
        self._journal = journal
        self._running = running
        self._hub: Hub = gevent.get_hub()
        self.queue = Queue()
        self.on_look: Callable[[], object] = _ignore
        self.on_room: Callable[[], object] | None = None
        self.on_interrupted: Callable[[], object] | None = None
        #: A batch is to be started as soon as that can be.
        self._is_due = False
        self._reports = Reports(self._guarded)
        self._is_open = False
        self._is_scheduled = False
        self._done = Event()
        self._closed = Event()
        #: The journal is to be closed as soon as the thread is free.
        self._is_to_finish = False
        self._patience = Patience()
        self._worker = Worker(self._hub, self._guarded, self._deal_with_result, self._give_up_waiting, lambda: self.on_look())
        self._tidy_at = 0.0
        self._health = Health(self._hub, self._on_timer)
        self.count = self.failures = 0

    @property
    def pending(self) -> int:
        """Writes that are not durable yet."""
        return len(self.queue.waiting) + len(self.queue.batch)

    @property
    def error(self) -> JournalError | None:
        """The error of the last try of a batch, None if it has succeeded."""
        return self._health.error

    @property
    def oldest_seconds(self) -> float | None:
        """The seconds for which the thread has been at its present work, all tries of a batch together; None if it has none."""
        return monotonic() - self._worker.since if self._worker.is_busy else None

    @property
    def is_well(self) -> bool:
        """Return whether the journal can be written, and its thread is not stalled."""
        return self.error is None and not self._worker.is_stalled

    def __repr__(self) -> str:
        return f"<Commits {self._journal!r} pending={self.pending} count={self.count} failures={self.failures}>"

    def open(self) -> None:
        """Open the journal; waits, and lets others run. JournalError if it cannot be opened.

        If the wait is ended, the journal is closed again as soon as it is open.
        """
        opening = self._worker.spawn(open_it, self._journal)
        try:
            _stall.log_if_slow(opening, self._journal)
            error = opening.get()
        except BaseException:
            self._is_to_finish = True
            self._worker.adopt(opening)
            raise
        if error is not None:
            self._end()
            raise error
        self._is_open = self._worker.is_watched = True
        self._health.start(TIDY, ASK)

    def write(
        self, write: Write, then: Then | None = None, undo: Write | None = None, weight: int = 0, is_soon: bool = False
    ) -> int:
        """Store something. From any greenlet of the server's thread, the hub included; for `then` see above.

        Without `then` it may take `TIDY` seconds before it is stored, unless it `is_soon`. With `undo` it is only wanted if
        `then` is told of it: if it is withdrawn, or `close` is called, first it is not stored; or undone, if it is by then and
        its result was None. Returns its number, for `withdraw`.
        """
        if not self._is_open:
            if then is not None:
                self._hub.loop.run_callback(then, None, JournalError("the journal is closed: its server was stopped"))
            return 0
        queue = self.queue
        if then is not None and self._worker.stalled is not None:
            self._hub.loop.run_callback(then, None, self._worker.stalled)
            return 0
        if then is not None or is_soon:
            self._is_due = True
            if not self._worker.is_busy and not self._is_scheduled:
                self._schedule()
        queue.number += 1
        queue.waiting[queue.number] = write, then, undo, weight
        queue.weight += weight
        return queue.number

    def withdraw(self, number: int) -> bool:
        """Take back a write, whose `then` is not called; return True if nothing of it is, or will be, written."""
        is_gone = self.queue.withdraw(number)
        if is_gone and self.on_room is not None:
            self._hub.loop.run_callback(self._have_room)
        return is_gone

    def _schedule(self) -> None:
        if not self._worker.is_busy and not self._is_scheduled:
            self._hub.loop.run_callback(self._guarded, self._start)  # at the end of this turn, with all that comes in it
            self._is_scheduled = True

    def _have_room(self) -> None:
        on_room, self.on_room = self.on_room, None
        if on_room is not None:
            self._guarded(on_room)

    def flush(self, seconds: float) -> bool:
        """Wait for up to `seconds` until nothing is pending, but not for a stalled thread; return whether that is so."""
        self._is_due = bool(self.queue.waiting)
        self._schedule()
        with move_on(seconds):
            while self.pending and not self._worker.is_stalled:
                self._done.clear()
                self._done.wait()
        return not self.pending

    def close(self) -> None:
        """Store what is pending, then close the journal; does not wait for either.

        Callers that wait are told that this is not known to be stored. A place that cannot be written to is tried once more.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._health.stop()
        self._worker.unwatch()
        is_paused = self._worker.is_paused
        if is_paused:
            self._worker.end_pause()
        pending = self.queue.close(is_paused)
        self._is_to_finish = True
        error = JournalError("the server was stopped before this was known to be stored")
        self._reports.due += zip(pending, [error] * len(pending))
        self._reports.send()
        self._done.set()
        if not self._worker.is_busy:
            self._end()

    def join(self, seconds: float) -> bool:
        """Wait for up to `seconds` until the journal is closed, but not for a stalled thread; return whether it is."""
        with move_on(0 if self._worker.is_stalled else seconds):
            self._closed.wait()
        return bool(self._closed.is_set())

    def _end(self) -> None:
        if self._is_to_finish:
            self._is_to_finish = False
            self._worker.start(None, finish, self._journal, self.queue.unfinished)
        else:
            self._worker.end(self._closed)

    def _start(self) -> None:
        self._is_scheduled = False
        if not self._is_open or self._worker.is_busy or not self._is_due or not self.queue.waiting:
            return
        self.queue.take()
        self._is_due = False
        self._try()
        if self.on_room is not None:
            self._have_room()

    def _try(self, since: float | None = None) -> None:
        writes = [entry[0] for entry in self.queue.batch.values()]
        self._worker.start(self._on_committed, _commit, self._journal, writes, since=since)

    def _deal_with_result(self) -> None:
        if self._worker.result is None:
            return
        then, result = self._worker.result
        if self._is_open:
            if then is None or self._guarded(then, result):
                self._worker.result = None
        else:
            self._worker.result = None
            if self.queue.late:
                self._guarded(self.queue.settle, result)
            self._guarded(self._end)
        if not self.pending:
            self._done.set()

    def _recover(self) -> None:
        """Go on with what an exception from outside has interrupted."""
        self._worker.recover()
        self._deal_with_result()
        self._reports.send()
        if self._is_open and not self._worker.is_busy and self.queue.batch:
            self._try()
        else:
            self._go_on()
        if self._is_open and self.on_interrupted is not None:
            self.on_interrupted()

    def _on_committed(self, results: list[Any]) -> None:
        batch = self.queue.batch
        told: list[tuple[Entry, Any]] = list(zip(batch.values(), results, strict=True))
        failures = [result for result in results if isinstance(result, JournalError)]
        if failures:
            self._worker.result = None
            self.queue.end_batch()
            told = self._look_into(batch, told, failures)
            self._reports.due += told
        else:
            self._patience.ended()
            self._health.note(None)
            # No call between these: before them this can be done once more, and after them the reports have what is left to do.
            self._reports.due += told
            self.queue.batch = {}
            self._worker.result = None
        self.count += 1
        self.queue.undo_unwanted(told)
        self._guarded(self._go_on)
        self._reports.send()
        self._guarded(self._go_on)
        if self.on_room is not None and not self._is_due:
            self._have_room()  # a caller that waits for the next batch would wait for ever

    def _look_into(
        self, batch: dict[int, Entry], told: list[tuple[Entry, Any]], failures: list[JournalError]
    ) -> list[tuple[Entry, Any]]:
        """Sort the results of a batch in which some writes have failed; return those to report."""
        ills = [failure for failure in failures if not isinstance(failure, Unstorable)]  # those say nothing about the place
        if ills or len(failures) < len(told):
            told = self._try_again(batch, told)
            self._health.note(ills[-1] if ills else None)
        self.failures += sum(isinstance(result, JournalError) for _, result in told)
        return told

    def _try_again(self, batch: dict[int, Entry], told: list[tuple[Entry, Any]]) -> list[tuple[Entry, Any]]:
        """Keep what the place could not take for another try, unless it was waited for long enough; return the rest."""
        kept = dict(each for each, (_, result) in zip(batch.items(), told) if isinstance(result, JournalUnavailable))
        if not kept:
            self._patience.ended()
            return told
        was_spent = self._patience.is_spent
        pause = self._patience.failed(self._worker.began, monotonic())
        if pause is None:
            error, stay = told[-1][1], self.queue.put_back(kept)
            told = [each for number, each in zip(batch, told) if number not in stay]
            if not was_spent:
                # What has come meanwhile was waiting, too. A batch of its own would have it wait for one more try.
                late, self._is_due = self.queue.take_waited_for(), False
                told += zip(late, [error] * len(late))
                text = "the journal could not be written for %.0f s: %d writes have failed; until it can be, each is tried once"
                write(log, logging.ERROR, text, LIMIT, len(kept) - len(stay) + len(late))
            return told
        self.queue.batch = kept
        self._worker.pause(pause, self._on_pause)
        return [each for each in told if not isinstance(each[1], JournalUnavailable)]

    def _on_pause(self) -> None:
        self._worker.end_pause()
        if not self._worker.is_inherited:
            self._try(self._worker.since)

    def _give_up_waiting(self, age: float) -> None:
        """Report the stall to all callers, and to later ones until the thread is back. That of the running effect waits on."""
        names = self.queue.under_way()
        told = self.queue.abandon()
        self._is_due = False
        self.failures += len(told)
        where = f"the effect of step {names[0]!r} has not returned" if names else "its disk, or who locks it, does not answer"
        what = "the journal has been busy for %.0f s: %s; %d writes have failed, and so do all further ones until it goes on"
        write(log, logging.ERROR, what, age, where, len(told))
        error = JournalUnavailable(f"the journal has been busy for {age:.0f} s and does not answer: {where}")
        self._worker.stalled = error
        self._reports.due += zip(told, [error] * len(told))
        self._reports.send()
        self._done.set()
        self._have_room()

    def _go_on(self, has_tidied: bool = False) -> None:
        """Start what is next: batches and the parts of a long tidying take turns."""
        if self._worker.is_busy or not self._is_open:
            return
        if monotonic() >= self._tidy_at and self._patience.since is None and not (has_tidied and self._is_due):
            self._tidy_at = monotonic() + TIDY
            self._worker.start(self._on_tidied, tidy, self._journal, frozenset(self._running()))
        else:
            self._start()

    def _guarded(self, act: Callable[..., object], *args: Any) -> bool:
        """Call it and report what it raises; return False if an exception from outside has ended it."""
        try:
            act(*args)
        except BaseException as error:  # noqa: BLE001 - see above
            self._hub.handle_error(self, type(error), error, error.__traceback__)
            if is_interruption(error) and self._hub.loop is not None:
                self._hub.loop.run_callback(self._guarded, self._recover)
                return False
        return True

    def _on_tidied(self, result: bool | JournalError) -> None:
        if isinstance(result, JournalUnavailable):
            self._patience.failed(self._worker.began, monotonic())
            self._health.note(result)
        elif isinstance(result, JournalError):
            write(log, logging.ERROR, "the journal cannot be tidied: %s", result)
        elif result:
            self._tidy_at = 0.0
        self._go_on(True)

    def _on_asked(self, error: JournalError | None) -> None:
        if error is None:
            self._patience.ended()
        elif isinstance(error, JournalUnavailable):
            self._patience.failed(self._worker.began, monotonic())
        self._health.note(error)
        self._go_on()

    def _on_timer(self) -> None:
        if self._worker.is_inherited:
            self._health.stop()  # in a forked child the journal is closed
        elif not self._worker.check() and not self._worker.is_busy and self._is_open:
            self._is_due = bool(self.queue.waiting)
            if self.error is not None and not self._is_due:
                self._worker.start(self._on_asked, ask, self._journal)
            else:
                self._go_on()
