"""What becomes of a request that a journal knows already, and which answers are kept?

    known as   what the client gets
    OPEN       a rerun, which goes on at the first step that is not stored (resume="rerun"), unless `max_attempts` of them
               have come no further; or ABORTED (resume="abort"). Of what runs already nobody asks: a resend joins it
    DONE       the stored answer
    ACKED      ABORTED: it had its answer
    DROPPED    ABORTED: nobody can tell any more whether it has run
    any, with another body than the stored one: INVALID_ARGUMENT

An answer that says no more than "not now" is not kept (`is_kept`): the request stays OPEN, and runs when it is sent again.

It does not know how anything is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import RemoteError
from .records import Known, State

__all__ = ["RESUMES", "Refuse", "Replay", "Run", "decide", "is_kept"]

#: What may become of an interrupted request.
RESUMES = ("rerun", "abort")

#: The codes of answers that are not kept.
_NOT_NOW = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})


class Run(NamedTuple):
    """Run it again, as this attempt, with the results of the steps that are stored."""

    attempt: int
    steps: Mapping[tuple[str, int], bytes]


class Replay(NamedTuple):
    """Send what is stored."""

    kind: int
    body: Sequence[bytes]


class Refuse(NamedTuple):
    """Answer with this error; `is_final`: it is the answer of the interrupted request, and kept."""

    error: RemoteError
    is_final: bool


def decide(known: Known, resume: str, max_attempts: int) -> Run | Replay | Refuse:
    """What becomes of it; see the table."""
    if not known.is_same:
        message = "a request with this id and another body is in the journal: an id is for one request"
        return Refuse(RemoteError("INVALID_ARGUMENT", message, "OtherBody"), False)
    if known.state is State.DONE:
        return Replay(known.kind, known.reply)
    if known.state is State.ACKED:
        message = "the answer to this request has arrived before, and is not kept any longer"
        return Refuse(RemoteError("ABORTED", message, "AnswerGone"), False)
    if known.state is State.DROPPED:
        message = "this request was sent before, and what the journal knew at that time is dropped: it may have run"
        return Refuse(RemoteError("ABORTED", message, "Forgotten"), False)
    if resume == "abort":
        message = "a run of this request has begun before and has ended without its answer: it is not run again"
        return Refuse(RemoteError("ABORTED", message, "Interrupted"), True)
    if known.fruitless >= max_attempts:
        message = f"the server was interrupted at this request {known.fruitless} times, without a new step: it is not run again"
        return Refuse(RemoteError("ABORTED", message, "TooManyAttempts"), True)
    return Run(known.attempts + 1, known.steps)


def is_kept(error: RemoteError | None) -> bool:
    """Whether an answer is kept; None stands for a reply."""
    return error is None or error.code not in _NOT_NOW
