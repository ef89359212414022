"""Which server does a request go to, and what becomes of it when that one is lost, or does not run it?

Rules:

* A request goes to the usable channel with the fewest in flight (see `choice`). While there is none it waits here: nobody being
  there yet is no error (wait=True), a server that refuses is.
* A request whose connection is lost ends with the error, unless it may be sent again (`retries`): what was not run may, what
  may have run only if it is idempotent or its server journals. Retries are a share of all requests (`sansio.backoff.Budget`).
* A request that may have run for one journal alone, and waits to be sent there again, waits until its caller's limit, whatever
  accepts connections meanwhile in its server's place. It pays nothing for that: only what was sent counts as a try.
* What a server has rejected, or what was not handed over, was not run: it goes elsewhere without an error, if there is a place.
* As long as requests are open all channels are looked at, also those that carry none: so a server that is back is found. One
  that is up, and takes none for now (its server drains, say), is judged as long as requests wait for it.

It does not know how a connection is made, watched and lost (see `channel`), nor who waits for an answer, and how long.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent
import zmq
from gevent.hub import Hub

from ..errors import GreensafeError, PeerSilent, Refused, RemoteError
from ..hooks import CallRetried, ConnectionFailed, ConnectionLost, ConnectionUp, Tell
from ..hub.forks import generation
from ..hub.log_limiter import write
from ..hub.timers import TICK, start_timer
from ..loops.restarts import Restarts
from ..sansio.backoff import Budget, delay
from ..sansio.envelope import NO_JOURNAL, OTHER_JOURNAL, SERVER_STOPPED, Kind
from ..sansio.liveness import LOOKS
from ..sansio.requester import Requester, Resolution
from .balancing import choose, hopeless, keepers
from .call import Call, error_in
from .channel import Channel
from .problems import LOST, Loss

__all__ = ["Failover"]

log = logging.getLogger("greensafe.failover")

#: Seconds between two looks at the connections if there is no limit of silence.
LOOK = 1.0

#: Seconds that requests wait for the one server that may run them before a log line names it.
NOTED = 60.0

_REJECTED, _INTERRUPTED = int(Kind.REJECTED), int(Kind.INTERRUPTED)


class Failover:
    """The channels of one client, and its requests on their way to an answer.

    Args:
        requester: The client's table.
        budget: What retries are taken from.
        retries: How often a request may be sent again after an error.
        waits_for_servers: Whether a request waits until a server is there.
        restarts: Looks after its loops and its channels'.
        tell: Told of retries, and of what happens to connections.
        wake: Called with each Call whose outcome is set, in the hub or in a greenlet that drains.
        on_end: Called when the context was terminated.

    Attributes:
        channels: One for each endpoint.
        waiting: The requests that wait for a channel, in their order.
        retried: Requests that were sent again, each time.
        rejected: Answers by which a server did not run a request.
    """

    def __init__(
        self,
        requester: Requester,
        budget: Budget,
        *,
        retries: int,
        waits_for_servers: bool,
        restarts: Restarts,
        tell: Tell | None,
        wake: Callable[[Call], None],
        on_end: Callable[[], None],
    ) -> None:
        self._requester = requester
        self._budget = budget
        self._retries = retries
        self._waits_for_servers = waits_for_servers
        self.restarts = restarts
        self._tell = tell
        self._wake = wake
        self._on_end = on_end
        self._generation = generation()
        self._hub: Hub = gevent.get_hub()
        self._looks: Any = None
        self._awaited_since: float | None = None
        self.channels: list[Channel] = []
        self.waiting: dict[Call, None] = {}
        self.retried = self.rejected = 0

    def __repr__(self) -> str:
        return (
            f"<Failover up={sum(channel.is_up for channel in self.channels)} of {len(self.channels)}"
            f" waiting={len(self.waiting)} retried={self.retried} rejected={self.rejected}>"
        )

    def connect(self, endpoint: str, context: zmq.Context[Any]) -> None:
        """Have one more server to ask.

        Raises:
            zmq.ZMQError: The endpoint is malformed; nothing is changed.
        """
        self.channels.append(Channel(endpoint, context, self._requester, self._requester.patience, self))

    def stop(self) -> None:
        """Nothing waits for a channel any more, and none is looked at. Channels stay as they are."""
        self.waiting.clear()
        self._stop_looking()

    # Where requests go.

    def place(self, call: Call, now: float) -> None:
        """Hand a request over, or have it wait until a channel can take it."""
        channel = choose(self.channels, call, self._retries)
        if channel is None:
            self.waiting[call] = None
            for each in self.channels:
                each.wake()
            if call in self.waiting:
                self._end_hopeless()
        else:
            call.channel = channel
            channel.send(call.asked, now)
        if self._looks is None:
            self._look_out()

    def _place_waiting(self) -> None:
        now = monotonic()
        for call in list(self.waiting):
            if call not in self.waiting:
                continue  # ended meanwhile
            channel = choose(self.channels, call, self._retries)
            if channel is None and not call.avoids and not call.asked.is_bound:
                return  # nor is there a place for those behind it
            if channel is not None:
                del self.waiting[call]
                call.channel = channel
                channel.send(call.asked, now)
            elif not keepers(self.channels, call):
                self._end_replaced(call)

    def _end_hopeless(self) -> None:
        """End the requests that wait if no channel can be expected to take them."""
        anybody = hopeless(self.channels, self._waits_for_servers)
        for call in list(self.waiting):
            if call not in self.waiting:
                continue  # ended by those that were woken before it
            able = keepers(self.channels, call)
            found = hopeless(able, self._waits_for_servers, is_bound=True) if call.asked.is_bound else anybody
            if not able:
                self._end_replaced(call)
            elif found is not None:
                del self.waiting[call]
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
        self.retried += 1
        if self._tell is not None:
            self._tell(CallRetried(call.endpoint, call.asked.request_id.hex(), call.tries, 0.0, error))
        self.place(call, now)

    def _pause(self, call: Call, error: GreensafeError) -> None:
        call.tries += 1
        call.avoids = ()
        pause = delay(call.tries, random.random())
        call.pause = start_timer(self._hub, pause, lambda: self.restarts.run("retries", lambda: self._on_paused(call)))
        self.retried += 1
        if self._tell is not None:
            self._tell(CallRetried(call.endpoint, call.asked.request_id.hex(), call.tries, pause, error))

    def _on_paused(self, call: Call) -> None:
        call.stop_pause()
        if self._generation == generation():  # in a forked child it is the parent's to send it again
            self.place(call, monotonic())

    # What channels tell.

    def on_end(self) -> None:
        self._on_end()

    def is_wanted(self, channel: Channel) -> bool:
        return bool(self._requester.pending)

    def on_up(self, channel: Channel) -> None:
        if self._tell is not None and not channel.connection.is_heard:  # said again when it is heard of
            self._tell(ConnectionUp(channel.endpoint, channel.losses))
        self._place_waiting()

    def on_down(self, channel: Channel) -> None:
        if self._tell is not None and channel.trouble is not None:
            self._tell(ConnectionFailed(channel.endpoint, channel.trouble.kind.__name__, channel.trouble.message))
        if self.waiting:
            self._end_hopeless()

    def on_lost(self, channel: Channel, loss: Loss) -> None:
        if self._tell is not None:
            kind, message, silent, _ = loss.trouble
            lost, unsent = len(loss.lost), len(loss.unsent)
            self._tell(ConnectionLost(channel.endpoint, kind.__name__, message, silent, lost, unsent))
        now = monotonic()
        if self.waiting and loss.trouble.kind is PeerSilent:
            self._end_hopeless()
        for asked in loss.unsent:
            if asked.is_open:
                asked.owner.avoids = ()  # it must not wait for a better place while there is any
                self.place(asked.owner, now)
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
        if self.waiting:
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
            if self.waiting:
                self.waiting.pop(call, None)
            call.outcome = answer
            self._wake(call)
        if self.waiting:
            self._place_waiting()

    def _on_rejected(self, call: Call, channel: Channel, answer: Resolution) -> None:
        """It was not run: so it goes elsewhere, or waits for the next server if this one is about to stop."""
        error = error_in(answer)
        self.rejected += 1
        call.avoids = (*call.avoids, channel)
        if isinstance(error, RemoteError) and error.type == OTHER_JOURNAL:
            self._on_other_journal(call, channel)
        elif isinstance(error, RemoteError) and error.type == SERVER_STOPPED and self._waits_for_servers:
            channel.connection.is_draining = channel.connection.is_direct
            if channel.connection.is_direct:
                call.avoids = ()
                self.place(call, monotonic())
            else:
                self._pause(call, error)  # the proxy may choose the same server again
        elif choose(self.channels, call, self._retries) is not None:
            self.place(call, monotonic())
        else:
            self._retry_or_end(call, error, True)

    def _on_other_journal(self, call: Call, channel: Channel) -> None:
        """The server that knows of it is not there, but another one. Behind a proxy it may be the next."""
        if choose(self.channels, call, self._retries) is not None:
            self.place(call, monotonic())
        elif not channel.connection.is_direct and call.tries < self._retries:
            # Not a share of all requests: the one who owes this answer may be the next, and who refuses has hardly any work.
            self._pause(call, self._replaced(call, channel))
        else:
            self._end(call, self._replaced(call, channel))

    def _end_replaced(self, call: Call) -> None:
        """No server is left that may run it."""
        del self.waiting[call]
        self._end(call, self._replaced(call, call.channel or self.channels[0]))

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

    # Looks.

    def _look_out(self) -> None:
        """Look at the connections from time to time as long as requests are open."""
        limit = self._requester.patience
        interval = LOOK if limit is None else max(limit / LOOKS, TICK)
        self._looks = self._hub.loop.timer(interval, interval, ref=False)
        self._looks.start(_look, weakref.ref(self), self._looks)
        now = monotonic()
        for channel in self.channels:
            channel.begin_looks(now)

    def _on_look(self) -> None:
        now = monotonic()
        for channel in self.channels:
            channel.look(now, self._is_awaited(channel))
        self._note_awaited(now)
        if not self._requester.pending:
            self._stop_looking()

    def _is_awaited(self, channel: Channel) -> bool:
        return any(not call.asked.is_bound or channel.keeps(call.asked.journal) for call in self.waiting)

    def _note_awaited(self, now: float) -> None:
        """Log once for each such wait that requests wait for a journaling server: without a limit they do so for ever."""
        awaited = [call for call in self.waiting if call.asked.is_bound] if self.waiting else []
        if not awaited:
            self._awaited_since = None
        elif self._awaited_since is None:
            self._awaited_since = now
        elif now - self._awaited_since >= NOTED:
            self._awaited_since = float("inf")
            endpoints = " ".join(channel.endpoint for channel in keepers(self.channels, awaited[0]))
            first = awaited[0].asked.request_id.hex()
            what = "%s: %d requests have waited for %.0f s for their server to come back with its journal, such as %s"
            extra = {"endpoint": endpoints, "request_id": first}
            write(log, logging.WARNING, what, endpoints, len(awaited), NOTED, first, extra=extra)

    def _stop_looking(self) -> None:
        if self._looks is not None:
            self._looks.stop()
            self._looks.close()
            self._looks = None
            for channel in self.channels:
                channel.end_looks()


def _look(failover: weakref.ref[Failover], timer: Any) -> None:
    found = failover()
    if found is None:
        timer.stop()
        timer.close()
        return
    found.restarts.run("looks", found._on_look)
