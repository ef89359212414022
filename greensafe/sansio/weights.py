"""What a message, a request and a client weigh in memory, in bytes.

Everything that is kept for a peer is bounded by weight, not by the bytes of its bodies: 100,000 empty frames have no bytes and
take a megabyte. The constants are measured (docs/design.md, "What is kept") and rounded up: a sum of weights is an upper limit
of what Python holds. libzmq's own queues come on top: it does not tell what is in them.

This module does not know what is kept, nor where the limits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["CALLER", "DEAD_BYTES", "FEWEST_FRAMES", "FRAME", "MAX_FRAMES", "MESSAGE", "REQUEST", "check_max_frames", "weight"]

#: Bytes of one frame besides its contents: a bytes object has 33, rounded up to 48, and each of the two lists that it is in 8.
FRAME = 64

#: Bytes of a message that waits to be sent, besides its frames: a list, a tuple, and its place in the queue.
MESSAGE = 150

#: Bytes of a request that waits for its turn, besides its frames: its objects, its limit, its turn and its client. Measured:
#: 1,200 for a client with many requests, 2,000 for one with a single request.
REQUEST = 2000

#: Bytes of a client that is remembered, besides its routing ids; 550 measured.
CALLER = 600

#: Bytes of what is over that a queue of times may keep until it would have been due.
DEAD_BYTES = 4 * 2**20

#: Frames of one message, its envelope included, unless an option says otherwise. Reading so many takes 11 ms.
MAX_FRAMES = 4096

#: With a header and one proxy a request of one frame has five.
FEWEST_FRAMES = 8


def weight(frames: Sequence[bytes]) -> int:
    """Bytes that these frames take."""
    return FRAME * len(frames) + sum(map(len, frames))


def check_max_frames(max_frames: Any) -> int:
    """Check how many frames a message may have."""
    if not isinstance(max_frames, int) or isinstance(max_frames, bool) or max_frames < FEWEST_FRAMES:
        raise ValueError(f"max_frames is a whole number from {FEWEST_FRAMES}, not {max_frames!r}")
    return max_frames
