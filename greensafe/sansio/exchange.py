"""What may still happen to one request on the server's side?

Its state is a table, `_NEXT`; an event that does not fit names role, state and event.

    state      answer owed   handler runs
    RUNNING    yes           yes
    PROMISED   yes           no             it returned LATER
    ANSWERED   no            yes
    OVER       no            no

It does not know other requests, nor when anything is due; see `responder`.
"""

from __future__ import annotations

import enum
from typing import Any

from ..errors import LocalProtocolError
from .envelope import Envelope

__all__ = ["Event", "Exchange", "State"]


class State(enum.Enum):
    """Of an exchange on the server's side; see the table above."""

    RUNNING = "running"
    PROMISED = "promised"
    ANSWERED = "answered"
    OVER = "over"
    #: The handler has ended and neither answered nor promised: the answer is owed by the watchdog.
    ABANDONED = "abandoned"


class Event(enum.Enum):
    """What happens to an exchange."""

    ANSWER = "answer"
    PROMISE = "promise"
    FINISH = "finish"


_RUNNING, _PROMISED, _ANSWERED, _OVER, _ABANDONED = (
    State.RUNNING,
    State.PROMISED,
    State.ANSWERED,
    State.OVER,
    State.ABANDONED,
)

_NEXT: dict[Event, dict[tuple[State, bool], State]] = {
    # (state, whether the handler still runs) -> state
    Event.ANSWER: {
        (_RUNNING, True): _ANSWERED,
        (_PROMISED, True): _ANSWERED,
        (_PROMISED, False): _OVER,
        (_ABANDONED, False): _OVER,
    },
    Event.PROMISE: {(_RUNNING, True): _PROMISED},
    Event.FINISH: {(_RUNNING, True): _ABANDONED, (_PROMISED, True): _PROMISED, (_ANSWERED, True): _OVER},
}


class Exchange:
    """One request on the server's side.

    Attributes:
        key: A number that no other exchange of this responder has.
        envelope: The request.
        arrived_at: When it came.
        state: See the module's head.
        at: When it is due next: the deadline, then the kill, then each further one. None for never.
        is_running: Whether its handler has not ended.
        is_expired: Whether the deadline has passed.
        kills: How often the handler was to be killed.
        is_limited_by_caller: The deadline is the caller's own limit, which is earlier than the server's.
        caller: The responder's own object for a client that sends headers.
        also: The envelopes of others that have sent the same request (with a journal): they get the same answer.
        ways_size: What the ways weigh by which it has come again.
        is_delivered: The frames of the answer have been made.
        is_held: The one answer has been given, and does not leave before it is stored (with a journal).
        owner: The shell's own object.
        memory: The same, for what a journal keeps of it.
    """

    __slots__ = (
        "also",
        "arrived_at",
        "at",
        "caller",
        "envelope",
        "is_delivered",
        "is_expired",
        "is_held",
        "is_limited_by_caller",
        "is_running",
        "key",
        "kills",
        "memory",
        "owner",
        "state",
        "ways_size",
    )

    def __init__(self, key: int, envelope: Envelope, arrived_at: float) -> None:
        self.key = key
        self.envelope = envelope
        self.arrived_at = arrived_at
        self.state = _RUNNING
        self.at: float | None = None
        self.is_running = True
        self.is_expired = False
        self.kills = 0
        self.is_limited_by_caller = False
        self.caller: Any = None
        self.also: tuple[Envelope, ...] = ()
        self.ways_size = 0
        self.is_delivered = False
        self.is_held = False
        self.owner: Any = None
        self.memory: Any = None

    @property
    def is_answered(self) -> bool:
        """Whether the one answer has been given."""
        return self.state is _ANSWERED or self.state is _OVER

    @property
    def is_abandoned(self) -> bool:
        """Whether the handler has ended and nobody else owes the answer."""
        return self.state is _ABANDONED

    @property
    def is_over(self) -> bool:
        """Answered, and its handler has ended; and the answer has left."""
        return self.state is _OVER and not self.is_held

    def move(self, event: Event) -> None:
        """Change the state. LocalProtocolError if the event does not fit; nothing is changed."""
        state = _NEXT[event].get((self.state, self.is_running))
        if state is None:
            handler = "runs" if self.is_running else "has ended"
            raise LocalProtocolError(
                f"responder: {event.value} does not fit request {self.key}, which is {self.state.value} (its handler {handler})"
            )
        self.state = state
