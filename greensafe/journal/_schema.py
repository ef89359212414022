"""The tables of a journal's file, and the checks that a file is one.

A journal is a sqlite database that says so in its header: application_id is `APPLICATION`, user_version the schema's version.
Its tables begin with `greensafe_`; whatever else is in the file belongs to the program that uses it.

Rules:

* A file is made beside its place and renamed when it is whole, so what stands there was never half of one.
* What is asked before a file is known to be a journal of a known version changes nothing in it.
* Version n is made of version n - 1 by `MIGRATIONS[n - 1]`, the first of nothing; all that are needed in one transaction. One
  that was released is never changed.

It does not know what is written; see `_writing`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from ..errors import JournalError, Unstorable
from ._checking import misfit
from ._clock import Moment, Stored, offset
from ._descriptors import peek
from ._place import make_draft, remove_draft

__all__ = [
    "APPLICATION",
    "BUSY",
    "MIGRATIONS",
    "SQLITE_ERRORS",
    "TABLES",
    "Head",
    "check",
    "check_version",
    "connect",
    "create",
    "explain",
    "head",
    "is_files_fault",
    "migrate",
    "set_wal",
]

#: "GSjl".
APPLICATION = 0x47536A6C

MIGRATIONS: list[Sequence[str]] = [
    (
        # One row.
        """CREATE TABLE greensafe_journal (
            id BLOB NOT NULL, boot TEXT NOT NULL, offset REAL NOT NULL, last REAL NOT NULL,
            horizon REAL, expired INTEGER NOT NULL DEFAULT 0, evicted INTEGER NOT NULL DEFAULT 0
        )""",
        # By rowid, so that new ones stand together at the end whatever their ids are: with 10,000 clients a batch of 100 costs
        # half of what it does WITHOUT ROWID, where each of its three writes goes to another page.
        """CREATE TABLE greensafe_requests (
            id BLOB NOT NULL UNIQUE, state INTEGER NOT NULL, changed REAL NOT NULL, since REAL NOT NULL, until REAL,
            digest BLOB NOT NULL, attempts INTEGER NOT NULL DEFAULT 1, fruitless INTEGER NOT NULL DEFAULT 1,
            kind INTEGER NOT NULL DEFAULT 0, client BLOB NOT NULL, metadata BLOB NOT NULL, payload BLOB
        )""",
        "CREATE INDEX greensafe_ages ON greensafe_requests (state, changed)",
        """CREATE TABLE greensafe_steps (
            id BLOB NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, value BLOB NOT NULL, UNIQUE (id, name, number)
        )""",
    ),
]

TABLES = frozenset({"greensafe_journal", "greensafe_requests", "greensafe_steps"})

# https://www.sqlite.org/fileformat.html#the_database_header
_HEADER_SIZE = 100
_MAGIC = b"SQLite format 3\0"
_APPLICATION_AT = 68

#: RETURNING, UPDATE FROM and 32,766 parameters are there from this version on.
_SQLITE = (3, 35, 0)

#: Seconds to wait for another program that writes to the file: not a server, those are refused.
BUSY = 5.0

#: How a write-ahead log begins, by the order of its checksums' bytes.
_LOG_MAGIC = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")

#: What sqlite3 raises for a file that is not what it should be. UnicodeError: the damage stands in the text of sqlite's error.
SQLITE_ERRORS = (sqlite3.Error, UnicodeError)

_DAMAGED = "the file is damaged: `greensafe journal verify` says where; put a copy back, or move it away"

_FOREIGN = "{} is the database of another program, not a journal: give another name"

_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full: make room",
    sqlite3.SQLITE_IOERR: "the disk, or a limit of this process for files, is the cause: see the system's log",
    sqlite3.SQLITE_READONLY: "this user must be able to write to the file, its -wal and -shm, and their folder",
    sqlite3.SQLITE_CANTOPEN: "this user must be able to write to the file, its -wal and -shm, and their folder",
    sqlite3.SQLITE_PERM: "this user must be able to write to the file, its -wal and -shm, and their folder",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: "it is not a sqlite file, or its beginning is damaged: give another name, or put a copy back",
    sqlite3.SQLITE_BUSY: "another program is writing to it, and did not end in time",
    sqlite3.SQLITE_TOOBIG: "a request, a step's result or an answer is larger than sqlite can store",
}

#: Of the file alone, whatever is written to it.
_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOTADB,
}

#: Of the file, or of one write: it is too large for the room that is left, or touches the page that is damaged.
_DOUBTFUL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT}


def explain(path: str, error: Exception) -> JournalError:
    """Make the error that stands for what sqlite has raised."""
    code = _code(error)
    advice = _DAMAGED if isinstance(error, UnicodeDecodeError) else _ADVICE.get(code)
    # What sqlite has no form for is the fault of one write, and so is what is larger than it can ever hold.
    is_unstorable = code == sqlite3.SQLITE_TOOBIG or isinstance(error, (OverflowError, UnicodeEncodeError))
    return (Unstorable if is_unstorable else JournalError)(f"the journal {path}: {error}" + (f"; {advice}" if advice else ""))


def is_files_fault(error: BaseException | None) -> bool | None:
    """Return whether what sqlite has raised is the file's fault, whatever was written; None: only another write can tell."""
    code = _code(error)
    return None if code in _DOUBTFUL else code in _UNAVAILABLE


