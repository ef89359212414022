"""How do any number of greenlets ask servers, and each get its own answer or an error that says what happened to the server?

One channel per endpoint, one table of open requests; every request carries an id of its own in its envelope, so answers may
come in any order, late ones are told apart, and nobody waits for somebody else's.

Rules:

* A request goes to the usable channel with the fewest in flight. While there is none it waits here: nobody being there yet is
  no error (wait=True), a server that refuses is.
* A request whose connection is lost ends with the error, unless it may be sent again (`retries`): what was not run may, what
  may have run only if it is idempotent or its server journals. Retries are a share of all requests (`sansio.backoff.Budget`).
* What a server has rejected, or what was not handed over, was not run: it goes elsewhere without an error, if there is a place.
* A limit that runs out ends the wait, not the connection: the server is told (CANCEL), a late reply is counted and dropped.
* When a loop of its own fails (see `restarts`) too often it closes.
* A reply that has arrived is delivered, also to a caller whose limit ends in the same instant.

It does not know how a connection is made, watched and lost; see `channel`.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import weakref
from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Self

import gevent
import zmq
from gevent import get_hub, getcurrent
from gevent.hub import Hub

from .call import Call, error_in, raise_error
from .channel import Channel
from .choice import choose, hopeless, keepers
from .deadlines import TICK, DeadlineSignal, allowed_until, start_timer, to_seconds
from .endpoints import check_endpoint
from .errors import (
    Cancelled,
    GreensafeError,
    OperationTimeout,
    Refused,
    RemoteError,
    RemoteProtocolError,
)
from .green._forks import generation
from .green.context import Context, check_context, close_first, own
from .green.socket import UNSET, Timeout
from .hooks import (
    CallAnswered,
    CallFailed,
    CallRetried,
    CallStarted,
    ConnectionFailed,
    ConnectionLost,
    ConnectionUp,
    Hooks,
    teller,
)
from .options import check_body, check_heartbeat, check_metadata, check_retries
from .restarts import Restarts
from .sansio.backoff import Budget, delay
from .sansio.envelope import NO_JOURNAL, OTHER_JOURNAL, SERVER_STOPPED, Kind
from .sansio.liveness import LOOKS
from .sansio.requester import Requester, Resolution
from .stats import ClientStats
from .trouble import LOST, Loss

__all__ = ["HEARTBEAT", "Client"]

#: Seconds of silence after which a server is taken for dead, by default.
HEARTBEAT = 5.0

#: Seconds since the loop had a turn in which the monitors are not asked again: it costs more than the moment is worth.
RECENT = 0.001

#: Seconds between two looks at the connections if there is no such limit.
LOOK = 1.0

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
        heartbeat: Seconds of silence after which a server is taken for dead (PeerSilent), also while requests take long. None:
            no heartbeats; then a frozen or cut-off server is not noticed. (A plain server over ipc: Disconnected, within a
            little more than twice that.) It takes a peer that answers ZMTP 3.1's PING, as
            libzmq does from 4.2 on, or one of ZMTP 2, which is not judged.
        hooks: A function, or several, called with a record of each thing that happens; see `hooks`. They must not wait.
        context: The Context to use, with its options for sockets (CURVE keys, say); by default the shared one.

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
        heartbeat: Any = HEARTBEAT,
        hooks: Hooks | None = None,
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
            RemoteError: A greensafe server answered with an error.
            RemoteProtocolError: The reply has several frames: use request_multipart.
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
        if get_hub() is not self._hub:
            raise RuntimeError("this Client belongs to another thread: make one per thread")
        limit = self._timeout if timeout is UNSET else to_seconds(timeout)
        now = monotonic()
        at = None if limit is None else now + limit
        told = allowed_until(at is not None)
        if now - self._turned_at > RECENT:
            self._catch_up(now)
        if limit == 0:
            raise OperationTimeout(0.0, "request", self._endpoints[0])  # no answer can be there: nothing is sent
        call = Call(getcurrent().switch, idempotent, now)
        request_id = self._prefix + next(self._numbers).to_bytes(8, "big")
        call.asked = self._requester.open(request_id, body, at, call, told, metadata)
        if self._retries:
            self._budget.earn()
        try:
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
        """Close the connections. Requests that wait get Cancelled, and greensafe servers are told to stop their handlers."""
        self._shut(None)

    def _shut(self, error: Exception | None) -> None:
        """Close, because a loop has failed too often with an error if there is one."""
        if self._closed:
            return
        self._closed = True
        self.restarts.close()
        self._waiting.clear()
        has_told = [self._tell_cancelled(asked.owner) for asked in self._requester.asked()]
        for asked in self._requester.abandon_all():
            asked.owner.outcome = _ended(error)
            self._hub.loop.run_callback(asked.owner.wake)
        self._stop_timers()
        for channel in self._channels:
            channel.close(CLOSE_LINGER if any(has_told) else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def stats(self) -> ClientStats:
        """How it stands now, counted since it was made; to be asked in its own thread."""
        table, error = self._requester, self.restarts.error
        since = min((asked.owner.since for asked in table.asked()), default=None)
        return ClientStats(
            state=self._state,
            answered=self._answered,
            failures=dict(self._failures),
            inflight=len(table),
            waiting=sum(asked.connection is None for asked in table.asked()),
            oldest_seconds=None if since is None else monotonic() - since,
            retries=self._retried,
            rejections=self._rejected,
            drops={"late": table.late, "malformed": table.malformed, "ignored": table.ignored},
            endpoints=tuple(channel.stats for channel in self._channels),
            restarts=dict(self.restarts.counts),
            loop_error="" if error is None else f"{type(error).__name__}: {error}",
        )

    @property
    def _state(self) -> str:
        return "open" if not self._closed else "closed" if self.restarts.error is None else "failed"

    def __repr__(self) -> str:
        return (
            f"<Client {self._state} {' '.join(self._endpoints)} up={sum(channel.is_up for channel in self._channels)}"
            f" inflight={len(self._requester)} late={self._requester.late}>"
        )

    # Where requests go.

    def _catch_up(self, now: float) -> None:
        """The loop may not have turned for long: a request must not go to a connection that is known to be gone."""
        self._turned_at = now
        for channel in self._channels:
            channel.catch_up()

    def _place(self, call: Call, now: float) -> None:
        """Hand a request over, or have it wait until a channel can take it."""
        channel = choose(self._channels, call, self._retries)
        if channel is None:
            self._waiting[call] = None
            for each in self._channels:
                each.wake()
            if call in self._waiting:
                self._end_hopeless()
        else:
            call.channel = channel
            channel.send(call.asked, now)
        if self._looks is None:
            self._look_out()

    def _place_waiting(self) -> None:
        now = monotonic()
        for call in list(self._waiting):
            if call not in self._waiting:
                continue  # ended meanwhile
            channel = choose(self._channels, call, self._retries)
            if channel is None and not call.avoids and not call.asked.is_bound:
                return  # nor is there a place for those behind it
            if channel is not None:
                del self._waiting[call]
                call.channel = channel
                channel.send(call.asked, now)
            elif not keepers(self._channels, call):
                self._end_replaced(call)

    def _end_hopeless(self) -> None:
        """End the requests that wait if no channel can be expected to take them."""
        anybody = hopeless(self._channels, self._waits_for_servers)
        for call in list(self._waiting):
            if call not in self._waiting:
                continue  # ended by those that were woken before it
            able = keepers(self._channels, call)
            found = hopeless(able, self._waits_for_servers) if call.asked.is_bound else anybody
            if not able:
                self._end_replaced(call)
            elif found is not None:
                del self._waiting[call]
                channel, trouble = found
                self._retry_or_end(call, trouble.error(channel.endpoint, call.asked.request_id, call.asked.may_have_run), True)

    def _retry_or_end(self, call: Call, error: GreensafeError, is_safe: bool) -> None:
        if call.tries < self._retries and is_safe and type(error) is not Refused and self._budget.spend():
            self._pause(call, error)
        else:
            self._end(call, error)

    def _end(self, call: Call, error: GreensafeError) -> None:
        self._requester.abandon(call.asked)
        call.outcome = error
        self._wake(call)

    def _resend(self, call: Call, journal: bytes, error: GreensafeError, now: float) -> None:
        """Its server keeps a journal, and goes on with it once it is back: no more work for it than it has had before."""
        self._requester.bind(call.asked, journal)
        call.tries += 1
        call.avoids = ()
        self._retried += 1
        if self._tell is not None:
            self._tell(CallRetried(call.endpoint, call.asked.request_id.hex(), call.tries, 0.0, error))
        self._place(call, now)

    def _pause(self, call: Call, error: GreensafeError) -> None:
        call.tries += 1
        call.avoids = ()
        pause = delay(call.tries, random.random())
        call.pause = start_timer(self._hub, pause, lambda: self.restarts.run("retries", lambda: self._on_paused(call)))
        self._retried += 1
        if self._tell is not None:
            self._tell(CallRetried(call.endpoint, call.asked.request_id.hex(), call.tries, pause, error))

    def _on_paused(self, call: Call) -> None:
        call.stop_pause()
        if self._generation == generation():  # in a forked child it is the parent's to send it again
            self._place(call, monotonic())

    # What channels tell.

    def on_up(self, channel: Channel) -> None:
        if self._tell is not None and not channel.connection.is_heard:  # said again when it is heard of
            self._tell(ConnectionUp(channel.endpoint, channel.losses))
        self._place_waiting()

    def on_down(self, channel: Channel) -> None:
        if self._tell is not None and channel.trouble is not None:
            self._tell(ConnectionFailed(channel.endpoint, channel.trouble.kind.__name__, channel.trouble.message))
        if self._waiting:
            self._end_hopeless()

    def on_lost(self, channel: Channel, loss: Loss) -> None:
        if self._tell is not None:
            kind, message, silent = loss.trouble
            lost, unsent = len(loss.lost), len(loss.unsent)
            self._tell(ConnectionLost(channel.endpoint, kind.__name__, message, silent, lost, unsent))
        now = monotonic()
        for asked in loss.unsent:
            if asked.is_open:
                asked.owner.avoids = ()  # it must not wait for a better place while there is any
                self._place(asked.owner, now)
        for asked in loss.lost:
            if not asked.is_open:
                continue  # answered meanwhile, by what those woken before it have read
            call: Call = asked.owner
            asked.may_have_run = True
            error = loss.trouble.error(channel.endpoint, asked.request_id, True)
            journal = asked.journal if asked.journal != NO_JOURNAL else loss.connection.journal_of(asked, channel.journal)
            if journal == NO_JOURNAL:
                self._retry_or_end(call, error, call.idempotent)
            elif call.tries >= self._retries:
                self._end(call, error)
            elif call.idempotent and self._budget.spend():
                self._pause(call, error)  # for anybody
            else:
                self._resend(call, journal, error, now)
        if self._waiting:
            self._place_waiting()

    def on_answer(self, channel: Channel, answer: Resolution) -> None:
        call: Call = answer.asked.owner
        if answer.kind == _REJECTED:
            self._on_rejected(call, channel, answer)
        elif answer.kind == _INTERRUPTED:
            self._on_interrupted(call, answer)
        else:
            if call.pause is not None:
                call.stop_pause()  # it is the answer to an earlier try
            if self._waiting:
                self._waiting.pop(call, None)
            call.outcome = answer
            self._wake(call)
        if self._waiting:
            self._place_waiting()

    def on_end(self) -> None:
        self.close()

    def _give_up(self, error: Exception) -> None:
        """A loop has failed too often. Not closed here: this may be in the middle of a send."""
        self._hub.loop.run_callback(self._shut, error)

    def is_wanted(self, channel: Channel) -> bool:
        return bool(self._requester.pending)

    def _on_rejected(self, call: Call, channel: Channel, answer: Resolution) -> None:
        """It was not run: so it goes elsewhere, or waits for the next server if this one is about to stop."""
        error = error_in(answer)
        self._rejected += 1
        call.avoids = (*call.avoids, channel)
        if isinstance(error, RemoteError) and error.type == OTHER_JOURNAL:
            self._on_other_journal(call, channel)
        elif isinstance(error, RemoteError) and error.code == "UNAVAILABLE" and self._waits_for_servers:
            channel.connection.is_draining = channel.connection.is_direct
            if channel.connection.is_direct:
                call.avoids = ()
                self._place(call, monotonic())
            else:
                self._pause(call, error)  # the proxy may choose the same server again
        elif choose(self._channels, call, self._retries) is not None:
            self._place(call, monotonic())
        else:
            self._retry_or_end(call, error, True)

    def _on_other_journal(self, call: Call, channel: Channel) -> None:
        """The server that knows of it is not there, but another one. Behind a proxy it may be the next."""
        if choose(self._channels, call, self._retries) is not None:
            self._place(call, monotonic())
        elif not channel.connection.is_direct and call.tries < self._retries:
            # Not a share of all requests: the one who owes this answer may be the next, and who refuses has hardly any work.
            self._pause(call, self._replaced(call, channel))
        else:
            self._end(call, self._replaced(call, channel))

    def _end_replaced(self, call: Call) -> None:
        """No server is left that may run it."""
        del self._waiting[call]
        self._end(call, self._replaced(call, call.channel or self._channels[0]))

    def _replaced(self, call: Call, channel: Channel) -> GreensafeError:
        error = LOST.error(channel.endpoint, call.asked.request_id, True)
        error.add_note("the server that is there now keeps another journal, and must not run it")
        return error

    def _on_interrupted(self, call: Call, answer: Resolution) -> None:
        """It goes on where it was interrupted when it is sent again, if to that journal."""
        error = error_in(answer)
        self._requester.bind(call.asked, answer.journal)
        if isinstance(error, RemoteError) and error.type == SERVER_STOPPED and call.tries < self._retries:
            self._pause(call, error)  # until it is gone; then it waits for the next one
        else:
            self._retry_or_end(call, error, True)

    # A request's wait.

    def _forget_parent(self) -> None:
        """Begin anew; the parent's requests are its own, whatever becomes of the greenlets here that seem to wait for them."""
        for asked in self._requester.abandon_all():
            asked.owner.stop_pause()
        self._stop_timers()
        self._begin()

    def _begin(self) -> None:
        """Open the connections: at first, and anew in a forked child, where those at hand are the parent's."""
        own(self._context)
        self._generation = generation()
        self._hub: Hub = gevent.get_hub()
        self.restarts = Restarts(" ".join(self._endpoints), self._give_up, self._tell)
        self._requester = Requester(self._heartbeat)
        self._budget = Budget()
        self._waiting: dict[Call, None] = {}
        self._timer: Any = None
        self._timer_at = float("inf")
        self._looks: Any = None
        self._answered = self._retried = self._rejected = 0
        self._failures: dict[str, int] = {}
        self._turned_at = monotonic()
        #: A caller that was woken by a callback runs: it may ask again at once, so whether to rest is seen to afterwards.
        self._is_waking = False
        self._prefix = os.urandom(8)
        self._numbers = itertools.count(1)
        self._channels: list[Channel] = []
        try:
            for endpoint in self._endpoints:
                self._channels.append(Channel(endpoint, self._context, self._requester, self._heartbeat, self))
            close_first(self._context, self)
        except BaseException:
            self.close()
            raise

    def _wait(self, call: Call, at: float | None, limit: float | None) -> list[bytes]:
        """Sleep until the answer has come or a limit ends it."""
        if at is not None and at < self._timer_at:
            self._arm(at)
        if call.outcome is None:
            self._sleep(call)
        outcome, call.outcome = call.outcome, None
        if isinstance(outcome, GreensafeError):
            try:
                raise outcome
            finally:
                del outcome  # the error's traceback holds this frame
        if outcome is not None:
            if outcome.kind != _ERROR:
                return outcome.body
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
        if asked.is_open:
            self._tell_cancelled(call)
            self._requester.abandon(asked)
            self._waiting.pop(call, None)
        asked.frames.clear()  # if it has not left yet it need not leave any more
        asked.body = ()  # the table may keep what has a limit until that comes: neither what was asked with it, nor who asked
        asked.owner = None  # which knows its request: else each would be for the garbage collector
        if not self._is_waking and not self._requester.pending:
            self._rest()

    def _tell_cancelled(self, call: Call) -> bool:
        note = self._requester.cancel(call.asked)
        if note is None or call.channel is None:
            return False
        call.channel.tell(note)
        return True

    def _rest(self) -> None:
        """Nothing of an idle client keeps the loop going, or the client alive once it is dropped."""
        self._disarm()
        if not self._closed:
            for channel in self._channels:
                channel.rest()

    def _timeout_of(self, call: Call, limit: float | None) -> OperationTimeout:
        channel = call.channel or self._channels[0]
        error = OperationTimeout(limit, "request", channel.endpoint)
        if call.asked.connection is None and channel.trouble is not None:
            error.add_note(f"it was not sent: {channel.trouble.message}")
        return error

    def _wake(self, call: Call) -> None:
        """Straight from a callback; from a greenlet only by way of the hub, which alone is sure to come back."""
        if not call.asleep:
            return
        if getcurrent() is not self._hub:
            self._hub.loop.run_callback(call.wake)
            return
        call.asleep = False
        self._is_waking = True
        try:
            call.switch()
        except BaseException:  # noqa: BLE001 - out of a raw greenlet; those behind it are to be woken all the same
            self._hub.handle_error(call, *sys.exc_info())
        finally:
            self._is_waking = False
        if not self._requester.pending:
            self._rest()

    # Time.

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
        self._timer_at = float("-inf")  # nobody sets it again before this is done, if it has to be done again
        self.restarts.run("limits", self._end_overdue)

    def _end_overdue(self) -> None:
        for channel in self._channels:
            channel.drain()
        for asked in self._requester.tick(monotonic()):
            if asked.is_open:  # and not ended by those that were woken before it
                asked.owner.is_timed_out = True
                self._wake(asked.owner)
        self._disarm()
        at = self._requester.next_deadline()
        if at is not None:
            self._arm(at)

    def _look_out(self) -> None:
        """Look at the connections from time to time as long as requests are open."""
        interval = LOOK if self._heartbeat is None else max(self._heartbeat / LOOKS, TICK)
        self._looks = self._hub.loop.timer(interval, interval, ref=False)
        self._looks.start(_look, weakref.ref(self), self._looks)
        now = monotonic()
        for channel in self._channels:
            channel.begin_looks(now)

    def _on_look(self) -> None:
        now = monotonic()
        for channel in self._channels:
            channel.look(now)
        if not self._requester.pending:
            self._stop_looking()

    def _stop_looking(self) -> None:
        if self._looks is not None:
            self._looks.stop()
            self._looks.close()
            self._looks = None

    def _stop_timers(self) -> None:
        self._disarm()
        self._stop_looking()


_REJECTED, _INTERRUPTED, _ERROR = int(Kind.REJECTED), int(Kind.INTERRUPTED), int(Kind.ERROR)


def _look(client: weakref.ref[Client], timer: Any) -> None:
    found = client()
    if found is None:
        timer.stop()
        timer.close()
        return
    found.restarts.run("looks", found._on_look)


def _ended(error: Exception | None) -> Cancelled:
    """What a request gets that is open when the client ends, or comes afterwards."""
    if error is None:
        return Cancelled("the client or its context was closed")
    cancelled = Cancelled(f"the client is closed, since a loop of its own has failed again and again: {error!r}")
    cancelled.__cause__ = error
    return cancelled
