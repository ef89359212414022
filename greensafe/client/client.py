"""How do any number of greenlets ask servers, and each get its own answer or an error that says what happened to the server?

One table of open requests; every request carries an id of its own in its envelope, so answers may come in any order, late ones
are told apart, and nobody waits for somebody else's.

Rules:

* A limit that runs out ends the wait, not the connection: the server is told (CANCEL), a late reply is counted and dropped.
* A reply that has arrived is delivered, also to a caller whose limit ends in the same instant.
* What is idle keeps neither the loop going nor the client alive.
* When a loop of its own fails (see `restarts`) too often it closes.

It does not know which server a request goes to, nor when it is sent again; see `failover`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Self

import gevent
import zmq
from gevent import getcurrent
from gevent.hub import Hub
from gevent.monkey import get_original

from ..deadlines import DeadlineSignal, allowed_until, to_seconds
from ..errors import Cancelled, GreensafeError, OperationTimeout, RemoteError, RemoteProtocolError
from ..green.context import Context, check_context, close_first, own
from ..green.socket import UNSET, Timeout
from ..hooks import CallAnswered, CallFailed, CallStarted, Hooks, teller
from ..hub.forks import generation
from ..hub.threads import call_in, is_elsewhere
from ..hub.turns import let_others_run
from ..loops.restarts import Restarts
from ..sansio.backoff import Budget
from ..sansio.envelope import Kind
from ..sansio.requester import Requester
from ..sansio.weights import MAX_FRAMES, check_max_frames
from ..stats import ClientStats
from ..transport.endpoints import check_endpoint
from .call import Call, data_in, raise_error
from .calls import Waking, weakly
from .options import check_body, check_heartbeat, check_metadata, check_retries
from .pool import Failover

__all__ = ["HEARTBEAT", "Client"]

_this_thread = get_original("_thread", "get_ident")

#: Seconds of silence after which a server is taken for dead, by default.
HEARTBEAT = 5.0

#: Seconds since the loop had a turn in which the monitors are not asked again: it costs more than the moment is worth.
RECENT = 0.001

#: Milliseconds that what tells servers of a client's end may take to leave.
CLOSE_LINGER = 100


class Client:
    """A client of greensafe servers and of any REP or ROUTER that follows the envelope rules.

    Args:
        endpoints: One or more, such as "tcp://127.0.0.1:5555". Nobody has to be there yet.
        timeout: Seconds that a request waits unless it says otherwise; None for no limit.
        retries: How often a request may be sent again after an error, where that is safe.
        wait: Whether a request waits until a server is there (within its limit); False: it raises Unreachable at once. (inproc
            does not tell whether anybody is there: it waits.)
        heartbeat: Seconds of silence after which a server is taken for dead (PeerSilent), also while requests take long. While
            long requests may be under way it takes longer, since the silence may be theirs (docs/operations.md). None: no
            heartbeats; then a frozen or cut-off server is not noticed. It takes a peer that answers ZMTP 3.1's PING, as
            libzmq does from 4.2 on, or one of ZMTP 2, which is not judged.
        hooks: A function, or several, called with a record of each thing that happens; see `hooks`. They must not wait.
        max_frames: Frames of one reply, its envelope included; one that has more is RemoteProtocolError.
        context: The Context to use, with its options for sockets (CURVE keys, say) but ROUTING_ID; the shared one by default.

    Raises:
        TypeError, ValueError: An argument is not usable; the text says which.
        zmq.ZMQError: An endpoint is malformed; nothing is left behind.
    """

    #: In which process it has opened its connections: none yet.
    _generation = -1

    def __init__(
        self,
        *endpoints: str,
        timeout: Any = None,
        retries: int = 0,
        wait: bool = True,
        heartbeat: Any = HEARTBEAT,
        hooks: Hooks | None = None,
        max_frames: int = MAX_FRAMES,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        if not endpoints:
            raise TypeError("a Client needs at least one endpoint, such as 'tcp://127.0.0.1:5555'")
        for endpoint in endpoints:
            check_endpoint(endpoint, to_connect=True)
        check_context(context)
        check_retries(retries)
        self._endpoints = endpoints
        self._timeout = to_seconds(timeout)
        self._retries = retries
        self._waits_for_servers = bool(wait)
        self._heartbeat = check_heartbeat(heartbeat)
        self._tell = teller(hooks)
        self._max_frames = check_max_frames(max_frames)
        self._context = context or Context.instance()
        self._closed = False
        self._begin()

    def request(self, body: bytes, timeout: Timeout = UNSET, idempotent: bool = False, metadata: bytes = b"") -> bytes:
        """Send one frame and wait for the answer, one frame.

        Args:
            body: The request.
            timeout: Seconds for all of it, retries included; None for no limit; by default the client's. A deadline scope
                holds as well.
            idempotent: Whether running it twice does no harm: then it is sent again (`retries`) also if it may have run.
            metadata: Bytes for `Request.metadata`, such as a W3C traceparent. Proxies and plain servers pass it through.

        Raises:
            OperationTimeout: `timeout` ran out. The request may have run; a greensafe server is told to stop it.
            DeadlineExceeded: By the enclosing scope, the same.
            Unreachable: wait=False, and nobody is there. Nothing was delivered.
            Disconnected: The connection that carried the request is gone.
            PeerSilent: The server gives no more signs of life; `.silent` says what is silent.
            Refused: The server refuses this client, or is none; trying again cannot help.
            RemoteError: The peer answered with an error: a greensafe server, or a REP under `supervise` or `supervised`.
            RemoteProtocolError: The reply has several frames: use request_multipart. Or it has more than max_frames.
            Cancelled: The client was closed meanwhile, or its context was terminated; or a loop of its own has failed too often
                (see `restarts`), with the error that is its __cause__.
        """
        frames = self._ask([body] if type(body) is bytes else check_body([body]), timeout, idempotent, metadata)
        if len(frames) != 1:
            raise RemoteProtocolError(f"the reply has {len(frames)} frames: use request_multipart, which returns all of them")
        return frames[0]

    def request_multipart(
        self, frames: Sequence[bytes], timeout: Timeout = UNSET, idempotent: bool = False, metadata: bytes = b""
    ) -> list[bytes]:
        """Send a message of one or more frames and wait for the answer, a list of frames. See `request` for the rest."""
        return self._ask(check_body(frames), timeout, idempotent, metadata)

    def _ask(self, body: list[bytes], timeout: Timeout, idempotent: bool, metadata: bytes) -> list[bytes]:
        if metadata:
            check_metadata(metadata)
        if self._closed:
            raise _ended(self.restarts.error)
        if self._generation != generation():
            self._forget_parent()
        if _this_thread() != self._thread:
            raise RuntimeError("Client.request was called in another thread than made this Client: make one in each thread")
        limit = self._timeout if timeout is UNSET else to_seconds(timeout)
        now = monotonic()
        at = None if limit is None else now + limit
        told = allowed_until(at is not None)
        if now - self._turned_at > RECENT:
            self._catch_up(now)
        if limit == 0:
            let_others_run()  # a loop of such calls must not stop the hub
            raise OperationTimeout(0.0, "request", self._endpoints[0])  # no answer can be there: nothing is sent
        call = Call(getcurrent().switch, idempotent, now)
        request_id = self._prefix + next(self._numbers).to_bytes(8, "big")
        call.asked = self._requester.open(request_id, body, at, call, told, metadata)
        try:
            if self._retries:
                self._budget.earn()
            if self._tell is not None:
                self._tell(CallStarted(self._endpoints, request_id.hex(), metadata))
            self._place(call, now)
            frames = self._wait(call, at, limit)
        except BaseException as error:
            self._leave(call)
            self._count_failure(call, request_id, error)
            raise
        self._leave(call)
        self._answered += 1
        if self._tell is not None:
            self._tell(CallAnswered(call.endpoint, request_id.hex(), monotonic() - now, call.tries))
        return frames

    def _count_failure(self, call: Call, request_id: bytes, error: BaseException) -> None:
        # A scope's signal is DeadlineExceeded as soon as it has left the scope.
        name = "DeadlineExceeded" if isinstance(error, DeadlineSignal) else type(error).__name__
        self._failures[name] = self._failures.get(name, 0) + 1
        if self._tell is not None:
            took = monotonic() - call.since
            self._tell(CallFailed(call.endpoint, request_id.hex(), took, call.tries, error, name))

    def close(self) -> None:
        """Close the connections. Requests that wait get Cancelled, and greensafe servers are told to stop their handlers.

        In another thread this waits for a turn of the client's hub; RuntimeError if there is none (see `threads.call_in`).
        """
        if self._is_open_elsewhere:
            call_in(self._hub, "Client.close", self._shut, None)
        else:
            self._shut(None)

    def _shut(self, error: Exception | None) -> None:
        """Close, because a loop has failed too often with an error if there is one."""
        if self._closed:
            return
        self._closed = True
        self.restarts.close()
        self._failover.stop()
        has_told = [self._tell_cancelled(asked.owner) for asked in self._requester.asked()]
        for asked in self._requester.abandon_all():
            asked.owner.outcome = _ended(error)
            self._hub.loop.run_callback(asked.owner.wake)
        self._waking.disarm()
        for channel in self._channels:
            channel.close(CLOSE_LINGER if any(has_told) else 0)

    def __del__(self) -> None:
        # Dropped without a close, and so without requests: its descriptors would stay until the next collection. In another
        # thread nothing may be done to them; nor in a forked child, whose parent goes on with them, nor when all ends.
        if self._generation != generation() or self._closed or sys.is_finalizing():
            return
        if self._thread == _this_thread() and self._hub.loop is not None:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def stats(self) -> ClientStats:
        """How it stands now, counted since it was made. In another thread this waits for a turn of the client's hub."""
        if self._is_open_elsewhere:
            return call_in(self._hub, "Client.stats", lambda: self.stats)
        table, error = self._requester, self.restarts.error
        since = min((asked.owner.since for asked in table.asked()), default=None)
        return ClientStats(
            state=self._state,
            answered=self._answered,
            failures=dict(self._failures),
            inflight=len(table),
            waiting=sum(asked.connection is None for asked in table.asked()),
            oldest_seconds=None if since is None else monotonic() - since,
            retries=self._failover.retried,
            rejections=self._failover.rejected,
            drops={
                "late": table.late,
                "malformed": table.malformed,
                "ignored": table.ignored,
                "unsaid": sum(channel.unsaid for channel in self._channels),
            },
            endpoints=tuple(channel.stats for channel in self._channels),
            restarts=dict(self.restarts.counts),
            loop_error="" if error is None else f"{type(error).__name__}: {error}",
        )

    @property
    def _is_open_elsewhere(self) -> bool:
        return not self._closed and is_elsewhere(self._hub) and self._generation == generation()

    @property
    def _state(self) -> str:
        return "open" if not self._closed else "closed" if self.restarts.error is None else "failed"

    def __repr__(self) -> str:
        return (
            f"<Client {self._state} {' '.join(self._endpoints)} up={sum(channel.is_up for channel in self._channels)}"
            f" inflight={len(self._requester)} late={self._requester.late}>"
        )

    def _catch_up(self, now: float) -> None:
        """The loop may not have turned for long: a request must not go to a connection that is known to be gone."""
        self._turned_at = now
        for channel in self._channels:
            channel.catch_up()

    # Its life.

    def _give_up(self, error: Exception) -> None:
        """A loop has failed too often. Not closed here: this may be in the middle of a send."""
        self._hub.loop.run_callback(self._shut, error)

    def _forget_parent(self) -> None:
        """Begin anew; the parent's requests are its own, whatever becomes of the greenlets here that seem to wait for them."""
        for asked in self._requester.abandon_all():
            asked.owner.stop_pause()
        self._waking.disarm()
        self._failover.stop()
        self._begin()

    def _begin(self) -> None:
        """Open the connections: at first, and anew in a forked child, where those at hand are the parent's."""
        own(self._context)
        self._generation = generation()
        self._hub: Hub = gevent.get_hub()
        self._thread: int = self._hub.thread_ident
        self.restarts = Restarts(" ".join(self._endpoints), weakly(self._give_up), self._tell)
        self._requester = Requester(self._heartbeat, self._max_frames)
        self._budget = Budget()
        self._waking = Waking(self._requester, self.restarts)
        self._failover = Failover(
            self._requester,
            self._budget,
            retries=self._retries,
            waits_for_servers=self._waits_for_servers,
            restarts=self.restarts,
            tell=self._tell,
            wake=self._waking.wake,
            on_end=weakly(self.close),
        )
        self._channels = self._waking.channels = self._failover.channels
        self._place = self._failover.place
        self._answered = 0
        self._failures: dict[str, int] = {}
        self._turned_at = monotonic()
        self._prefix = os.urandom(8)
        self._numbers = itertools.count(1)
        try:
            for endpoint in self._endpoints:
                self._failover.connect(endpoint, self._context)
            close_first(self._context, self)
        except BaseException:
            self.close()
            raise

    # A request's wait.

    def _wait(self, call: Call, at: float | None, limit: float | None) -> list[bytes]:
        """Sleep until the answer has come or a limit ends it."""
        if at is not None and at < self._waking.at:
            self._waking.arm(at)
        if call.outcome is None:
            self._sleep(call)
        outcome, call.outcome = call.outcome, None
        if isinstance(outcome, GreensafeError):
            try:
                raise outcome
            finally:
                del outcome  # the error's traceback holds this frame
        if outcome is not None:
            kind = outcome.kind
            if kind == _REPLY or (kind == _REQUEST and not outcome.body[0].startswith(_ERROR_HEAD)):
                return outcome.body
            if kind == _REQUEST:
                return data_in(outcome)
            raise_error(outcome, at)
        raise self._timeout_of(call, limit)

    def _sleep(self, call: Call) -> None:
        try:
            while call.outcome is None and not call.is_timed_out:
                call.asleep = True
                self._hub.switch()
        except DeadlineSignal as signal:
            call.asleep = False
            if call.channel is not None:
                call.channel.drain()
            if call.outcome is None:
                raise
            signal.put_back()
        finally:
            call.asleep = False
            self._turned_at = monotonic()

    def _leave(self, call: Call) -> None:
        """Nobody waits for this request any more: nothing of it stays, here or on the server."""
        asked = call.asked
        call.stop_pause()
        call.switch = None  # a killed greenlet keeps its traceback, and that this: else it would keep itself, and the client
        if asked.is_open:
            self._tell_cancelled(call)
            self._requester.abandon(asked)
            self._failover.waiting.pop(call, None)
        asked.frames.clear()  # if it has not left yet it need not leave any more
        asked.body, asked.metadata = (
            (),
            b"",
        )  # the table may keep what has a limit until that comes: neither what was asked with it, nor who asked
        asked.owner = None  # which knows its request: else each would be for the garbage collector
        if not self._waking.is_waking and not self._requester.pending:
            self._waking.rest()

    def _tell_cancelled(self, call: Call) -> bool:
        note = self._requester.cancel(call.asked)
        if note is None or call.channel is None:
            return False
        call.channel.tell(note)
        return True

    def _timeout_of(self, call: Call, limit: float | None) -> OperationTimeout:
        channel = call.channel or self._channels[0]
        error = OperationTimeout(limit, "request", channel.endpoint)
        if call.asked.connection is None and (why := channel.why_not_up):
            error.add_note(f"it was not sent: {why}")
        return error


#: The kinds of answers: a greensafe server's, and a plain peer's, which returns the request's header.
_REPLY, _REQUEST = int(Kind.REPLY), int(Kind.REQUEST)

_ERROR_HEAD = RemoteError.FRAME_HEAD


def _ended(error: Exception | None) -> Cancelled:
    """What a request gets that is open when the client ends, or comes afterwards."""
    if error is None:
        return Cancelled("the client or its context was closed")
    cancelled = Cancelled(f"the client is closed, since a loop of its own has failed again and again: {error!r}")
    cancelled.__cause__ = error
    return cancelled
