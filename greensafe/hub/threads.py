"""Calls from other threads into the thread that an object belongs to.

A server, a client and their requests belong to the thread whose hub they were made or started in: neither libzmq's sockets nor
the loop's watchers stand two threads. Rules:

* `call_in` has a function called in that thread, in a greenlet of its own, and waits for its result. In a thread that has a hub
  other greenlets go on meanwhile; a thread that has none stops until then.
* Whoever gives up before the function has begun takes it back: then nothing has been done, and nothing will be.
* Every wait ends. A hub that does not begin within `LIMIT` seconds, or whose thread has ended, is a RuntimeError.

It does not know what is called.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, TypeVar

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.hub import Hub, Waiter
from gevent.monkey import get_original

from .frames import frames_of_threads
from .timers import start_timer

__all__ = ["LIMIT", "begin_in", "call_in", "check_here", "is_elsewhere", "is_in_hub", "pause", "wait_while"]

T = TypeVar("T")

#: Seconds that another thread's hub has to begin.
LIMIT = 30.0

#: Seconds between two looks whether that thread lives.
LOOK = 0.1

#: The same while nothing tells of what is waited for.
PAUSE = 0.005

_this_thread: Callable[[], int] = get_original("_thread", "get_ident")
_sleep: Callable[[float], None] = get_original("time", "sleep")
_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")


def is_elsewhere(hub: Hub | None) -> bool:
    """Return whether this hub is another living thread's: what belonged to one that has ended is anybody's to close."""
    return hub is not None and hub.thread_ident != _this_thread() and not _has_ended(hub)


def is_in_hub() -> bool:
    """Return whether this is a callback of this thread's hub, which cannot wait."""
    return gevent.getcurrent() is get_hub_if_exists()


def check_here(hub: Hub, what: str, instead: str) -> None:
    """Refuse what cannot be done in another thread than this hub's.

    Raises:
        RuntimeError: This is another one; it says `what`, and what to do `instead`.
    """
    if hub.thread_ident != _this_thread():
        raise RuntimeError(f"{what} was called in another thread than it belongs to: {instead}")


def call_in(hub: Hub, what: str, function: Callable[..., T], *args: Any) -> T:
    """Call a function in another thread's hub, and return its result, or raise what it raises.

    Args:
        hub: Where.
        what: What this is called in errors, such as "Server.stop".
        function, args: Called in a greenlet of that thread.

    Raises:
        RuntimeError: That thread has ended, or its hub did not turn within `LIMIT` seconds, or this is called in a hub, which
            cannot wait. The function was not called.
    """
    errand = _Errand(function, args)
    wait = _wait_natively if (here := get_hub_if_exists()) is None else _wait_in(here, what)
    until = monotonic() + LIMIT
    _call_soon(hub, errand.begin)
    try:
        while not wait(errand):
            has_ended = _has_ended(hub)
            if (has_ended or monotonic() >= until) and errand.take_back():
                why = "the thread to which it belongs has ended" if has_ended else f"its hub has not turned for {LIMIT:.0f} s"
                raise RuntimeError(f"{what} was called in another thread, and {why}: nothing was done")
            if has_ended and not errand.is_done:
                raise RuntimeError(
                    f"{what} was called in another thread, and the thread to which it belongs has ended meanwhile"
                )
    finally:
        errand.take_back()  # the caller was ended before the call began
    error, errand.error = errand.error, None  # its traceback holds the errand, and this frame
    if error is not None:
        try:
            raise error
        finally:
            del error
    return errand.result  # type: ignore[no-any-return]


def begin_in(hub: Hub, function: Callable[..., object], *args: Any) -> None:
    """Have a function called in another thread's hub, and do not wait for it: for a callback of a hub, which cannot wait."""
    _call_soon(hub, gevent.spawn, function, *args)


def wait_while(predicate: Callable[[], bool], hub: Hub, seconds: float) -> bool:
    """Wait, in another thread than this hub's, while something holds; return whether it ended. That hub's thread may end.

    Not for long: after so many seconds, or when the hub's thread has ended, this returns all the same.
    """
    until = monotonic() + seconds
    while predicate():
        if monotonic() >= until or _has_ended(hub):
            return not predicate()
        pause(PAUSE)
    return True


def pause(seconds: float) -> None:
    """Sleep; other greenlets go on if this thread has a hub, and none is made for it if not."""
    (_sleep if get_hub_if_exists() is None else gevent.sleep)(seconds)


class _Errand:
    """One function to be called in another thread."""

    __slots__ = ("_args", "_function", "_to_do", "error", "is_done", "notify", "result")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        #: Empty as soon as it has begun or was taken back: one thread alone can take what is in it.
        self._to_do = [None]
        self.is_done = False
        self.notify: Callable[[], object] = lambda: None
        self.result: Any = None
        self.error: BaseException | None = None

    def take_back(self) -> bool:
        """Have it not called any more; False if that has begun."""
        try:
            self._to_do.pop()
        except IndexError:
            return False
        return True

    def begin(self) -> None:
        """Call it; in the hub of its thread."""
        gevent.spawn(self._run)

    def _run(self) -> None:
        if not self.take_back():
            return
        try:
            self.result = self._function(*self._args)
        except (KeyboardInterrupt, SystemExit) as error:
            self.error = error
            raise  # meant for this thread, too
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self.error = error
        finally:
            self.is_done = True
            self.notify()


def _wait_natively(errand: _Errand) -> bool:
    """Stop this thread, which has no hub; return whether it is done, False after `LOOK` seconds."""
    lock = _lock()
    lock.acquire()
    errand.notify = lock.release
    if errand.is_done:
        return True
    lock.acquire(True, LOOK)
    errand.notify = lambda: None
    return errand.is_done


def _wait_in(hub: Hub, what: str) -> Callable[[_Errand], bool]:
    """Return what does the same in a thread that has a hub, whose other greenlets go on."""
    if gevent.getcurrent() is hub:
        raise RuntimeError(f"{what} was called in another thread's hub, which cannot wait: call it in a greenlet there")

    def wait(errand: _Errand) -> bool:
        waiter = Waiter(hub)
        timer = start_timer(hub, LOOK, lambda: waiter.switch(None))  # which also keeps this loop going
        try:
            errand.notify = lambda: _call_soon(hub, waiter.switch, None)
            if not errand.is_done:
                waiter.get()
        finally:
            errand.notify = lambda: None
            timer.stop()
            timer.close()
        return errand.is_done

    return wait


def _call_soon(hub: Hub, callback: Callable[..., object], *args: Any) -> None:
    """Have something called in a hub of any thread; nothing if that thread has destroyed it, perhaps just now."""
    loop = hub.loop
    if loop is not None and not hub.dead:
        with suppress(ValueError):  # the loop is destroyed
            loop.run_callback_threadsafe(callback, *args)


def _has_ended(hub: Hub) -> bool:
    return hub.loop is None or hub.dead or hub.thread_ident not in frames_of_threads()
