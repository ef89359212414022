"""The lock file next to a journal, by which one server at a time may write to it.

Rules:

* The lock is the kernel's (flock), so it ends with its holder, however that ends. The file only carries it, and the holder's
  process id for people; left behind by a kill it is in nobody's way.
* It is an open file's, not a process's: a second server in the same process is refused as one in another process is. It ends
  at exec, and a forked child gives up its part at once: it never outlives the process that took it.
* The file goes when the lock is given up. So whoever has locked one checks whether it is still the one that stands there; a
  server does so again now and then (`check`), since anybody may take a lock file for a left-over.
* Only a file that a journal has made is written to: a regular one with nothing else in it than a process id. A link is not
  followed.

It does not know sqlite, whose own locks are held for moments: readers need none of this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import weakref
from typing import Any

from gevent.monkey import get_original

from ..errors import JournalError, JournalUnavailable
from ._descriptors import CAREFULLY, key_of
from ._files import in_use, is_held

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["Lock", "holder"]

log = logging.getLogger("greensafe.journal.sqlite")

#: Behind the journal's name.
SUFFIX = ".lock"

#: Its owner's alone: to be allowed to read a file is enough for keeping it locked.
MODE = 0o600

#: What is in one: a process id, or nothing if there was no room for it.
_CONTENT = re.compile(rb"[0-9]{0,19}\n?")
_LONGEST = 20

#: How often a lock is asked for that only readers hold for a moment (`holder`), and seconds in between.
TRIES = 300
PAUSE = 0.01

_sleep = get_original("time", "sleep")


class Lock:
    """The right to write to the journal at `path`, from when it is made until `release()`.

    Raises:
        JournalError: Another server has it, or the lock file cannot be made.
    """

    def __init__(self, path: str) -> None:
        if fcntl is None:
            raise JournalError("journals in a file need the locks of Unix: on this system a server can have none")
        self._of = path
        self._path = path + SUFFIX
        self._fd = _take(self._path, path)
        #: Somebody else had it at the last check.
        self.is_lost = False
        _held.add(self)

    def check(self) -> None:
        """Check that the lock file is still the one that is locked, and make another one if it is gone. Costs two stats.

        Raises:
            JournalUnavailable: Somebody else has made and locked another one, or it cannot be made.
        """
        try:
            if _is_at(self._path, self._fd):
                self.is_lost = False
                return
            self.is_lost = True
            fd = _take(self._path, self._of)
        except OSError as error:
            raise JournalUnavailable(f"{_cannot(self._of, self._path, error)}; see the system's log") from error
        except JournalError as error:
            raise JournalUnavailable(f"{error} (the lock file was removed or replaced while this process had it)") from error
        log.error("the journal %s: its lock file was removed or replaced while it was open; it was made again", self._of)
        self._drop()
        self._fd, self.is_lost = fd, False

    def release(self) -> None:
        """Give it up; once more does nothing."""
        _held.discard(self)
        if self._fd >= 0:
            # Removed before it is unlocked: a process that opened it meanwhile sees that it is gone, and tries again.
            # Another one that stands in its place is not ours.
            with contextlib.suppress(OSError):
                if _is_at(self._path, self._fd):
                    os.unlink(self._path)
            self._drop()

    def _drop(self) -> None:
        """Close without unlocking: where it was inherited, the lock is the parent's."""
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # it is closed all the same, and only a process id was written by it
            os.close(fd)


def holder(path: str) -> int | None:
    """Return the process that may write to the journal at `path`; None if there is none, 0 if it has not written its pid."""
    try:
        fd = os.open(path + SUFFIX, os.O_RDONLY | CAREFULLY)
    except OSError:  # it may have been removed, or be another user's
        return 0 if is_held(path) else None
    try:
        if fcntl is None:
            return None
        if not _try(fd, fcntl.LOCK_SH):
            return _process(fd)
    finally:
        os.close(fd)
    return 0 if is_held(path) else None


def _take(name: str, path: str) -> int:
    """Lock the file that stands at `name`, and write this process's id into it; return its descriptor."""
    while True:
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | CAREFULLY, MODE)
        except OSError as error:
            link = " (it is a link, which is not followed: remove it)" if os.path.islink(name) else ""
            raise JournalError(
                f"{_cannot(path, name, error)}{link}; its folder has to be there, and this user must be able to write there"
            ) from error
        is_locked = False
        try:
            _check_ours(name, path, fd)
            if not _is_free(fd):
                process = _process(fd)
                who = "this process" if process == os.getpid() else f"process {process}" if process else "another process"
                raise in_use(path, who)
            is_locked = _is_at(name, fd)
        except OSError as error:
            raise JournalError(f"{_cannot(path, name, error)}; its file system may have no locks: choose another") from error
        finally:
            if not is_locked:
                os.close(fd)
        if is_locked:
            _say(fd)
            return fd


def _cannot(path: str, name: str, error: OSError) -> str:
    return f"the journal {path} cannot be locked: {name}: {error.strerror}"


def _check_ours(name: str, path: str, fd: int) -> None:
    """Refuse a file that is not a lock of ours: its contents are about to be replaced."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or not _CONTENT.fullmatch(os.pread(fd, _LONGEST + 1, 0)):
        raise JournalError(
            f"the journal {path} cannot be locked: {name} is no lock file of a journal; move it away, or give the journal "
            "another name"
        )


def _say(fd: int) -> None:
    # On a full disk nobody is told; there the lock holds as well. That of an older version may be anybody's to lock.
    with contextlib.suppress(OSError):
        os.truncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    with contextlib.suppress(OSError):
        os.fchmod(fd, MODE)


def _is_free(fd: int) -> bool:
    """Take it, if no server has it; return whether that was so.

    Who looks whether one has it (`holder`) shares it with us, for a moment: that is waited for, however busy the machine is.
    """
    for _ in range(TRIES):
        if _try(fd, fcntl.LOCK_EX):
            return True
        if not _try(fd, fcntl.LOCK_SH):
            return False
        fcntl.flock(fd, fcntl.LOCK_UN)  # two that start at a time must not keep it from each other
        _sleep(PAUSE)
    return False


def _try(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(name: str, fd: int) -> bool:
    try:
        return key_of(os.lstat(name)) == key_of(os.fstat(fd))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False


def _process(fd: int) -> int:
    text = os.pread(fd, 20, 0).strip()
    return int(text) if text.isdigit() else 0


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _on_fork() -> None:
    for lock in list(_held):
        lock._drop()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_on_fork)
