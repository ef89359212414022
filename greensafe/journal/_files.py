"""The files of an open journal: kept from being taken away, and checked for being those that were opened.

sqlite's own lock on a file is the process's (POSIX), and ends when *anything* in the process closes *any* descriptor of that
file: a handler that copies the journal is enough. The next program that opens and closes the database then takes itself for the
last one, and deletes the write-ahead log; the journal would go on writing to a log that nobody finds any more. So:

* Where the system has locks of open files (Linux), one stands beside sqlite's, over the same bytes. No close ends it but its
  own. It is let go before sqlite closes the file, so that the last one to close still tidies up.
* Another byte is the server's. Removing the lock file does not let in a second server, nor does another name of the same file.
* `check` compares what stands at the names with what was opened, for what no lock prevents: files that are removed, moved or
  replaced. After each commit it asks Linux for the names of the descriptors: a stat of a file that was just written costs more,
  since kernels from 6.13 on then note the time of its next write more exactly.

It does not know what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import struct
import sys
import weakref
from typing import Any

from ..errors import JournalError, JournalUnavailable
from ._descriptors import Key, get, key_at, key_of, let_go, open_files

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["Files", "in_use", "is_held", "is_journal_here"]

log = logging.getLogger("greensafe.journal.sqlite")

# https://www.sqlite.org/src/file/src/os.h: what every connection locks for reading, as long as it is open.
_SHARED_FIRST = 0x40000002
_SHARED_SIZE = 510

#: Behind sqlite's: the server's byte.
_SERVER = _SHARED_FIRST + _SHARED_SIZE

#: The byte of the shared memory that says it is in use (sqlite's "dead man switch"). A program that finds it unlocked begins
#: the memory anew.
_MEMORY_IN_USE = 128

#: struct flock of Linux.
_FLOCK = struct.Struct("hhqqi0q")

_HAS_LOCKS = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK")

#: Where Linux tells how the file of a descriptor is called by now.
_NAMES = "/proc/self/fd"

#: Of a file system that knows no such locks.
_UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class Files:
    """The three files of the journal at `path`, for the one server that may write to it.

    Raises:
        JournalError: Another server has the file, or this user may not write to it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._names = (path, path + "-wal", path + "-shm")
        self._log = self._memory = -1
        #: Where the system says how the file and the log are called, and what it should say.
        self._links: tuple[tuple[str, str], ...] = ()
        #: No program deletes the log by closing the file, and no other server can have it: what is left are people.
        self.is_guarded = False
        #: What the connection has opened; none if there is no connection.
        self._keys: tuple[Key, ...] = ()
        if is_journal_here(path):
            raise in_use(path, "this process")
        self._fd = get(path, os.O_RDWR)
        self._file = key_of(os.fstat(self._fd))
        try:
            if _lock(self._fd, "write", _SERVER, 1) is False:
                raise in_use(path, "another server, whose lock file was removed or which has the file by another name")
        except BaseException:
            let_go(self._fd)
            raise
        _here.add(self)

    def expect(self) -> None:
        """Check that the file is still there; before a connection is opened, which writes to what it finds.

        Raises:
            JournalUnavailable: It is not, or another one stands in its place.
        """
        if key_at(self.path) != self._file:
            raise self._error(f"{self.path} was removed, renamed or replaced")

    def guard(self) -> None:
        """Keep other programs from deleting the log as they close the file; behind a connection's first statement.

        It has sqlite's own lock from then on, so nobody else has the file for itself.

        Raises:
            JournalUnavailable: Somebody has, since something in this process has just ended that lock; or the log and the
                shared memory that stand at the names are not those of the connection.
        """
        if (got := _lock(self._fd, "read", _SHARED_FIRST, _SHARED_SIZE)) is False:
            raise JournalUnavailable(f"the journal {self.path}: another program has it for itself just now")
        self.is_guarded = got is True
        here, keys = open_files(), [key_at(name) for name in self._names]
        for name, key in zip(self._names, keys):
            if key is None or (here is not None and key not in here):
                raise JournalUnavailable(
                    f"the journal {self.path}: {name} is not what was just opened: another connection of this process may keep "
                    "one that was removed; close that, or restart the server"
                )
        try:
            self._log = get(self._names[1], os.O_RDONLY)
            self._memory = get(self._names[2], os.O_RDWR)
        except JournalError as error:  # no descriptor is left, say
            raise JournalUnavailable(str(error)) from error
        self._keys = self._file, key_of(os.fstat(self._log)), key_of(os.fstat(self._memory))
        if keys != list(self._keys):
            raise self._error("its files were replaced")
        self._links = tuple((f"{_NAMES}/{fd}", name) for fd, name in zip((self._fd, self._log), self._names))
        _lock(self._memory, "read", _MEMORY_IN_USE, 1)

    def check(self, connection: sqlite3.Connection, is_sure: bool = False) -> bool:
        """Check that what the connection writes to is what stands at the names.

        If only the log is gone, what is in it is moved to the file. Then all of it is there, and the connection has to be
        replaced by another one, which begins a new log: returns False.

        Args:
            connection: The one that was opened before `guard`.
            is_sure: Check the shared memory as well, which holds nothing that is not in the log.

        Raises:
            JournalUnavailable: It is not, and nothing can be done about it here.
        """
        if (not is_sure and self._are_named()) or (fault := self._fault()) is None:
            return True
        is_in_place = key_at(self.path) == self._file
        # Another log that was written to is another program's, which did not know of ours: they cannot be made one.
        if not (is_in_place and self._has_foreign_log()) and _move_log(connection) and is_in_place:
            log.error(
                "the journal %s: %s while it was open; its contents were moved to the file, nothing is lost", self.path, fault
            )
            return False
        raise self._error(fault)

    def disconnect(self, connection: sqlite3.Connection) -> None:
        """Close the connection. The last one of all has sqlite remove the log, unless that is another's."""
        if self._keys and key_at(self.path) != self._file:
            # sqlite would leave the log as it is, to be read into whatever stands there next.
            _move_log(connection)
        if not self._has_foreign_log():
            _unlock(self._fd, _SHARED_FIRST, _SHARED_SIZE)
        connection.close()
        _unlock(self._fd, _SHARED_FIRST, _SHARED_SIZE)
        self._keys = self._links = ()
        unused = (self._log, self._memory)
        self._log = self._memory = -1  # before they are closed: a child that is forked just now closes what stands here
        for fd in unused:
            _release(fd)

    def close(self) -> None:
        """Give up the file; after the connection. Once more does nothing."""
        _here.discard(self)
        fd, self._fd = self._fd, -1
        _release(fd)

    # Inside.

    def _are_named(self) -> bool:
        """Return whether the system says that the file and the log are called what they should; False if it says nothing."""
        try:
            for link, name in self._links:
                if os.readlink(link) != name:
                    return False
        except OSError:
            return False
        return True

    def _fault(self) -> str | None:
        """Describe what is wrong with the files; None if they are those that were opened."""
        name = self.path
        try:
            for name, key in zip(self._names, self._keys):
                if key_of(os.stat(name)) != key:
                    return f"{name} was replaced by another file"
        except FileNotFoundError:
            return f"{name} was removed or renamed"
        except OSError as error:
            return f"{name} cannot be reached ({error.strerror})"
        return None

    def _has_foreign_log(self) -> bool:
        """Return whether another program may have written to a log of its own, or to this one over our pages."""
        if not self._keys:
            return False
        try:
            found = os.stat(self._names[1])
        except OSError:
            return False
        if key_of(found) == self._keys[1]:
            return key_at(self._names[2]) not in (None, self._keys[2])
        return found.st_size > 0

    def _error(self, fault: str) -> JournalUnavailable:
        return JournalUnavailable(
            f"the journal {self.path}: {fault} while it was open; nothing is stored until it is put back: stop the server "
            "before a journal is moved, replaced or cleaned up, and `greensafe journal verify` it"
        )

    def _on_fork(self) -> None:
        """In a child: close without unlocking, what was inherited is the parent's. A child has no POSIX locks to lose."""
        for fd in (self._fd, self._log, self._memory):
            if fd >= 0:
                os.close(fd)
        self._fd = self._log = self._memory = -1


