"""Wakes the callers of one client: when their answer has come, and when their own limit has.

One timer for all of them. When the last one has been woken, and asks for nothing more, everything rests: neither timer nor
connection keeps the loop going.

It does not know the client, so that a client which nobody holds any more is freed at once, with its descriptors, and not at the
next collection: all else that a client is made of refers to itself in circles.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from types import MethodType
from typing import Any

import gevent
from gevent import getcurrent
from gevent.hub import Hub

from ..hub.timers import start_timer
from ..loops.restarts import Restarts
from ..sansio.requester import Requester
from .call import Call
from .channel import Channel

__all__ = ["Waking", "weakly"]


class Waking:
    """The callers of one client.

    Args:
        requester: The table of what they have asked.
        restarts: Looks after the timer.

    Attributes:
        channels: What they wait for.
        at: When the timer is due, infinity for none.
        is_waking: A caller that was woken by a callback runs. It may ask again at once, so what is done at rest comes later.
    """

    __slots__ = ("_hub", "_requester", "_restarts", "_timer", "at", "channels", "is_waking")

    def __init__(self, requester: Requester, restarts: Restarts) -> None:
        self._requester = requester
        self.channels: Sequence[Channel] = ()
        self._restarts = restarts
        self._hub: Hub = gevent.get_hub()
        self._timer: Any = None
        self.at = float("inf")
        self.is_waking = False

    def __repr__(self) -> str:
        return f"<Waking {len(self._requester)} callers, {'no timer' if self._timer is None else 'timer'}>"

    def wake(self, call: Call) -> None:
        """Straight from a callback; from a greenlet only by way of the hub, which alone is sure to come back."""
        if not call.asleep:
            return
        if getcurrent() is not self._hub:
            self._hub.loop.run_callback(call.wake)
            return
        call.asleep = False
        self.is_waking = True
        try:
            call.switch()
        except BaseException:  # noqa: BLE001 - out of a raw greenlet; those behind it are to be woken all the same
            self._hub.handle_error(call, *sys.exc_info())
        finally:
            self.is_waking = False
        if not self._requester.pending:
            self.rest()

    def rest(self) -> None:
        """Keep nothing going: nobody waits."""
        self.disarm()
        for channel in self.channels:
            channel.rest()

    def arm(self, at: float) -> None:
        """Have the callers' limits seen to at this monotonic time."""
        self.disarm()
        self._timer = start_timer(self._hub, at - monotonic(), self._on_timer, again=True)
        self.at = at

    def disarm(self) -> None:
        """Stop the timer, if there is one."""
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
        self.at = float("inf")

    def _on_timer(self) -> None:
        self._restarts.run("limits", self._end_overdue)

    def _end_overdue(self) -> None:
        self.disarm()
        self.at = float("-inf")  # nobody sets it again before this is done, if it has to be done again
        for channel in self.channels:
            channel.drain()
        for asked in self._requester.tick(monotonic()):
            if asked.is_open:  # and not ended by those that were woken before it
                asked.owner.is_timed_out = True
                self.wake(asked.owner)
        self.disarm()
        at = self._requester.next_deadline()
        if at is not None:
            self.arm(at)


def weakly(method: Callable[..., object]) -> Callable[..., None]:
    """Call a bound method as long as somebody else holds its object."""
    assert isinstance(method, MethodType)
    found = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        bound = found()
        if bound is not None:
            bound(*args)

    return call
