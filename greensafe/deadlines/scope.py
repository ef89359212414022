"""One limit for everything that a block of code waits for.

    with deadline(5):
        sock.recv()

Rules:

* Time is absolute and monotonic. Nested scopes: the earliest counts; a shield holds back what is outside of it.
* When it comes, a `DeadlineSignal` (a BaseException, so that `except Exception` cannot swallow it) is thrown into the greenlet,
  once, for the outermost scope that is due. That scope alone turns it into DeadlineExceeded at its end.
* A block that finishes late or has swallowed its signal is not an error; but operations of ours without a limit of their own
  get one non-blocking try afterwards and then the signal again (`check`), so the cleanup cannot hang.
* Never early, never into a greenlet that has left the scope, never into the consumer of a suspended generator.
* Scopes are not inherited by spawned greenlets: `deadline(at=parent.at)` does that in writing.

The innermost scope of a greenlet is an attribute of that greenlet, and each scope knows the next outer one.
This module does not know sockets: they call `check` before they wait and `put_back` if they finished nevertheless.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import gevent
from gevent import getcurrent
from gevent.hub import Hub

from ..errors import Cancelled, DeadlineExceeded
from ..hub.frames import frame_at
from ..hub.timers import start_timer
from .frames import is_generator, is_on_stack
from .seconds import ENDLESS, to_float, to_seconds
from .signal import DeadlineSignal

__all__ = [
    "allowed_until",
    "check",
    "deadline",
    "is_signal_due",
    "move_on",
    "preempted",
    "preemptible",
    "raise_if_preempted",
    "shield",
]

P = ParamSpec("P")
R = TypeVar("R")

_get_hub: Callable[[], Hub] = gevent.get_hub

#: The attribute of a greenlet that holds its innermost scope. Absent outside of any scope.
_SCOPE = "_greensafe_scope"

#: Seconds between two checks of a suspended generator whose scope is over.
SUSPENDED = 0.05


class deadline:
    """A scope in which everything that waits has `seconds` in all. Also a decorator, with a new scope for each call.

    Args:
        seconds: From entry. None: no limit, but it can still be cancelled or extended. 0 or less: only what is ready now.
        at: Instead of `seconds`, the absolute time of `time.monotonic()`.

    Attributes:
        at: When it ends, absolute; None for no limit. Set on entry if `seconds` was given.
        seconds: As given, checked.
        is_cancelled: Whether `cancel` has ended it, and not its limit.
        expired: Whether the block was ended by this scope; known when it was left.
        delivered: Whether the signal was thrown into the block.

    Raises:
        DeadlineExceeded: On leaving the block because of its limit (a TimeoutError).
        Cancelled: On leaving it because of `cancel`.
        RuntimeError: Entered twice, in the hub, or left in another greenlet than it was entered in.
    """

    __slots__ = (
        "__weakref__",
        "_cause",
        "_frame",
        "_greenlet",
        "_outer",
        "_overtaken_by",
        "_state",
        "_timer",
        "at",
        "delivered",
        "expired",
        "is_cancelled",
        "seconds",
    )

    _quiet = False
    _shields = False
    _preempts = False
    #: What the repr calls it, if not by its class.
    _label: str | None = None

    def __init__(self, seconds: Any = None, *, at: float | None = None) -> None:
        if at is not None:
            if seconds is not None:
                raise TypeError("give seconds or at=, not both")
            if isinstance(at, bool) or not isinstance(at, (int, float)):
                raise TypeError(f"at= is a time of time.monotonic(), not {at!r}")
            if at != at:
                raise ValueError("at= cannot be NaN")
            at = to_float(at)
            at = None if at > ENDLESS else at
        self.seconds = to_seconds(seconds)
        self.at = at
        self.expired = False
        self.delivered = False
        self._cause: object = None
        self.is_cancelled = False
        self._timer: Any = None
        self._greenlet: Any = None
        self._outer: deadline | None = None
        #: The outer scope whose signal was thrown while this one was the inner one.
        self._overtaken_by: deadline | None = None
        self._frame: FrameType | None = None
        self._state = _NEW

    # The block.

    def __enter__(self) -> Self:
        if self._state is not _NEW:
            raise RuntimeError("a deadline limits one block: make a new one for each `with`")
        current = getcurrent()
        hub = _get_hub()
        if current is hub:
            raise RuntimeError("the hub cannot be limited: a deadline works in a greenlet, not in a callback of the loop")
        frame = frame_at(1)
        if is_generator(frame):
            self._frame = frame
        if self.seconds is not None:
            self.at = monotonic() + self.seconds
        self._push(current)
        if self.is_cancelled:
            self._arm(hub, 0.0)
        elif self.at is not None:
            self._arm(hub)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        timer = self._timer
        if timer is not None:
            self._timer = None
            timer.stop()
            timer.close()
        outer = self._outer
        self._pop()
        if self._shields and outer is not None:
            outer._release()
        if error is None or not isinstance(error, DeadlineSignal) or error.scope is not self:
            return False
        # Its frames hold the scope and the scope's user: without the traceback no cycle keeps them alive.
        error.__traceback__ = None
        overtaken_by = self._overtaken_by
        if overtaken_by is not None and overtaken_by.delivered and overtaken_by._greenlet is getcurrent():
            # This signal took the place of an outer one that was on its way through here: that one must not be lost.
            raise DeadlineSignal(overtaken_by, overtaken_by._put_back) from None
        self.expired = True
        if self._quiet:
            return True
        raise self._outcome() from None

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function: each call runs in a new scope."""
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(f"{function!r} runs when it is iterated or awaited, not when it is called: use `with` inside of it")
        kind, seconds, at = type(self), self.seconds, self.at

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            with kind(seconds, at=at):
                return function(*args, **kwargs)
            return None  # type: ignore[return-value]  # a move_on that ended

        return limited

    # Looking and steering.

    @staticmethod
    def current() -> deadline | None:
        """The innermost scope of the running greenlet, or None."""
        return getattr(getcurrent(), _SCOPE, None)

    @property
    def effective_at(self) -> float | None:
        """The absolute time that counts inside this scope: its own or that of an outer one, up to the nearest shield."""
        at = self.at
        scope: deadline | None = self
        while scope is not None:
            if scope.at is not None and (at is None or scope.at < at):
                at = scope.at
            scope = None if scope._shields else scope._outer
        return at

    def remaining(self) -> float:
        """Seconds that are left, outer scopes included: 0.0 when it is over, infinity without a limit."""
        at = self.effective_at
        return math.inf if at is None else max(0.0, at - monotonic())

    def extend(self, seconds: Any) -> None:
        """Give the block this many seconds from now, also when its time had run out; None lifts the limit.

        Before the block it changes what the block will have, after it nothing. RuntimeError for a server's scope, or in another
        thread than its own.
        """
        limit = to_seconds(seconds)
        if self._state is _LEFT:
            return
        self._check_thread("extend")
        self.seconds = limit
        self._disarm()
        self.delivered = False
        self.is_cancelled = False
        self._cause = None
        entered = self._state is _ENTERED
        self.at = monotonic() + limit if entered and limit is not None else None
        if self.at is not None:
            self._arm(_get_hub())

    def cancel(self, cause: object = None) -> None:
        """End the block now, or at its first wait if it has not begun; afterwards nothing happens.

        The block raises `cause` if that is an exception, otherwise Cancelled(cause). RuntimeError in another thread than
        its own.
        """
        self._check_thread("cancel")
        self._cause = cause
        self.is_cancelled = True
        if self._greenlet is not None:
            self._disarm()
            self.delivered = False
            self._arm(_get_hub(), 0.0)

    def __repr__(self) -> str:
        name = self._label or type(self).__name__
        if self._state is _NEW:
            return f"<{name} {self.seconds if self.at is None else self.at!r} not entered>"
        state = "expired" if self.expired else "delivered" if self.delivered else "left" if self._state is _LEFT else "running"
        return f"<{name} {state}, {self.remaining():.3f} s left>" if state == "running" else f"<{name} {state}>"

    # Inside.

    def _outcome(self) -> BaseException:
        if not self.is_cancelled:
            return DeadlineExceeded(self.seconds)
        return self._cause if isinstance(self._cause, BaseException) else Cancelled(self._cause)

    def _push(self, greenlet: Any) -> None:
        self._state = _ENTERED
        self._greenlet = greenlet
        self._outer = getattr(greenlet, _SCOPE, None)
        setattr(greenlet, _SCOPE, self)

    def _pop(self) -> None:
        """Leave; out of order (a generator closed late) the scope is unlinked wherever it stands."""
        greenlet, self._greenlet, self._frame, self._state = self._greenlet, None, None, _LEFT
        if greenlet is not getcurrent():
            _unlink(greenlet, self)
            raise RuntimeError("a deadline was left in another greenlet than it was entered in: it limits nobody any more")
        _unlink(greenlet, self)

    def _check_thread(self, name: str) -> None:
        """Refuse another thread than the block's, whose timer and greenlet nobody else can touch."""
        greenlet = self._greenlet
        if greenlet is not None and _root(greenlet) is not _root(getcurrent()):
            raise RuntimeError(
                f"deadline.{name} was called in another thread than its block runs in: have that thread's hub do it, by"
                " hub.loop.run_callback_threadsafe"
            )

    def _is_due(self) -> bool:
        return self.is_cancelled or (self.at is not None and monotonic() >= self.at)

    def _arm(self, hub: Hub, seconds: float | None = None) -> None:
        if seconds is None:
            assert self.at is not None
            seconds = self.at - monotonic()
        self._timer = start_timer(hub, seconds, self._on_timer)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _release(self) -> None:
        """Arm the limits that a shield held back, here and further out: it was left."""
        scope: deadline | None = self
        while scope is not None:
            if not scope.delivered and scope._timer is None and scope._is_due():
                scope._arm(_get_hub(), 0.0)
            scope = None if scope._shields else scope._outer

    def _put_back(self) -> None:
        if self._greenlet is not None:
            self._disarm()
            self.delivered = False
            self._arm(_get_hub(), 0.0)

    def _on_timer(self) -> None:
        self._disarm()
        if self._greenlet is None:
            return
        if self._state is _ENTERED and not self._is_due():
            self._arm(_get_hub())
            return
        self._deliver()

    def _deliver(self) -> None:
        """Throw the signal of the outermost due scope into the greenlet, unless the block is not what runs there."""
        greenlet = self._greenlet
        if self.delivered or greenlet is None or greenlet.dead:
            return
        if self._is_shielded():
            return  # the shield hands it on when it is left
        if self._frame is not None and not is_on_stack(greenlet.gr_frame, self._frame):
            # A suspended generator: the limit is not its consumer's, and nothing tells when the generator goes on.
            self._arm(_get_hub(), SUSPENDED)
            return
        signal = _delivered(_outermost_due(self), greenlet)
        try:
            greenlet.throw(signal)
        except BaseException:  # noqa: BLE001 - out of a raw greenlet; it must not end the hub's callback
            _get_hub().handle_error(greenlet, *sys.exc_info())

    def _is_shielded(self) -> bool:
        """Return whether the greenlet is inside a shield that stands inside this scope."""
        scope: deadline | None = getattr(self._greenlet, _SCOPE, None)
        while scope is not None and scope is not self:
            if scope._shields:
                return True
            scope = scope._outer
        return False