def in_use(path: str, who: str) -> JournalError:
    """Make the error for a journal that `who` has."""
    return JournalError(
        f"the journal {path} is in use by {who}: one server at a time writes to a journal; stop that one, or give this one a "
        "file of its own"
    )


def is_journal_here(path: str) -> bool:
    """Return whether this process has the file open as a journal."""
    key = key_at(path)
    return key is not None and any(each._file == key for each in list(_here))


def is_held(path: str) -> bool:
    """Return whether a server has the file, be its lock file there or not; False also where that cannot be told."""
    if is_journal_here(path):
        return True
    if not _HAS_LOCKS:
        return False
    try:
        fd = get(path, os.O_RDONLY)
    except JournalError:
        return False
    try:
        asked = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _SERVER, 1, 0))
        return bool(_FLOCK.unpack(asked)[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        let_go(fd)


def _move_log(connection: sqlite3.Connection) -> bool:
    """Move what is in the log to the file; return whether that is all of it."""
    try:
        _, pages, moved = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error:
        return False  # what is wrong with the files is about to be said
    return bool(pages == moved)


def _lock(fd: int, how: str, start: int, length: int) -> bool | None:
    """Take a lock that is this open file's; return False if another has one, None if there are no such locks here."""
    if not _HAS_LOCKS:
        return None
    kind = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK}[how]
    try:
        _set(fd, kind, start, length)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in _UNSUPPORTED:
            raise JournalError(f"a lock cannot be had: {error.strerror}; the system's log may say why") from error
        return None
    return True


def _unlock(fd: int, start: int, length: int) -> None:
    """Let a lock go. One that stays all the same keeps others from tidying up, and ends with the descriptor."""
    if _HAS_LOCKS:
        with contextlib.suppress(OSError):
            _set(fd, fcntl.F_UNLCK, start, length)


def _set(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _release(fd: int) -> None:
    if fd >= 0:
        _unlock(fd, 0, 0)  # it may have to stay open
        let_go(fd)


_here: weakref.WeakSet[Files] = weakref.WeakSet()


def _on_fork() -> None:
    for each in list(_here):
        each._on_fork()
    _here.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_on_fork)
