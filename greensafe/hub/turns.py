"""Turns of the event loop: how a greenlet that never has to wait gives them to the others, and timers and descriptors theirs.

`gevent.sleep(0)` alone does not do that. It asks for a callback, and gevent calls callbacks that were asked for by callbacks in
the same turn: 50 of them (100 on libuv), and on until 5 ms are over. Only then do timers run and descriptors get polled, so a
limit of 5 ms came after 51 to 301 such calls. Rules:

* A greenlet that gives way gives the loop a whole turn if the last one is `TURN` or longer ago. Else only those run that are
  ready, which costs less (1.5 µs against 9 µs where the loop is cffi's).
* How many operations a socket may do before it gives way follows from how late the loop was: fewer where each takes long (the
  program computes in between, or the messages are large), up to `FAIR_SHARE` where they are quick.
* A callback that asks for itself again does so by `call_in_next_turn` as soon as `TURN` is over.

What this costs at most: a limit comes late by `TURN` and by the operations between two looks at the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent
from gevent.hub import Hub

from .timers import start_timer

__all__ = ["FAIR_SHARE", "FIRST_SHARE", "TURN", "call_in_next_turn", "let_others_run", "next_share", "seconds_since_turn"]

#: Operations in a row that find their message at once, at most, before the socket gives way.
FAIR_SHARE = 256

#: The same for a new socket, whose operations have not been measured yet.
FIRST_SHARE = 16

#: Seconds that the loop may be kept from its next turn.
TURN = 0.002

#: The attribute of a hub that holds the monotonic time at which a greenlet that gave way knew of its last turn.
_TURNED_AT = "_greensafe_turned_at"


def seconds_since_turn() -> float:
    """Return the seconds since the loop of this thread last turned, as far as greenlets that gave way have seen it."""
    late: float = monotonic() - getattr(get_hub(), _TURNED_AT, 0.0)
    return late


def next_share(share: int, late: float) -> int:
    """Return how many operations a socket may do until it gives way again, if the loop's last turn was so many seconds ago."""
    if late > 2 * TURN:
        return max(int(share * TURN / late), 1)
    return min(share * 4, FAIR_SHARE)


def let_others_run(late: float | None = None) -> None:
    """Give way; do nothing in the hub's own callbacks, which cannot wait.

    Args:
        late: What `seconds_since_turn` has just returned; None to ask it.
    """
    hub = get_hub()
    # No local variable holds the greenlet: when it is killed here it keeps its traceback, with this frame, and so itself and
    # the socket.
    if getcurrent() is hub:
        return
    if late is None:
        late = monotonic() - getattr(hub, _TURNED_AT, 0.0)  # not by a call: poll(0) does this each time
    if late >= TURN:
        _wait_for_turn(hub)
        return
    # As gevent.sleep(0), which takes half as long again.
    callback = hub.loop.run_callback(getcurrent().switch)
    try:
        hub.switch()
    finally:
        callback.stop()


def call_in_next_turn(hub: Hub, callback: Callable[..., object], *args: Any) -> None:
    """Have something called in this thread's hub after timers and descriptors had their turn."""

    def call() -> None:
        timer.stop()
        timer.close()
        callback(*args)

    timer = start_timer(hub, 0, call)


def _wait_for_turn(hub: Hub) -> None:
    """Sleep until the loop has turned once.

    By a timer that is due at once: both loops poll descriptors without a pause then, and call each such timer once in a turn,
    with whatever else is due. (An idle watcher of libev's is never called while descriptors are ready.)
    """
    asked_at = monotonic()
    timer = start_timer(hub, 0, getcurrent().switch)
    try:
        hub.switch()
    finally:
        timer.stop()
        timer.close()
    # Of all that wake in one turn the first notes it: the others have kept the loop waiting since then, too.
    if getattr(hub, _TURNED_AT, 0.0) < asked_at:
        setattr(hub, _TURNED_AT, monotonic())
