"""Which of many things is due next?

One heap for all. What is over is not searched for but skipped when it comes to the top, and the heap is rebuilt when more than
half of it is over, so that it never grows with what ended long ago.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["DueQueue"]

T = TypeVar("T")

#: Entries below which rebuilding is not worth it.
SMALL = 64


class DueQueue(Generic[T]):
    """Things with an absolute time each.

    Args:
        is_live: Tells whether what was pushed for this time still counts.
    """

    __slots__ = ("_heap", "_is_live", "_live_size", "_number")

    def __init__(self, is_live: Callable[[T, float], bool]) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._is_live = is_live
        self._number = 0
        self._live_size = SMALL

    def __len__(self) -> int:
        """Entries kept, those that are over included."""
        return len(self._heap)

    def push(self, at: float, thing: T) -> None:
        """Have `thing` come up at `at`; pushed twice it comes up twice, if both still count then."""
        self._number += 1
        heap = self._heap
        if len(heap) >= 2 * self._live_size:
            self.sweep()  # before: what is pushed may count only afterwards
        heapq.heappush(heap, (at, self._number, thing))

    def sweep(self) -> None:
        """Let go of all that is over."""
        is_live, heap = self._is_live, self._heap
        heap[:] = [entry for entry in heap if is_live(entry[2], entry[0])]
        heapq.heapify(heap)
        self._live_size = max(SMALL, len(heap))

    def next_at(self) -> float | None:
        """When the next one is due, None if nothing is left."""
        heap = self._heap
        while heap:
            at, _, thing = heap[0]
            if self._is_live(thing, at):
                return at
            heapq.heappop(heap)
        return None

    def take_due(self, now: float, most: float = math.inf) -> Iterator[tuple[float, T]]:
        """Take out what is due by `now`, each with its time, in their order; `next_at` tells whether there are more.

        Each is taken out when the next one is asked for. If the caller is interrupted before, it comes again.
        """
        heap = self._heap
        while most > 0 and heap and heap[0][0] <= now:
            entry = heap[0]
            at, _, thing = entry
            if self._is_live(thing, at):
                most -= 1
                yield at, thing
            if heap and heap[0] is entry:
                heapq.heappop(heap)
