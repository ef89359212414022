"""Damage in a write-ahead log that sqlite does not report: where a page does not check out, it takes the log to end there.

https://www.sqlite.org/fileformat2.html#the_write_ahead_log has the format. Each page carries the salts of the log that it
belongs to, and a checksum over all of the log before it. Behind the last page that checks out there may be pages of an older
log, which have other salts; and of a transaction that was never committed. If a commit of this log is there, it was cut off.
What was cut off with the end of the file leaves no trace.

It does not know what is in the pages.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from gevent.monkey import get_original

from ..errors import JournalError
from ._descriptors import CAREFULLY
from ._files import is_journal_here

__all__ = ["log_faults"]

_HEADER = struct.Struct(">IIIIIIII")
_PAGE = struct.Struct(">IIIIII")

#: The first four bytes, and the byte order of the checksums.
_ORDERS = {0x377F0682: "<", 0x377F0683: ">"}

_SIZES = [1 << bit for bit in range(9, 17)]

#: A server may be writing just then: damage is what is found twice, with seconds in between.
_TRIES = 5
PAUSE = 0.05

_sleep = get_original("time", "sleep")


class _Found(NamedTuple):
    """The end of a log as sqlite sees it, and what is behind it: pages of the same log, and how many of them end a commit."""

    at: int
    pages: int
    commits: int
    header: bytes


def log_faults(path: str) -> Iterator[str]:
    """Describe in whole sentences what of the journal's log was cut off. A journal that this process has open is not read.

    Raises:
        JournalError: It cannot be read.
    """
    if is_journal_here(path):
        return
    name = path + "-wal"
    before = None
    for _ in range(_TRIES):
        found = _look(name)
        if found is None:
            return
        if found == before:
            yield _sentence(name, found)
            return
        before = found
        _sleep(PAUSE)


def _sentence(name: str, found: _Found) -> str:
    why = "that is damage, unless a loss of power has interrupted the writing of just that"
    if found.at == 0:
        return f"{name}: its header does not check out, and sqlite reads nothing of it: {why}"
    return (
        f"{name}: sqlite reads nothing from byte {found.at} on, but {found.pages} pages of the same log are there, with the "
        f"ends of {found.commits} commits: {why}"
    )


def _look(name: str) -> _Found | None:
    """Read the log once; None if it is whole, or not there."""
    try:
        with open(name, "rb", opener=lambda name, how: os.open(name, how | CAREFULLY)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise JournalError(f"{name} is not a file: move it away")
            return _read(file, found.st_size)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{name}: {error.strerror}; this user must be able to read it") from error


def _read(file: BinaryIO, size: int) -> _Found | None:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or (size == _HEADER.size and not header.strip(b"\0")):
        return None
    magic, _, page_size, _, *salts, first, second = _HEADER.unpack(header)
    order = _ORDERS.get(magic)
    if order is None or page_size not in _SIZES or _sum(order, header[:24], (0, 0)) != (first, second):
        return _Found(0, 0, 0, header)
    at, sums = _HEADER.size, (first, second)
    behind: list[int] = []
    end = 0
    while at + _PAGE.size + page_size <= size:
        page = file.read(_PAGE.size + page_size)
        if len(page) < _PAGE.size + page_size:
            break
        number, commit, *of, first, second = _PAGE.unpack_from(page)
        is_of_this = of == salts
        if not end:
            sums = _sum(order, page[_PAGE.size :], _sum(order, page[:8], sums))
            is_next = sums == (first, second)  # they do not cover the salts, which may be what is damaged
            if not (is_of_this and is_next and number):
                end = at
                is_of_this |= is_next
        if end and is_of_this:
            behind.append(commit)
        at += len(page)
    commits = sum(commit > 0 for commit in behind)
    return _Found(end, len(behind), commits, header) if commits else None


def _sum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    numbers = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for one, other in zip(numbers, numbers):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second
