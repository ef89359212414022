"""Makes the routing ids that libzmq gives to connections unguessable.

A ROUTER, REP or STREAM gives each peer that announces no routing id an id of five bytes: a zero and a number of 32 bits. Each
peer gets the next number; libzmq draws the first one from libc's `rand` when the socket is made. It never seeds `rand`, so in
every process the first socket would begin at 00 6B8B4567. A peer may announce any id, also one of these. If it could guess them
it would take another peer's place, or announce the number that comes next: then libzmq aborts the process as soon as the next
ordinary peer connects.

Rules:

* `rand` is seeded from the system's random source each time before such a socket is made. A peer that has learned ids of one
  socket knows nothing of those of the next one, or of a forked child's. Only two that two threads make in the same moment may
  share a seed.
* That changes state of the whole process: a program that calls `srand` itself, in order to repeat its numbers, gets others as
  soon as such a socket is made. Python's `random` is not concerned.
* The ids of one socket stay consecutive, which nobody can change from outside of libzmq. No peer is told its own.

On Windows, and where Python has no ctypes, nothing is seeded. What remains possible is in docs/security.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import zmq

__all__ = ["draw_ids"]

#: What draws a number when it is made: an id's for each peer, or, of a REQ, those of its requests (REQ_CORRELATE).
_DRAWING = frozenset(getattr(zmq, name) for name in ("REQ", "REP", "ROUTER", "STREAM", "SERVER", "PEER") if hasattr(zmq, name))


def draw_ids(kind: int) -> None:
    """Have the ids of the socket of this type that is made next begin where nobody can guess; about 5 µs."""
    if kind in _DRAWING and _srand is not None:
        _srand(int.from_bytes(os.urandom(4), "little"))


def _find() -> Callable[[int], object] | None:
    """Find libc's srand, which libzmq's numbers come from; None where it cannot be had."""
    if os.name != "posix":
        return None
    try:
        import ctypes

        # PyDLL, so that no other thread gets Python's lock meanwhile: what it may do in between is for others, too.
        srand = ctypes.PyDLL(None).srand
        srand.argtypes, srand.restype = (ctypes.c_uint,), None
    except (ImportError, OSError, AttributeError):
        return None
    found: Callable[[int], object] = srand
    return found


_srand = _find()
