"""The exception that ends a block whose time is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import gevent

__all__ = ["DeadlineSignal", "Scope"]


class Scope(Protocol):
    """The part of a scope that its signal uses.

    Attributes:
        seconds: Its limit, None for none.
    """

    seconds: float | None


class DeadlineSignal(gevent.Timeout):  # type: ignore[misc]  # gevent is untyped
    """The exception thrown into a greenlet whose scope has ended. Do not catch it, or raise it again.

    Args:
        scope: The scope that has ended; also an attribute.
        put_back: Has the scope throw its signal again.
    """

    def __init__(self, scope: Scope, put_back: Callable[[], object]) -> None:
        # Not Timeout.__init__, which would make a timer.
        BaseException.__init__(self)
        self.seconds = scope.seconds
        self.exception = None
        self.timer = None
        self.scope = scope
        self._put_back = put_back

    @property
    def pending(self) -> bool:
        return False

    def start(self) -> None:
        raise RuntimeError("a DeadlineSignal is thrown by its scope; it cannot be started")

    def cancel(self) -> None:
        """Do nothing: there is no timer."""

    def close(self) -> None:
        """Do nothing: there is no timer."""

    def put_back(self) -> None:
        """Say that an operation completed although this interrupted it: it is thrown again at the next wait in the scope."""
        self._put_back()

    def __str__(self) -> str:
        return f"the scope {self.scope!r} has ended"

    __repr__ = __str__
