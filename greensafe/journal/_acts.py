"""The calls of a journal that are made in its thread.

Nothing is raised here: gevent would print it as well. What a journal raises is returned.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from time import monotonic
from typing import Any

from ..errors import JournalError, JournalUnavailable, Unstorable
from ..sansio.records import Write
from ._patience import LIMIT
from .base import Journal

__all__ = ["ask", "commit", "finish", "open_it", "tidy"]

log = logging.getLogger("greensafe.journal.commits")


def open_it(journal: Journal) -> Exception | None:
    try:
        journal.open()
    except Exception as error:  # noqa: BLE001 - it is raised where open was called
        return error
    return None


def commit(journal: Journal, writes: Sequence[Write]) -> list[Any]:
    """The result of each write, or its JournalError.

    Once it is a JournalUnavailable all further ones are: what stands behind it may depend on it.
    """
    return _commit_until(monotonic() + LIMIT, journal, writes)


def _commit_until(at: float, journal: Journal, writes: Sequence[Write], is_logged: bool = False) -> list[Any]:
    """Commit by halves. From `at` on no more halves are tried: a journal may take long to say that it cannot store anything."""
    error: BaseException
    try:
        results = journal.commit(writes)
        if len(results) != len(writes):
            raise JournalError(f"{journal!r} has returned {len(results)} results for {len(writes)} writes")
        return results
    except JournalError as raised:
        error = raised
    except BaseException as raised:  # a fault of the journal's, at one write perhaps, must not cost any request its answer
        if not is_logged:
            log.exception("%r has failed", journal)
        error, is_logged = _wrapped(raised), True
    if len(writes) == 1 or isinstance(error, JournalUnavailable):
        return [error] * len(writes)
    if monotonic() >= at:
        if isinstance(error, Unstorable):  # one of them is, and nobody knows which: the others must not be answered for good
            error = JournalError(f"not stored, since one write of its batch can never be: {error}")
        return [error] * len(writes)
    half = len(writes) // 2
    results = _commit_until(at, journal, writes[:half], is_logged)
    if isinstance(results[-1], JournalUnavailable):
        return results + [results[-1]] * (len(writes) - half)
    return results + _commit_until(at, journal, writes[half:], is_logged)


def ask(journal: Journal) -> JournalError | None:
    """Try whether the journal can be written; return the error if not, else None."""
    try:
        journal.commit(())
    except JournalError as error:
        return error
    except BaseException as error:  # noqa: BLE001 - as above; it was logged when the last batch has failed
        return _wrapped(error)
    return None


def tidy(journal: Journal, running: Collection[bytes]) -> bool | JournalError:
    try:
        return journal.tidy(running)
    except JournalError as error:
        return error
    except Exception as error:  # a fault of the journal's must not end the tidying for good
        log.exception("%r has failed", journal)
        return _wrapped(error)


def finish(journal: Journal, writes: Sequence[Write]) -> None:
    try:
        failures = [result for result in commit(journal, writes) if isinstance(result, JournalError)] if writes else []
        if failures:
            log.error("the journal is closed without %d writes, which it cannot store: %s", len(failures), failures[-1])
        journal.close()
    except Exception:
        log.exception("%r cannot be closed", journal)


def _wrapped(error: BaseException) -> JournalError:
    wrapped = JournalError(f"the journal has failed: {error!r}")
    wrapped.__cause__ = error
    return wrapped
