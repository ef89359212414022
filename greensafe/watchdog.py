"""How does every request get exactly one answer, whatever its handler does?

A `Watchdog` runs each request in a greenlet of its own and answers for it when the handler raises, hangs, returns nonsense or
is killed. Rules:

* Everything that happens to a request is an event of `sansio.exchange.Responder`; the first answer wins, the rest is counted.
* One timer for all requests. At its deadline a request is answered DEADLINE_EXCEEDED and its handler gets the signal; after
  `grace` more seconds it is killed; what survives that is a zombie, and killed again every `grace` seconds.
* This is the one place where BaseException is caught: SystemExit or KeyboardInterrupt in a handler end that handler alone.

It does not know how frames travel: `send` is given, and `accept` is called in the hub by whoever receives.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final

import gevent
from gevent.hub import Hub

from .deadlines import DeadlineSignal, deadline, start_timer, to_seconds
from .errors import LocalProtocolError, RemoteError, RemoteProtocolError
from .sansio.exchange import Exchange, Expire, Kill, Responder, Zombie

__all__ = ["LATER", "Handler", "OnError", "Request", "Watchdog", "check_handler", "check_limits", "check_options", "error_for"]

log = logging.getLogger(__name__)


class Later:
    """The type of `LATER`."""

    def __repr__(self) -> str:
        return "greensafe.LATER"


#: What a handler returns when it, or somebody it handed the request to, will answer by `request.reply`.
LATER: Final = Later()

#: The code of an error that came about because the caller's own limit, not the server's, ran out.
CALLER_LIMIT = "CallerLimit"


class InvalidBodyError(RemoteProtocolError, ValueError):
    """Raised when a request's body is not what the handler asked for; let out of the handler it answers INVALID_ARGUMENT."""


class Request:
    """One request, as its handler sees it.

    Attributes:
        frames: The body, a list of bytes; never empty.
        deadline: The scope in which the handler runs; it ends when the answer is overdue.
        attempt: 1; more when a journal runs the request again.
    """

    __slots__ = ("__weakref__", "_exchange", "_watchdog", "deadline", "frames")

    attempt: Final = 1

    def __init__(self, watchdog: Watchdog, exchange: Exchange, scope: deadline) -> None:
        self._watchdog = watchdog
        self._exchange = exchange
        self.frames: list[bytes] = exchange.envelope.body
        self.deadline = scope

    @property
    def body(self) -> bytes:
        """The first frame of the body."""
        return self.frames[0]

    @property
    def id(self) -> str:
        """The client's id of this request in hex; for a plain client, which sends none, a number of this server's."""
        header = self._exchange.envelope.header
        return str(self._exchange.key) if header is None else header.request_id.hex()

    @property
    def client(self) -> bytes:
        """The routing id of the connection that the request came by; the same for all on a REP, which keeps it to itself."""
        return self._exchange.envelope.route[0]

    @property
    def metadata(self) -> bytes:
        """What the client's header carries beyond the protocol; b"" for a plain client."""
        header = self._exchange.envelope.header
        return b"" if header is None else header.metadata

    @property
    def replied(self) -> bool:
        """Whether the answer has been given, by the handler or for it."""
        return self._exchange.is_answered

    def json(self) -> Any:
        """Decode the body.

        Raises:
            InvalidBodyError: A ValueError; if the handler lets it out, the client is answered INVALID_ARGUMENT.
        """
        try:
            return json.loads(self.frames[0])
        except (ValueError, RecursionError) as error:
            raise InvalidBodyError(f"the request's body is not JSON: {error}") from error

    def reply(self, *frames: bytes) -> None:
        """Answer with these frames, now, from any greenlet of the server's thread.

        Raises:
            LocalProtocolError: The request has been answered already, by the handler or by the watchdog; nothing is sent.
            TypeError: A frame is not bytes; nothing is sent, and the request can still be answered.
        """
        self._watchdog.answer(self._exchange, _check_frames(frames))

    def reply_json(self, obj: object) -> None:
        """Answer with one frame of JSON. Errors as in `reply`, and what json.dumps raises."""
        self.reply(json.dumps(obj).encode())

    def error(self, code: str, message: str) -> None:
        """Answer with an error; `code` is one of `errors.CODES`. Errors as in `reply`."""
        self._watchdog.fail(self, RemoteError(code, message))

    def __repr__(self) -> str:
        return f"<Request {self.id} {self._exchange.state.name.lower()} {len(self.frames)} frames>"


