"""Hooks: records of what happens in servers and clients, handed to the program.

`Server(..., hooks=hook)`, `Client(..., hooks=hook)`, `supervise` and `supervised` call each hook with one frozen record for
each thing that happens:

    def hook(record: Record) -> None:
        match record:
            case RequestFailed(code=code):
                errors[code] += 1

Rules:

* Hooks are called at once, one after the other, where it happens: in the hub, in a handler's greenlet or in a caller's. So they
  must not wait for anything; in the hub they cannot.
* Whatever a hook raises is logged, and touches neither the request nor the other hooks. Only what was thrown into the greenlet
  from outside (a kill, a limit) while a hook waited goes on its way.
* A hook ignores the records that it does not know: later versions have more.
* Without hooks no record is made.

Each request of a server has one RequestAnswered or RequestFailed, also if its handler was never started; each call of a client
one CallAnswered or CallFailed after its CallStarted. Seconds are on the monotonic clock.

It does not know what is done with the records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import gevent

from .hub.log_limiter import Seldom
from .stats import Zombie

__all__ = [
    "CallAnswered",
    "CallFailed",
    "CallRetried",
    "CallStarted",
    "ConnectionFailed",
    "ConnectionLost",
    "ConnectionUp",
    "DescriptorsExhausted",
    "HandlerStuck",
    "Hook",
    "Hooks",
    "HubBlocked",
    "LoopFailed",
    "Record",
    "RequestAnswered",
    "RequestFailed",
    "RequestStarted",
    "ServerStarted",
    "ServerStopped",
    "Tell",
    "teller",
]

log = logging.getLogger("greensafe.hooks")

#: Lines a second about one hook that fails at one kind of record with one kind of error: each request may be such a record.
MOST_FAILURES = 10

_FAILED = "hook %s has failed at a %s"

#: What others throw into a greenlet, and what is not the hook's if it is raised there.
_FROM_OUTSIDE = (gevent.GreenletExit, gevent.Timeout, KeyboardInterrupt)


@dataclass(frozen=True, slots=True)
class ServerStarted:
    """A server is bound to `endpoint` and reads requests; or `supervise` begins to read them from a socket."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class ServerStopped:
    """A server has closed its socket, or `supervise` has ended; `answered` requests were answered since its start."""

    endpoint: str
    answered: int


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """A handler is about to run; told in its greenlet, so that what the hook puts into a context variable is the handler's.

    Attributes:
        endpoint: The server's.
        request_id: As `Request.id`.
        client: As `Request.client`.
        metadata: As `Request.metadata`.
        seconds: Between the request's arrival and now, in which it waited for its turn.
        attempt: As `Request.attempt`: more than 1 if a server with a journal goes on with what was interrupted.
    """

    endpoint: str
    request_id: str
    client: bytes
    metadata: bytes
    seconds: float
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """A request was answered, by its handler, or by `on_error` on its own account.

    Attributes:
        endpoint: The server's.
        request_id: As `Request.id`.
        client: As `Request.client`.
        seconds: Between its arrival and its answer.
    """

    endpoint: str
    request_id: str
    client: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request was answered with an error, whether its handler has run or not.

    Attributes:
        endpoint: The server's.
        request_id: As `Request.id`.
        client: As `Request.client`.
        seconds: Between its arrival and its answer.
        code, type, message: As in RemoteError.
    """

    endpoint: str
    request_id: str
    client: bytes
    seconds: float
    code: str
    type: str
    message: str


@dataclass(frozen=True, slots=True)
class HandlerStuck:
    """A handler has survived its deadline and a kill; said once for each."""

    endpoint: str
    zombie: Zombie


@dataclass(frozen=True, slots=True)
class HubBlocked:
    """The hub of a server turns again, after it had not done so for the server's `blocked_after` or longer.

    Attributes:
        endpoint: The server's.
        seconds: How long it did not turn after it should have; a lower limit.
        stack: What ran when that was noticed, as in a traceback; "" if nobody could see it.
    """

    endpoint: str
    seconds: float
    stack: str


@dataclass(frozen=True, slots=True)
class LoopFailed:
    """A loop of the library itself has failed, no handler; see "Loops" in docs/operations.md.

    Attributes:
        endpoint: The server's, or the client's, several with a space between them.
        loop: Its name, such as "pump".
        seconds: The pause after which it goes on. None: it has failed too often; the server stops, the client is closed.
        error: Why: keep its name or text, since it holds frames.
    """

    endpoint: str
    loop: str
    seconds: float | None
    error: Exception


@dataclass(frozen=True, slots=True)
class DescriptorsExhausted:
    """No file descriptor is left (by ipc: hardly any), so a server cannot accept; or it can again.

    Attributes:
        endpoint: The server's.
        limit: How many descriptors the process may have; None if there is no such limit.
        seconds: How long it was so, now that it is over, to a second; None when it begins.
    """

    endpoint: str
    limit: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A client's request is about to be sent, or to wait for a server; told in the caller's greenlet.

    Attributes:
        endpoints: The client's.
        request_id: In hex: the server's `Request.id`, if it is a greensafe server.
        metadata: As it was given.
    """

    endpoints: tuple[str, ...]
    request_id: str
    metadata: bytes


