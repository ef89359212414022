"""A clock that a test sets itself.

For code that is handed the time, or a function that tells it, instead of asking `time.monotonic`: such code can be tested
through hours in microseconds, without a sleep and without a machine that is too slow.

It moves nobody else's clock: what waits in gevent or in the kernel goes on waiting in real time.
"""

from __future__ import annotations

import math

__all__ = ["ManualClock"]


class ManualClock:
    """A clock that goes only when told; called like `time.monotonic`.

        clock = ManualClock()
        cache = Cache(lifetime=60.0, clock=clock)
        clock.advance(60.0)

    Args:
        now: Seconds that it shows first; they may be negative, as those of any monotonic clock.

    Raises:
        TypeError, ValueError: `now` is not a finite number.
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = _finite(now, "the time")

    def __call__(self) -> float:
        return self._now

    @property
    def now(self) -> float:
        """The time in seconds; the same as calling the clock."""
        return self._now

    def advance(self, seconds: float) -> float:
        """Go on by `seconds`, 0 or more, and return the new time.

        Raises:
            TypeError, ValueError: It is not a finite number, or negative; the clock stays where it is.
        """
        step = _finite(seconds, "a step")
        if step < 0:
            raise ValueError(f"a clock never goes back: a step is 0 or more seconds, not {seconds!r}")
        self._now = _finite(self._now + step, "the time")
        return self._now

    def __repr__(self) -> str:
        return f"<ManualClock {self._now:g} s>"


def _finite(seconds: float, what: str) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{what} is a number of seconds, not {seconds!r}")
    if not math.isfinite(seconds):
        raise ValueError(f"{what} is a finite number of seconds, not {seconds!r}")
    return float(seconds)
