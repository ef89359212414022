"""Has a peer fallen silent, and what of it: its process, or the link to it?

A `Pulse` looks, a few times within the limit, at what a TCP connection counts. Its peer's libzmq answers every ZMTP PING from a
thread of its own, so a peer that is alive is heard of, whatever its program does. Rules:

* Bytes received are a sign of life. A single frame that takes minutes to arrive is one all the time (libzmq's own heartbeat
  timeout counts whole frames and kills such a connection: libzmq#2709).
* So are bytes that the peer's kernel acknowledges while more wait to be sent: it cannot answer a PING that stands behind a long
  frame. While nothing waits they prove nothing: the kernel of a stopped process acknowledges PINGs, too.
* Buffers on the way (a proxy's, say) take as long to empty as they took to fill, and the PING stands behind what is in them:
  each look at which acknowledgements were the only sign of life is one more look to wait afterwards, up to one more limit.
* While a long message is on its way, in either direction, no WORKING can come by it, or none is due yet: a server's silence
  then means nothing (`is_busy`). One that is arriving shows in bytes that neither the messages taken so far nor PONGs explain.
* Something in between may take a long message whole, at once, and acknowledge all of it. Then silence means nothing for as long
  as it takes to pass that on (`explains`), if a second look by another connection shows that the peer is there. Where nobody
  acknowledges anything (`is_cut`), nobody has taken it.
* Where nobody counts bytes (`Sample.of_messages`) a message is the only sign of life. A plain peer that works on a request
  sends none, so there a silence shows nothing before a second look.
* What counts is the time that was looked at, not the looks. One that comes right after another is none (libev fires a timer
  twice after a pause), and none counts for more than the time between two.
* A look that comes late judges nothing: this process was itself stopped or blocked, and what came meanwhile is still unread.

Time and counts are arguments.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LONG", "LOOKS", "SLOWEST", "SLOWEST_UNCOUNTED", "WORDLESS", "Pulse", "Sample", "explains", "looks_allowed"]

#: Looks within the limit, PINGs, and WORKINGs of a server.
LOOKS = 5

#: Looks without a sign of life that make the verdict. The last sign may be as old as one look more, so it falls within 4 of 5
#: looks: before the one on a server that says WORKING no more (`WORDLESS`), so that a stopped process is not taken for that.
SILENT_LOOKS = 3
WORDLESS = 0.8

#: By how much looks may come early, taken together.
MARGIN = 0.5

#: Bytes between two looks that PONGs may explain.
PONGS = 256


#: Bytes per second that anything in between passes on, at the least. A silence longer than that takes has another cause.
SLOWEST = 1000

#: The same where nobody counts what a connection carries: there a request may have arrived long ago, and its server be stuck.
SLOWEST_UNCOUNTED = 100_000

#: Bytes under way that may hold up a second connection, too, if something in between (`ssh -L`) sends both by one line.
LONG = 100_000


class Sample(NamedTuple):
    """What a TCP connection has counted.

    Attributes:
        received: Bytes that have arrived.
        acked: Bytes sent that the peer's kernel has acknowledged.
        waiting: Bytes that wait to be sent.
        unacked: Segments sent that are not acknowledged; by ipc, bytes that the peer has not read.
        taken: Bytes among those received of which the program has taken messages that prove nothing of others on their way.
    """

    received: int
    acked: int
    waiting: int
    unacked: int
    taken: int = 0

    @classmethod
    def of_messages(cls, count: int, unread: int = 0) -> Sample:
        """What stands for it where nobody counts bytes: the messages that have come, and what the peer has not read."""
        return cls(count, 0, 0, unread, count)


class Pulse:
    """The signs of life of one connection.

    Args:
        limit: Seconds of silence after which the peer is taken for dead.

    Attributes:
        is_busy: Whether, at the last look, a long message was on its way.
        owed: Looks to wait longer, for what may still be in buffers on the way.
        step: What the last look counts for: one if it came in its time.
        quiet_since: When a look first found no sign of life after the last one; None if the last look has found one.
    """

    __slots__ = ("_before", "_cut", "_last", "_late_at", "_silent", "interval", "is_busy", "owed", "quiet_since", "step")

    def __init__(self, limit: float) -> None:
        self.interval = limit / LOOKS
        self._last: float | None = None
        self._late_at = float("-inf")
        self._before: Sample | None = None
        self._silent = self._cut = self.owed = 0.0
        self.step = 1.0
        self.quiet_since: float | None = None
        self.is_busy = False

    def rest(self, now: float | None = None) -> None:
        """Nobody waits for this peer: what happens until the next look is not judged.

        Args:
            now: When this was found by a look, or looks begin; None if there are none until then: the next cannot be late.
        """
        self._last, self._before = now, None
        self._silent = self._cut = self.owed = 0.0
        self.quiet_since = None
        self.is_busy = False

    def renew(self) -> None:
        """It is another connection: what was counted of the one before means nothing. Looks go on as they were."""
        self.rest(self._last)

    def forgive(self) -> None:
        """Count the silence so far for nothing: the peer was heard of by another way."""
        self._silent = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether for `SILENT_LOOKS` in a row nothing that was sent has been acknowledged: nobody takes it, not even a hop."""
        return self._cut >= SILENT_LOOKS - MARGIN

    def is_early(self, now: float) -> bool:
        """Whether this look comes so soon after the last one that it is none: it shows nothing that could not be late."""
        return self._last is not None and now - self._last < self.interval / 2

    def is_late(self, now: float) -> bool:
        """Whether this look comes so late that it can judge nothing; asked once for each look, before `look`."""
        is_late = self._is_overdue(now)
        if is_late:
            self._late_at = now
        self.step = 1.0 if self._last is None else min((now - self._last) / self.interval, 1.0)
        self._last = now
        return is_late

    def was_away(self, now: float) -> bool:
        """Whether this process was stopped or blocked until now, or a moment ago: then a limit may be over only for that."""
        return self._is_overdue(now) or now - self._late_at < self.interval

    def _is_overdue(self, now: float) -> bool:
        return self._last is not None and now - self._last > 2 * self.interval

    def look(self, sample: Sample | None, late: bool) -> str | None:
        """Judge: None, "process" (its machine answers, it does not) or "link" (nothing comes through).

        Args:
            sample: What is counted now, None if nobody counts.
            late: What `is_late` has said of this look.
        """
        before, self._before = self._before, sample
        is_arriving = sample is not None and before is not None and _unexplained(before, sample) > PONGS
        is_silent = False
        if late or sample is None or before is None:
            pass
        elif sample.received != before.received:
            self.owed = 0.0
        elif before.waiting > 0 and sample.acked != before.acked:
            self.owed = min(self.owed + self.step, LOOKS)
        else:
            is_silent = True
        # A PING that was sent this moment is not acknowledged yet: cut off is who has acknowledged nothing since the last look.
        is_cut = is_silent and sample is not None and before is not None and sample.unacked > 0 and sample.acked == before.acked
        self._silent = self._silent + self.step if is_silent else 0.0
        self._cut = self._cut + self.step if is_cut else 0.0
        if not is_silent:
            self.quiet_since = None
        elif self.quiet_since is None:
            self.quiet_since = self._last
        self.is_busy = is_arriving or self.owed > 0
        if sample is None or self._silent < SILENT_LOOKS + self.owed - MARGIN:
            return None
        return "link" if is_cut else "process"


def explains(size: int, seconds: float, slowest: int = SLOWEST) -> bool:
    """Whether so many bytes under way, on a line of so many bytes per second, may cause a silence of so many seconds."""
    return size > slowest * seconds


def looks_allowed(size: int, owed: float) -> float:
    """Looks within which a second connection has to get its handshake, with so many bytes under way on the first.

    One, so that the verdict comes within the limit; with a long message under way as many as the limit has, less those that the
    first connection was given already.
    """
    return max(1.0, LOOKS - owed) if size >= LONG else 1.0


def _unexplained(before: Sample, now: Sample) -> int:
    return (now.received - now.taken) - (before.received - before.taken)
