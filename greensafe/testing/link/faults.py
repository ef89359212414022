"""The faults of one direction of a link, and when bytes may pass.

One `Faults` for each direction, shared by all connections as a cable is: they share its rate, and its bytes are counted
together. What happens to a packet is decided when it would be passed on, by what holds then; so a fault that begins or ends
counts for what is underway as well.

It knows no socket and no clock: the time comes in as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["Faults"]

#: Seconds of sending that may be made up for by a sender that came late: a busy machine wakes nobody in time.
BURST = 0.05

#: Seconds of sending that go out in one piece; smaller pieces would cost a timer each.
PIECE = 0.01


class Faults:
    """The state of one direction.

    Attributes:
        is_cut: What would pass is lost.
        is_stalled: Nothing passes, and nothing is lost.
        delay: Seconds from being read to being passed on.
        rate: Bytes per second at most; None for no limit.
        passed: Bytes passed on so far, by all connections.
        lost: Bytes swallowed so far.
    """

    __slots__ = ("_allowed", "_corrupt", "_since", "delay", "is_cut", "is_stalled", "lost", "passed", "rate")

    def __init__(self) -> None:
        self.passed = 0
        self.lost = 0
        self.heal()

    def heal(self) -> None:
        """Undo every fault; the counts stay."""
        self.is_cut = False
        self.is_stalled = False
        self.delay = 0.0
        self.rate: float | None = None
        self._allowed = 0.0
        self._since = 0.0
        self._corrupt: set[int] = set()

    def throttle(self, rate: float | None, now: float) -> None:
        """Let at most `rate` bytes per second pass from `now` on."""
        self.rate = rate
        self._allowed = 0.0
        self._since = now

    def corrupt(self, skip: int) -> None:
        """Invert the byte that comes `skip` bytes after the next."""
        self._corrupt.add(self.passed + skip)

    def wait(self, read_at: float, size: int, now: float) -> float:
        """Return the seconds until a packet read at `read_at`, or a first piece of its `size` bytes, may pass; 0 for now.

        Infinite while it depends on a command. Whoever is called earlier or later asks again.
        """
        if self.is_cut or self.is_stalled:
            return math.inf
        due = read_at + self.delay - now
        if due > 0 or self.rate is None or size == 0:
            return max(0.0, due)
        self._refill(self.rate, now)
        return max(0.0, (min(size, _piece(self.rate)) - self._allowed) / self.rate)

    def share(self, size: int) -> int:
        """Return how many of `size` bytes may pass now, after `wait` returned 0."""
        return size if self.rate is None else min(size, max(1, int(self._allowed)))

    def spoil(self, data: bytes | memoryview) -> bytes | memoryview:
        """The bytes as they arrive if they pass now."""
        hit = [at - self.passed for at in self._corrupt if 0 <= at - self.passed < len(data)]
        return _inverted(data, hit) if hit else data

    def count(self, size: int) -> None:
        """Note that `size` bytes have passed."""
        self.passed += size
        if self.rate is not None:
            self._allowed -= size
        if self._corrupt:
            self._corrupt = {at for at in self._corrupt if at >= self.passed}

    def __str__(self) -> str:
        found = [
            "cut" if self.is_cut else "",
            "stalled" if self.is_stalled else "",
            f"delayed {self.delay:g} s" if self.delay else "",
            "" if self.rate is None else f"throttled to {self.rate:g} B/s",
            "about to corrupt" if self._corrupt else "",
        ]
        return " and ".join(filter(None, found)) or "sound"

    def _refill(self, rate: float, now: float) -> None:
        self._allowed = min(self._allowed + (now - self._since) * rate, _piece(rate) + rate * BURST)
        self._since = now


def _piece(rate: float) -> float:
    return max(1.0, rate * PIECE)


def _inverted(data: bytes | memoryview, offsets: Iterable[int]) -> bytes:
    changed = bytearray(data)
    for offset in offsets:
        changed[offset] ^= 0xFF
    return bytes(changed)