Handler = Callable[[Request], Any]
OnError = Callable[[Request, RemoteError], "bytes | Sequence[bytes] | None"]


def error_for(error: BaseException) -> RemoteError:
    """What a client is told about an exception that a handler let out. Never raises, whatever the exception is."""
    try:
        return _told(error)
    except BaseException:  # noqa: BLE001 - its __str__ or its class may fail in any way, and must not cost the client its answer
        return RemoteError("INTERNAL", "the handler failed with an exception that cannot be shown")


def _told(error: BaseException) -> RemoteError:
    kind = str(type(error).__name__)
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, InvalidBodyError):
        return RemoteError("INVALID_ARGUMENT", str(error), "InvalidBodyError")
    if isinstance(error, gevent.GreenletExit):
        return RemoteError("ABORTED", "the handler was killed", kind)
    if isinstance(error, MemoryError):
        return RemoteError("RESOURCE_EXHAUSTED", "the handler ran out of memory", kind)
    return RemoteError("INTERNAL", str(error), kind)


class Watchdog:
    """The requests of one server, their handlers and the answers they owe.

    Args:
        handler: Called with each Request in a greenlet of its own. What it returns is the answer: bytes, or a list of bytes;
            None if it has replied; LATER if somebody will.
        send: Takes the frames of an answer, envelope included; must not block.
        limit: Seconds that a handler has, None for no limit.
        grace: Seconds between the signal and the kill.
        on_error: Called with (request, error) before an error is sent to a plain client; returns the frames to send instead,
            or None; or answers by itself.
        on_room: Called whenever `load` has become less.
    """

    def __init__(
        self,
        handler: Handler,
        send: Callable[[list[bytes]], None],
        *,
        limit: float | None,
        grace: float,
        on_error: OnError | None = None,
        on_room: Callable[[], None] | None = None,
    ) -> None:
        self.responder = Responder(grace=grace)
        self._handler = handler
        self._send = send
        self._limit = limit
        self._on_error = on_error
        self._on_room = on_room
        self._hub: Hub = gevent.get_hub()
        self._greenlets: dict[int, gevent.Greenlet] = {}
        self._owed: dict[int, Exchange] = {}
        self._timer: Any = None
        self._timer_at = float("inf")

    @property
    def load(self) -> int:
        """Requests that are not over: unanswered, or answered by a handler that still runs. Zombies do not count."""
        return len(self._owed) - self.responder.zombies

    def accept(self, frames: list[bytes]) -> None:
        """Start the handler for a message as a ROUTER received it; called in the hub.

        A malformed message is counted and logged, and affects nothing else.
        """
        try:
            request = self.open(frames)
        except RemoteProtocolError as error:
            log.warning("malformed request dropped: %s", error)
            return
        self._greenlets[request._exchange.key] = greenlet = gevent.Greenlet(self._run, request)
        # Straight from the hub, so the handler cannot be killed before it starts.
        greenlet.switch()

    def open(self, frames: list[bytes]) -> Request:
        """Take a message in and watch over it; who handles it is up to the caller. RemoteProtocolError if it is malformed."""
        exchange = self.responder.receive(frames, monotonic(), self._limit)
        scope = deadline(at=exchange.at)
        exchange.owner = scope
        self._owed[exchange.key] = exchange
        if exchange.at is not None and exchange.at < self._timer_at:
            self._arm(exchange.at)
        return Request(self, exchange, scope)

    def answer(self, exchange: Exchange, body: Sequence[bytes], *, error: bool = False) -> None:
        """Open the reply gate and send; LocalProtocolError if it was opened before."""
        self._send(self.responder.answer(exchange, body, error=error))
        self._settle(exchange)

    def fail(self, request: Request, error: RemoteError) -> None:
        """Answer with an error, as the kind of client understands it.

        Whatever on_error raises, the client is answered; what is no Exception is raised again afterwards.
        """
        exchange = request._exchange
        if exchange.is_answered:
            raise LocalProtocolError(f"request {request.id} has been answered already")
        body: Sequence[bytes] = [error.to_reply()]
        try:
            if self._on_error is not None and exchange.envelope.header is None:
                frames = self._on_error(request, error)
                body = body if frames is None else _as_frames(frames)
        except Exception:
            log.exception("on_error failed for %r: the standard error is sent", request)
        finally:
            if not exchange.is_answered:
                self.answer(exchange, body, error=True)

    def refuse(self, frames: list[bytes], error: RemoteError) -> None:
        """Answer a message without running a handler."""
        try:
            request = self.open(frames)
        except RemoteProtocolError as malformed:
            log.warning("malformed request dropped: %s", malformed)
            return
        try:
            self.fail(request, error)
        finally:
            self.finish(request)

    def note_answered(self, request: Request) -> None:
        """The program has answered on its own socket: open the gate without sending."""
        self.responder.answer(request._exchange, [b""])

    def abort_all(self, error: RemoteError) -> None:
        """Answer whatever is still owed with `error` and kill the handlers that still run."""
        for exchange in list(self._owed.values()):
            if not exchange.is_answered:
                self._guarded(self.fail, Request(self, exchange, exchange.owner), error)
        for greenlet in list(self._greenlets.values()):
            self._kill(greenlet)

    def close(self) -> None:
        """Stop the timer. Handlers that still run are not watched any more."""
        self._disarm()

    # A handler's life.

    def _run(self, request: Request) -> None:
        """The body of a handler's greenlet: no exception leaves it."""
        scope = request.deadline
        try:
            scope._attach(gevent.getcurrent())
            self._returned(request, self._handler(request))
        except BaseException as error:  # noqa: BLE001 - the one place that supervises
            self._guarded(self.raised, request, error)
        finally:
            scope._detach()
            self._greenlets.pop(request._exchange.key, None)
            self._guarded(self.finish, request)

    def _guarded(self, act: Callable[..., object], *args: object) -> None:
        """Do something for one request; its failure, which only on_error can cause, is logged and touches no other request."""
        try:
            act(*args)
        except BaseException:
            log.exception("answering failed")

    def _returned(self, request: Request, result: object) -> None:
        exchange = request._exchange
        if result is LATER:
            if not exchange.is_answered:
                self.responder.promise(exchange)
                weakref.finalize(request, self._on_forgotten, exchange).atexit = False
        elif result is not None:
            if exchange.is_answered:
                log.error("handler of %r returned an answer to a request that is answered already: dropped", request)
                self.responder.duplicates += 1
            else:
                self.answer(exchange, _as_frames(result))

    def raised(self, request: Request, error: BaseException) -> None:
        """An exception ended the handling: answer for it, unless it was answered before."""
        exchange = request._exchange
        if isinstance(error, DeadlineSignal) and error.scope is request.deadline:
            if exchange.is_answered:
                return
            told = RemoteError("DEADLINE_EXCEEDED", "the handler did not answer in time", "DeadlineExceeded")
        else:
            told = error_for(error)
            log.error("handler of %r failed", request, exc_info=(type(error), error, error.__traceback__))
        if not exchange.is_answered:
            self.fail(request, told)

    def finish(self, request: Request) -> None:
        """The handling is over; who has neither answered nor promised to is answered for."""
        exchange = request._exchange
        try:
            if self.responder.finish(exchange):
                message = "the handler returned nothing: return bytes, call request.reply, or return greensafe.LATER"
                self.fail(request, RemoteError("INTERNAL", message, "NoReply"))
        finally:
            self._settle(exchange)

    def _settle(self, exchange: Exchange) -> None:
        """Forget a request that is answered and whose handler has ended."""
        if exchange.is_over and self._owed.pop(exchange.key, None) is not None:
            self._tell_room()

    def _tell_room(self) -> None:
        if self._on_room is not None:
            self._on_room()

    def _on_forgotten(self, exchange: Exchange) -> None:
        """The handler promised an answer, and then everybody dropped the request: nobody can give it any more.

        Called wherever the last reference went, which may be another thread.
        """
        if self._hub.loop is not None:
            self._hub.loop.run_callback_threadsafe(self._break_promise, exchange)

    def _break_promise(self, exchange: Exchange) -> None:
        if not exchange.is_answered:
            error = RemoteError("INTERNAL", "the handler promised an answer and dropped the request", "BrokenPromise")
            self._guarded(self.fail, Request(self, exchange, exchange.owner), error)

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
        try:
            for effect in self.responder.tick(monotonic()):
                self._guarded(self._apply, effect)
        finally:
            at = self.responder.next_deadline()
            if at is not None and at < self._timer_at:
                self._arm(at)

    def _apply(self, effect: Expire | Kill | Zombie) -> None:
        exchange = effect.exchange
        greenlet = self._greenlets.get(exchange.key)
        if isinstance(effect, Expire):
            if not exchange.is_answered:
                self._answer_overdue(exchange)
            exchange.owner._expire()
        elif greenlet is not None:
            if isinstance(effect, Zombie):
                log.error("a handler has survived its deadline and a kill: %r", greenlet)
                self._tell_room()
            else:
                self._kill(greenlet)

    def _answer_overdue(self, exchange: Exchange) -> None:
        header = exchange.envelope.header
        by_caller = header is not None and header.remaining_ms is not None and exchange.is_limited_by_caller
        kind = CALLER_LIMIT if by_caller else "DeadlineExceeded"
        self.fail(
            Request(self, exchange, exchange.owner),
            RemoteError("DEADLINE_EXCEEDED", "the handler did not answer in time", kind),
        )

    def _kill(self, greenlet: gevent.Greenlet) -> None:
        if not greenlet.dead:
            greenlet.kill(block=False)