class move_on(deadline):
    """A deadline that ends its block quietly; `.expired` tells."""

    __slots__ = ()
    _quiet = True


class shield(deadline):
    """A scope that holds back the limits outside of it, for cleanup; with `seconds` it has a limit of its own."""

    __slots__ = ()
    _shields = True


class HandlerScope(deadline):
    """The scope of a server's handler. The server keeps one timer for all its requests, and says itself when this is over."""

    __slots__ = ()
    _label: str | None = "deadline"

    def extend(self, seconds: Any) -> None:
        """Refuse: RuntimeError."""
        raise RuntimeError("a server's limit for a request cannot be extended from its handler")

    @property
    def greenlet(self) -> Any:
        """The greenlet that it limits, from `attach` to `detach`; else None."""
        return self._greenlet

    def attach(self, greenlet: Any) -> None:
        """Enter without a timer, inside whatever scope the greenlet is in."""
        self._push(greenlet)
        self._state = _ATTACHED

    def detach(self) -> None:
        """Leave, if it was entered: in the greenlet that it limits."""
        if self._state is _ATTACHED:
            self._disarm()
            self._pop()

    def outcome(self) -> BaseException:
        """Make the exception that stands for its end: DeadlineExceeded, or what `cancel` was given."""
        return self._outcome()

    def expire(self) -> None:
        """Throw the signal, if it was entered: to be called in the hub."""
        if self._state is _ATTACHED:
            self._deliver()


