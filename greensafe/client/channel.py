"""How is one endpoint reached, and what has happened to the connection to it?

A `Channel` has a plain DEALER, driven by a pump, and says when requests can be handed over, why not, and which were lost.

    down --handshake--> up --lost--> down, with a new socket

Rules:

* A request is handed to libzmq only while the channel is up. So what was not handed over was provably not delivered.
* When the connection is lost the DEALER is thrown away (LINGER 0) and a new one made: nothing that is still queued in it may be
  delivered behind the back of a caller who was told of the loss.
* libzmq says DISCONNECTED, then hands over what it had read, then says CONNECT_RETRIED: so everything is read once more after
  the event that follows, and only then is a request lost. Where none follows (a peer that broke the protocol), after `SETTLE`.
  A peer that has sent faster than it was read does not stop the hub: what it has sent is read in turns before that.
* Signs of life of a TCP connection are counted in the kernel (see `sansio.liveness`); elsewhere messages are, and a second
  connection tells (see `secondlook`). Never by libzmq's HEARTBEAT_TIMEOUT, which kills a connection behind a long message.
* inproc has none of these, and no monitor: there a peer that is gone cannot be sent to.
* Never IMMEDIATE=1 or RECONNECT_IVL<=0: both throw replies away that have been received.
* libzmq is never given a name to resolve (see `names`). While a name is resolved the DEALER stands, connected to nobody.

It does not know which request goes to which channel, nor whether one is sent again.
"""

from __future__ import annotations

import errno
import logging
import math
import random
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Protocol

import gevent
import zmq

from ..errors import Disconnected, PeerSilent, Refused, Unreachable
from ..green.context import plain_socket
from ..hub.forks import generation
from ..hub.log_limiter import Seldom, write
from ..hub.timers import start_timer
from ..loops.restarts import Restarts
from ..sansio.backoff import LONGEST, delay
from ..sansio.envelope import NO_JOURNAL
from ..sansio.liveness import LOOKS, Pulse, Sample
from ..sansio.requester import Asked, Connection, Requester, Resolution
from ..stats import EndpointStats
from ..transport.byname import ByName, has_proxy, reconnect
from ..transport.endpoints import explained, not_begun
from ..transport.inlet import LOST_FIRST
from ..transport.monitor import ConnectionEvent, Monitor
from ..transport.names import host_in
from ..transport.outbox import OUTBOX
from ..transport.pump import Pump
from ..transport.tcp_info import is_counted, sample, unread
from .problems import LOST, NO_ANSWER, NO_HANDSHAKE, NOBODY, SILENT, TORN, WRONG_TYPE, Loss, Trouble, refusal
from .second_look import SecondLook

__all__ = ["Channel", "Owner"]

log = logging.getLogger("greensafe.channel")

#: Seconds after which what a lost connection had read is taken for handed over if no event says so.
SETTLE = 0.01

#: Seconds in which all is read at the latest that a lost connection has left: a high-water mark's messages, or any number.
READ_OUT, READ_OUT_ALL = 2.0, 60.0

#: A connection that was lost within this many seconds of its beginning is made again only after a pause.
SHORT_LIVED = 1.0

#: Seconds that a connection may stand before a peer that has sent bytes (ipc: has read those sent to it), but made no handshake
#: that libzmq announces, is taken for one of ZMTP 2.
SHY = 0.2

#: Journals behind a proxy that are remembered: who makes one up for each message ends there.
NAMED = 1000

#: Bytes of a frame on the wire besides its own, about.
FRAMING = 2

_NO_DETAIL = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_FINAL = frozenset({zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL})

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class Owner(Protocol):
    """Who is told, in the hub or in a greenlet that drains.

    Attributes:
        restarts: Looks after the channel's loops.
    """

    restarts: Restarts

    def on_up(self, channel: Channel) -> None:
        """Requests can be handed over."""

    def on_down(self, channel: Channel) -> None:
        """An attempt to connect has failed; `channel.trouble` says how. Nothing was handed over."""

    def on_lost(self, channel: Channel, loss: Loss) -> None:
        """The connection is gone, or a server behind it."""

    def on_answer(self, channel: Channel, answer: Resolution) -> None:
        """A request has its answer, or was rejected."""

    def on_end(self) -> None:
        """The context was terminated."""

    def is_wanted(self, channel: Channel) -> bool:
        """Whether the channel is to be up: the client is in use."""


