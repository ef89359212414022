"""What came of one request, for the greenlet that waits for it?

It does not know where a request goes, nor how its connection fares; see `failover` and `channel`.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

import gevent

from ..deadlines import check, deadline
from ..errors import GreensafeError, RemoteError, RemoteProtocolError
from ..hub.timers import TICK
from ..sansio.envelope import CALLER_LIMIT, Kind
from ..sansio.requester import Asked, Resolution
from .channel import Channel

__all__ = ["Call", "data_in", "error_in", "raise_error"]

#: Seconds by which a server may see the caller's limit run out before the caller does.
SKEW = 0.05


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
    """The error in an answer that the server has marked as one, or that cannot be taken."""
    if answer.flaw:
        return RemoteProtocolError(answer.flaw)
    error = RemoteError.from_reply(answer.body[0], is_error=True) if len(answer.body) == 1 else None
    if error is not None:
        error.maybe_executed = answer.kind != Kind.REJECTED or answer.asked.may_have_run
        return error
    return RemoteProtocolError(f"the server marked its reply as an error, but it holds none: {answer.body[0][:80]!r}")


def data_in(answer: Resolution) -> list[bytes]:
    """Return the frames of a plain peer's answer that begins as an error does; raise RemoteError if it is one.

    Its type says nothing of the caller's limit, which a plain peer does not know.
    """
    error = RemoteError.from_reply(answer.body[0]) if len(answer.body) == 1 else None
    if error is None:
        return answer.body
    try:
        raise error
    finally:
        del error  # its traceback holds this frame


def raise_error(answer: Resolution, at: float | None) -> None:
    """Raise the server's error; return if it is the echo of the caller's own limit, which is over.

    Args:
        answer: The server's, marked as an error.
        at: When the caller's own limit comes, on the monotonic clock; None for never. Scopes around it are seen to.
    """
    error = error_in(answer)
    if isinstance(error, RemoteError) and error.type == CALLER_LIMIT:
        _outlast(at)
        if at is not None and monotonic() >= at:
            return
    try:
        raise error
    finally:
        del error  # its traceback holds this frame


def _outlast(at: float | None) -> None:
    """Wait for the caller's own limit, whose echo from the server has come a little before it."""
    scope = _told()
    until = scope if at is None else at if scope is None else min(at, scope)
    if until is not None and 0 < until - monotonic() <= SKEW:
        gevent.sleep(max(until - monotonic(), TICK))
    check(at is not None)


def _told() -> float | None:
    """Until when the scopes around the caller let it wait."""
    scope = deadline.current()
    return None if scope is None else scope.effective_at
