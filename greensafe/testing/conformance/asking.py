"""Short forms for tests: writes to a journal, and questions about it.

Requests are called by numbers. A journal is asked by a Begin, which would store what is not known yet: `look` fails then, `ask`
has it forgotten again.

It does not know which answers are right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import JournalError
from ...journal.base import Journal
from ...sansio.records import Begin, Finish, Forget, Known, Step, Write

__all__ = [
    "ERROR",
    "HOUR",
    "REPLY",
    "Opens",
    "ask",
    "begin",
    "counts",
    "finish",
    "id_of",
    "is_there",
    "look",
    "noting",
    "raising",
    "refuse",
    "returning",
    "step",
    "tidy",
    "wait",
]

#: Kinds of answers, as on the wire.
REPLY, ERROR = 0x81, 0x82

HOUR = 3_600.0


class Opens:
    """A test's journal: made by the subclass, open for a while."""

    #: See JournalConformance.
    make: Callable[..., Journal]

    @contextmanager
    def _open(self, folder: Path, **limits: Any) -> Iterator[Journal]:
        journal = self.make(folder, **limits)
        journal.open()
        try:
            yield journal
        finally:
            journal.close()


# Writes, briefly.


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def begin(number: int, *frames: bytes, since: float = 1.0, **more: Any) -> Begin:
    return Begin(id_of(number), list(frames) or [b"body"], since=since, **more)


def step(number: int, name: str, index: int = 0, value: bytes = b"") -> Step:
    return Step(id_of(number), name, index, value)


def finish(number: int, *frames: bytes) -> Finish:
    return Finish(id_of(number), REPLY, list(frames) or [b"reply"])


def raising(error: Exception) -> Callable[[Any], bytes]:
    def act(place: Any) -> bytes:
        raise error

    return act


def noting(calls: list[Any]) -> Callable[[Any], bytes]:
    def act(place: Any) -> bytes:
        calls.append(place)
        return b""

    return act


def returning(value: Any) -> Callable[[Any], Any]:
    return lambda place: value


# Questions.


def look(journal: Journal, number: int, *frames: bytes) -> Known:
    """Return what is known of a request, which has to be there."""
    (known,) = journal.commit([begin(number, *frames)])
    assert isinstance(known, Known), f"request {number} is not there"
    return Known(*known[:6], list(known.reply), dict(known.steps))


def ask(journal: Journal, writes: Sequence[Begin]) -> list[Known | None]:
    """Return what is known of requests; unknown ones stay unknown."""
    known: list[Known | None] = journal.commit(writes)
    journal.commit([Forget(write.request_id) for write, each in zip(writes, known) if each is None])
    return known


def is_there(journal: Journal, number: int) -> bool:
    return ask(journal, [begin(number)]) != [None]


def counts(known: Known) -> tuple[int, int]:
    return known.attempts, known.fruitless


def refuse(journal: Journal, writes: Sequence[Write]) -> JournalError:
    """Have a batch fail, and return its error."""
    try:
        journal.commit(writes)
    except JournalError as error:
        return error
    raise AssertionError(f"no JournalError for {writes}")


def tidy(journal: Journal, running: Sequence[bytes] = ()) -> None:
    """Tidy until there is no more to do, which has to come to an end."""
    for _ in range(1_000):
        if not journal.tidy(running):
            return
    raise AssertionError("tidy does not come to an end")


def wait(journal: Journal, until: float) -> None:
    """Wait until the journal's time is later than that."""
    while journal.now() <= until:
        time.sleep(0.001)