class preemptible(HandlerScope):
    """A handler's scope whose end is also raised while the handler does not wait, see `loops.preemption`."""

    __slots__ = ()
    _preempts = True
    _label: str | None = None


_NEW, _ENTERED, _ATTACHED, _LEFT = "new", "entered", "attached", "left"


def check(limited: bool) -> None:
    """Raise the signal if a scope of the running greenlet is over; for operations that are about to wait.

    Args:
        limited: The operation has a limit of its own: then only a scope whose signal was not thrown yet ends it.
    """
    scope: deadline | None = getattr(getcurrent(), _SCOPE, None)
    if scope is None:
        return
    due: deadline | None = None
    while scope is not None:
        is_over = (not limited) if scope.delivered else scope._is_due()
        if is_over and (scope._frame is None or is_on_stack(frame_at(1), scope._frame)):
            due = scope
        scope = None if scope._shields else scope._outer
    if due is not None:
        raise _delivered(due, getcurrent())


def allowed_until(limited: bool) -> float | None:
    """Return until when the scopes of the running greenlet let it wait, None for no limit. Raises what `check` raises."""
    scope: deadline | None = getattr(getcurrent(), _SCOPE, None)
    if scope is None:
        return None
    check(limited)
    return scope.effective_at


def raise_if_preempted() -> None:
    """Raise the signal of the running greenlet's own preemptible scope if that is over: once, and not inside of a shield."""
    scope = preempted()
    if scope is not None:
        raise _delivered(scope, scope._greenlet)


