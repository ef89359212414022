"""What is a journal told of requests, and what does it know of them?

A journal (see `greensafe.journal`) is told in *writes*:

    Begin    store a request before it is run        unless its id is known: then nothing changes, and what is known comes back
    Rerun    count one more attempt at it            before it is run again
    Excuse   the attempt was not in vain             it has ended without an answer, but not with its process
    Step     store the result of a finished step
    Effect   the same, and do something else in the same transaction
    Finish   store the answer                        before it is sent
    Ack      the answer has arrived                  its bytes may go, the id stays
    Forget   as if it had never come                 by hand

It does not know where that is kept.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Ack", "Begin", "Effect", "Excuse", "Failed", "Finish", "Forget", "Known", "Rerun", "State", "Step", "Write"]


class State(enum.Enum):
    """Of a request in a journal."""

    #: Stored and not answered: it runs, or what ran it is gone.
    OPEN = "open"
    #: Answered; the answer is at hand.
    DONE = "done"
    #: Answered, and the answer has arrived: its bytes are gone.
    ACKED = "acked"
    #: Unknown, and sent before the newest that was dropped: it may have run.
    DROPPED = "dropped"


class Known(NamedTuple):
    """What a journal knows of a request.

    Attributes:
        state: See State. DROPPED comes without the rest.
        is_same: The body that was asked about is the one that was stored.
        attempts: How often it was begun, 1 after the first Begin.
        fruitless: Attempts since the last one that has stored a new step, less those that were excused; 1 after the first
            Begin, 0 after a new Step.
        until: The journal's time at which its caller gives up, None for never.
        kind: The answer's, a number of `sansio.envelope.Kind`; 0 while it is OPEN.
        reply: The answer's frames; empty unless it is DONE.
        steps: Results by (name, number), in the order in which they were stored; empty unless it is OPEN.
    """

    state: State
    is_same: bool = True
    attempts: int = 0
    fruitless: int = 0
    until: float | None = None
    kind: int = 0
    reply: Sequence[bytes] = ()
    steps: Mapping[tuple[str, int], bytes] = {}


class Begin(NamedTuple):
    """Store a request. Its result is None, and then it is stored as a new one; or what is Known, and then nothing changed.

    Attributes:
        request_id: 16 bytes.
        body: Its frames, at least one.
        since: The journal's time at which it was first sent, as far as the server can tell.
        is_resent: It was sent before. Only such a one can be DROPPED.
        until: As in Known.
        client, metadata: For showing.
    """

    request_id: bytes
    body: Sequence[bytes]
    since: float
    is_resent: bool = False
    until: float | None = None
    client: bytes = b""
    metadata: bytes = b""


class Rerun(NamedTuple):
    """Count one more attempt at an OPEN request; its result is None."""

    request_id: bytes


class Excuse(NamedTuple):
    """Count one less of the attempts without a new step, if there are any; its result is None.

    Nothing happens if the request is unknown or not OPEN.
    """

    request_id: bytes


class Step(NamedTuple):
    """Store the result of a finished step of an OPEN request; its result is None. What is stored already stays as it is."""

    request_id: bytes
    name: str
    number: int
    value: bytes


class Effect(NamedTuple):
    """Call `act` with the backend's own connection and store the bytes that it returns as a step, all in one transaction.

    Its result is those bytes; those that are stored, without calling `act`, if the step is stored already; or Failed, and then
    nothing of it is left and the other writes are not affected. `act` runs in the journal's thread: it must not wait by gevent.
    Of a request without an id (b"") nothing is stored, but the effect is there all the same.
    """

    request_id: bytes
    name: str
    number: int
    act: Callable[[Any], bytes]


class Finish(NamedTuple):
    """Store the answer of an OPEN request; its result is None. Its body and steps may go."""

    request_id: bytes
    kind: int
    body: Sequence[bytes]


class Ack(NamedTuple):
    """The answer has arrived; its result is None. Nothing happens if the request is unknown or not DONE."""

    request_id: bytes


class Forget(NamedTuple):
    """Delete a request, whatever its state; its result is None. It counts as dropped by nobody: the id is new again."""

    request_id: bytes


class Failed(NamedTuple):
    """The result of an Effect whose `act` raised."""

    error: BaseException


Write = Begin | Rerun | Excuse | Step | Effect | Finish | Ack | Forget