class Channel:
    """The connection to one endpoint, again and again.

    Args:
        endpoint: Where to connect.
        context: Whose options hold for the socket, too.
        requester: The client's table.
        limit: Seconds of silence after which the peer is taken for dead; None for no heartbeats at all.
        owner: Who is told.

    Raises:
        zmq.ZMQError: The endpoint is malformed; nothing is left behind.

    Attributes:
        connection: What is known of the present one.
        journal: Of the server that answered here last, on this connection or an earlier one, with nobody in between; NO_JOURNAL
            if it had none, or stands behind a proxy.
        is_up: Whether requests can be handed over.
        trouble: How the last attempt to connect ended, None if none has ended since the channel was up.
        losses: Connections, or servers behind one, that were lost.
        lost_requests: Requests that were in flight on them and may have run.
        failed_attempts: Attempts to connect that have failed.
        unsaid: What is no request, and was not sent since the server does not read.
    """

    __slots__ = (
        "__weakref__",
        "_by_name",
        "_connected_at",
        "_context",
        "_counts",
        "_descriptor",
        "_failing_since",
        "_generation",
        "_has_failed",
        "_has_tried",
        "_has_warned",
        "_ipv6",
        "_is_bounded",
        "_is_closed",
        "_is_dying",
        "_is_mute",
        "_limit",
        "_losses",
        "_monitor",
        "_named",
        "_opened_at",
        "_owner",
        "_pulse",
        "_pump",
        "_reading_out",
        "_reopen",
        "_requester",
        "_second",
        "_seldom",
        "_settle",
        "_taken",
        "_was_silent",
        "connection",
        "endpoint",
        "failed_attempts",
        "is_up",
        "journal",
        "losses",
        "lost_requests",
        "trouble",
        "unsaid",
    )

    def __init__(
        self, endpoint: str, context: zmq.Context[Any], requester: Requester, limit: float | None, owner: Owner
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._requester = requester
        self._limit = limit
        self._owner = owner
        self._counts = is_counted(endpoint)
        self._pulse = None if limit is None or endpoint.startswith("inproc:") else Pulse(limit)
        self._seldom = Seldom()
        self._second = SecondLook(endpoint, context, limit or 0.0)
        self._generation = generation()
        self._pump: Pump | None = None
        self._monitor: Monitor | None = None
        self._settle: Any = None
        self._reading_out: Any = None
        self._reopen: Any = None
        host = host_in(endpoint)
        self._by_name = None if host is None else ByName(host, self._on_no_address)
        self._has_warned = False
        self._losses = 0
        self._failing_since: float | None = None
        self._was_silent = False
        self._is_closed = False
        self.journal = NO_JOURNAL
        #: Of the servers behind a proxy, any of which may get what is sent.
        self._named: set[bytes] = set()
        self.losses = 0
        self.lost_requests = 0
        self.failed_attempts = 0
        self.unsaid = 0
        self.trouble: Trouble | None
        self._open()

    @property
    def why_not_up(self) -> str:
        """What stands in the way of a request, for people; "" if nothing is known to."""
        if self.trouble is not None:
            return self.trouble.message
        is_asking = self._by_name is not None and self._by_name.number is None and not self.is_up
        return "its name is still being resolved" if is_asking else ""

    @property
    def load(self) -> int:
        """Requests handed over and not answered."""
        return len(self.connection.sent)

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a forked child and all this is its parent's."""
        return self._generation != generation()

    @property
    def stats(self) -> EndpointStats:
        """How it stands now."""
        return EndpointStats(
            endpoint=self.endpoint,
            is_up=self.is_up,
            is_draining=self.connection.is_draining,
            is_greensafe=self.connection.is_known,
            inflight=self.load,
            losses=self.losses,
            lost_requests=self.lost_requests,
            failed_attempts=self.failed_attempts,
            trouble="" if self.trouble is None else self.trouble.message,
        )

    def keeps(self, journal: bytes) -> bool:
        """Whether the server here, or one behind the proxy, has this journal, as far as can be told before it is asked."""
        connection = self.connection
        if connection.is_mixed:
            return False
        if connection.is_direct:
            return connection.journal == journal
        return journal in self._named or (not connection.is_known and self.journal == journal)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "up" if self.is_up else "down"
        return f"<Channel {state} {self.endpoint} inflight={self.load} losses={self.losses}>"

    def send(self, asked: Asked, now: float) -> None:
        """Hand a request over; whoever empties `asked.frames` takes it back, if it has not left yet."""
        pump, connection = self._pump, self.connection
        assert pump is not None
        if not pump.is_started:
            pump.start()
        frames = self._requester.send(asked, connection, now)
        if len(connection.sent) > 1:
            pump.send_soon(frames)
        else:
            pump.send(frames)  # alone: its server may begin while this goes to sleep

    def tell(self, frames: list[bytes]) -> None:
        """Send what is no request, and need not arrive: who does not read is not told for ever."""
        if self._pump is not None and self.is_up and not self.is_inherited:
            if self._pump.outbox.size > OUTBOX:
                self.unsaid += 1
            else:
                self._pump.send(frames)

    def wake(self) -> None:
        """Somebody waits for an answer, or for the connection: read, connect, keep the loop running."""
        if self._is_closed:
            return
        kind = None if self.trouble is None else self.trouble.kind
        if kind is PeerSilent:
            self.trouble = None  # libzmq tries again, and that is worth waiting for
        elif kind is Refused and self._pump is not None and monotonic() - self._opened_at > SHORT_LIVED:
            self._shut(0)  # libzmq does not try again by itself
        if self._by_name is not None and self._by_name.wake():
            self.trouble = None  # likewise
        if self._pump is None:
            self._connect_again()
        if self._pump is not None:
            self._pump.start()

    def rest(self) -> None:
        """Nobody waits any more: nothing here keeps the loop running."""
        if self._pump is not None:
            self._pump.stop()
        if self._by_name is not None:
            self._by_name.rest()
        self._stop_reopening()

    def drain(self) -> bool:
        """Read what has arrived, for some milliseconds at most; whether that was all."""
        return self._pump is None or self.is_inherited or self._pump.drain_all()

    def catch_up(self) -> None:
        """Learn what has happened to the connection while the loop did not turn."""
        if self._monitor is not None and not self._is_closed:
            self._monitor.drain()

    @property
    def is_blind(self) -> bool:
        """Whether it is up only as far as anybody can tell: on inproc, until somebody has answered."""
        return self._monitor is None and not self.connection.is_heard

    def begin_looks(self, now: float) -> None:
        """Nothing was looked at so far; from now on it will be, and a look that comes late will be known for that."""
        if self._pulse is not None:
            self._pulse.rest(now)
            self._second.end()

    def end_looks(self) -> None:
        """Nothing is looked at until then, so nothing is late."""
        if self._pulse is not None and not self.is_inherited:
            self._pulse.rest()
            self._second.end()

    def look(self, now: float, is_awaited: bool = False) -> None:
        """Look for signs of life, or whether it is time to connect again; called `LOOKS` times within the limit while requests
        wait, here or elsewhere, and once more.

        Args:
            now: When this is.
            is_awaited: Whether requests wait for this channel to take them: if it is up they must not wait for a dead server.
        """
        if self.is_inherited:
            return
        early = self._pulse is not None and self._pulse.is_early(now)
        late = not early and self._pulse is not None and self._pulse.is_late(now)
        self._revive(now)
        if not self.is_up and not late and self._is_legacy(now):
            self._guess(now)
        if early:
            return
        if self._pulse is None or not self.is_up or not (self.connection.sent or is_awaited):
            self.begin_looks(now)
            return
        if self._pump is not None:
            self._pump.look_after()
        self.drain()
        if late:
            self._requester.forgive(self.connection, now)
        silent = self._pulse.look(None if self._is_mute else self._sample(), late)
        second, connection = self._second, self.connection
        says_working = bool(connection.sent) and connection.is_known and connection.is_direct
        trouble = second.judge(silent, self._pulse, connection.under_way, self._descriptor, now, says_working)
        if self._pulse.is_busy or (second.is_open and (self._counts or second.has_reason)):
            self._requester.forgive(self.connection, now)
        if trouble is not None:
            self._lose(trouble)
        elif missing := self._requester.missing(self.connection, now):
            self._tell_lost(Loss(TORN, missing, [], self.connection))
        elif second.is_open or second.has_reason:
            pass  # the pulse's verdict comes first
        elif (unheard := self._requester.silent(self.connection, now)) and self.connection.is_direct:
            self._lose(SILENT["hub" if self._counts else "server"])
        elif unheard:
            for asked in unheard:  # its server is gone behind a proxy; those of others are not
                self._requester.unsend(asked)
            self._tell_lost(Loss(SILENT["hub"], unheard, [], self.connection))

    def close(self, linger: int) -> None:
        """Close; what is queued may leave for `linger` milliseconds more."""
        self._is_closed = True
        self.is_up = False
        self._stop_settling()
        self._stop_reading_out()
        self._stop_reopening()
        self._shut(linger)
        self._seldom.flush()

    # Connecting.

    def _open(self) -> None:
        self.connection = Connection()
        self.is_up = False
        self.trouble = None
        self._is_dying = False
        self._connected_at = math.inf  # while it is not connected
        self._is_mute = False  # of ZMTP 2, which knows no PING
        self._has_failed = False
        self._has_tried = False  # libzmq has: it could begin
        self._descriptor = -1
        self._taken = 0
        self._opened_at = monotonic()
        sock = plain_socket(self._context, zmq.DEALER)
        try:
            self._set_options(sock)
            is_inproc = self.endpoint.startswith("inproc:")
            self._monitor = None if is_inproc else self._watch(sock)
            if self._by_name is not None and has_proxy(sock):
                self._by_name = None
            if self._by_name is None:
                with explained(self.endpoint):
                    sock.connect(self.endpoint)
            self._pump = Pump(
                sock,
                self._on_message,
                self._owner.on_end,
                outbox=None,
                on_gone=self._on_gone if is_inproc else None,
                on_failure=lambda error, go_on: self._owner.restarts.failed("pump", error, go_on),
                on_torn=self._on_torn,
                most_frames=self._requester.max_frames,
                on_interrupted=self._on_interrupted,
            )
        except BaseException:
            if self._monitor is not None:
                self._monitor.close()
            sock.close(0)
            raise
        self._ipv6 = bool(sock.getsockopt(zmq.IPV6))
        self._is_bounded = bool(sock.getsockopt(zmq.RCVHWM))
        if self._by_name is not None:
            self._by_name.begin(self._ipv6, partial(reconnect, sock))
        if self._monitor is None:
            self.is_up = True  # nobody tells: libzmq keeps what is sent until somebody is there

    def _set_options(self, sock: zmq.Socket[Any]) -> None:
        if self.endpoint.startswith("inproc:"):
            sock.set_hwm(0)  # then nothing but a peer that is gone can be in the way of a send
        if self._limit is None or self._pulse is None:
            return
        limit = max(LOOKS, round(self._limit * 1000))
        sock.setsockopt(zmq.HEARTBEAT_IVL, limit // LOOKS)
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 0)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, limit)
        sock.setsockopt(zmq.HANDSHAKE_IVL, limit)

    def _watch(self, sock: zmq.Socket[Any]) -> Monitor | None:
        try:
            return Monitor(sock, self._on_event_guarded, _EVENTS)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            what = "%s: no descriptor is left for a monitor: a lost connection will not be noticed"
            self._say(logging.WARNING, what)
            return None

    def _unwatch(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _shut(self, linger: int) -> None:
        self._second.end()
        self._unwatch()
        if self._by_name is not None:
            self._by_name.end()
        if self._pump is not None and not self.is_inherited:
            self._pump.close(linger)
        self._pump = None

    def _set_up(self) -> None:
        if not self.is_up:
            self.is_up = True
            if self._pulse is not None:
                self._pulse.renew()
            self._has_warned = False
            self.trouble = self._failing_since = None
            write(log, logging.DEBUG, "%s: up", self.endpoint, extra={"endpoint": self.endpoint})
            self._owner.on_up(self)

    # What libzmq tells.

    def _on_event_guarded(self, event: ConnectionEvent) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001 - what is known of the connection is not true any more: it is made again
            self._owner.restarts.failed("connection", error, lambda: self._guarded(lambda: self._lose(LOST)))

    def _guarded(self, act: Callable[[], None]) -> None:
        """Do what would not be done any more if it failed; nothing in a forked child, whose timers are not its own."""
        if not self.is_inherited:
            self._owner.restarts.run("connection", act)

    def _on_event(self, event: ConnectionEvent) -> None:
        kind = event.kind
        if self._is_dying:
            self._lose(LOST)
        elif self._by_name is not None and self._by_name.was_at(event.endpoint):
            pass  # the name has another address now; that one may even have answered while the hub did not turn
        elif kind == zmq.EVENT_CONNECTED:
            self._descriptor = event.value
            self._connected_at = monotonic()
            if self._by_name is not None:
                self._by_name.on_connected()
        elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._was_silent = self._is_mute = False  # a slow handshake looks like ZMTP 2's until it is done
            self._set_up()
        elif kind == zmq.EVENT_DISCONNECTED:
            self._has_tried = True
            self._on_disconnected()
        elif kind in _FINAL:
            self._fail(refusal(event))
        elif kind == _NO_DETAIL and self.is_up:
            self._unmask(event)
        elif kind == _NO_DETAIL:
            self._has_failed = True
            self._on_bad_handshake(event)
        elif kind == zmq.EVENT_CLOSED:
            self._has_tried = True
            self._failing_since = None
            self._on_closed()
        elif kind == zmq.EVENT_CONNECT_RETRIED:
            has_tried, self._has_tried = self._has_tried, False
            if not has_tried:
                self._on_not_begun()

    def _unmask(self, event: ConnectionEvent) -> None:
        """End a connection that was taken for one to a peer of ZMTP 2, of whose end libzmq says the same."""
        is_mistaken = event.value == errno.EAGAIN and not self.connection.is_heard
        self.connection.is_over = is_mistaken  # libzmq still waits for the handshake: so it has sent no request
        self._lose(NO_ANSWER if is_mistaken else LOST)

    def _on_bad_handshake(self, event: ConnectionEvent) -> None:
        """It may be a server that dies as it starts, or one who will never answer: time tells, unless that was slept away."""
        now = monotonic()
        was_away = self._pulse is not None and self._pulse.was_away(now)
        if was_away:
            self._failing_since = None
        if event.value != errno.EAGAIN:
            self._failing_since = now if self._failing_since is None else self._failing_since
            is_hopeless = self._limit is not None and now - self._failing_since >= self._limit
            self._fail(NO_HANDSHAKE._replace(kind=Refused) if is_hopeless else NO_HANDSHAKE)
        elif was_away:
            self.failed_attempts += 1  # the limit may be over only because this process did not run; libzmq tries again
        else:
            self._fail(NO_ANSWER)

    def _on_disconnected(self) -> None:
        self._connected_at = math.inf
        if self.is_up:
            self._is_dying = True
            self.is_up = False  # what comes now waits for the next connection
            self._begin_settling(partial(self._on_settled, monotonic() + SETTLE))
            return  # nothing is done to the socket before all is read that has arrived
        if self._by_name is not None:
            self._by_name.on_failed()
        if self._has_failed:
            self._has_failed = False
        elif self.trouble is None or self.trouble.kind is not Refused:
            self._fail(WRONG_TYPE)  # neither up nor failed: libzmq does not say so, nor try again

    def _begin_settling(self, then: Callable[[], None]) -> None:
        self._settle = start_timer(gevent.get_hub(), SETTLE, lambda: self._guarded(then))

    def _on_settled(self, due: float) -> None:
        self._stop_settling()
        if monotonic() - due > SETTLE:  # if this process was stopped, so was libzmq: it may just be handing things over
            self._begin_settling(partial(self._lose, LOST))
        else:
            self._lose(LOST)

    def _on_closed(self) -> None:
        if self._by_name is not None and self._by_name.on_failed():
            self.failed_attempts += 1  # at one of several addresses
        else:
            self._fail(NOBODY)

    def _on_not_begun(self) -> None:
        """libzmq has had no socket to connect, so it says neither CONNECTED nor CLOSED."""
        by_name = self._by_name
        if by_name is not None and by_name.on_failed():
            self.failed_attempts += 1
        else:
            self._fail_aloud(not_begun((by_name and by_name.number) or self.endpoint, self._ipv6))

    def _on_no_address(self, what: str) -> None:
        """The name has none that anybody knows."""
        self._guarded(lambda: self._fail_aloud(what))

    def _fail_aloud(self, what: str) -> None:
        """There is nothing to connect to, which may well be somebody's mistake: say so, once."""
        if not self._has_warned:
            self._has_warned = True
            self._say(logging.WARNING, "%s: %s", what)
        self._fail(Trouble(Unreachable, what))
        if self._by_name is not None and self._owner.is_wanted(self):
            self._by_name.ask_later()

    def _fail(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.failed_attempts += 1
        write(log, logging.DEBUG, "%s: %s", self.endpoint, trouble.message, extra={"endpoint": self.endpoint})
        self._owner.on_down(self)

    def _on_gone(self) -> None:
        self._lose(LOST)

    def _on_message(self, frames: list[bytes]) -> None:
        connection = self.connection
        was_heard = connection.is_heard
        answer = self._requester.receive(frames, connection, monotonic())
        if not self._counts:
            self._taken += 1
        elif answer is None or not connection.is_direct:
            # Answers of a server without a proxy need not be counted: it is there, and the next may stand right behind.
            self._taken += sum(map(len, frames)) + FRAMING * len(frames)
        if self.connection.is_known and not self.connection.is_direct and len(self._named) < NAMED:
            self._named.add(self.connection.journal)
        if answer is None:
            if self._requester.malformed != self._requester.noted:
                self._requester.noted = self._requester.malformed
                self._say(logging.WARNING, "%s: malformed message dropped: it is no answer")
            if not was_heard and connection.is_heard:
                self._learn()
                self._owner.on_up(self)  # what waited for a sign that somebody answers here
        else:
            if not was_heard:
                self._learn()
            if answer.journal:
                note = self._requester.ack(answer, connection)
                if note is not None:
                    self.tell(note)
            self._owner.on_answer(self, answer)
            self._requester.ended = None

    def _on_torn(self, frames: list[bytes], why: str) -> None:
        """A message has come that could not be received whole."""
        trouble = Trouble(Disconnected, f"its answer was thrown away: {why}")
        is_known = bool(frames) and why != LOST_FIRST
        asked = self._requester.torn(frames if is_known else [], self.connection, monotonic())
        if asked is not None:
            self._tell_lost(Loss(trouble, [asked], [], self.connection))
        elif not is_known and (self._limit is None or not self.connection.is_known):
            self._lose(trouble)  # of a request that nobody will hear of any more; otherwise the missing WORKING tells whose

    def _on_interrupted(self, frames: list[bytes]) -> None:
        """Something from outside has ended `_on_message` halfway."""
        answer, self._requester.ended = self._requester.ended, None
        if answer is None:
            self._on_message(frames)
        elif answer.asked.owner is not None:  # it still waits
            self._owner.on_answer(self, answer)

    def _learn(self) -> None:
        if self.connection.is_direct:
            self.journal = self.connection.journal
            self._named.clear()
        else:
            self.journal = NO_JOURNAL  # the next request may be another server's

    # The end of a connection.

    def _lose(self, trouble: Trouble) -> None:
        if self._reading_out is not None:
            return  # it is known
        self._stop_settling()
        self._is_dying = False
        self.is_up = False  # whoever is woken by what is read now must not send on this socket
        self._unwatch()  # nor learn that it is connected again
        self._read_out(trouble, monotonic() + (READ_OUT if self._is_bounded else READ_OUT_ALL))

    def _read_out(self, trouble: Trouble, until: float) -> None:
        """See the end of a connection to its end when all is read that has arrived; others have their turns meanwhile.

        What comes after `until` is a later connection's, which libzmq makes by itself.
        """
        self._stop_reading_out()
        pump = self._pump
        if not self.drain() and self._pump is pump and not self._is_closed and monotonic() < until:
            again = partial(self._guarded, partial(self._read_out, trouble, until))
            self._reading_out = start_timer(gevent.get_hub(), 0, again)
            return
        if self._is_closed or self._pump is not pump:
            return
        loss = self._count(trouble)
        self._shut(0)
        self._was_silent = trouble.kind is PeerSilent
        self._losses = 1 if monotonic() - self._opened_at > SHORT_LIVED else self._losses + 1
        self.connection = Connection()
        if self._was_silent:
            self.trouble = trouble
        self._tell_lost(loss)
        if not self._is_closed and self._pump is None and self._owner.is_wanted(self):
            self._connect_again()

    def _tell_lost(self, loss: Loss) -> None:
        self.losses += 1
        self.lost_requests += len(loss.lost)
        what = "%s: %s; %d requests may have run, %d were not run"
        self._say(logging.INFO, what, loss.trouble.message, len(loss.lost), len(loss.unsent))
        self._owner.on_lost(self, loss)

    def _count(self, trouble: Trouble) -> Loss:
        kept = set() if self._pump is None else {id(frames) for frames in self._pump.outbox.unsent()}
        lost = self._requester.lose(self.connection)
        is_over = self.connection.is_over
        unsent = [asked for asked in lost if is_over or id(asked.frames) in kept]
        lost = [asked for asked in lost if not is_over and id(asked.frames) not in kept]
        return Loss(trouble, lost, unsent, self.connection)

    def _revive(self, now: float) -> None:
        """Connect again though others do the work meanwhile: that is how a server that is back is found."""
        if self.endpoint.startswith("inproc:"):
            return  # nobody says whether somebody is there
        is_old = now - self._opened_at > LONGEST
        if is_old and self._pump is not None and self.trouble is not None and self.trouble.kind is Refused:
            self._shut(0)
        if self._by_name is not None:
            self._by_name.wake()
        if self._pump is None and not self._is_closed and self._reopen is None and (is_old or self._losses <= 1):
            self._open_again()

    def _connect_again(self) -> None:
        """At once, or after a pause if one connection after the other was lost as soon as it was made."""
        if self._losses <= 1 or monotonic() - self._opened_at > LONGEST:
            self._open_again()
        elif self._reopen is None:
            self._pause()

    def _pause(self) -> None:
        pause = delay(self._losses, random.random())
        self._reopen = start_timer(gevent.get_hub(), pause, lambda: self._guarded(self._on_reopen))

    def _on_reopen(self) -> None:
        self._stop_reopening()
        if not self._is_closed and self._pump is None:
            self._open_again()

    def _open_again(self) -> None:
        try:
            self._open()
        except zmq.ZMQError as error:
            self._say(logging.ERROR, "%s: cannot be connected to again: %s", error)
            self._losses += 1
            self._fail(NOBODY)
            if not self._is_closed and self._pump is None and self._reopen is None and self._owner.is_wanted(self):
                self._pause()  # nothing else keeps the loop running for those who wait
            return
        assert self._pump is not None
        if self._owner.is_wanted(self):
            self._pump.start()
        if self.is_up:
            self._owner.on_up(self)

    def _stop_settling(self) -> None:
        if self._settle is not None:
            self._settle.stop()
            self._settle.close()
            self._settle = None

    def _stop_reading_out(self) -> None:
        if self._reading_out is not None:
            self._reading_out.stop()
            self._reading_out.close()
            self._reading_out = None

    def _stop_reopening(self) -> None:
        if self._reopen is not None:
            self._reopen.stop()
            self._reopen.close()
            self._reopen = None

    def _guess(self, now: float) -> None:
        """Take the peer for one of ZMTP 2, if the connection still looks like that when all its events are known."""
        if self._monitor is not None:
            self._monitor.drain()
        if self._monitor is not None and not self.is_up and self._is_legacy(now):
            self._is_mute = True
            self._set_up()

    def _is_legacy(self, now: float) -> bool:
        # Of this connection, not of the tries before it: of a new one libzmq may not have read yet what it will refuse.
        if now - self._connected_at < SHY or self._was_silent:
            return False
        if self._counts:
            sample = self._sample()
            return sample is None or sample.received > 0
        return not unread(self._descriptor)

    def _say(self, level: int, text: str, *args: object) -> None:
        """Log what a server can cause at will."""
        self._seldom.say(log, level, text, self.endpoint, *args, extra={"endpoint": self.endpoint})

    def _sample(self) -> Sample | None:
        if not self._counts:
            return Sample.of_messages(self._taken, unread(self._descriptor) if self.endpoint.startswith("ipc:") else 0)
        return sample(self._descriptor, self._taken) if self._descriptor >= 0 else None
