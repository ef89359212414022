"""The state of a server and of a client at the moment when it is asked for.

`server.stats`, `client.stats` and `stats_of(sock)` are made when asked for, of counts that are kept anyway, and do not change
afterwards.

Rules:

* All counts begin at the last `start` of a server, at the making of a client, when a socket is first supervised, and anew in a
  forked child (with the client's first request there).
* Ages are seconds on the monotonic clock; what is bounded says so.
* A record's dicts are copies: `dataclasses.asdict` of a record can be sent as JSON, but for the bytes in it.

It does not know how anything is counted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from traceback import walk_tb
from types import FrameType

__all__ = ["ClientStats", "EndpointStats", "JournalStats", "ServerStats", "Zombie"]

#: Calls that `trail` names besides the innermost one, and packages in which it looks for none.
CALLERS = 2
_LIBRARIES = frozenset({"gevent", "greenlet", "greensafe", "zmq"})
_RAISING = frozenset({"greensafe.deadlines.scope", "greensafe.deadlines.seconds", "greensafe.loops.preemption"})


@dataclass(frozen=True, slots=True)
class Zombie:
    """A handler that has survived its deadline and a kill, and still runs.

    Attributes:
        request_id: As `Request.id`.
        client: The routing id of the connection that the request came by.
        handler: The handler's name.
        greenlet: The name of the greenlet that it runs in.
        where: "file:line function" of what it does, gevent's own left out; "" if that cannot be seen.
        age_seconds: Since the request arrived.
        kills: How often it was to be killed.
    """

    request_id: str
    client: bytes
    handler: str
    greenlet: str
    where: str
    age_seconds: float
    kills: int


@dataclass(frozen=True, slots=True)
class JournalStats:
    """The state of a Server's journal.

    Attributes:
        commits: Batches of writes that were made durable, or tried to.
        pending: Writes that are not durable yet.
        failures: Writes that have failed.
        error: What the last try of a batch has failed with, also while it is tried again; "" if it has not.
        joined: Requests that have come again while they were owed their answer.
        replayed: Those that were answered with what was stored.
        rerun: Those that were begun again after an interruption.
        dropped: Requests that the journal has dropped since it was made, by cause.
        oldest_seconds: For how long the journal has been at the batch that it writes now (all its tries together), or at
            tidying; None if it has nothing to do. Over 5 s the server is not healthy.
        withdrawn: Writes that were taken out before anything of them was written, since their requests were over.
        released: Answers that have left before they were known to be stored, since the journal took too long.
    """

    commits: int
    pending: int
    failures: int
    error: str
    joined: int
    replayed: int
    rerun: int
    dropped: dict[str, int]
    oldest_seconds: float | None = None
    withdrawn: int = 0
    released: int = 0


@dataclass(frozen=True, slots=True)
class ServerStats:
    """The state of a Server, or (`stats_of`) of a socket under `supervise` or `supervised`.

    Attributes:
        endpoint: Where it is bound; where it is to be bound before the first start.
        state: "started", "stopping", "closed", or "failed": closed because a loop of its own had failed too often.
        is_healthy: As `Server.healthy`.
        is_accepting: False while no file descriptor is left for a new connection (by ipc: hardly any).
        received: Requests that have arrived and were read.
        answered: Those that were answered, errors included.
        failures: Answers that were errors, by their code, such as {"DEADLINE_EXCEEDED": 3}; only codes that did occur.
        cancelled: Requests whose clients did not want the answer any more, or were gone.
        inflight: Requests that are owed an answer: their handlers run, or have promised one, or wait for their turn.
        running: Requests whose handlers were started and that are not over, zombies not counted: what max_inflight limits.
        backlog: Requests that wait for their turn.
        oldest_seconds: Age of the oldest request that is not answered; None if there is none.
        zombie_count: Handlers that have survived a kill and still run.
        zombies: The 100 oldest of them.
        unsent: Messages that wait until their client has room for them.
        drops: What was thrown away, by cause:
            "malformed": messages that were no request;
            "ignored": notes for requests that are not open (cancelled too late, acknowledged);
            "duplicates": second answers of handlers, and those that came when the watchdog had answered;
            "unreachable": answers for clients that are gone;
            "full_outbox": answers for clients that do not read;
            "unsaid": WORKINGs for clients that do not read, which are told again soon;
            "misdirected": requests refused because they may have run for a server with another journal;
            "forgotten": clients without open requests that were not remembered for want of room.
        journal: None without one, and while the server is closed.
        restarts: How often a loop of the library itself has failed and went on, by its name; only those that did fail.
        loop_error: What the last of them has failed with, if the server has stopped for that; else "".
        hub_lag_seconds: By how much the hub was late at its last beat, some four within `blocked_after`; None if it is not
            watched. Of the hub, as the next two: not of one server alone, and since the first of its servers was started.
        worst_hub_lag_seconds: The most so far.
        hub_blocked: How often it was late by `blocked_after` or more (of the server for which that is shortest).
    """

    endpoint: str
    state: str
    is_healthy: bool = True
    is_accepting: bool = True
    received: int = 0
    answered: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    cancelled: int = 0
    inflight: int = 0
    running: int = 0
    backlog: int = 0
    oldest_seconds: float | None = None
    zombie_count: int = 0
    zombies: tuple[Zombie, ...] = ()
    unsent: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    journal: JournalStats | None = None
    restarts: dict[str, int] = field(default_factory=dict)
    loop_error: str = ""
    hub_lag_seconds: float | None = None
    worst_hub_lag_seconds: float | None = None
    hub_blocked: int = 0


@dataclass(frozen=True, slots=True)
class EndpointStats:
    """The state of one endpoint of a Client.

    Attributes:
        endpoint: As it was given.
        is_up: Whether requests can be handed over. (On inproc this is so until a server that was there is gone.)
        is_draining: The server there is about to stop and gets no further requests.
        is_greensafe: A greensafe server has answered on this connection.
        inflight: Requests that were handed over and are not answered.
        losses: Connections, or servers behind one, that were lost.
        lost_requests: Requests that were in flight on them and may have run.
        failed_attempts: Attempts to connect that have failed.
        trouble: How the last attempt failed; "" if none has since it was up.
    """

    endpoint: str
    is_up: bool
    is_draining: bool
    is_greensafe: bool
    inflight: int
    losses: int
    lost_requests: int
    failed_attempts: int
    trouble: str


@dataclass(frozen=True, slots=True)
class ClientStats:
    """The state of a Client.

    Attributes:
        state: "open", "closed", or "failed": closed because a loop of its own had failed too often.
        answered: Requests that have returned their reply.
        failures: Requests that ended with an exception, by its class, such as {"RemoteError": 2, "OperationTimeout": 1}.
        inflight: Requests that are open.
        waiting: Those among them that were not handed over to any endpoint.
        oldest_seconds: Age of the oldest open request; None if there is none.
        retries: How often a request was sent again after an error.
        rejections: How often a server has sent one back unrun.
        drops: What was thrown away, by cause:
            "late": answers to requests that nobody waits for any more;
            "malformed": messages that were no answer;
            "ignored": kinds of messages that mean nothing here;
            "unsaid": CANCELs and acknowledgements for servers that do not read.
        endpoints: One for each, in the order in which they were given.
        restarts, loop_error: As in ServerStats.
    """

    state: str
    answered: int
    failures: dict[str, int]
    inflight: int
    waiting: int
    oldest_seconds: float | None
    retries: int
    rejections: int
    drops: dict[str, int]
    endpoints: tuple[EndpointStats, ...]
    restarts: dict[str, int] = field(default_factory=dict)
    loop_error: str = ""


_Steps = list[tuple[FrameType, int]]


def where(frame: FrameType | None) -> str:
    """Describe where a greenlet that does not run is: the innermost frame that is not gevent's, else the innermost."""
    return "".join(map(_place, _without_gevent(_outwards(frame))[:1]))


