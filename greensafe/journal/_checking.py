"""Checks of rows that were read from a journal.

sqlite has no checksums. A bit that has flipped on the disk may make a text of bytes, or one number of another, without sqlite
seeing anything wrong; so each row is looked at before it is used.

It does not know what becomes of a row that is damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["misfit"]

_NUMBER = (int, float)

#: What each column of a request, of a step, and of the journal's own row is.
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (bytes,),
    "state": (int,),
    "changed": _NUMBER,
    "since": _NUMBER,
    "until": (*_NUMBER, type(None)),
    "digest": (bytes,),
    "attempts": (int,),
    "fruitless": (int,),
    "kind": (int,),
    "client": (bytes,),
    "metadata": (bytes,),
    "payload": (bytes, type(None)),
    "name": (str,),
    "number": (int,),
    "value": (bytes,),
    "boot": (str,),
    "offset": _NUMBER,
    "last": _NUMBER,
    "horizon": (*_NUMBER, type(None)),
    "expired": (int,),
    "evicted": (int,),
}

#: OPEN, DONE, ACKED.
_STATES = range(3)


def misfit(columns: Sequence[str], row: Sequence[Any]) -> str | None:
    """Describe the first of these columns that cannot be used, as the end of a sentence; None if there is none."""
    for column, value in zip(columns, row, strict=True):
        if not isinstance(value, _TYPES[column]) or (column == "state" and value not in _STATES):
            return f"has the impossible {column} {value!r}"
    return None
