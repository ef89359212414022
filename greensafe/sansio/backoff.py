"""How long to wait before the next try, and is there one at all?

Randomness comes in as an argument.
"""

from __future__ import annotations

__all__ = ["LONGEST", "PERIOD", "RESTARTS", "Budget", "Intensity", "delay"]

#: Seconds before the second try, and at the most.
FIRST = 0.05
LONGEST = 2.0

#: How much of a delay is left to chance, so that many clients do not come back in step.
JITTER = 0.5

#: Retries as a share of all requests, so that they cannot bring an ailing server down, and how many may come at once.
SHARE = 0.1
RESERVE = 10.0

#: How often something that fails is started again within so many seconds, before that is given up.
RESTARTS = 3
PERIOD = 5.0


def delay(tries: int, chance: float) -> float:
    """Seconds before the next try, after `tries` that failed; `chance` is evenly distributed over 0 to 1."""
    longest: float = min(LONGEST, FIRST * 2 ** min(tries - 1, 16))
    return longest * (1 - JITTER * chance)


class Budget:
    """How many retries there may be: a share of all requests, and a few more at first."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = RESERVE

    def earn(self) -> None:
        """A request was made."""
        if self._left < RESERVE:
            self._left += SHARE

    def spend(self) -> bool:
        """Whether one more retry is within the share; then it is taken."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Intensity:
    """May what has failed be started again, and when? Not if it was `RESTARTS` times within the last `PERIOD` seconds."""

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times: list[float] = []

    def restart(self, now: float, chance: float) -> float | None:
        """It has failed: seconds until it is to be started again; None if it has failed too often. `chance`: see `delay`."""
        self._times = [at for at in self._times if now - at < PERIOD]
        if len(self._times) >= RESTARTS:
            return None
        self._times.append(now)
        return delay(len(self._times), chance)
