"""When is a batch tried again that the journal's place could not take, and when are those told that wait for it?

The limit counts from the first try that has failed, over all batches, until one is stored. So a place that has been ill for
longer costs each further batch one try and no wait.

It does not know what is tried.
"""

from __future__ import annotations

__all__ = ["LIMIT", "Patience"]

#: Seconds that a place which cannot be written to is waited for.
LIMIT = 5.0

#: Seconds before the second try, and at most between two. (Where another program has the file locked, a try waits by itself.)
SHORTEST = 0.05
LONGEST = 0.5


class Patience:
    """The trouble with one place, if there is any.

    Attributes:
        since: When the first try began that has failed, None if the last one has not.
        is_spent: It was waited for long enough.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.is_spent = False

    def __repr__(self) -> str:
        return f"<Patience {'well' if self.since is None else f'ill since {self.since:.3f}'}>"

    def failed(self, began: float, now: float) -> float | None:
        """A try has failed; returns the seconds until the next one, or None if it is to be given up."""
        if self.since is None:
            self.since = began
        waited = now - self.since
        if waited >= LIMIT:
            self.is_spent = True
            return None
        return min(max(waited / 2, SHORTEST), LONGEST, LIMIT - waited)

    def ended(self) -> None:
        """A try has succeeded."""
        self.since = None
        self.is_spent = False
