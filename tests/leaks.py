"""What is alive in this process now that was not when a test began?

Rules: one pass over the collector's objects finds greenlets and contexts, /proc finds the rest. Compared is by identity, so
what was there before (the hub, its threadpool, a module fixture's server) is never reported, nor is what is dead, closed or
ends within the limit. Where there is no /proc only greenlets and contexts are looked for.

It does not know sockets: each holds a descriptor, and shows as that. Nor does it see what is garbage but not collected yet:
the collector runs before anything is reported.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import gevent
import zmq
from gevent.hub import Hub
from greenlet import greenlet
from helpers import MS, Patience

_PROC = Path("/proc")
_GEVENT = str(Path(gevent.__file__).parent)


@dataclass(frozen=True)
class Census:
    """What was alive at one moment; an identity each, and enough to describe it later."""

    objects: dict[int, weakref.ref[Any]]
    descriptors: dict[str, str]
    threads: frozenset[str]
    children: frozenset[str]

    def since(self, before: Census) -> list[str]:
        """Describe, one line each, what is here and was not in `before`."""
        objects = [found for key, ref in self.objects.items() if (found := ref()) is not None and not before._has(key, found)]
        names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
        return [
            *(_describe(found) for found in objects),
            *(f"descriptor {fd}: {target}" for fd, target in self.descriptors.items() if before.descriptors.get(fd) != target),
            *(f"thread {tid}: {names.get(tid) or _read(f'self/task/{tid}/comm')}" for tid in self.threads - before.threads),
            *(f"child process {pid}: {_command(pid)}" for pid in self.children - before.children),
        ]

    def _has(self, key: int, found: object) -> bool:
        # An address alone may have been given to something new.
        return key in self.objects and self.objects[key]() is found


def census() -> Census:
    """Count what is alive now."""
    here = gevent.getcurrent()
    kinds = _with_subclasses(greenlet) | _with_subclasses(zmq.Context)
    # type() in a set, because isinstance() is slower and asks proxies for the class of what they stand for.
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    objects = {id(thing): weakref.ref(thing) for thing in found if thing is not here and _is_alive(thing)}
    tasks = _list("self/task")
    children = frozenset(pid for tid in tasks for pid in _read(f"self/task/{tid}/children").split())
    return Census(objects, _descriptors(), frozenset(tasks), children)


def left_behind(before: Census, limit: float) -> list[str]:
    """Give what is new since `before` up to `limit` seconds of patience to end; the hub turns meanwhile.

    Returns:
        A line for each thing that is still there, empty if none is.
    """
    gevent.sleep(0)
    patience = None
    while found := census().since(before):
        patience = patience or Patience(limit)
        if not patience.left():
            break
        gc.collect()
        gevent.sleep(MS)
    return found


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


def _is_alive(thing: Any) -> bool:
    if isinstance(thing, zmq.Context):
        return not thing.closed and not thing._shadow
    # The main greenlet of a thread has no parent: it is counted as the thread. A hub lives as long as its thread.
    return bool(thing) and not isinstance(thing, Hub) and thing.parent is not None


def _describe(thing: Any) -> str:
    if isinstance(thing, zmq.Context):
        return f"context not closed: {thing!r}"
    return f"greenlet {thing!r}{_place(thing.gr_frame)}"


def _place(frame: FrameType | None) -> str:
    """Name the line at which a greenlet waits: the innermost one outside gevent."""
    while frame is not None and frame.f_code.co_filename.startswith(_GEVENT):
        frame = frame.f_back
    return "" if frame is None else f" in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}"


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in _list("self/fd"):
        try:
            found[fd] = os.readlink(_PROC / "self/fd" / fd)
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    return found


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(_PROC / folder)
    except FileNotFoundError:
        return []


def _read(name: str) -> str:
    """Read a file in /proc; empty if the thread or process it is about has ended."""
    try:
        return (_PROC / name).read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _command(pid: str) -> str:
    return _read(f"{pid}/cmdline").replace("\0", " ").strip() or "ended, but nobody has waited for it"