@dataclass(frozen=True, slots=True)
class CallAnswered:
    """A client's request has its reply; told in the caller's greenlet.

    Attributes:
        endpoint: Where it was answered.
        request_id: In hex.
        seconds: Since CallStarted.
        retries: How often it was sent again.
    """

    endpoint: str
    request_id: str
    seconds: float
    retries: int


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A client's request has ended with an exception; told in the caller's greenlet.

    Attributes:
        endpoint: Where it was sent last; "" if it was not sent.
        request_id: In hex.
        seconds: Since CallStarted.
        retries: How often it was sent again.
        error: The exception: keep its name or text, since it holds the caller's frames. A `deadline` scope's signal is no
            DeadlineExceeded yet; `error_name` is what the program will see, as `ClientStats.failures` counts it.
        error_name: Its class's name.
    """

    endpoint: str
    request_id: str
    seconds: float
    retries: int
    error: BaseException
    error_name: str


@dataclass(frozen=True, slots=True)
class CallRetried:
    """A client's request has failed and will be sent again, after a pause.

    Attributes:
        endpoint: Where it has failed; "" if it was not sent.
        request_id: In hex.
        retries: The number of this retry, from 1.
        seconds: The pause.
        error: Why.
    """

    endpoint: str
    request_id: str
    retries: int
    seconds: float
    error: Exception


@dataclass(frozen=True, slots=True)
class ConnectionUp:
    """An endpoint of a client can be handed requests, after `losses` lost connections. (inproc says so only after a loss.)"""

    endpoint: str
    losses: int


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """An attempt to connect has failed.

    Attributes:
        endpoint: The client's.
        error_name: What a request would get: "Unreachable", "Refused" or "PeerSilent".
        message: What was wrong.
    """

    endpoint: str
    error_name: str
    message: str


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """A connection of a client is gone, or a server behind it.

    Attributes:
        endpoint: The client's.
        error_name: "Disconnected" or "PeerSilent".
        message: What has happened.
        silent: As in PeerSilent; None for others.
        lost: Requests in flight there that may have run.
        unsent: Requests that were provably not run; they go elsewhere, or wait.
    """

    endpoint: str
    error_name: str
    message: str
    silent: str | None
    lost: int
    unsent: int


Record = (
    ServerStarted
    | ServerStopped
    | RequestStarted
    | RequestAnswered
    | RequestFailed
    | HandlerStuck
    | HubBlocked
    | LoopFailed
    | DescriptorsExhausted
    | CallStarted
    | CallAnswered
    | CallFailed
    | CallRetried
    | ConnectionUp
    | ConnectionFailed
    | ConnectionLost
)

Hook = Callable[[Record], object]
Hooks = Hook | Iterable[Hook]
Tell = Callable[[Record], None]


def teller(hooks: Hooks | None, seldom: Seldom | None = None) -> Tell | None:
    """Make one function that calls all of the hooks; None if there are none. TypeError for what cannot be called.

    Args:
        hooks: The program's.
        seldom: What logs that one has failed, if its counts are to outlive what is returned here.
    """
    if hooks is None:
        return None
    given = (hooks,) if callable(hooks) else tuple(hooks) if isinstance(hooks, Iterable) else hooks
    if not isinstance(given, tuple) or not all(map(callable, given)):
        raise TypeError(f"hooks is a function of one record, or several of them, not {hooks!r}")
    if not given:
        return None
    lines = seldom or Seldom()

    def tell(record: Record) -> None:
        for place, hook in enumerate(given):
            try:
                hook(record)
            except BaseException as error:
                if _is_from_outside(error):
                    raise
                key = (place, type(record).__name__, type(error).__name__)
                lines.say(log, logging.ERROR, _FAILED, hook, key[1], key=key, most=MOST_FAILURES, error=error)

    return tell


def _is_from_outside(error: BaseException) -> bool:
    """Return whether an exception is meant for the hook's greenlet, not a failure of the hook. The hub is spared them."""
    if isinstance(error, Exception) or not isinstance(error, _FROM_OUTSIDE):
        return False
    return gevent.getcurrent() is not gevent.get_hub()
