"""The pauses between the tries of a batch that could not be written, and the limit after which the callers are notified.

The limit counts from the first try that has failed, over all batches, until one is stored. So a place that has been ill for
longer costs each further batch one try and no wait. A try, with the pause before it, counts for no more than `STEP`: if it has
taken longer, this process was most likely stopped (SIGSTOP) or its hub blocked, and the place not tried meanwhile.

It does not know what is tried.
"""

from __future__ import annotations

__all__ = ["LIMIT", "Patience"]

#: Seconds that a place which cannot be written to is waited for.
LIMIT = 5.0

#: Seconds before the second try, and at most between two. (Where another program has the file locked, a try waits by itself.)
SHORTEST = 0.05
LONGEST = 0.5

#: Seconds for which a try counts at most, with the pause before it.
STEP = 2.0


class Patience:
    """The trouble with one place, if there is any.

    Attributes:
        since: When the first try began that has failed, None if the last one has not.
        is_spent: It was waited for long enough.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.is_spent = False
        self._waited = self._failed_at = 0.0

    def __repr__(self) -> str:
        return f"<Patience {'well' if self.since is None else f'ill since {self.since:.3f}'}>"

    def failed(self, began: float, now: float) -> float | None:
        """Note that a try has failed; return the seconds until the next one, or None if it is to be given up."""
        if self.since is None:
            self.since = self._failed_at = began
            self._waited = 0.0
        self._waited += min(now - self._failed_at, STEP)
        self._failed_at = now
        if self._waited >= LIMIT:
            self.is_spent = True
            return None
        return min(max(self._waited / 2, SHORTEST), LONGEST, LIMIT - self._waited)

    def ended(self) -> None:
        """Note that a try has succeeded."""
        self.since = None
        self.is_spent = False
