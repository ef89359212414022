"""The time of a journal, which outlives processes and reboots.

The journal's time is the monotonic clock's plus an offset. A file keeps the offset, and the boot for which it holds:

    the same boot   the offset that is stored: no step of the wall clock can be seen, the clocks of all processes are the same
    another boot    an offset by which it is the time of day now; but never before what was stored last

The boot is named by Linux. Elsewhere each time a journal is opened counts as a boot: then the time of day decides between two
processes, and a limit that was stored is as good as that clock.

It does not know where the three are kept.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

__all__ = ["Moment", "Stored", "moment", "offset"]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Moment(NamedTuple):
    """The time on the machine's clocks; `boot` is the same text as long as the machine runs."""

    boot: str
    monotonic: float
    wall: float


class Stored(NamedTuple):
    """The part of it that the file keeps: the offset, the boot for which it holds, and a time that it has reached."""

    boot: str
    offset: float
    last: float


def moment() -> Moment:
    """Ask the machine."""
    return Moment(_boot(), time.monotonic(), time.time())


def offset(stored: Stored | None, here: Moment) -> float:
    """Return what to add to the monotonic clock from now on."""
    if stored is None:
        return here.wall - here.monotonic
    # A container may have a monotonic clock of its own in the same boot: it must not go back either.
    if stored.boot == here.boot and here.monotonic + stored.offset >= stored.last:
        return stored.offset
    return max(here.wall, stored.last) - here.monotonic


def _boot() -> str:
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return os.urandom(16).hex()
