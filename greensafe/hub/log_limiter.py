"""Log lines that a peer can cause at will: one a second of each kind, and the number of those left out.

    self._seldom = Seldom()
    self._seldom.say(log, logging.WARNING, "malformed request dropped: %s", error)

    malformed request dropped: a message without a body
    malformed request dropped: a message without a body (the last of 53969 more within 1.0 s)

Rules:

* The first line of a kind is written at once. Those that follow within a second are counted; when the second is over one line
  says how many they were, and shows the last. So each is either written or counted, and every count is written, also when
  nothing follows: by the timer, by `flush` at the owner's end, or at the process's exit.
* What is counted is kept as text: no request, exception or frame lives longer because of it.
* Texts that are put into a line are made printable and cut off, so that no peer can forge or flood the log with one. So is a
  traceback whose exceptions have such texts: its lines begin with a bar then.
* Whatever the program's logging does, no Exception of it comes out of here: somebody may be waiting for an answer. Such a line
  goes to stderr. (In the hub a log handler that waits fails, and so does one whose lock a greenlet holds that waits in it.)
* A timer of the hub writes the counts. It does not keep the loop running. A forked child forgets what its parent has counted.

It does not know what the lines are about.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
import weakref
from collections.abc import Hashable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import gevent

from .frames import frame_at
from .printable import printable

__all__ = ["PERIOD", "Seldom", "write"]

#: Seconds for which lines of one kind are counted after the first.
PERIOD = 1.0

#: Kinds that are counted apart at a time. What comes beyond that is told from others by its text alone.
KINDS = 100

#: Characters of one exception's text, and of a whole traceback, that are written as they are.
_LONG, _LONGEST = 10_000, 100_000


_all: weakref.WeakSet[Seldom] = weakref.WeakSet()


class Seldom:
    """The lines of one owner that others cause; for one thread with its hub."""

    __slots__ = ("__weakref__", "_kinds", "_process")

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._process = os.getpid()
        _all.add(self)

    def __repr__(self) -> str:
        return f"<Seldom kinds={len(self._kinds)} left_out={sum(kind.count for kind in self._kinds.values())}>"

    def say(
        self,
        log: logging.Logger,
        level: int,
        text: str,
        *args: object,
        key: Hashable = None,
        most: int = 1,
        error: BaseException | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Write a line, or count it.

        Args:
            log, level, text, args, extra: As for logging; in place of an arg that is no number stands its printable str.
            key: What tells this kind from others with the same text.
            most: Lines of the kind that are written at once within a second.
            error: Whose traceback follows the line. A line that is only counted has none.
        """
        if not log.isEnabledFor(level):
            return
        if self._process != os.getpid():
            self._process = os.getpid()
            self._kinds = {}
        if key is not None and len(self._kinds) >= KINDS:
            key = None
        kind = self._kinds.get((text, key))
        if kind is None:
            kind = self._kinds[text, key] = _Kind(self, (text, key), log, level)
        if kind.written < most:
            kind.written += 1
            write(log, level, text, *args, error=error, extra=extra, depth=2)
        else:
            kind.count += 1
            kind.last = (text, tuple(map(_plain, args)), extra)

    def flush(self) -> None:
        """Write all counts now."""
        for kind in list(self._kinds.values()):
            kind.end()


class _Kind:
    """Lines that are counted together, while one of them was written less than a second ago."""

    __slots__ = ("_key", "_level", "_log", "_owner", "_process", "_since", "_timer", "count", "last", "written")

    def __init__(self, owner: Seldom, key: Hashable, log: logging.Logger, level: int) -> None:
        self._owner = owner
        self._process = owner._process
        self._key = key
        self._log = log
        self._level = level
        self.count = self.written = 0
        self.last: tuple[str, tuple[object, ...], dict[str, Any] | None] = ("", (), None)
        self._start()

    def _start(self) -> None:
        self._since = monotonic()
        self._timer = gevent.get_hub().loop.timer(PERIOD, ref=False)
        self._timer.start(self._on_timer, update=True)

    def _on_timer(self) -> None:
        if self._process != os.getpid() or not self.count:
            self.end()
        else:
            self._close()
            self._start_again()

    def _start_again(self) -> None:
        since = self._since
        self._start()
        self.tell(since)
        self.written = 1

    def end(self) -> None:
        """Count no more: the next such line is written at once."""
        self._close()
        if self._owner._kinds.get(self._key) is self:
            del self._owner._kinds[self._key]
        self.tell(self._since)

    def tell(self, since: float | None = None) -> None:
        """Write the count, if there is one and it is this process's."""
        if not self.count or self._process != os.getpid():
            return
        count, (text, args, extra) = self.count, self.last
        self.count, self.last = 0, ("", (), None)
        text += " (the last of %d more within %.1f s)"
        seconds = monotonic() - (self._since if since is None else since)
        write(self._log, self._level, text, *args, count, seconds, extra=extra)

    def _close(self) -> None:
        self._timer.stop()
        self._timer.close()


