"""The message that is being read: in parts if it is long, and whole whatever is raised meanwhile.

Rules:

* What has been read of a message stays here until all of it is: when reading is interrupted, it goes on from there.
* A long message is read for `TURN` at a time; then others have theirs.
* Of a message with more than `most_frames` frames one more than that is kept, and of one of which pyzmq has lost a frame the
  first `FIRST`. The rest is read and thrown away. If the first frame is lost the others are kept: its sender may be known all
  the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from time import monotonic
from typing import Any

import zmq

from ..hub.turns import TURN
from .whole import BYTES, has_gap, read_rest, reader

__all__ = ["AT_ONCE", "FIRST", "INTERRUPTED", "LOST_FIRST", "THROWN_AT_ONCE", "TOO_MANY", "Inlet"]

#: Frames of a message that are read before anything is counted, and between two looks at the clock.
AT_ONCE = 64

#: Frames that are thrown away at once, and between two looks at the clock.
THROWN_AT_ONCE = 512

#: Frames that are kept of a message that is thrown away: enough to know its sender.
FIRST = 16

#: Why the rest of a message is thrown away: the receiver of its first frames sees that they are too many.
TOO_MANY = "it has too many frames"

#: Why a message was thrown away.
INTERRUPTED = "an exception came out of a signal's handler while pyzmq received a frame of it, which pyzmq dropped"


#: The same of the first one: it was a ROUTER's name of the peer, or a DEALER's header.
LOST_FIRST = f"{INTERRUPTED}: the first one"


class Inlet:
    """The frames read so far of the next message.

    Args:
        sock: A plain socket.
        most_frames: Frames that a message may have.

    Attributes:
        parts: The frames that were read; the last one knows whether more follow.
        step: Reads one more frame by `next`.
        why: Why the message is thrown away; "" if it is not.
    """

    __slots__ = ("_most", "_sock", "parts", "step", "why")

    def __init__(self, sock: zmq.Socket[Any], most_frames: float = math.inf) -> None:
        self._sock = sock
        self._most = most_frames
        self.parts: list[zmq.Frame] = []
        self.step: Iterator[None] = reader(sock, self.parts)
        self.why = ""

    def __repr__(self) -> str:
        return f"<Inlet parts={len(self.parts)}{' thrown away' if self.why else ''}>"

    @property
    def is_inside(self) -> bool:
        """Return whether a message was begun that is not at its end."""
        return bool(self.why or self.parts)

    def read_on(self) -> bool:
        """Read on in the message that was begun, for `TURN` at most; return whether it is at its end."""
        parts, step = self.parts, self.step
        until = monotonic() + TURN
        while not self.why or self.why is LOST_FIRST:
            for _ in range(AT_ONCE):
                if parts and not parts[-1].more:
                    return True
                next(step)
            if len(parts) > self._most:
                self._throw_away(TOO_MANY, int(self._most) + 1)
            elif monotonic() > until:
                return False
        while read_rest(self._sock, THROWN_AT_ONCE):
            if monotonic() > until:
                return False
        return True

    def note(self, error: BaseException) -> None:
        """Check, after reading has raised this error, whether the message still has all its frames."""
        if not has_gap(self._sock, self.parts, error):
            return
        if self.parts or self.why:
            self._throw_away(INTERRUPTED, FIRST)
        else:
            self.why = LOST_FIRST

    def take(self) -> list[bytes]:
        """Take the frames of a message that was read, or the first ones of one thrown away. Then the next can be read."""
        frames = list(map(BYTES, self.parts))
        self.why = ""
        del self.parts[:]
        return frames

    def _throw_away(self, why: str, kept: int) -> None:
        self.why = why
        del self.parts[kept:]
