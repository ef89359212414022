"""Timers of the event loop: one call later, a timer that its owner sets again and again, and the alarm of a queue of times."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent.hub import Hub

__all__ = ["AGAIN", "LONGEST", "TICK", "Alarm", "Timer", "start_timer"]

#: The shortest time in seconds that both loops can tell from none.
TICK = 0.001

#: The longest time in seconds that a timer is set for: libuv refuses what does not fit into 64 bits of milliseconds.
LONGEST = 86_400.0

#: Seconds after which a loop's timer calls again if its call has not begun.
AGAIN = 1.0


def start_timer(hub: Hub, seconds: float, callback: Callable[[], object], again: bool = False, ref: bool = True) -> Any:
    """Have the loop call `callback` once, in `seconds` (0 or less: in its next turn); stop() and close() what is returned.

    With `again` it is called every second until it stops the timer: so that it runs though a signal's handler has raised in the
    moment in which the loop called back, before its first line. (On libuv gevent stops it then.)

    Without `ref` it does not keep the loop running.

    Always a new timer: a stopped libev timer goes on with what it had left (gevent#1890). It has the low priority of
    gevent.Timeout's, so that what is ready wins over a limit. The callback may come early and has to look at the clock: libuv
    knows whole milliseconds and cuts off the rest, and no timer is set for more than `LONGEST`.
    """
    seconds = 0.0 if seconds <= 0 else min(max(seconds, TICK), LONGEST)
    timer = hub.loop.timer(seconds, AGAIN if again else 0.0, ref=ref, priority=-1)
    timer.start(callback, update=True)
    return timer


class Timer:
    """One timer of its owner, set for one thing at a time.

    It counts as set until it is stopped, also while its callback runs and afterwards: the callback stops it, or sets it again.
    """

    __slots__ = ("_timer",)

    def __init__(self) -> None:
        self._timer: Any = None

    def __repr__(self) -> str:
        return f"<Timer {'set' if self.is_set else 'stopped'}>"

    @property
    def is_set(self) -> bool:
        """Return whether it was set and not stopped since."""
        return self._timer is not None

    def set(self, hub: Hub, seconds: float, callback: Callable[[], object], again: bool = False, ref: bool = True) -> None:
        """Have the loop call `callback` in `seconds`, as `start_timer` does, instead of what it was set for before."""
        self.stop()
        self._timer = start_timer(hub, seconds, callback, again, ref)

    def stop(self) -> None:
        """Release the loop's timer. Stopping a stopped one does nothing."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()


class Alarm:
    """The timer of a queue of times, set for the earliest of them.

    Its callback stops it first, sees to what is due, and names the next time by `no_later_than`.

    Attributes:
        at: The monotonic time in seconds that it is set for; inf if it is not set, -inf while it is held. Read it before a call
            of `no_later_than` on a path where a call is too much.
    """

    __slots__ = ("_callback", "_hub", "_timer", "at")

    def __init__(self, hub: Hub, callback: Callable[[], object]) -> None:
        self._hub = hub
        self._callback = callback
        self._timer = Timer()
        self.at = math.inf

    def __repr__(self) -> str:
        return f"<Alarm at {self.at:.3f}>"

    def no_later_than(self, at: float) -> None:
        """Call back at the monotonic time `at`, unless that happens before."""
        if at < self.at:
            self._timer.set(self._hub, at - monotonic(), self._callback, again=True)
            self.at = at

    def stop(self) -> None:
        """Call back no more, until it is set again."""
        self._timer.stop()
        self.at = math.inf

    def hold(self) -> None:
        """Stop, and let nobody set it until the next `stop`: its callback names the next time itself when it is done."""
        self._timer.stop()
        self.at = -math.inf
