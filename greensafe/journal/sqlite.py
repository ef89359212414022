"""A journal in one sqlite file.

In a sqlite database in WAL mode, by one server at a time; anybody may read it meanwhile. docs/journal.md has its tables.

Rules:

* A batch is a transaction, and its COMMIT returns when the disk has it. What was raised before that is rolled back; if that
  fails the connection is given up, and the next batch opens another one.
* What was committed is durable if and only if the files that have it still stand at their names. That is checked behind each
  COMMIT, before anybody is told. It is checked before BEGIN as well when the last check has failed, while nothing happens
  (`tidy`), and where the files cannot be guarded: so nothing more is written to files that nobody finds.
* One thread at a time; `now`, `dropped` and `id` are read from memory by any. Nothing here waits by gevent, and there are no
  locks but the file's.
* After a fork the child has a journal that is closed, and must not be used; the parent's goes on.

The parts: `_lock` and `_files` for who may write and where, `_place` for what stands beside it, `_schema` for what the file is,
`_clock` for its time, `_writing` for batches, `_effects` for a caller's own part in them, `_tidying` for what goes.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from types import MappingProxyType
from typing import Any, Literal

from ..errors import JournalError, JournalUnavailable
from ..sansio.records import Write
from ._clock import Stored, moment, offset
from ._files import Files
from ._lock import Lock
from ._place import warn_of_others
from ._schema import BUSY, SQLITE_ERRORS, check, check_version, connect, create, explain, head, is_files_fault, migrate, set_wal
from ._tidying import MOST, Dropped, evict, expire, oldest, renew, size
from ._writing import Writing
from .base import Journal

__all__ = ["SqliteJournal"]

log = logging.getLogger("greensafe.journal.sqlite")

#: Seconds by which a request may have been first sent earlier than its `since` says: a server can only tell when it came, or
#: work it out of what the client says, and both leave out the time on the way. What is within them counts as dropped: that is
#: an ABORTED that need not have been, where the other error would be a request that runs twice.
MARGIN = 60.0

#: Seconds that one try of a batch waits for another program that has the file locked. Short, so that it is logged soon:
#: `Commits` tries again.
_PATIENCE = 1.0

#: Where evicting stops, as a part of max_bytes.
_ENOUGH = 0.98

#: How often what is too old is looked for, in parts of the TTL: not after every commit, since that would sync once more.
_LOOKS = 1_000

#: Fewer are hardly more than the tables themselves.
_LEAST_BYTES = 2**17

#: Pages in the write-ahead log from which on a commit also moves them to the file: more make it rarer, but longer.
_CHECKPOINT = 1_000

#: Bytes of the log that are kept after a reader has held it up for long.
_LOG_BYTES = 64 * 2**20

_NONE = float("-inf")


class SqliteJournal(Journal):
    """A journal in a file, made when it is first opened.

    Args:
        path: The file. Next to it there are `-wal` and `-shm` (sqlite's) and `.lock` while it is open. Whatever is made is
            its owner's alone (mode 0600).
        ttl: Seconds for which a request is remembered after it last changed; that it runs is noted as a change, each half of
            them.
        max_bytes: How large the file may become; what is oldest goes then. It may be exceeded by what is running, by the
            write-ahead log, and by tables of your own, which count.
        synchronous: "FULL" for durable at each commit. "NORMAL" for fast: after a loss of power, but not after a crash, the
            latest commits may be gone, a whole number of them.

    Raises:
        TypeError, ValueError: An argument is not what it should be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ttl: float = 86_400.0,
        max_bytes: int = 2**30,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ) -> None:
        # Two names of one file have one lock.
        self.path = os.path.realpath(os.fsdecode(os.fspath(path)))
        self._ttl = _positive(ttl, "ttl is a number of seconds")
        self._max_bytes = int(_positive(max_bytes, "max_bytes is a number of bytes"))
        if self._max_bytes < _LEAST_BYTES:
            raise ValueError(f"max_bytes is at least {_LEAST_BYTES}, not {max_bytes!r}")
        if synchronous not in ("FULL", "NORMAL"):
            raise ValueError(f"synchronous is 'FULL' or 'NORMAL', not {synchronous!r}")
        self._synchronous = synchronous
        self._lock: Lock | None = None
        self._files: Files | None = None
        self._connection: sqlite3.Connection | None = None
        #: Something has failed, which may be the files' fault.
        self._is_in_doubt = False
        #: The batch that was committed to files that were not in their place any more, with its results.
        self._doubtful: tuple[Sequence[Write], list[Any]] | None = None
        self._offset = 0.0
        self._horizon = _NONE
        self._has_steps = True
        self._dropped = _counts(0, 0)
        self._next_look = _NONE

    # As in Journal.

    def open(self) -> None:
        if self._lock is not None:
            raise JournalError(f"the journal {self.path} is open already")
        lock = Lock(self.path)
        try:
            if not check(self.path):
                create(self.path, moment())
            self._files = Files(self.path)
            self._connection = self._connect(self._files, BUSY)
        except BaseException:
            self._let_go(lock)
            raise
        self._lock = lock
        _opened.add(self)
        warn_of_others(self.path)

    def close(self) -> None:
        _opened.discard(self)
        lock, self._lock = self._lock, None
        self._disconnect()
        self._let_go(lock)

    def now(self) -> float:
        if self._lock is None:
            raise JournalError(f"the journal {self.path} is not open")
        return monotonic() + self._offset

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        try:
            return self._commit(writes)
        except JournalError as error:
            self._raise_if_unavailable(error, may_be_large=bool(writes))
            raise

    def tidy(self, running: Collection[bytes]) -> bool:
        try:
            return self._tidy(running)
        except JournalError as error:
            self._raise_if_unavailable(error, may_be_large=True)
            raise

    @property
    def dropped(self) -> Mapping[str, int]:
        return self._dropped

    def __repr__(self) -> str:
        state = "closed" if self._lock is None else "open"
        counts = " ".join(f"{cause}={count}" for cause, count in self._dropped.items())
        return f"<SqliteJournal {state} {self.path}{counts and ' '}{counts}>"

    # Inside.

    def _commit(self, writes: Sequence[Write]) -> list[Any]:
        if self._doubtful is not None and writes:
            doubtful, results = self._doubtful
            if len(doubtful) == len(writes) and all(one is other for one, other in zip(doubtful, writes)):
                self._ready()  # raises as long as the files are not in their place
                self._doubtful = None
                return results
            self._doubtful = None
        with self._transaction() as connection:
            now = self.now()
            writing = Writing(connection, now, self._horizon + MARGIN, self._has_steps)
            results = writing.run(writes)
            if not writes:
                # A transaction that changes nothing would succeed on a disk that is full.
                connection.execute("UPDATE greensafe_journal SET last = ?", (now,))
        self._has_steps = writing.has_steps
        try:
            self._check_files()
        except JournalUnavailable:
            self._doubtful = writes, results
            raise
        return results

    def _tidy(self, running: Collection[bytes]) -> bool:
        now = self.now()
        is_due, is_too_large = now >= self._next_look, self._is_too_large()
        if not (is_due or is_too_large):
            return False
        with self._transaction() as connection:
            if is_due:
                renew(connection, running, now, now - self._ttl / 2)
            expired = expire(connection, running, now - self._ttl) if is_due else Dropped()
            evicted = evict(connection, running, int(self._max_bytes * _ENOUGH)) if is_too_large else Dropped()
            first = oldest(connection)
            horizon = max(self._horizon, expired.horizon, evicted.horizon)
            dropped = self._add(expired.count, evicted.count)
            if dropped != self._dropped:
                connection.execute(_DROP, {**dropped, "horizon": horizon, "last": now})
        self._horizon, self._dropped = horizon, dropped
        self._check_files()
        if is_due and expired.count < MOST:
            self._next_look = max((now if first is None else first) + self._ttl / 2, now + self._ttl / _LOOKS)
        return expired.count >= MOST or (evicted.count >= MOST and self._is_too_large())

    def _raise_if_unavailable(self, error: JournalError, may_be_large: bool) -> None:
        """Raise JournalUnavailable if the file is at fault, and not what was to be written to it.

        A file that is full, say, may have room for less: if it takes a change of one row, the batch was too large.
        """
        cause = error.__cause__
        is_fault = is_files_fault(cause)
        if is_fault is None:
            is_fault = not (may_be_large and self._is_writable())
        if is_fault:
            raise JournalUnavailable(str(error)) from cause

    def _is_writable(self) -> bool:
        try:
            self._commit(())
        except JournalError:
            return False
        return True

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a transaction that is durable on leaving, or rolled back."""
        try:
            connection = self._ready()
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            self._roll_back()
            # What does not fit into sqlite's types is a fault of one write, as what is too large is.
            if isinstance(error, (*SQLITE_ERRORS, OverflowError)):
                raise explain(self.path, error) from error
            raise

    def _roll_back(self) -> None:
        self._is_in_doubt = True
        if self._connection is None:
            return
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()

    def _ready(self, is_sure: bool = False) -> sqlite3.Connection:
        """The connection; `is_sure` to check first that this is the one server that may write, and where."""
        if self._lock is None or self._files is None:
            raise JournalError(f"the journal {self.path} is not open")
        if is_sure or self._is_in_doubt or not self._files.is_guarded:
            self._is_in_doubt = True
            was_lost = self._lock.is_lost
            self._lock.check()
            if was_lost:
                # What is in memory of the file may be wrong by now: another one had it.
                self._disconnect()
            self._check_files(is_sure=True)
        if self._connection is None:
            self._connection = self._connect(self._files, _PATIENCE)
        return self._connection

    def _check_files(self, is_sure: bool = False) -> None:
        """Check that the next program that opens the file finds what was written, or raise JournalUnavailable."""
        self._is_in_doubt = True
        connection, files = self._connection, self._files
        if connection is not None and files is not None and not files.check(connection, is_sure):
            self._disconnect()
        self._is_in_doubt = False

    def _connect(self, files: Files, busy: float) -> sqlite3.Connection:
        """Open the file, waiting `busy` seconds for other programs, and read what is kept in memory of it."""
        connection = None
        files.expect()
        try:
            connection = connect(self.path, "rw", busy)
            check_version(self.path, connection)
            set_wal(self.path, connection)
            files.guard()
            for setting in (
                f"synchronous = {self._synchronous}",
                f"wal_autocheckpoint = {_CHECKPOINT}",
                f"journal_size_limit = {_LOG_BYTES}",
                # On macOS alone: there fsync does not reach the disk.
                "fullfsync = ON",
            ):
                connection.execute(f"PRAGMA {setting}")
            migrate(connection)
            self._start_clock(connection)
            self._read(connection)
            (self._has_steps,) = connection.execute("SELECT EXISTS (SELECT 1 FROM greensafe_steps)").fetchone()
            connection.execute(f"PRAGMA busy_timeout = {int(_PATIENCE * 1000)}")
        except BaseException as error:
            if connection is not None:
                files.disconnect(connection)
            if isinstance(error, SQLITE_ERRORS):
                raise explain(self.path, error) from error
            raise
        return connection

    def _start_clock(self, connection: sqlite3.Connection) -> None:
        """Find the offset; it is written back in any case, which shows whether the file can be written to."""
        connection.execute("BEGIN IMMEDIATE")
        stored = head(self.path, connection).clock
        changes = [connection.execute(_LATEST, (state,)).fetchone()[0] for state in range(3)]
        last = max([stored.last, *(time for time in changes if time is not None)])
        here = moment()
        found = offset(Stored(stored.boot, stored.offset, last), here)
        connection.execute("UPDATE greensafe_journal SET boot = ?, offset = ?, last = ?", (here.boot, found, last))
        connection.execute("COMMIT")
        self._offset = found

    def _read(self, connection: sqlite3.Connection) -> None:
        found = head(self.path, connection)
        self.id = found.id
        self._horizon = _NONE if found.horizon is None else found.horizon
        self._dropped = _counts(found.expired, found.evicted)

    def _add(self, expired: int, evicted: int) -> Mapping[str, int]:
        return _counts(self._dropped["expired"] + expired, self._dropped["evicted"] + evicted)

    def _is_too_large(self) -> bool:
        try:
            return size(self._ready(is_sure=True)) > self._max_bytes
        except SQLITE_ERRORS as error:
            raise explain(self.path, error) from error

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._files is not None:
            self._files.disconnect(connection)

    def _let_go(self, lock: Lock | None) -> None:
        files, self._files = self._files, None
        self._doubtful = None
        if files is not None:
            files.close()
        if lock is not None:
            lock.release()

    def _on_fork(self) -> None:
        """In a child: let go without touching anything. Closing might wait for ever for a thread that only the parent has."""
        if self._connection is not None:
            import ctypes  # which not every Python has

            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        self._connection = self._lock = self._files = None


_DROP = "UPDATE greensafe_journal SET last = :last, horizon = :horizon, expired = :expired, evicted = :evicted"

#: What is a number: bytes and text, which only damage puts there, come after all of them.
_LATEST = "SELECT max(changed) FROM greensafe_requests WHERE state = ? AND changed < 9e999"

_opened: weakref.WeakSet[SqliteJournal] = weakref.WeakSet()


def _on_fork() -> None:
    for journal in list(_opened):
        journal._on_fork()
    _opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_on_fork)


def _counts(expired: int, evicted: int) -> Mapping[str, int]:
    return MappingProxyType({"expired": expired, "evicted": evicted})


def _positive(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}, not {value!r}")
    if not 0 < value <= sys.float_info.max:  # NaN is not, nor is an int that no float can hold
        raise ValueError(f"{what}, more than 0, not {value!r}")
    return float(value)
