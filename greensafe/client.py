"""How do any number of greenlets ask servers and each get their own answer, or an error in time?

One plain DEALER per endpoint, driven by a pump; every request carries an id of its own in its envelope, so answers may come
in any order, late ones are told apart, and nobody waits for somebody else's.

Rules:

* A request goes to the endpoint with the fewest in flight.
* A limit that runs out ends the wait, not the connection: a late reply is counted and dropped.
* A reply that has arrived is delivered, also to a caller whose limit ends in the same instant.

It does not know how servers are found, and in this version not whether they are alive: without a limit a request waits until
its server answers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Self

import gevent
import zmq
from gevent.hub import Hub

from .deadlines import TICK, DeadlineSignal, check, deadline, start_timer, to_seconds
from .endpoints import check_endpoint, explained
from .errors import Cancelled, GreensafeError, OperationTimeout, RemoteError, RemoteProtocolError
from .green._pump import Pump
from .green.context import Context, check_context, close_first, own
from .green.socket import UNSET, Timeout
from .sansio.exchange import Requester, Resolution
from .watchdog import CALLER_LIMIT

__all__ = ["Client"]

#: Milliseconds that requests still queued may take to leave when the client is closed: nobody waits for their answers.
CLOSE_LINGER = 0


#: Seconds by which a server may see the caller's limit run out before the caller does.
SKEW = 0.05


class _Call:
    """One waiting greenlet, and what came for it."""

    __slots__ = ("asleep", "is_timed_out", "outcome", "switch")

    def __init__(self, switch: Any) -> None:
        self.switch = switch
        self.asleep = False
        self.is_timed_out = False
        self.outcome: Resolution | GreensafeError | None = None

    def is_answered(self) -> bool:
        return self.outcome is not None

    def wake(self) -> None:
        if self.asleep:
            self.asleep = False
            self.switch()


class _Channel:
    """The connection to one endpoint."""

    __slots__ = ("endpoint", "inflight", "pump")

    def __init__(self, endpoint: str, pump: Pump) -> None:
        self.endpoint = endpoint
        self.pump = pump
        self.inflight = 0


class Client:
    """A client of greensafe servers and of any REP or ROUTER that follows the envelope rules.

    Args:
        endpoints: One or more, such as "tcp://127.0.0.1:5555". Nobody has to be there yet.
        timeout: Seconds that a request waits unless it says otherwise; None for no limit.
        retries: 0; retries are not part of this version.
        wait: True; a request waits until a server is there (within its limit).
        context: The Context to use; by default the shared one.

    Raises:
        TypeError, ValueError: An argument is not usable; the text says which.
        zmq.ZMQError: An endpoint is malformed; nothing is left behind.
    """

    def __init__(
        self,
        *endpoints: str,
        timeout: Any = None,
        retries: int = 0,
        wait: bool = True,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        if not endpoints:
            raise TypeError("a Client needs at least one endpoint, such as 'tcp://127.0.0.1:5555'")
        for endpoint in endpoints:
            check_endpoint(endpoint)
        check_context(context)
        if retries != 0 or wait is not True:
            raise ValueError("this version has no retries and no wait=False yet: leave them at retries=0, wait=True")
        self._endpoints = endpoints
        self._timeout = to_seconds(timeout)
        self._context = context or Context.instance()
        self._closed = False
        self._begin()

    def request(self, body: bytes, timeout: Timeout = UNSET, idempotent: bool = False) -> bytes:
        """Send one frame and wait for the answer, one frame.

        Args:
            body: The request.
            timeout: Seconds for all of it; None for no limit; by default the client's. A deadline scope holds as well.
            idempotent: Whether running it twice does no harm; without retries it makes no difference.

        Raises:
            OperationTimeout: `timeout` ran out. The request may have run, or may still.
            DeadlineExceeded: By the enclosing scope, the same.
            RemoteError: A greensafe server answered with an error.
            RemoteProtocolError: The reply has several frames: use request_multipart.
            Cancelled: The client was closed meanwhile, or its context was terminated.
        """
        frames = self.request_multipart([body], timeout, idempotent)
        if len(frames) != 1:
            raise RemoteProtocolError(f"the reply has {len(frames)} frames: use request_multipart, which returns all of them")
        return frames[0]

    def request_multipart(self, frames: Sequence[bytes], timeout: Timeout = UNSET, idempotent: bool = False) -> list[bytes]:
        """Send a message of one or more frames and wait for the answer, a list of frames. See `request` for the rest."""
        body = _check_body(frames)
        if self._closed:
            raise Cancelled("the client is closed")
        if self._channels[0].pump.is_inherited:
            self._begin()
        if gevent.get_hub() is not self._hub:
            raise RuntimeError("this Client belongs to another thread: make one per thread")
        limit = self._timeout if timeout is UNSET else to_seconds(timeout)
        start = monotonic()
        at = None if limit is None else start + limit
        check(at is not None)
        if limit == 0:
            raise OperationTimeout(0.0, "request", self._endpoints[0])  # no answer can be there: nothing is sent
        call = _Call(gevent.getcurrent().switch)
        request_id = self._prefix + next(self._numbers).to_bytes(8, "big")
        channel = min(self._channels, key=lambda each: each.inflight) if len(self._channels) > 1 else self._channels[0]
        message = self._requester.open(request_id, body, start, at, call, _told())
        channel.inflight += 1
        try:
            channel.pump.start()
            channel.pump.send(message)
            return self._wait(call, request_id, channel, at, limit)
        finally:
            message.clear()  # if it has not left yet it need not leave any more
            self._requester.abandon(request_id)
            channel.inflight -= 1
            self._rest(channel)

    def close(self) -> None:
        """Close the connections. Requests that wait get Cancelled."""
        if self._closed:
            return
        self._closed = True
        for call in self._requester.abandon_all():
            call.outcome = Cancelled("the client or its context was closed")
            self._hub.loop.run_callback(call.wake)
        self._disarm()
        for channel in self._channels:
            if not channel.pump.is_inherited:
                channel.pump.close(CLOSE_LINGER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        inflight = sum(channel.inflight for channel in self._channels)
        return f"<Client {state} {' '.join(self._endpoints)} inflight={inflight} late={self._requester.late}>"

    # Inside.

    def _begin(self) -> None:
        """Open the connections: at first, and anew in a forked child, where those at hand are the parent's."""
        own(self._context)
        self._hub: Hub = gevent.get_hub()
        self._requester = Requester()
        self._timer: Any = None
        self._timer_at = float("inf")
        self._prefix = os.urandom(8)
        self._numbers = itertools.count(1)
        self._channels: list[_Channel] = []
        try:
            for endpoint in self._endpoints:
                self._channels.append(_Channel(endpoint, self._open(endpoint)))
            close_first(self._context, self)
        except BaseException:
            self.close()
            raise

    def _open(self, endpoint: str) -> Pump:
        sock = zmq.Socket(self._context, zmq.DEALER)
        try:
            with explained(endpoint):
                sock.connect(endpoint)
            # No limit of its own: each message belongs to a greenlet that waits, and is taken back when it gives up.
            return Pump(sock, self._on_message, self.close, outbox=None)
        except BaseException:
            sock.close(0)
            raise

    def _rest(self, channel: _Channel) -> None:
        """Nothing of an idle client keeps the loop going, or the client alive once it is dropped."""
        if not channel.inflight and not self._closed:
            channel.pump.stop()
        if not len(self._requester):
            self._disarm()

    def _wait(self, call: _Call, request_id: bytes, channel: _Channel, at: float | None, limit: float | None) -> list[bytes]:
        """Sleep until the answer has come or a limit ends it."""
        if at is not None and at < self._timer_at:
            self._arm(at)
        while True:
            if call.outcome is None and not call.is_timed_out:
                try:
                    check(at is not None)
                    self._sleep(call)
                except DeadlineSignal as signal:
                    channel.pump.drain()
                    if not call.is_answered():
                        raise
                    signal.put_back()
            if isinstance(call.outcome, GreensafeError):
                raise call.outcome
            if call.outcome is not None:
                frames = self._frames(call.outcome, at)
                if frames is not None:
                    return frames
                call.outcome = None
                call.is_timed_out = True
            if call.is_timed_out:
                raise OperationTimeout(limit, "request", channel.endpoint)

    def _sleep(self, call: _Call) -> None:
        call.asleep = True
        try:
            self._hub.switch()
        finally:
            call.asleep = False

    def _frames(self, outcome: Resolution, at: float | None) -> list[bytes] | None:
        """The reply's frames; the server's error is raised. None: the caller's own limit, known to the server, is over."""
        if not outcome.error:
            return outcome.body
        error = RemoteError.from_reply(outcome.body[0]) if len(outcome.body) == 1 else None
        if error is None:
            raise RemoteProtocolError(f"the server marked its reply as an error, but it holds none: {outcome.body[0][:80]!r}")
        if error.type == CALLER_LIMIT:
            _outlast(at)
            if at is not None and monotonic() >= at:
                return None
        raise error

    def _on_message(self, frames: list[bytes]) -> None:
        resolution = self._requester.receive(frames)
        if resolution is not None:
            call: _Call = resolution.owner
            call.outcome = resolution
            self._wake(call)

    def _wake(self, call: _Call) -> None:
        """Straight from a callback; from a greenlet only by way of the hub, which alone is sure to come back."""
        if gevent.getcurrent() is self._hub:
            call.wake()
        elif call.asleep:
            self._hub.loop.run_callback(call.wake)

    def _arm(self, at: float) -> None:
        self._disarm()
        self._timer = start_timer(self._hub, at - monotonic(), self._on_timer)
        self._timer_at = at

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
        self._timer_at = float("inf")

    def _on_timer(self) -> None:
        self._disarm()
        for channel in self._channels:
            channel.pump.drain()
        for expired in self._requester.tick(monotonic()):
            expired.owner.is_timed_out = True
            self._wake(expired.owner)
        at = self._requester.next_deadline()
        if at is not None and at < self._timer_at:
            self._arm(at)


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


def _check_body(frames: Any) -> list[bytes]:
    if isinstance(frames, (bytes, str)):
        raise TypeError("request_multipart takes a list of frames; for one frame use request")
    frames = list(frames)
    if not frames:
        raise ValueError("a request has at least one frame; b'' is an empty one")
    for index, frame in enumerate(frames):
        if not isinstance(frame, (bytes, bytearray, memoryview)):
            raise TypeError(f"frame {index} of the request is {type(frame).__name__}, not bytes: encode it first")
    return [bytes(frame) for frame in frames]
