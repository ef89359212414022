"""Check something every second or so.

An `Every` is a timer in the hub of the thread that makes it. Rules:

* It keeps neither the loop running nor its owner alive, and does nothing in a forked child.
* A check that fails is logged with its traceback; the next one comes at its time. KeyboardInterrupt and SystemExit, which may
  be raised in any callback, go to the main greenlet, where gevent sends them.

It does not know what is checked.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import gevent

from .forks import generation
from .log_limiter import write

__all__ = ["Every"]

log = logging.getLogger("greensafe.green._every")


class Every:
    """Call `act(owner)` every so many seconds, in the hub, until it is closed or the owner is gone.

    Args:
        seconds: Between two calls.
        owner: Held weakly.
        act: Must not wait.
    """

    __slots__ = ("_act", "_generation", "_is_closed", "_owner", "_timer")

    def __init__(self, seconds: float, owner: Any, act: Callable[[Any], object]) -> None:
        self._owner = weakref.ref(owner)
        self._act = act
        self._generation = generation()
        self._is_closed = False
        self._timer: Any = gevent.get_hub().loop.timer(seconds, seconds, ref=False)
        self._timer.start(self._turn, update=True)

    def __repr__(self) -> str:
        return "<Every closed>" if self._is_closed else f"<Every of {self._owner()!r}>"

    def close(self) -> None:
        """Call no more; in another thread than its own the timer ends at its next turn. Once more does nothing."""
        self._is_closed = True
        timer = self._timer
        if timer is not None and timer.loop is gevent.get_hub().loop:
            self._timer = None
            timer.stop()
            timer.close()

    def _turn(self) -> None:
        owner = self._owner()
        if owner is None or self._is_closed or self._generation != generation():
            self.close()
            return
        try:
            self._act(owner)
        except Exception as error:  # noqa: BLE001 - as below
            write(log, logging.ERROR, "%s: a check has failed, and is made again", owner, error=error)
        except BaseException:  # noqa: BLE001 - what leaves a callback ends its watcher for good
            gevent.get_hub().handle_error(self, *sys.exc_info())
