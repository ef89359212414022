"""The callbacks of writes that are stored or have failed, which are called once each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import JournalError
from ._queue import Entry

__all__ = ["Reports"]


class Reports:
    """What is to be reported to the callers of one journal.

    Args:
        guarded: Makes a call, and sees to what it raises; returns False if an exception from outside has ended it.

    Attributes:
        due: The writes whose callbacks were not called yet, and their results. To be extended in place.
    """

    def __init__(self, guarded: Callable[..., bool]) -> None:
        self._guarded = guarded
        self.due: deque[tuple[Entry, Any]] = deque()

    def __repr__(self) -> str:
        return f"<Reports {len(self.due)} due>"

    def send(self) -> None:
        """Call back each caller once, and once more if that is interrupted."""
        due = self.due
        while due:
            (_, then, _, _), result = due[0]
            if then is not None:
                args = (None, result) if isinstance(result, JournalError) else (result, None)
                if not self._guarded(then, *args):
                    self._guarded(then, *args)
            del due[0]
