"""Statements that do the same for many rows.

A statement is a function of a number of rows. It has places for 1, 2, 4 ... 256 of them; those that are left over are NULL,
which is nobody's id: so there are few statements, and sqlite3 keeps them all prepared. Parameters that all share come first.

Bytes are given as bytearrays: sqlite3 looks for an adapter of what is bytes, each time anew, which costs more than the copy (in
Python 3.11 0.65 against 0.22 µs for 16 bytes), and holds the interpreter's lock.

It does not know what the rows are.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

__all__ = ["MOST", "execute", "fetch", "marks", "rows"]

#: The most rows of one statement.
MOST = 256

_Rows = Sequence[Sequence[Any]]


def execute(connection: sqlite3.Connection, statement: Callable[[int], str], given: _Rows, *first: Any) -> int:
    """Execute for all rows, as few times as possible; return how many rows of the table were changed."""
    return sum(connection.execute(statement(size), [*first, *parameters]).rowcount for size, parameters in _chunks(given))


def fetch(connection: sqlite3.Connection, statement: Callable[[int], str], given: _Rows) -> Iterator[Any]:
    """Select for all rows."""
    for size, parameters in _chunks(given):
        yield from connection.execute(statement(size), parameters).fetchall()


def rows(count: int, width: int) -> str:
    """Return the text behind VALUES."""
    return ",".join([f"({marks(width)})"] * count)


def marks(count: int) -> str:
    """Return the text in the parentheses of IN."""
    return ",".join("?" * count)


def _chunks(given: _Rows) -> Iterator[tuple[int, list[Any]]]:
    """Yield for how many rows a statement has to be, and its parameters."""
    for start in range(0, len(given), MOST):
        chunk = given[start : start + MOST]
        size = 1 << (len(chunk) - 1).bit_length()
        nothing = repeat(None, (size - len(chunk)) * len(chunk[0]))
        given_all = chain.from_iterable(chunk)
        yield size, [*[bytearray(each) if type(each) is bytes else each for each in given_all], *nothing]
