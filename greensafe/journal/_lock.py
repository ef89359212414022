"""Who may write to a journal: one server at a time, told by a lock file next to it.

Rules:

* The lock is the kernel's (flock), so it ends with its holder, however that ends. The file only carries it, and the holder's
  process id for people; left behind by a kill it is in nobody's way.
* It is an open file's, not a process's: a second server in the same process is refused as one in another process is. It ends
  at exec, and a forked child gives up its part at once: it never outlives the process that took it.
* The file goes when the lock is given up. So whoever has locked one looks whether it is still the one that stands there.

It does not know sqlite, whose own locks are held for moments: readers need none of this.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any

from gevent.monkey import get_original

from ..errors import JournalError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["Lock", "holder"]

#: Behind the journal's name.
SUFFIX = ".lock"

#: How often a lock is asked for that only those have who look (`holder`), and seconds in between.
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
        self._path = path + SUFFIX
        self._fd = _take(self._path, path)
        # On a full disk nobody is told; there the lock holds as well.
        with contextlib.suppress(OSError):
            os.truncate(self._fd, 0)
            os.write(self._fd, b"%d\n" % os.getpid())
        _held.add(self)

    def release(self) -> None:
        """Give it up; once more does nothing."""
        _held.discard(self)
        if self._fd >= 0:
            # Removed before it is unlocked: whoever opened it meanwhile sees that it is not there any more, and tries again.
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._drop()

    def _drop(self) -> None:
        """Close without unlocking: where it was inherited, the lock is the parent's."""
        fd, self._fd = self._fd, -1
        os.close(fd)


def holder(path: str) -> int | None:
    """The process that may write to the journal at `path`; None if nobody does, 0 if it has not said who it is."""
    try:
        fd = os.open(path + SUFFIX, os.O_RDONLY)  # whoever may read the journal may know
    except OSError:
        return None
    try:
        return None if fcntl is None or _try(fd, fcntl.LOCK_SH) else _process(fd)
    finally:
        os.close(fd)


def _take(name: str, path: str) -> int:
    while True:
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise JournalError(
                f"the journal {path} cannot be locked: {name}: {error.strerror}; its folder has to be there, and this user "
                "must be able to write there"
            ) from error
        if not _is_free(fd):
            process = _process(fd)
            os.close(fd)
            who = "this process" if process == os.getpid() else f"process {process}" if process else "another process"
            raise JournalError(
                f"the journal {path} is in use by {who}: one server at a time writes to a journal; stop that one, or give this "
                "one a file of its own"
            )
        if _is_at(name, fd):
            return fd
        os.close(fd)


def _is_free(fd: int) -> bool:
    """Take it, if no server has it.

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
        return os.path.samestat(os.stat(name), os.fstat(fd))
    except FileNotFoundError:
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