def is_signal_due(scope: deadline) -> bool:
    """Return whether a scope that was over when it was last asked has neither been left since nor had its signal."""
    return scope._greenlet is not None and not scope.delivered


def preempted() -> deadline | None:
    """Return the scope whose signal `raise_if_preempted` would raise; None if it would raise none."""
    greenlet = getcurrent()
    scope: deadline | None = getattr(greenlet, _SCOPE, None)
    while scope is not None and not scope._preempts:
        scope = None if scope._shields else scope._outer
    is_over = scope is not None and scope._greenlet is greenlet and not scope.delivered and scope._is_due()
    return scope if is_over else None


def _delivered(target: deadline, greenlet: Any) -> DeadlineSignal:
    """Make the signal of a scope that is due, and mark the scope as delivered. The scopes inside of it note that it came."""
    target._disarm()
    target.delivered = True
    scope: deadline | None = getattr(greenlet, _SCOPE, None)
    while scope is not None and scope is not target:
        scope._overtaken_by = target
        scope = scope._outer
    return DeadlineSignal(target, target._put_back)


def _outermost_due(scope: deadline) -> deadline:
    """Find the outermost scope around that is due: it makes the inner ones pointless."""
    found = scope
    while not scope._shields and scope._outer is not None:
        scope = scope._outer
        if scope._state is _ENTERED and scope._is_due() and not scope.delivered:
            found = scope
    return found


def _root(greenlet: Any) -> Any:
    """The greenlet that a thread began with: each thread has one of its own."""
    while greenlet.parent is not None:
        greenlet = greenlet.parent
    return greenlet


def _unlink(greenlet: Any, scope: deadline) -> None:
    inner: deadline | None = getattr(greenlet, _SCOPE, None)
    if inner is scope:
        if scope._outer is None:
            delattr(greenlet, _SCOPE)
        else:
            setattr(greenlet, _SCOPE, scope._outer)
    else:
        while inner is not None and inner._outer is not scope:
            inner = inner._outer
        if inner is not None:
            inner._outer = scope._outer
    scope._outer = None