def trail(frame: FrameType | None) -> str:
    """Describe where a greenlet that does not run is, as `where` does, and which calls in the program's code led there."""
    return _trail(_outwards(frame))


def trail_of(error: BaseException) -> str:
    """Describe likewise where a greenlet was when this exception was raised in it."""
    return _trail(list(walk_tb(error.__traceback__))[::-1])


def _trail(outwards: _Steps) -> str:
    steps = _without_gevent(outwards)
    callers = [step for step in steps[1:] if _package(step) not in _LIBRARIES]
    return ", called at ".join(map(_place, steps[:1] + callers[:CALLERS]))


def _outwards(frame: FrameType | None) -> _Steps:
    steps = []
    while frame is not None:
        steps.append((frame, frame.f_lineno))
        frame = frame.f_back
    return steps


def _without_gevent(outwards: _Steps) -> _Steps:
    """Drop the frames at the inner end that are gevent's, or raise a deadline; keep all if there are no others."""
    return list(itertools.dropwhile(lambda step: _package(step) == "gevent" or _module(step) in _RAISING, outwards)) or outwards


def _module(step: tuple[FrameType, int]) -> str:
    return str(step[0].f_globals.get("__name__"))


def _package(step: tuple[FrameType, int]) -> str:
    return _module(step).partition(".")[0]


def _place(step: tuple[FrameType, int]) -> str:
    code = step[0].f_code
    return f"{code.co_filename}:{step[1]} {code.co_qualname}"