def check_handler(handler: object) -> None:
    """Raise TypeError unless `handler` can be called."""
    if not callable(handler):
        raise TypeError(f"handler is a function of one request, not {type(handler).__name__}")


def check_limits(limit: Any, grace: Any) -> tuple[float | None, float]:
    """Check a server's `deadline` and `grace`, both in seconds; the first may be None."""
    seconds = to_seconds(limit)
    if seconds is not None and seconds <= 0:
        raise ValueError(f"deadline is a number of seconds above 0, or None for no limit, not {limit!r}")
    after = to_seconds(grace)
    if after is None or after <= 0:
        raise ValueError(f"grace is a number of seconds above 0, after which a handler that goes on is killed, not {grace!r}")
    return seconds, after


def check_options(max_inflight: Any, on_error: Any) -> None:
    """Check what servers and supervise take besides."""
    if not isinstance(max_inflight, int) or isinstance(max_inflight, bool) or max_inflight < 1:
        raise ValueError(f"max_inflight is a whole number from 1, not {max_inflight!r}")
    if on_error is not None and not callable(on_error):
        raise TypeError(f"on_error is a function of (request, error), not {type(on_error).__name__}")


def _as_frames(result: object) -> list[bytes]:
    """What a handler returned, as frames; TypeError names what it was."""
    if isinstance(result, (bytes, bytearray, memoryview)):
        return [bytes(result)]
    if isinstance(result, (list, tuple)):
        return _check_frames(result)
    raise TypeError(
        f"a handler returns bytes, a list of bytes, None after request.reply(), or greensafe.LATER, not {type(result).__name__}"
    )


def _check_frames(frames: Sequence[Any]) -> list[bytes]:
    if not frames:
        raise TypeError("an answer has at least one frame; b'' is an empty one")
    for index, frame in enumerate(frames):
        if not isinstance(frame, (bytes, bytearray, memoryview)):
            raise TypeError(f"frame {index} of the answer is {type(frame).__name__}, not bytes: encode it first")
    return [bytes(frame) for frame in frames]
