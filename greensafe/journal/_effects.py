"""Changes of the caller's own in a batch, which must not endanger the rest of it.

Rules:

* It runs in a savepoint. What it raises undoes what it did, and nothing else.
* It has the journal's own connection, but may neither end the transaction nor attach files nor change the journal's tables or
  settings: sqlite asks the authorizer about each statement, and "not authorized" is raised inside. How it has rows and texts
  given to it (`row_factory`, `text_factory`) is its own affair, and is put back: the journal reads by the same connection.
* If the transaction is gone all the same (sqlite itself rolls back when a disk is full, or for ON CONFLICT ROLLBACK), the batch
  has failed with it.

It does not know what the change is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from ..errors import JournalError, Unstorable
from ..sansio.records import Failed
from ._schema import TABLES

__all__ = ["run"]

_SAVEPOINT = "greensafe_effect"

#: They end the transaction or reach beyond the file.
_FORBIDDEN = {sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH}

#: Of the pragmas with a value, those that only ask.
_QUESTIONS = {"table_info", "table_xinfo", "index_list", "index_info", "index_xinfo", "foreign_key_list"}


def run(connection: sqlite3.Connection, act: Callable[[Any], bytes]) -> bytes | Failed:
    """Call it with the connection, in its transaction; return what it returns, or Failed, and then it has changed nothing.

    Raises:
        JournalError: The transaction is gone; Unstorable if it would be each time.
    """
    connection.execute(f"SAVEPOINT {_SAVEPOINT}")
    outcome = _call(connection, act)
    if not connection.in_transaction:
        cause = outcome.error if isinstance(outcome, Failed) else None
        text = "" if cause is None else f": {cause}"
        # A constraint that rolls back does so each time; a full disk does not.
        kind = Unstorable if isinstance(cause, sqlite3.IntegrityError) else JournalError
        raise kind(f"sqlite has rolled back the batch with the effect of a step{text}") from cause
    if isinstance(outcome, Failed):
        connection.execute(f"ROLLBACK TO {_SAVEPOINT}")
    connection.execute(f"RELEASE {_SAVEPOINT}")
    return outcome


def _call(connection: sqlite3.Connection, act: Callable[[Any], bytes]) -> bytes | Failed:
    rows, text = connection.row_factory, connection.text_factory
    connection.set_authorizer(_may)
    try:
        value = act(connection)
        if not isinstance(value, bytes):
            raise TypeError(f"an effect returns the bytes of its step's result, not {value!r}")
        return value
    except KeyboardInterrupt:
        raise  # nobody's but the program's
    except BaseException as error:  # noqa: BLE001 - it goes to the caller that gave us the function, SystemExit as well
        return Failed(error)
    finally:
        connection.set_authorizer(None)
        connection.row_factory, connection.text_factory = rows, text


def _may(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    if action in _FORBIDDEN:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_PRAGMA:
        return sqlite3.SQLITE_OK if second is None or first in _QUESTIONS else sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_SAVEPOINT:
        return sqlite3.SQLITE_DENY if second == _SAVEPOINT else sqlite3.SQLITE_OK
    if action != sqlite3.SQLITE_READ and (first in TABLES or second in TABLES):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK
