"""Can a request be sent with these arguments, and if not, what is wrong with them?"""

from __future__ import annotations

from typing import Any

from ..deadlines import to_seconds
from ..sansio.envelope import MAX_METADATA

__all__ = ["LONGEST_HEARTBEAT", "SHORTEST_HEARTBEAT", "check_body", "check_heartbeat", "check_metadata", "check_retries"]

#: The shortest that is not a mistake: a server says WORKING 50 ms apart at most, and has to be heard within 4/5 of the limit.
SHORTEST_HEARTBEAT = 0.1

#: Eleven days. libzmq's options for it are milliseconds in 32 bits, and the longest of them is twice as long.
LONGEST_HEARTBEAT = 1e6


def check_heartbeat(heartbeat: Any) -> float | None:
    """Check a client's seconds of silence; gives them as a float or None."""
    seconds = to_seconds(heartbeat)
    if seconds is not None and not SHORTEST_HEARTBEAT <= seconds <= LONGEST_HEARTBEAT:
        allowed = f"from {SHORTEST_HEARTBEAT} to {LONGEST_HEARTBEAT:.0f}"
        raise ValueError(f"heartbeat is a number of seconds {allowed}, or None for no heartbeats, not {heartbeat!r}")
    return seconds


def check_retries(retries: Any) -> None:
    """Check how often a client may send a request again."""
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ValueError(f"retries is a whole number from 0, not {retries!r}")


def check_metadata(metadata: Any) -> None:
    """Check what a client has passed through."""
    if not isinstance(metadata, bytes):
        raise TypeError(f"metadata is bytes, not {type(metadata).__name__}")
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"metadata of {len(metadata)} bytes: {MAX_METADATA} fit into a request's header")


def check_body(frames: Any) -> list[bytes]:
    """Check the frames of a request; gives them as bytes."""
    if isinstance(frames, (bytes, str)):
        raise TypeError("request_multipart takes a list of frames; for one frame use request")
    frames = list(frames)
    if not frames:
        raise ValueError("a request has at least one frame; b'' is an empty one")
    for index, frame in enumerate(frames):
        if not isinstance(frame, (bytes, bytearray, memoryview)):
            raise TypeError(f"frame {index} of the request is {type(frame).__name__}, not bytes: encode it first")
    return [bytes(frame) for frame in frames]
