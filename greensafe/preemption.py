"""How is a greenlet interrupted that does not yield?

By a signal to its thread: SIGUSR2, on Linux and macOS and for the main thread's hub only. Python runs the signal's handler in
the greenlet that is running. Rules:

* It is hit only if its own preemptible scope is over, and once.
* Only the program's own code is hit: greensafe, pyzmq and gevent are never interrupted halfway, so no message is torn; nor are
  `logging`, `threading` and `queue`, so no lock of theirs stays held.
* Where Python has to drop what is raised (in a `__del__`, a weak reference's or the garbage collector's callback) that did not
  count: it is raised once more.

It does not know what is overdue, nor when; see `hubwatch`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent
from gevent.monkey import get_original

from .deadlines import DeadlineSignal, raise_if_preempted

__all__ = ["check_preempt", "listen", "poke", "unlisten", "unlisten_in_child"]

#: Whose code is never interrupted halfway: ours, and what of Python's library is written in Python and holds locks that others
#: need. `with` calls an `__exit__` of Python's own, which would be ended before its first line: the lock would stay held.
_WHOLE = frozenset({"greensafe", "zmq", "gevent", "greenlet"}) | {"threading", "logging", "queue", "concurrent", "importlib"}

_make_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")

_listeners = 0

#: Held by who signals and by who takes the handler away: a signal without a handler would end the process.
_guard = _make_lock()

#: Who is told of what Python has to drop, while we are.
_told_before: Callable[[Any], object] = sys.__unraisablehook__


def check_preempt() -> None:
    """See whether this hub's greenlets can be interrupted.

    Raises:
        RuntimeError: Not here, not in this thread, or somebody else uses SIGUSR2; the text says which.
    """
    number = getattr(signal, "SIGUSR2", None)
    if number is None or not hasattr(signal, "pthread_kill"):
        raise RuntimeError("preempt=True needs SIGUSR2 and pthread_kill, which this platform does not have")
    if not gevent.get_hub().main_hub:
        raise RuntimeError("preempt=True works in the main thread only: Python runs signal handlers nowhere else")
    if signal.getsignal(number) not in (signal.SIG_DFL, _on_poke):
        raise RuntimeError("preempt=True needs SIGUSR2 for itself, and this program has a handler for it")


def listen() -> None:
    """Be ready for `poke`, until `unlisten` was called as often."""
    global _listeners, _told_before
    _listeners += 1
    if _listeners == 1:
        signal.signal(signal.SIGUSR2, _on_poke)
        _told_before, sys.unraisablehook = sys.unraisablehook, _on_dropped


def unlisten() -> None:
    """Be ready once less."""
    global _listeners
    _listeners -= 1
    if not _listeners:
        with _guard:
            _restore()


def unlisten_in_child() -> None:
    """In a forked child, where no thread is that could poke."""
    global _listeners, _guard
    _guard = _make_lock()
    if _listeners:
        _listeners = 0
        _restore()


def poke(thread: int) -> None:
    """Have whoever runs in this thread look whether it is over. From another thread."""
    with _guard:
        if _listeners and signal.getsignal(signal.SIGUSR2) is _on_poke:
            signal.pthread_kill(thread, signal.SIGUSR2)


def _restore() -> None:
    if sys.unraisablehook is _on_dropped:
        sys.unraisablehook = _told_before
    if signal.getsignal(signal.SIGUSR2) is _on_poke:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which throws away what is on its way
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def _on_poke(number: int, frame: FrameType | None) -> None:
    if _is_programs(frame):
        raise_if_preempted()


def _is_programs(frame: FrameType | None) -> bool:
    """Whether what is interrupted is the program's own code, or what it has called of Python's library."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _WHOLE:
            return False
        if package not in sys.stdlib_module_names:
            return True
        frame = frame.f_back
    return False


def _on_dropped(what: Any) -> None:
    if isinstance(what.exc_value, DeadlineSignal):
        what.exc_value.put_back()
    else:
        _told_before(what)
