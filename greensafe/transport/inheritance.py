"""Close libzmq's connections in a forked child.

A fork copies every descriptor, so a child keeps the port of its parent's server and both ends of its parent's connections. When
the parent is killed, nobody is told and nothing can bind until the child ends. libzmq's threads stay in the parent and nothing
in the child can use these descriptors, so the child closes them as its first act. Rules:

* They are closed, never shut down: the connection is the parent's, too.
* What libzmq's I/O threads poll is libzmq's, and nothing else is. Linux lists the targets of an epoll in /proc/self/fdinfo,
  each by its number and inode. The child closes a number only if it is a socket with this inode: a number that has come to mean
  something else meanwhile is left alone.
* An epoll is libzmq's if it appeared while a context made its first socket, or if a thread of libzmq's waits on it, and if its
  entries carry pointers as libzmq's do. (libev's, libuv's and Python's carry the descriptor.) The entry for the thread's own
  mailbox is kept as its mark: an epoll without it is another one that was given the same number.
* A listener is polled some time after `bind` returns, on a busy machine milliseconds. So those that `_binding` knows are closed
  as well.
* Parent and child share an epoll, so its list goes on changing. It is read before the fork and again in the child: a connection
  that the parent accepted a moment before the fork appears in the second list, one that it closes meanwhile is in the first.

Elsewhere than on Linux, without /proc or before Linux 4.13, nothing is known and nothing is closed. A fork while no descriptor
is left cannot read the lists either. A connection that libzmq accepted just before the fork, and does not poll yet when the
child reads the lists, stays open in the child.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import zmq
from gevent.monkey import get_original

from .binding import listeners

__all__ = ["noted"]

_PROC = "/proc/self"

#: A line of an epoll's fdinfo: the target's number, libzmq's data for it, and the target's inode; all but the first in hex.
_TARGET = re.compile(rb"^tfd: *(\d+) +events: *[0-9a-f]+ +data: *([0-9a-f]+) +pos:\S+ +ino:([0-9a-f]+)", re.MULTILINE)

#: In the names of libzmq's I/O threads.
_THREAD = b"ZMQbg/IO"

#: Of the arguments of epoll_wait, the third one, in hex: how many events libzmq's threads take at a time.
_MAX_EVENTS = b"0x100"

#: How often a thread that works is asked for its epoll, and seconds in between: it is in no system call then.
_TRIES, _PAUSE = 50, 20e-6

#: The half of an epoll's data in which others than libzmq keep the descriptor.
_LOW = 0xFFFF_FFFF

_NOTHING = contextlib.nullcontext()
_sleep = get_original("time", "sleep")

_is_known_here = sys.platform == "linux" and hasattr(os, "register_at_fork")

#: libzmq's epolls and the mark of each.
_marks: dict[int, bytes] = {}

#: Whether some context had begun before it was seen: its threads are looked for at each fork, since they may work just now.
_are_some_begun = False

#: Contexts that have made a socket.
_seen: weakref.WeakSet[Any] = weakref.WeakSet()

#: What libzmq polled just before the fork that is under way.
_polled: list[bytes] = []


def noted(context: object) -> contextlib.AbstractContextManager[None]:
    """Make a socket of `context` inside: at the first one libzmq starts the context's threads, whose epolls are noted."""
    if not _is_known_here or not isinstance(context, zmq.Context) or context in _seen:
        return _NOTHING
    return _noted(context)


@contextlib.contextmanager
def _noted(context: zmq.Context[Any]) -> Iterator[None]:
    before = _descriptors()
    yield
    _seen.add(context)
    # Where none is new the program has made the context's first socket. Where nothing could be listed, all would look new.
    if not before or not _note(_descriptors() - before):
        global _are_some_begun
        _are_some_begun = True
        _note(_waited_on())


def _note(descriptors: Iterable[int]) -> bool:
    """Remember those which are epolls of libzmq's; return whether there are any."""
    found = {fd: mark for fd in descriptors if (mark := _mark(_read_info(fd)))}
    _marks.update(found)
    return bool(found)


def _mark(info: bytes) -> bytes:
    """The line of the mailbox, if these are the targets of an epoll of libzmq's; else nothing."""
    found = list(_TARGET.finditer(info))
    if any(int(target[2], 16) & _LOW == int(target[1]) for target in found):
        return b""
    return next((target[0] for target in found if not _is_socket(int(target[1]))), b"")


def _read_info(fd: int) -> bytes:
    """Read what Linux tells of a descriptor; of an epoll, a line for each target."""
    return _read(f"{_PROC}/fdinfo/{fd}")


def _polled_now() -> list[bytes]:
    """Read what Linux tells now of libzmq's epolls."""
    found = [(mark, _read_info(fd)) for fd, mark in list(_marks.items())]
    return [info for mark, info in found if mark in info]


def _waited_on() -> set[int]:
    """The descriptors on which libzmq's threads wait, as far as they do wait."""
    found = set()
    for task in _list(f"{_PROC}/task"):
        if _THREAD in _read(f"{_PROC}/task/{task}/comm"):
            for _ in range(_TRIES):
                call = _read(f"{_PROC}/task/{task}/syscall").split()  # its number and arguments, or "running"
                if len(call) > 3 and call[3] == _MAX_EVENTS:
                    found.add(int(call[1], 16))
                    break
                _sleep(_PAUSE)
    return found


def _descriptors() -> set[int]:
    """The open descriptors; none if they cannot be listed."""
    folder = f"{_PROC}/fd"
    try:
        lowest = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return set()
    os.close(lowest)
    return set(map(int, _list(folder))) - {lowest}  # by which the list itself was read


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # no /proc, or no descriptor left
        return []


def _read(name: str) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # as above, or what it is about has ended
        return b""
    try:
        parts = []
        while part := os.read(fd, 1 << 20):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _is_socket(fd: int, inode: int | None = None) -> bool:
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and inode in (None, found.st_ino)


def _before_fork() -> None:
    global _polled
    if _are_some_begun:
        _note(_waited_on())
    _polled = _polled_now()


def _in_parent() -> None:
    global _polled
    _polled = []


def _in_child() -> None:
    global _polled, _are_some_begun
    polled, _polled, _are_some_begun = [*_polled, *_polled_now()], [], False
    found = {(int(target[1]), int(target[3], 16)) for info in polled for target in _TARGET.finditer(info)}
    found.update((fd, os.fstat(fd).st_ino) for fd in listeners())
    for known in (_marks, _seen):
        known.clear()
    for fd, inode in found:
        # libzmq makes none of its own inheritable. One that is was handed to it (USE_FD), by systemd perhaps, to be passed on.
        if _is_socket(fd, inode) and not os.get_inheritable(fd):
            os.close(fd)


if _is_known_here:
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
