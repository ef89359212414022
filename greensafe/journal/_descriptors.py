"""Descriptors of files that sqlite has open as well.

sqlite's locks on a file are the process's (POSIX): they end when anything in the process closes any descriptor of that file.
So whatever else opens one does it here: it is closed only when this process has no other descriptor of the same file. Until
then it is kept, and used again. Where that cannot be told (no descriptor is left to list them by) it is kept, too.

Any thread may call this; a thread holds the lock for the milliseconds that it takes to list all descriptors.

It does not know what the files are.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any

from gevent.monkey import get_original

from ..errors import JournalError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["CAREFULLY", "Key", "get", "key_at", "key_of", "let_go", "open_files", "peek", "sweep"]

#: How files are opened that somebody else may have put there: no link is followed, and a pipe is not waited for.
CAREFULLY = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))

#: Where a system lists a process's descriptors. If it lists the standard ones only (FreeBSD's devfs), even that is missing by
#: which the list is read.
_LIST = "/dev/fd"
_FIRST = 3

#: What tells a file from all others: device and inode.
Key = tuple[int, int]


def key_of(found: os.stat_result) -> Key:
    return found.st_dev, found.st_ino


def key_at(name: str) -> Key | None:
    """Of what stands there; None if that cannot be told."""
    try:
        return key_of(os.stat(name))
    except OSError:
        return None


def peek(path: str, size: int) -> bytes | None:
    """The beginning of a file, or None if this process has it open, or cannot tell.

    Raises:
        OSError: It cannot be read.
    """
    used = open_files()
    if used is None or key_at(path) in used:
        return None
    fd = os.open(path, os.O_RDONLY | CAREFULLY)
    try:
        return os.read(fd, size)
    finally:
        let_go(fd)


def get(path: str, how: int) -> int:
    """A descriptor of a regular file, for `let_go`; `how` is O_RDONLY or O_RDWR.

    Raises:
        JournalError: It cannot be opened, or is none.
    """
    try:
        with _lock:
            _sweep()
            fd = _take_kept(key_of(os.stat(path)), how)
        if fd is None:
            fd = os.open(path, how | CAREFULLY)
    except OSError as error:
        raise JournalError(
            f"the journal {path}: {error.strerror}; this user must be able to write to the file, its -wal and -shm, and "
            "their folder"
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise JournalError(f"the journal {path} is not a file: give the name of one, or a name in it")
    return fd


def let_go(fd: int) -> None:
    """Close it, as soon as that ends nobody's locks."""
    with _lock:
        _kept.append((key_of(os.fstat(fd)), fd))
        _sweep()


def sweep() -> None:
    """Close what can be closed by now."""
    with _lock:
        _sweep()


def open_files() -> set[Key] | None:
    """Return the files that this process has open, apart from those only kept here; None if that cannot be told."""
    with _lock:
        return _open_files()


def _sweep() -> None:
    used = _open_files() if _kept else None
    if used is not None:
        for each in [each for each in _kept if each[0] not in used]:
            _kept.remove(each)
            with contextlib.suppress(OSError):  # it is closed all the same, and nothing was written by it
                os.close(each[1])


def _take_kept(key: Key, how: int) -> int | None:
    for kept, fd in _kept:
        if kept == key and (how == os.O_RDONLY or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == how):
            _kept.remove((kept, fd))
            return fd
    return None


def _open_files() -> set[Key] | None:
    try:
        listed = [int(name) for name in os.listdir(_LIST)]
    except OSError:  # no such list here, or no descriptor left to read it by
        return None
    if max(listed, default=0) < _FIRST:
        return None
    kept = {fd for _, fd in _kept}
    found = set()
    for fd in listed:
        # OSError: the one by which the list was read; or another thread has closed it.
        with contextlib.suppress(OSError):
            if fd not in kept:
                found.add(key_of(os.fstat(fd)))
    return found


#: What cannot be closed yet.
_kept: list[tuple[Key, int]] = []

#: A native one: a greenlet that has it does not wait for anything meanwhile.
_new_lock = get_original("threading", "Lock")
_lock = _new_lock()


def _on_fork() -> None:
    """In a child, which has inherited no lock of sqlite's, but perhaps this one of a thread that it does not have."""
    global _lock
    _lock = _new_lock()
    for _, fd in _kept:
        with contextlib.suppress(OSError):  # that thread has just closed it
            os.close(fd)
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_on_fork)
