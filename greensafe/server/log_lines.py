"""The log lines about the requests of one server.

All of them can be caused by clients, so all go through `Seldom`: what is written of a request that has gone wrong says which
one it was (also as `request_id` of the log record), whose, and why.

| line | level | at most |
| --- | --- | --- |
| malformed message, second answer, what could not be stored, cancelled scope | WARNING, ERROR | 1 a second |
| body that is no JSON, error that a handler has raised for its client, limit of the client's own | INFO | 1 a second |
| failed handler, missed deadline, zombie | ERROR, WARNING | 10 a second for each place in the code |

It does not know what a client is told; see `telling`.
"""

from __future__ import annotations

import logging
from time import monotonic

from ..errors import JournalError, RemoteProtocolError
from ..hub.log_limiter import Seldom
from ..hub.printable import printable
from ..sansio.exchange import Exchange, State
from ..stats import Zombie, trail, trail_of
from .error_replies import is_meant
from .reports import describe, extra, named
from .request import InvalidBodyError

__all__ = ["Lines"]

log = logging.getLogger("greensafe.watchdog")

#: Lines a second, with their tracebacks, about what goes wrong in the program's code at one place.
EACH_PLACE = 10

#: Characters of an exception's text in a line that its traceback follows.
_SHORT = 200


class Lines:
    """What one server, or one supervised socket, logs about its requests; `endpoint` is what it is called there.

    Attributes:
        seldom: What it all goes through; `flush` is that one's.
    """

    __slots__ = ("_endpoint", "flush", "seldom")

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self.seldom = Seldom()
        self.flush = self.seldom.flush

    def __repr__(self) -> str:
        return f"<Lines of {self._endpoint}: {self.seldom!r}>"

    def malformed(self, error: RemoteProtocolError) -> None:
        """A message was no request."""
        self.seldom.say(log, logging.WARNING, "malformed request dropped: %s", error, extra={"endpoint": self._endpoint})

    def failed(self, exchange: Exchange, error: BaseException) -> None:
        """A handler has let an exception out."""
        if is_meant(error):
            why = "" if error.__cause__ is None else f", because of {_shown(error.__cause__)}"
            self._say(logging.INFO, exchange, "%s: its handler has raised %s%s", error, why)
        elif isinstance(error, InvalidBodyError):
            self._say(logging.INFO, exchange, "%s: %s", error)
        else:
            self._at_place(logging.ERROR, exchange, error, "handler of %s failed: %s", _shown(error))

    def cancelled(self, exchange: Exchange, cause: BaseException) -> None:
        """A handler's scope was cancelled by the program, for this."""
        if is_meant(cause):
            self.failed(exchange, cause)
        else:
            self._say(logging.WARNING, exchange, "%s: its deadline scope was cancelled: %s", _shown(cause))

    def on_error_failed(self, exchange: Exchange, error: BaseException) -> None:
        """on_error has raised this."""
        self._at_place(logging.ERROR, exchange, error, "on_error failed for %s: the standard error is sent: %s", _shown(error))

    def answering_failed(self, error: BaseException) -> None:
        """Something for one request has raised this, which touches no other."""
        text, details = "answering failed: %s", {"endpoint": self._endpoint}
        key = _raised_at(error)
        self.seldom.say(log, logging.ERROR, text, _shown(error), key=key, most=EACH_PLACE, error=error, extra=details)

    def interrupted(self, error: BaseException) -> None:
        """Something from outside has ended the answering of one request halfway; it is done once more."""
        text = "answering was interrupted, and goes on: %s"
        self.seldom.say(log, logging.WARNING, text, _shown(error), extra={"endpoint": self._endpoint})

    def answered_twice(self, exchange: Exchange) -> None:
        """A handler has returned an answer to a request that has one."""
        self._say(logging.ERROR, exchange, "handler of %s returned an answer though it is answered: dropped")

    def not_stored(self, exchange: Exchange, what: str, error: JournalError) -> None:
        """The journal could not store a request or an answer; the client is not told why."""
        self._say(logging.WARNING, exchange, "%s: " + what + " could not be stored: %s", error)

    def stuck(self, exchange: Exchange, found: Zombie) -> None:
        """A handler has survived its deadline and a kill."""
        text = "a handler has survived its deadline and a kill: %s of %s in %s, at %s"
        details = extra(self._endpoint, exchange)
        args = (found.handler, named(exchange), found.greenlet, found.where)
        self.seldom.say(log, logging.ERROR, text, *args, key=found.where, most=EACH_PLACE, extra=details)

    def overdue(self, exchange: Exchange, signal: BaseException | None = None) -> None:
        """A request is answered DEADLINE_EXCEEDED: what does its handler wait for?

        A server's deadline that is missed is a WARNING. A limit of the client's own is the client's business: INFO.

        Args:
            exchange: Not answered yet.
            signal: What has told the handler, if it has come out of it before this.
        """
        level = logging.INFO if exchange.is_limited_by_caller else logging.WARNING
        if not log.isEnabledFor(level):
            return
        state, place = _state(exchange, signal)
        seconds = monotonic() - exchange.arrived_at
        details = extra(self._endpoint, exchange)
        request_id, client, _ = describe(exchange)
        args = (request_id, client, seconds, state)
        if exchange.is_limited_by_caller:
            text = "request %s of client %s: the client's own limit has come %.3f s after it arrived; %s"
            self.seldom.say(log, level, text, *args, extra=details)
        else:
            text = "request %s of client %s has missed the deadline, %.3f s after it arrived; %s"
            self.seldom.say(log, level, text, *args, key=place, most=EACH_PLACE, extra=details)

    def say(self, log: logging.Logger, level: int, text: str, *args: object) -> None:
        """Something else has happened that clients can cause."""
        self.seldom.say(log, level, text, *args, extra={"endpoint": self._endpoint})

    def say_of(self, log: logging.Logger, level: int, exchange: Exchange, text: str, *args: object) -> None:
        """Something else has happened to a request; `text` names it first."""
        if log.isEnabledFor(level):
            self.seldom.say(log, level, text, named(exchange), *args, extra=extra(self._endpoint, exchange))

    def killed(self, count: int) -> None:
        """The server has come to its end before so many handlers."""
        self.say(log, logging.WARNING, "%d handlers still run at the end, and are killed", count)

    def _say(self, level: int, exchange: Exchange, text: str, *args: object) -> None:
        self.say_of(log, level, exchange, text, *args)

    def _at_place(self, level: int, exchange: Exchange, error: BaseException, text: str, *args: object) -> None:
        if log.isEnabledFor(level):
            details, key = extra(self._endpoint, exchange), _raised_at(error)
            self.seldom.say(log, level, text, named(exchange), *args, key=key, most=EACH_PLACE, error=error, extra=details)


def _state(exchange: Exchange, signal: BaseException | None) -> tuple[str, str]:
    """What has become of an overdue request, and the place in the code that it is at."""
    if signal is not None:
        place = trail_of(signal)
    elif exchange.state is State.PROMISED and not exchange.is_running:
        return "its handler has returned LATER, and nobody has answered", ""
    else:
        greenlet = exchange.owner.greenlet
        if greenlet is None:
            return "it was not run", ""
        place = trail(greenlet.gr_frame)
    return f"its handler was at {place or 'a place that cannot be seen'}", place


def _raised_at(error: BaseException) -> str:
    """What tells this failure from others, in text: it must keep nothing. The library's line alone that raises is many's."""
    return f"{type(error).__name__} {trail_of(error)}"


def _shown(error: BaseException) -> str:
    try:
        return printable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, _SHORT)
    except BaseException:  # noqa: BLE001 - whatever its __str__ does
        return type(error).__name__
