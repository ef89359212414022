"""Timers of the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gevent.hub import Hub

__all__ = ["AGAIN", "LONGEST", "TICK", "start_timer"]

#: The shortest time in seconds that both loops can tell from none.
TICK = 0.001

#: The longest time in seconds that a timer is set for: libuv refuses what does not fit into 64 bits of milliseconds.
LONGEST = 86_400.0

#: Seconds after which a loop's timer calls again if its call has not begun.
AGAIN = 1.0


def start_timer(hub: Hub, seconds: float, callback: Callable[[], object], again: bool = False) -> Any:
    """Have the loop call `callback` once, in `seconds` (0 or less: in its next turn); stop() and close() what is returned.

    With `again` it is called every second until it stops the timer: so that it runs though a signal's handler has raised in the
    moment in which the loop called back, before its first line. (On libuv gevent stops it then.)

    Always a new timer: a stopped libev timer goes on with what it had left (gevent#1890). It has the low priority of
    gevent.Timeout's, so that what is ready wins over a limit. The callback may come early and has to look at the clock: libuv
    knows whole milliseconds and cuts off the rest, and no timer is set for more than `LONGEST`.
    """
    seconds = 0.0 if seconds <= 0 else min(max(seconds, TICK), LONGEST)
    timer = hub.loop.timer(seconds, AGAIN if again else 0.0, priority=-1)
    timer.start(callback, update=True)
    return timer
