"""Tests of greensafe.sansio.resume."""

from __future__ import annotations

from typing import Any

import pytest

from greensafe.errors import RemoteError
from greensafe.sansio.envelope import Kind
from greensafe.sansio.records import Known, State
from greensafe.sansio.resume import RESUMES, Refuse, Replay, Run, decide, is_kept

STEPS = {("a", 1): b"1"}


@pytest.mark.parametrize("resume", RESUMES)
@pytest.mark.parametrize(
    ("known", "type", "code"),
    [
        (Known(State.ACKED), "AnswerGone", "ABORTED"),
        (Known(State.DROPPED), "Forgotten", "ABORTED"),
        (Known(State.OPEN, False), "OtherBody", "INVALID_ARGUMENT"),
        (Known(State.DONE, False, kind=Kind.REPLY, reply=[b"x"]), "OtherBody", "INVALID_ARGUMENT"),
        (Known(State.ACKED, False), "OtherBody", "INVALID_ARGUMENT"),
    ],
)
def test_refused_whatever_the_server_does_with_interrupted_ones(known: Known, type: str, code: str, resume: str) -> None:
    """What has had its answer, is forgotten or has another body is refused; what is stored of it stays as it is."""
    action = decide(known, resume, 3)
    assert isinstance(action, Refuse)
    assert (action.error.type, action.error.code, action.is_final) == (type, code, False)


@pytest.mark.parametrize("resume", RESUMES)
def test_replayed(resume: str) -> None:
    """Who has an answer gets it, whatever it says."""
    assert decide(Known(State.DONE, kind=Kind.ERROR, reply=[b"a", b""]), resume, 1) == Replay(Kind.ERROR, [b"a", b""])


def test_run_again_as_long_as_it_comes_further() -> None:
    """An interrupted request is the next attempt; only attempts without a new step count against it."""
    assert decide(Known(State.OPEN, attempts=1, fruitless=1), "rerun", 3) == Run(2, {})
    assert decide(Known(State.OPEN, attempts=99, fruitless=2, steps=STEPS), "rerun", 3) == Run(100, STEPS)
    action = decide(Known(State.OPEN, attempts=3, fruitless=3), "rerun", 3)
    assert isinstance(action, Refuse)
    assert (action.error.type, action.error.code, action.is_final) == ("TooManyAttempts", "ABORTED", True)


def test_aborted() -> None:
    """With resume="abort" an interrupted request is never run again, and that is its answer."""
    action = decide(Known(State.OPEN, attempts=1, fruitless=0, steps=STEPS), "abort", 3)
    assert isinstance(action, Refuse)
    assert (action.error.type, action.error.code, action.is_final) == ("Interrupted", "ABORTED", True)


@pytest.mark.parametrize(
    ("error", "kept"),
    [(None, True), ("INTERNAL", True), ("DEADLINE_EXCEEDED", True), ("UNAVAILABLE", False), ("RESOURCE_EXHAUSTED", False)],
)
def test_what_is_kept(error: Any, kept: bool) -> None:
    """An answer is kept, an error as well, unless it says no more than: not now."""
    assert is_kept(None if error is None else RemoteError(error, "")) is kept
