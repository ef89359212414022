"""What came of one request, for the greenlet that waits for it?

It does not know where a request goes, nor how its connection fares; see `client` and `channel`.
"""

from __future__ import annotations

from typing import Any

from .channel import Channel
from .errors import GreensafeError, RemoteError, RemoteProtocolError
from .sansio.requester import Asked, Resolution

__all__ = ["Call", "error_in"]


class Call:
    """One waiting greenlet, its request, and what came for it."""

    __slots__ = (
        "asked",
        "asleep",
        "avoids",
        "channel",
        "idempotent",
        "is_timed_out",
        "outcome",
        "pause",
        "since",
        "switch",
        "tries",
    )

    asked: Asked

    def __init__(self, switch: Any, idempotent: bool, since: float) -> None:
        self.switch = switch
        self.since = since
        self.idempotent = idempotent
        self.asleep = False
        self.is_timed_out = False
        self.outcome: Resolution | GreensafeError | None = None
        self.channel: Channel | None = None
        self.tries = 0
        #: The timer of the pause before the next try.
        self.pause: Any = None
        #: Channels whose servers have rejected it.
        self.avoids: tuple[Channel, ...] = ()

    @property
    def endpoint(self) -> str:
        """Where it was sent last."""
        return "" if self.channel is None else self.channel.endpoint

    def wake(self) -> None:
        if self.asleep:
            self.asleep = False
            self.switch()

    def stop_pause(self) -> None:
        if self.pause is not None:
            self.pause.stop()
            self.pause.close()
            self.pause = None


def error_in(answer: Resolution) -> RemoteError | RemoteProtocolError:
    """The error in an answer that the server has marked as one."""
    error = RemoteError.from_reply(answer.body[0]) if len(answer.body) == 1 else None
    if error is not None:
        return error
    return RemoteProtocolError(f"the server marked its reply as an error, but it holds none: {answer.body[0][:80]!r}")
