"""The interruption of a greenlet that does not yield.

By a signal to its thread: SIGUSR2, on Linux and macOS and for the main thread's hub only. Python runs the signal's handler in
the greenlet that is running. Rules:

* It is hit only if its own preemptible scope is over, and once.
* Only the program's own code is hit: greensafe, pyzmq and gevent are never interrupted halfway, so no message is torn; nor are
  `logging`, `threading` and `queue`, so no lock of theirs stays held.
* A signal that comes while one of those is called leaves a mark, or a loop that does little else would hardly ever be hit. The
  call goes on to its end, what it returns reaches the program, and the loop that made it is hit before it begins again.
* Where Python has to drop what is raised (in a `__del__`, a weak reference's or the garbage collector's callback) that did not
  count: it is raised once more.

It does not know what is overdue, nor when; see `hubwatch`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dis import EXTENDED_ARG, opmap
from types import FrameType
from typing import Any

import gevent
from gevent.monkey import get_original

from ..deadlines import DeadlineSignal, deadline, is_signal_due, preempted, raise_if_preempted

__all__ = ["check_preempt", "listen", "poke", "unlisten", "unlisten_in_child"]

#: Whose code is never interrupted halfway: ours, and what of Python's library is written in Python and holds locks that others
#: need. `with` calls an `__exit__` of Python's own, which would be ended before its first line: the lock would stay held.
_WHOLE = frozenset({"greensafe", "zmq", "gevent", "greenlet"}) | {"threading", "logging", "queue", "concurrent", "importlib"}

_make_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")

_listeners = 0

#: Held while a signal is sent, and while the handler is removed: a signal without a handler would end the process.
_guard = _make_lock()

#: The mark: the program's frames that were on the stack when a signal came.
_marked: set[FrameType] = set()

#: The scope that they are to be interrupted for.
_overdue: deadline | None = None

#: What ends a turn of a loop, in bytecode. Where it waits for another generator Python lets no signal in either.
_LOOPS = frozenset(number for name, number in opmap.items() if "JUMP_BACKWARD" in name and name != "JUMP_BACKWARD_NO_INTERRUPT")

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
    """Have the greenlet that runs in this thread check whether its scope is over. To be called in another thread."""
    with _guard:
        if _listeners and signal.getsignal(signal.SIGUSR2) is _on_poke:
            signal.pthread_kill(thread, signal.SIGUSR2)


def _restore() -> None:
    _unmark()
    if sys.unraisablehook is _on_dropped:
        sys.unraisablehook = _told_before
    if signal.getsignal(signal.SIGUSR2) is _on_poke:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which throws away what is on its way
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def _on_poke(number: int, frame: FrameType | None) -> None:
    if _is_programs(frame):
        raise_if_preempted()
    elif (scope := preempted()) is not None:
        _mark(frame, scope)


def _is_programs(frame: FrameType | None) -> bool:
    """Return whether what is interrupted is the program's own code, or what it has called of Python's library."""
    while frame is not None:
        package = _package_of(frame)
        if package in _WHOLE:
            return False
        if package not in sys.stdlib_module_names:
            return True
        frame = frame.f_back
    return False


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


# The mark. Python calls a trace function for each instruction of a frame that asks for it. That costs nothing until there is a
# mark, and works for every kind of call, those of plain sockets and of Python's library included. The deadline's signal is
# raised at the jump that ends a loop's turn, one of the places at which Python itself calls signal handlers. Right behind the
# call its result would be lost, which may be a message. At the beginning of a line or of a function the `with` or `finally`
# that is just being left would not be completed. Another trace function, such as a debugger's, is left alone: then there is
# no mark.


def _mark(frame: FrameType | None, scope: deadline) -> None:
    global _overdue
    if sys.gettrace() not in (None, _on_call):
        return
    _unmark()
    _overdue = scope
    while frame is not None:
        package = _package_of(frame)
        if package not in _WHOLE and package not in sys.stdlib_module_names:
            _marked.add(frame)
            frame.f_trace_lines, frame.f_trace_opcodes, frame.f_trace = False, True, _on_event
        frame = frame.f_back
    if _marked:
        sys.settrace(_on_call)


def _unmark() -> None:
    global _overdue
    _overdue = None
    if sys.gettrace() is _on_call:
        sys.settrace(None)
    frames = list(_marked)  # the next signal may come in here
    _marked.clear()
    for frame in frames:
        _let_be(frame)


def _let_be(frame: FrameType) -> None:
    frame.f_trace_lines, frame.f_trace_opcodes, frame.f_trace = True, False, None


def _on_call(frame: FrameType, event: str, argument: object) -> None:
    """Trace no function that is called while there is a mark; remove a mark that is no longer needed.

    Each call in this thread comes here meanwhile, other greenlets' too, and takes many times as long. A marked greenlet that
    has had its signal otherwise may wait for long without leaving a loop or a function.
    """
    if _overdue is None or not is_signal_due(_overdue):
        _unmark()


def _on_event(frame: FrameType, event: str, argument: object) -> Any:
    """Raise what is due if a loop ends its turn here; called in one of the marked frames."""
    if event == "opcode" and _is_loops_end(frame):
        _unmark()
        raise_if_preempted()  # unless the scope was left meanwhile, or has had its signal otherwise
    elif event == "return":
        _marked.discard(frame)
        _let_be(frame)
        if not _marked:
            _unmark()
    return _on_event


def _is_loops_end(frame: FrameType) -> bool:
    code, at = frame.f_code.co_code, frame.f_lasti
    while code[at] == EXTENDED_ARG:
        at += 2
    return code[at] in _LOOPS


def _on_dropped(what: Any) -> None:
    if isinstance(what.exc_value, DeadlineSignal):
        what.exc_value.put_back()
    else:
        _told_before(what)
