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
from time import monotonic
from typing import Any

import gevent

from .printable import printable

__all__ = ["PERIOD", "Seldom"]

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
        args = tuple(map(_plain, args))
        if kind.written < most:
            kind.written += 1
            _write(log, level, text, args, error, extra)
        else:
            kind.count += 1
            kind.last = (text, args, extra)

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
        self._tell(since)
        self.written = 1

    def end(self) -> None:
        """Count no more: the next such line is written at once."""
        self._close()
        if self._owner._kinds.get(self._key) is self:
            del self._owner._kinds[self._key]
        self.tell_rest()

    def tell_rest(self) -> None:
        """Write what was counted so far."""
        if self.count and self._process == os.getpid():
            self._tell(self._since)

    def _tell(self, since: float) -> None:
        count, (text, args, extra) = self.count, self.last
        self.count, self.last = 0, ("", (), None)
        text += " (the last of %d more within %.1f s)"
        _write(self._log, self._level, text, (*args, count, monotonic() - since), None, extra)

    def _close(self) -> None:
        self._timer.stop()
        self._timer.close()


def _plain(value: object) -> object:
    """What is put into a line in place of something that may hold others, or whose text may be anything."""
    if isinstance(value, (int, float)):
        return value
    try:
        return printable(repr(value) if isinstance(value, bytes) else str(value))
    except BaseException:  # noqa: BLE001 - a class of the program's may raise anything, and more than this line depends on it
        return f"<{type(value).__name__} that cannot be shown>"


def _write(
    log: logging.Logger,
    level: int,
    text: str,
    args: tuple[object, ...],
    error: BaseException | None,
    extra: dict[str, Any] | None,
) -> None:
    what = None if error is None else (type(error), error, error.__traceback__)
    if error is None or not _is_unsafe(error):
        log.log(level, text, *args, exc_info=what, extra=extra, stacklevel=3)
        return
    # Formatters take the traceback's text from the record if it is there; what reads exc_info finds the exception itself.
    code = sys._getframe(2)
    record = log.makeRecord(
        log.name, level, code.f_code.co_filename, code.f_lineno, text, args, what, code.f_code.co_name, extra
    )
    record.exc_text = _barred(error)
    log.handle(record)


def _is_unsafe(error: BaseException) -> bool:
    """Whether the text of an exception, or of one that led to it, could be taken for lines of the log."""
    return any(not text.isprintable() or len(text) > _LONG for each in _chain(error) for text in _texts(each))


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
    try:
        yield str(error)
        for note in getattr(error, "__notes__", ()):
            yield str(note)
    except BaseException:  # noqa: BLE001 - the traceback says that it cannot be shown
        return


def _barred(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error))[:_LONGEST].split("\n")
    return "\n".join(f"  | {printable(line, _LONG)}" for line in lines).rstrip(" |\n")


@atexit.register
def _flush_all() -> None:
    for seldom in list(_all):
        for kind in list(seldom._kinds.values()):
            kind.tell_rest()  # its timer may be that of another thread's loop, which turns still
