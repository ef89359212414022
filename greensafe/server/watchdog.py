"""How does every request get exactly one answer, whatever its handler does?

A `Watchdog` runs each request in a greenlet of its own and answers for it when the handler raises, hangs, returns nonsense or
is killed. Rules:

* Everything that happens to a request is an event of `sansio.responder.Responder`; the first answer wins, the rest is counted.
* One timer for all requests. At its deadline a request is answered DEADLINE_EXCEEDED and its handler gets the signal; after
  `grace` more seconds it is killed; what survives that is a zombie, and killed again every `grace` seconds.
* `max_inflight` handlers run at a time. What comes beyond that is kept (see `backlog`) or rejected at once. The caller's limit
  runs meanwhile: what is overdue before its turn, or was so when it came, is answered and not run. The server's own limit is
  for the handler, and runs from its start.
* This is the one place where BaseException is caught: SystemExit or KeyboardInterrupt in a handler end that handler alone.

It does not know how frames travel: `send` is given, and `accept` is called in the hub by whoever receives. Nor does it know of
journals: see `journaled`.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent.hub import Hub

from ..deadlines import DeadlineSignal, HandlerScope
from ..errors import Cancelled, JournalError, LocalProtocolError, RemoteError, RemoteProtocolError
from ..hooks import HandlerStuck, Tell
from ..hub.interruptions import is_interruption
from ..hub.timers import start_timer
from ..journal.steps import Codec, InTransaction, JsonOrBytes
from ..loops.restarts import Restarts
from ..sansio.envelope import CALLER_LIMIT, NO_JOURNAL, Kind
from ..sansio.exchange import Exchange
from ..sansio.responder import Acked, Cancel, Effect, Expire, Kill, Responder, Say, Send, Zombie as ZombieFound
from ..stats import Zombie
from .backlog import Backlog
from .error_replies import Telling
from .log_lines import Lines
from .options import Handler, OnError
from .reports import answered, describe, started, zombie
from .request import LATER, Request, as_frames, error_for

__all__ = ["Watchdog"]

#: Zombies that `Watchdog.zombies` names.
NAMED = 100

#: Seconds for which handlers that do not yield may run, one after the other, before the loop gets a turn. It reads on then, and
#: clients hear that they are not forgotten, however many requests stand before theirs.
TURN = 0.02

#: What a client is told whose request is not even kept.
_FULL = RemoteError("RESOURCE_EXHAUSTED", "the server has as many requests as it may run: try again later", "ServerFull")

#: What a client is told for which no handler is started any more, because too many have survived their kill.
_STUCK = RemoteError("UNAVAILABLE", "the server has too many handlers that cannot be ended: restart it", "ServerStuck")


class _Ended(gevent.GreenletExit):  # type: ignore[misc]  # gevent is untyped
    """What ends the handlers that still run when nothing is served any more: no fault of theirs, so none is logged for it."""


class Watchdog:
    """The requests of one server, their handlers and the answers they owe.

    Args:
        handler: Called with each Request in a greenlet of its own. What it returns is the answer: bytes, or a list of bytes;
            None if it has replied; LATER if somebody will.
        send: Takes the frames of an answer, envelope included; must not block.
        send_soon: The same for an answer behind which nothing runs that could hold it up; by default `send`.
        send_if_read: The same for what need not be kept for a client that does not read; by default `send`.
        has_taken: Tells of frames, whose sending was interrupted, whether they leave all the same; by default they do.
        limit: Seconds that a handler has, None for no limit.
        grace: Seconds between the signal and the kill.
        max_inflight: Handlers that run at a time.
        max_zombies: When there are so many zombies and `max_inflight` more, nothing is run: it is answered UNAVAILABLE.
        rejects: What comes beyond that is answered RESOURCE_EXHAUSTED instead of being kept.
        instance: 16 bytes that tell this server from the one that was there before.
        journal: 16 bytes of its journal.
        reads_on, max_frames: See Responder.
        on_error, tell_errors: See `telling`.
        lines: What it logs with, if others do so as well; they flush it.
        on_room: Called whenever `load` or `backlog` has become less.
        endpoint: What the records for hooks, and log lines, call this server.
        tell: Told of what happens, in the records of `hooks`.
        codec: For the results of steps.
        restarts: Looks after its loops; by default they are given up with a log line.

    Attributes:
        responder: The table, with its counts.
        failures: Answers that were errors, by their code.
        scope: The kind of scope that handlers run in.
        hub, thread: Where it was made.
    """

    scope: type[HandlerScope] = HandlerScope

    def __init__(
        self,
        handler: Handler,
        send: Callable[[list[bytes]], None],
        *,
        limit: float | None,
        grace: float,
        send_soon: Callable[[list[bytes]], None] | None = None,
        send_if_read: Callable[[list[bytes]], None] | None = None,
        has_taken: Callable[[list[bytes]], bool] | None = None,
        max_inflight: int = 1000,
        max_zombies: int | None = None,
        rejects: bool = False,
        instance: bytes = bytes(16),
        journal: bytes = NO_JOURNAL,
        reads_on: bool = True,
        max_frames: int | None = None,
        on_error: OnError | None = None,
        tell_errors: bool = True,
        lines: Lines | None = None,
        on_room: Callable[[], None] | None = None,
        endpoint: str = "",
        tell: Tell | None = None,
        codec: Codec | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        self.responder = Responder(grace=grace, instance=instance, journal=journal, reads_on=reads_on, max_frames=max_frames)
        self._handler = handler
        self._send = send
        self._send_soon = send_soon or send
        self._send_if_read = send_if_read or send
        self._has_taken = has_taken or (lambda frames: True)
        self._limit = limit
        self._max_inflight = max_inflight
        self._most_zombies = math.inf if max_zombies is None else max_zombies + max_inflight
        self._rejects = rejects
        self._telling = Telling(on_error, tell_errors)
        self._on_room = on_room
        self._endpoint = endpoint
        self._tell = tell
        self._codec: Codec = codec or JsonOrBytes()
        self._restarts = restarts or Restarts(endpoint, lambda error: None)
        self.failures: dict[str, int] = {}
        self._lines = lines or Lines(endpoint)
        self._has_own_lines = lines is None
        self.hub: Hub = gevent.get_hub()
        self.thread: int = self.hub.thread_ident
        self._greenlets: dict[int, gevent.Greenlet] = {}
        self._owed: dict[int, Exchange] = {}
        #: The routing id, as an object, that the request came with which was opened last.
        self._opened = b""
        #: What is due and not done yet; it stays if a signal's handler raises meanwhile.
        self._effects: list[Effect] = []
        self._kept = Backlog()
        self._is_starting = False
        self._spent = 0.0
        self._next_turn: Any = None
        self._timer: Any = None
        self._timer_at = float("inf")

    @property
    def load(self) -> int:
        """Requests whose handlers were started and that are not over. Zombies do not count."""
        return len(self._owed) - len(self._kept) - self.responder.zombies

    @property
    def backlog(self) -> int:
        """Requests that wait for their turn."""
        return len(self._kept)

    @property
    def soonest(self) -> float:
        """The monotonic time at which the timer is due, infinity for none; may be asked in any thread."""
        return self._timer_at

    @property
    def is_full(self) -> bool:
        """Whether no more should be accepted for the time being."""
        return self._kept.is_full

    @property
    def oldest_seconds(self) -> float | None:
        """Age of the oldest request that is not answered; None if there is none."""
        arrived = next((exchange.arrived_at for exchange in self._owed.values() if not exchange.is_answered), None)
        return None if arrived is None else monotonic() - arrived

    def is_handler(self, greenlet: object) -> bool:
        """Whether this greenlet runs a handler, which is waited for by whoever waits for all to be answered."""
        return any(each is greenlet for each in self._greenlets.values())

    def zombies(self) -> tuple[Zombie, ...]:
        """The oldest `NAMED` handlers that have survived a kill and still run."""
        survivors = (each for each in self._owed.values() if each.kills > 1 and each.key in self._greenlets)
        now = monotonic()
        return tuple(self._name(each, now) for each in itertools.islice(survivors, NAMED))

    def _name(self, exchange: Exchange, now: float) -> Zombie:
        return zombie(exchange, self._handler, self._greenlets[exchange.key], now)

    def __repr__(self) -> str:
        return (
            f"<Watchdog {self._endpoint} load={self.load} backlog={self.backlog} answered={self.responder.answered}"
            f" failed={sum(self.failures.values())} zombies={self.responder.zombies}>"
        )

    def accept(self, frames: list[bytes]) -> None:
        """Deal with a message as a ROUTER received it; called in the hub. A request's handler is started when it is its turn.

        A malformed message is counted and logged, and affects nothing else.
        """
        exchange = self.open(frames)
        if exchange is None:
            return
        # Who is new here hears at once who we are, so that our silence is noticed if the handler, or a stop, comes between.
        is_new = exchange.caller is not None and len(exchange.caller.origin) == 1
        if is_new:
            self.greet(exchange)
        if exchange.is_answered:
            self._guarded(self.finish, exchange)
        elif self._rejects and self.load + len(self._kept) > self._max_inflight:
            self._guarded(self._drop, exchange, _FULL)
            return
        elif self._kept or self.load > self._max_inflight:
            self._kept.keep(exchange)
        elif self._spent > TURN:
            self._kept.keep(exchange)
            self._start_next_turn()
        else:
            self._start(exchange)
        if not is_new:
            self.greet(exchange)

    def open(self, frames: list[bytes]) -> Exchange | None:
        """Take a message in; a request is watched over, who handles it is up to the caller. None: it was no request.

        A request that was overdue when it came is answered already.
        """
        now = monotonic()
        try:
            received = self.responder.receive(frames, now)
        except RemoteProtocolError as error:
            self._lines.malformed(error)
            return None
        if received.__class__ is Exchange:  # no call: nothing can come between the responder's count and this
            self._owed[received.key] = received
            self._opened = frames[0]
        if not isinstance(received, Exchange):
            if received is not None:
                self._guarded(self._apply, received)
            self._rearm()
            return None
        scope = self.scope(at=received.at)
        received.owner = scope
        if received.at is not None and received.at <= now:
            self._guarded(self._answer_overdue, received)
        self._rearm()
        return received

    def begin(self, exchange: Exchange) -> None:
        """Its handling is about to start: this server's limit holds from here."""
        self.responder.begin(exchange, monotonic(), self._limit)
        exchange.owner.at = exchange.at
        self._rearm()

    def greet(self, exchange: Exchange) -> None:
        """Tell a greensafe client what it wants to know at once of its request, and of this server."""
        if exchange.caller is not None:
            for notice in (self.responder.greeting(exchange), self.responder.drain_notice(exchange)):
                if notice is not None:
                    self._send(notice)

    def answer(
        self, exchange: Exchange, body: Sequence[bytes], kind: Kind = Kind.REPLY, error: RemoteError | None = None
    ) -> None:
        """Open the reply gate and send; LocalProtocolError if it was opened before. `error` is what the body says, if any."""
        frames = None
        try:
            frames = self.responder.answer(exchange, body, kind)
            self._send(frames)
        except BaseException as interruption:
            if is_interruption(interruption):
                self._see_sent(exchange, body, kind, frames)
            raise
        self._count(exchange, error)

    def _see_sent(self, exchange: Exchange, body: Sequence[bytes], kind: Kind, frames: list[bytes] | None) -> None:
        """Something has ended the answering halfway: if the gate is open the answer leaves all the same, once."""
        if not exchange.is_answered or (frames is None and exchange.is_delivered):
            return
        if frames is None:
            frames = self.responder.deliver(exchange, body, kind)
        if not self._has_taken(frames):
            self._send(frames)

    def _count(self, exchange: Exchange, error: RemoteError | None) -> None:
        """An answer has left; `error` is what it says, if any."""
        if error is not None:
            self.failures[error.code] = self.failures.get(error.code, 0) + 1
        self._settle(exchange)
        if self._tell is not None:
            self._tell(answered(self._endpoint, exchange, error))

    def fail(self, exchange: Exchange, error: RemoteError, kind: Kind = Kind.ERROR, told: RemoteError | None = None) -> None:
        """Answer with an error, as the kind of client understands it.

        Whatever on_error raises, the client is answered; what is no Exception is raised again afterwards.

        Args:
            exchange: Not answered yet.
            error: What hooks, counts and on_error are given.
            kind: See Responder.answer.
            told: What the client is told if on_error does not replace it; by default the error.
        """
        if exchange.is_answered:
            raise LocalProtocolError(f"request {describe(exchange)[0]} has been answered already")
        body: Sequence[bytes] = [(told or error).to_reply()]
        try:
            body = self._telling.chosen(self, exchange, error, kind) or body
        except Exception as failed:  # noqa: BLE001 - the program's, and the client is answered nevertheless
            self._lines.on_error_failed(exchange, failed)
        finally:
            if not exchange.is_answered:
                self.answer(exchange, body, kind, error)

    def step(self, exchange: Exchange, name: str, fn: Callable[..., Any] | InTransaction, args: tuple[Any, ...]) -> Any:
        """Run a step of a handler; see Request.step. Without a journal nothing of it is kept, and all the rest is the same."""
        if isinstance(fn, InTransaction):
            raise JournalError(f"step {name!r} is to run in the journal's transaction, and this server has no journal")
        return self._codec.decode(self._codec.encode(fn(*args)))

    def refuse(self, frames: list[bytes], error: RemoteError) -> None:
        """Answer a message without running a handler."""
        exchange = self.open(frames)
        if exchange is None:
            return
        try:
            if not exchange.is_answered:
                self.fail(exchange, error, Kind.REJECTED)
        finally:
            self.finish(exchange)

    def recover(self, frames: list[bytes]) -> None:
        """Deal with a message once more, since something from outside has ended `accept` halfway."""
        if self._opened is not frames[0]:
            self.accept(frames)
        self._find_lost()
        self._rearm()

    def _find_lost(self) -> None:
        """Have the requests wait for their turn that were on their way to their handlers when something was interrupted."""
        for exchange in list(self._owed.values()):
            if exchange.is_over:
                self._settle(exchange)
            if not exchange.is_running or self._is_placed(exchange.key):
                continue
            if exchange.owner is None:
                exchange.owner = self.scope(at=exchange.at)
            if exchange.is_answered:
                self._guarded(self.finish, exchange)
            else:
                self._kept.keep(exchange)
                self._start_next_turn()

    def _is_placed(self, key: int) -> bool:
        """Whether a request waits for its turn, or its handler's greenlet has begun."""
        greenlet = self._greenlets.get(key)
        if greenlet is not None and not greenlet.dead and greenlet.gr_frame is None and greenlet is not gevent.getcurrent():
            del self._greenlets[key]  # it was made, and never switched to
            return False
        return greenlet is not None or key in self._kept

    def refuse_torn(self, frames: list[bytes], why: str) -> None:
        """Drop a message that could not be received whole; its client, if it is known, may send it again.

        Args:
            frames: Its first frames.
            why: What has become of it.
        """
        self._lines.malformed(RemoteProtocolError(why))
        error = RemoteError("UNAVAILABLE", f"the request was not received whole: {why}", "Interrupted")
        for told in self.responder.torn(frames, error):
            self._guarded(self._apply, told)

    def note_answered(self, exchange: Exchange) -> None:
        """The program has answered on its own socket: open the gate without sending."""
        self.responder.answer(exchange, [b""])
        self._count(exchange, None)

    def cancel_from(self, routing_id: bytes) -> None:
        """Stop the handlers of the requests that came by a connection which is gone."""
        now = monotonic()
        for exchange in list(self._owed.values()):
            if exchange.envelope.route[0] == routing_id and not exchange.is_answered:
                self._guarded(self._apply, self.responder.cancel(exchange, now))
        self._rearm()

    def drain(self) -> None:
        """Tell clients to send further requests elsewhere; those that come nevertheless are handled as ever."""
        for notice in self.responder.drain():
            self._guarded(self._apply, notice)

    def tell_closed(self) -> None:
        """Tell clients that nothing more is received; all that was has been answered."""
        for notice in self.responder.close():
            self._guarded(self._apply, notice)

    def abort_all(self, error: RemoteError) -> None:
        """Answer whatever is still owed with `error` and kill the handlers that still run."""
        for exchange in self._kept.requests():
            self._guarded(self._drop, exchange, error)
        for exchange in list(self._owed.values()):
            if not exchange.is_answered:
                self._guarded(self.fail, exchange, error)
        running = [greenlet for greenlet in self._greenlets.values() if not greenlet.dead]
        if running:
            self._lines.killed(len(running))
        for greenlet in running:
            self._kill(greenlet, _Ended)

    def close(self) -> None:
        """Stop the timers. Handlers that still run are not watched any more."""
        self._disarm()
        self._stop_next_turn()
        if self._has_own_lines:
            self._lines.flush()

    # A request's turn.

    def _start(self, exchange: Exchange) -> None:
        if self.responder.zombies >= self._most_zombies:
            self._guarded(self._drop, exchange, _STUCK)
            return
        self.begin(exchange)
        self._greenlets[exchange.key] = greenlet = gevent.Greenlet(self._run, exchange)
        before = monotonic()
        # Straight from the hub, so the handler cannot be killed before it starts.
        try:
            greenlet.switch()
        except Exception as error:
            if is_interruption(error):
                raise
            # No memory for it: then it has not run, and nobody else answers.
            self._greenlets.pop(exchange.key, None)
            self._guarded(self.raised, exchange, error)
            self._guarded(self.finish, exchange)
        self._spent += monotonic() - before
        if exchange.is_running and greenlet.dead:
            # A signal's handler has raised before its first line: it has not run.
            self._greenlets.pop(exchange.key, None)
            self._find_lost()

    def _take(self, key: int) -> Exchange | None:
        """A request that waits does not any more; None if it did not."""
        return self._kept.take(key)

    def _drop(self, exchange: Exchange, error: RemoteError) -> None:
        """Answer a request that was not run, and will not be."""
        self._take(exchange.key)
        try:
            if not exchange.is_answered:
                self.fail(exchange, error, Kind.REJECTED)
        finally:
            self.finish(exchange)

    def _start_kept(self) -> None:
        self._spent = 0.0
        while self._kept and self.load < self._max_inflight and self._spent <= TURN:
            try:
                self._start(self._kept.next())
            except BaseException:
                self._is_starting = False
                self._find_lost()
                raise
        self._is_starting = False
        if self._kept and self.load < self._max_inflight:
            self._start_next_turn()

    def _start_next_turn(self) -> None:
        # By a timer: callbacks that make callbacks are called in the same turn, up to fifty of them.
        if not self._is_starting:
            self._is_starting = True
            self._next_turn = start_timer(self.hub, 0, self._on_next_turn)

    def _on_next_turn(self) -> None:
        self._stop_next_turn()
        self._restarts.run("turns", self._start_kept)

    def _stop_next_turn(self) -> None:
        if self._next_turn is not None:
            self._next_turn.stop()
            self._next_turn.close()
            self._next_turn = None

    # A handler's life.

    def _run(self, exchange: Exchange) -> None:
        """The body of a handler's greenlet: no exception leaves it."""
        scope = exchange.owner
        try:
            scope.attach(gevent.getcurrent())
            if self._tell is not None:
                self._tell(started(self._endpoint, exchange))
            request = Request(self, exchange, scope)
            self._returned(exchange, request, self._handler(request))
        except BaseException as error:  # noqa: BLE001 - the one place that supervises
            self._guarded(self.raised, exchange, error)
        finally:
            try:
                scope.detach()
                self._guarded(self.finish, exchange)
            except BaseException:
                self._guarded(self.finish, exchange)  # a signal's handler has raised: it may be half done
                raise
            finally:
                # Not before: on_error and hooks may ask whether this is a handler.
                self._greenlets.pop(exchange.key, None)

    def _guarded(self, act: Callable[..., object], *args: object) -> None:
        """Do something for one request; its failure, which only on_error can cause, is logged and touches no other request.

        What comes from outside, by a signal's handler, ends it as little: it is done once more, and may find half of it done.
        """
        try:
            act(*args)
        except BaseException as error:  # noqa: BLE001 - see above
            if not is_interruption(error):
                self._lines.answering_failed(error)
                return
            self._lines.interrupted(error)
            try:
                act(*args)
            except BaseException as again:  # noqa: BLE001 - see above
                self._lines.answering_failed(again)

    def _returned(self, exchange: Exchange, request: Request, result: object) -> None:
        if result is LATER:
            if not exchange.is_answered:
                self.responder.promise(exchange)
                weakref.finalize(request, self._on_forgotten, exchange).atexit = False
        elif result is not None:
            if exchange.is_answered:
                self._drop_second(exchange)
            else:
                self._reply(exchange, as_frames(result))

    def _drop_second(self, exchange: Exchange) -> None:
        self._lines.answered_twice(exchange)
        self.responder.duplicates += 1

    def _reply(self, exchange: Exchange, frames: Sequence[bytes]) -> None:
        """Answer with what the handler has returned, which has nothing more to do."""
        made = None
        try:
            made = self.responder.answer(exchange, frames)
            self._send_soon(made)
        except BaseException as interruption:
            if is_interruption(interruption):
                self._see_sent(exchange, frames, Kind.REPLY, made)
            raise
        if self._tell is not None:
            self._tell(answered(self._endpoint, exchange, None))

    def raised(self, exchange: Exchange, error: BaseException) -> None:
        """An exception ended the handling: answer for it, unless it was answered before."""
        say: Callable[[Exchange, BaseException], None]
        scope: HandlerScope = exchange.owner
        if isinstance(error, DeadlineSignal) and error.scope is scope:
            if exchange.is_answered:
                return
            if not scope.is_cancelled:
                self._answer_overdue(exchange, error)  # before the timer has come to it
                return
            error, say = scope.outcome(), self._lines.cancelled
        elif isinstance(error, _Ended) and exchange.is_answered:
            return
        else:
            say = self._lines.failed
        try:
            if not exchange.is_answered:
                known = error_for(error)
                self.fail(exchange, known, told=self._telling.told(error, known, exchange))
        finally:
            say(exchange, error)  # last: logging may wait, and be interrupted

    def finish(self, exchange: Exchange) -> None:
        """The handling is over; who has neither answered nor promised to is answered for."""
        try:
            # Once more if it was interrupted: it may be half done.
            if self.responder.finish(exchange) if exchange.is_running else exchange.is_abandoned:
                message = "the handler returned nothing: return bytes, call request.reply, or return greensafe.LATER"
                self.fail(exchange, RemoteError("INTERNAL", message, "NoReply"))
        finally:
            self._settle(exchange)

    def _settle(self, exchange: Exchange) -> None:
        """Forget a request that is answered and whose handler has ended."""
        if exchange.is_over and self._owed.pop(exchange.key, None) is not None:
            exchange.envelope.body = []  # the responder may keep the exchange until its limit comes, but not what was asked
            self._tell_room()

    def _tell_room(self) -> None:
        if self._kept and not self._is_starting:
            self._is_starting = True
            self.hub.loop.run_callback(self._restarts.run, "turns", self._start_kept)
        if self._on_room is not None:
            self._on_room()

    def _on_forgotten(self, exchange: Exchange) -> None:
        """The handler promised an answer, and then everybody dropped the request: nobody can give it any more.

        Called wherever the last reference went, which may be another thread.
        """
        if self.hub.loop is not None:
            self.hub.loop.run_callback_threadsafe(self._break_promise, exchange)

    def _break_promise(self, exchange: Exchange) -> None:
        if not exchange.is_answered:
            error = RemoteError("INTERNAL", "the handler promised an answer and dropped the request", "BrokenPromise")
            self._guarded(self.fail, exchange, error)

    # Time.

    def _rearm(self) -> None:
        soonest = self.responder.soonest
        if soonest < self._timer_at:
            self._disarm()
            self._timer = start_timer(self.hub, soonest - monotonic(), self._on_timer, again=True)
            self._timer_at = soonest

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
        self._timer_at = float("inf")

    def _on_timer(self) -> None:
        self._restarts.run("watchdog", self._tick)

    def _tick(self) -> None:
        self._disarm()
        self._timer_at = float("-inf")  # nobody sets it again before this is done, if it has to be done again
        effects = self._effects
        self.responder.tick(monotonic(), effects)
        while effects:
            self._guarded(self._apply, effects[0])
            del effects[0]
        self.responder.next_deadline()
        self._disarm()
        self._rearm()

    def _apply(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            self._send(effect.frames)
        elif isinstance(effect, Say):
            self._send_if_read(effect.frames)
        elif isinstance(effect, Cancel):
            self._stop(effect.exchange)
        elif isinstance(effect, Expire):
            self._expire(effect.exchange)
        elif isinstance(effect, Acked):
            self._on_acked(effect.request_id)
        elif (greenlet := self._greenlets.get(effect.exchange.key)) is not None:
            if isinstance(effect, ZombieFound):
                self._on_zombie(effect.exchange)
            else:
                assert isinstance(effect, Kill)
                self._kill(greenlet)

    def _on_acked(self, request_id: bytes) -> None:
        """An answer has arrived: nothing to do without a journal."""

    def _on_zombie(self, exchange: Exchange) -> None:
        found = self._name(exchange, monotonic())
        self._lines.stuck(exchange, found)
        self._tell_room()
        if self._tell is not None:
            self._tell(HandlerStuck(self._endpoint, found))

    def _stop(self, exchange: Exchange) -> None:
        """The client does not want the answer any more."""
        error = RemoteError("CANCELLED", "the client has cancelled its request", "Cancelled")
        kept = self._take(exchange.key)
        if not exchange.is_answered:
            self.answer(exchange, [error.to_reply()], Kind.ERROR, error)
        if kept is not None:
            self.finish(kept)
        else:
            exchange.owner.cancel(Cancelled("the client has cancelled its request"))

    def _expire(self, exchange: Exchange) -> None:
        kept = self._take(exchange.key)
        if not exchange.is_answered:
            self._answer_overdue(exchange)
        if kept is not None:
            self.finish(kept)
        else:
            exchange.owner.expire()

    def _answer_overdue(self, exchange: Exchange, signal: BaseException | None = None) -> None:
        """Answer for the deadline; `signal` is what has told the handler so, if it has come out of it already."""
        kind = CALLER_LIMIT if exchange.is_limited_by_caller else "DeadlineExceeded"
        self._lines.overdue(exchange, signal)
        if not exchange.is_answered:  # logging may have waited, and the timer come meanwhile
            self.fail(exchange, RemoteError("DEADLINE_EXCEEDED", "the handler did not answer in time", kind))

    def _kill(self, greenlet: gevent.Greenlet, exception: type[BaseException] = gevent.GreenletExit) -> None:
        if not greenlet.dead:
            greenlet.kill(exception, block=False)
