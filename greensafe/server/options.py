"""Can a server be run with these arguments, and if not, what is wrong with them?"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ..deadlines import to_seconds
from ..errors import RemoteError
from ..journal.base import Journal
from ..sansio.resume import RESUMES
from .request import Request

__all__ = [
    "Handler",
    "OnError",
    "check_handler",
    "check_journal",
    "check_limits",
    "check_options",
    "check_resume",
    "check_watch",
]

Handler = Callable[[Request], Any]
OnError = Callable[[Request, RemoteError], "RemoteError | bytes | Sequence[bytes] | None"]


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


def check_resume(resume: Any, max_attempts: Any, codec: Any) -> None:
    """Check what tells a server with a journal how to go on."""
    if resume not in RESUMES:
        raise ValueError(f'resume is "rerun" or "abort", not {resume!r}')
    if not isinstance(max_attempts, int) or isinstance(max_attempts, bool) or max_attempts < 1:
        raise ValueError(f"max_attempts is a whole number from 1, not {max_attempts!r}")
    if codec is not None and not (callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None))):
        raise TypeError(f"step_codec has encode and decode, which {type(codec).__name__} has not")


def check_journal(journal: Any) -> Journal | None:
    """The journal that an argument stands for: a path is one of sqlite."""
    if journal is None or isinstance(journal, Journal):
        return journal
    if isinstance(journal, (str, os.PathLike)):
        from ..journal.sqlite import SqliteJournal

        return SqliteJournal(journal)
    raise TypeError(f"journal is a path, a Journal or None, not {type(journal).__name__}")


def check_watch(blocked_after: Any, exit_when_blocked: Any, max_zombies: Any) -> tuple[float | None, float | None]:
    """Check what tells a server that is not well; gives the first two in seconds."""
    found = []
    for name, value in (("blocked_after", blocked_after), ("exit_when_blocked", exit_when_blocked)):
        seconds = to_seconds(value)
        if seconds is not None and seconds <= 0:
            raise ValueError(f"{name} is a number of seconds above 0, or None for never, not {value!r}")
        found.append(seconds)
    if not isinstance(max_zombies, int) or isinstance(max_zombies, bool) or max_zombies < 0:
        raise ValueError(f"max_zombies is a whole number from 0, not {max_zombies!r}")
    return found[0], found[1]
