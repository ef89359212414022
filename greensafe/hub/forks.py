"""Objects that a forked child inherits, and how they are kept from being used there.

A forked child has the parent's sockets but not libzmq's threads, and shares the descriptors by which both are woken. So it must
never touch the parent's sockets: not even reading EVENTS, which would eat what the parent is waiting for. (libzmq notices the
fork and says EINTR, upon which pyzmq asks again, for ever.) What a child needs it opens itself: contexts and clients do that at
their first use, servers at `start`; sockets cannot, and say so.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

import gevent

__all__ = ["forbid_in_child", "generation", "own_loop"]


class _Inherited(Protocol):
    def on_fork(self) -> None: ...


_generation = 0
_reinit_done = 0
_forbidden: weakref.WeakSet[_Inherited] = weakref.WeakSet()


def generation() -> int:
    """Return how often this process and its ancestors were forked. An object made at another number is the parent's."""
    return _generation


def forbid_in_child(made: _Inherited) -> None:
    """Have `made.on_fork()` called in every child that inherits it: so that what is done often need not ask each time."""
    _forbidden.add(made)


def own_loop() -> None:
    """Give this process an event loop of its own, if gevent has not done so already."""
    global _reinit_done
    if _reinit_done != _generation:
        _reinit_done = _generation
        gevent.reinit()


def _on_fork() -> None:
    global _generation
    _generation += 1
    for inherited in list(_forbidden):
        inherited.on_fork()
    _forbidden.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_on_fork)