def _code(error: BaseException | None) -> int:
    # The lowest byte is the error, the others say more.
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def connect(path: str, mode: str, busy: float = BUSY) -> sqlite3.Connection:
    """Open the file without looking at it; `mode` is "ro", "rw" or "rwc". Transactions are the caller's.

    Whatever finds the file locked by another program waits for `busy` seconds at most.
    """
    return sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=busy,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )


def check(path: str) -> bool:
    """Return whether there is a journal at `path`; it can be opened then, after a migration perhaps. Nothing is changed.

    Raises:
        JournalError: There is something else, or something is in the way.
    """
    if sqlite3.sqlite_version_info < _SQLITE:
        raise JournalError(f"journals need sqlite {'.'.join(map(str, _SQLITE))} or later, not {sqlite3.sqlite_version}")
    if not os.path.lexists(path):
        _check_alone(path)
        return False
    if not os.path.isfile(path):
        raise JournalError(f"the journal {path} is not a file: give the name of one, or a name in it")
    if os.path.getsize(path) == 0:
        raise JournalError(
            f"the journal {path} is empty, which no crash of a server leaves: remove it for a new one, or put a copy back"
        )
    _check_header(path)
    return True


def _check_header(path: str) -> None:
    """Read the header that every version has, without sqlite, which would change a file that it has to recover.

    A file that this process has open is not read that way, see `_descriptors`; there a connection has recovered it already.
    """
    try:
        header = peek(path, _HEADER_SIZE)
    except OSError as error:
        raise JournalError(f"the journal {path}: {error.strerror}; this user must be able to read and write it") from error
    if header is None:
        return
    if len(header) < _HEADER_SIZE or not header.startswith(_MAGIC):
        if _has_log(path):
            return  # a loss of power while the log was moved to the file: sqlite has what stood there in the log
        raise JournalError(f"{path} is not a sqlite file, or its beginning is damaged: give another name, or put a copy back")
    if int.from_bytes(header[_APPLICATION_AT : _APPLICATION_AT + 4], "big") != APPLICATION:
        raise JournalError(_FOREIGN.format(path))


def _has_log(path: str) -> bool:
    try:
        return peek(path + "-wal", 4) in _LOG_MAGIC
    except OSError:
        return False


def check_version(path: str, connection: sqlite3.Connection) -> None:
    """Find a journal of a newer version, one with tables missing, and a file that was cut off; nothing is changed."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION:
        raise JournalError(_FOREIGN.format(path))
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not 1 <= version <= len(MIGRATIONS):
        raise JournalError(
            f"the journal {path} has version {version}, this greensafe knows 1 to {len(MIGRATIONS)}: it was written by a newer "
            "one, which has to be used"
        )
    for table in TABLES:
        connection.execute(f"SELECT 1 FROM {table}").fetchone()


class Head(NamedTuple):
    """The row that a journal keeps about itself."""

    id: bytes
    boot: str
    offset: float
    last: float
    horizon: float | None
    expired: int
    evicted: int

    @property
    def clock(self) -> Stored:
        """Its time."""
        return Stored(self.boot, self.offset, self.last)


_COLUMNS = tuple(Head.__annotations__)


def head(path: str, connection: sqlite3.Connection) -> Head:
    """Read it, in a file that is a journal.

    Raises:
        JournalError: It is damaged.
    """
    row = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM greensafe_journal").fetchone()
    fault = "has no row of its own" if row is None else misfit(_COLUMNS, row)
    if fault is not None:
        raise JournalError(f"the journal {path} {fault}: it is damaged; put a copy back, or move it away")
    return Head(*row)


def _check_alone(path: str) -> None:
    """Refuse a write-ahead log without its file: a journal was moved away, and its log would be read into the new one."""
    if os.path.lexists(log := path + "-wal"):
        raise JournalError(
            f"the journal {path} is not there, but {log} is, which holds its latest requests: put the file back, or remove both"
        )


def create(path: str, here: Moment) -> None:
    """Make a new journal, all or nothing; its owner's alone."""
    draft = None
    try:
        draft = make_draft(path)
        with closing(connect(draft, "rw")) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            migrate(connection)
            row = (os.urandom(16), here.boot, offset(None, here), here.wall)
            connection.execute("INSERT INTO greensafe_journal (id, boot, offset, last) VALUES (?, ?, ?, ?)", row)
            set_wal(path, connection)
        if os.path.lexists(path):
            raise JournalError(f"the journal {path}: somebody has just put a file there; try again")
        os.rename(draft, path)
        _sync(os.path.dirname(path))
    except (OSError, sqlite3.Error) as error:
        raise explain(path, error) from error
    finally:
        if draft is not None:
            remove_draft(draft)


def set_wal(path: str, connection: sqlite3.Connection) -> None:
    """Have a write-ahead log, which the header says from then on; a copy by VACUUM INTO says something else.

    Raises:
        JournalError: It cannot have one.
    """
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise JournalError(f"the journal {path}: its file system cannot share memory (a network's?): choose another")
    connection.execute("PRAGMA user_version").fetchone()  # sqlite makes it when something is read


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema to the newest version, in one transaction; nothing is done if it is there already."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _sync(folder: str) -> None:
    """Make a rename durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