def _plain(value: object) -> object:
    """Return what a log line shows instead of an object that may hold others alive, or whose text may be anything."""
    if isinstance(value, (int, float)):
        return value
    try:
        return printable(repr(value) if isinstance(value, bytes) else str(value))
    except BaseException:  # noqa: BLE001 - a class of the program's may raise anything, and more than this line depends on it
        return f"<{type(value).__name__} that cannot be shown>"


def write(
    log: logging.Logger,
    level: int,
    text: str,
    *args: object,
    error: BaseException | None = None,
    extra: dict[str, Any] | None = None,
    depth: int = 1,
) -> None:
    """Write a line now. No Exception leaves this; where the program's logging fails the line goes to stderr.

    Args:
        log, level, text, args, error, extra: As in `Seldom.say`.
        depth: Whose place in the code the record has: 1 for the caller, 2 for its caller.
    """
    if not log.isEnabledFor(level):
        return
    args = tuple(map(_plain, args))
    what = None if error is None else (type(error), error, error.__traceback__)
    try:
        if error is None or not _is_unsafe(error):
            log.log(level, text, *args, exc_info=what, extra=extra, stacklevel=depth + 1)
            return
        # Formatters take the traceback's text from the record if it is there; what reads exc_info finds the exception itself.
        code = frame_at(depth)
        record = log.makeRecord(
            log.name, level, code.f_code.co_filename, code.f_lineno, text, args, what, code.f_code.co_name, extra
        )
        record.exc_text = _barred(error)
        log.handle(record)
    except Exception as failed:  # noqa: BLE001 - a handler of the program's, which may raise anything
        _say_elsewhere(text, args, failed)


def _say_elsewhere(text: str, args: tuple[object, ...], failed: Exception) -> None:
    """Write to stderr, as logging does when one of its handlers fails, unless `logging.raiseExceptions` is off."""
    if logging.raiseExceptions:
        with suppress(Exception):  # there is none, or it is closed, or it waits: nobody is left to be told
            print(f"not logged: {text % args if args else text}\n{_barred(failed, chain=False)}", file=sys.stderr)


def _is_unsafe(error: BaseException) -> bool:
    """Return whether what a traceback shows of an exception, or of one that led to it, could be taken for lines of the log."""
    try:
        return any(not text.isprintable() or len(text) > _LONG for each in _chain(error) for text in _texts(each))
    except BaseException:  # noqa: BLE001 - its __str__ may raise anything; the traceback says that it cannot be shown
        return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found = [error]
    while found:
        each = found.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            found += [cause for cause in (each.__cause__, each.__context__) if cause is not None]
            found += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def _texts(error: BaseException) -> Iterator[str]:
    yield str(error)
    yield from map(str, getattr(error, "__notes__", ()))
    if isinstance(error, SyntaxError):  # of Python that a peer has sent: the traceback shows the line
        yield str(error.text).removesuffix("\n")
        yield str(error.filename)


def _barred(error: BaseException, chain: bool = True) -> str:
    lines = "".join(traceback.format_exception(error, chain=chain))[:_LONGEST].split("\n")
    return "\n".join(f"  | {printable(line, _LONG)}" for line in lines).rstrip(" |\n")


@atexit.register
def _tell_all() -> None:
    """Write what is counted. Timers are left alone: they may be of a thread that still runs, or of a loop that is gone."""
    for seldom in list(_all):
        for kind in list(seldom._kinds.values()):
            kind.tell()
