"""The removal of requests that are too old, or too many.

Rules:

* Older than the TTL is what has not changed for that long. What is running stays, and does not age: that it runs is noted each
  half of a TTL (`renew`). Else what had run for longer would be too old as soon as its server is killed, before its client can
  send it again.
* Too much is counted in pages that are in use, with whatever else is in the file. Then the oldest go, of those that are ACKED,
  then of those that are DONE, then of those that are OPEN, until a fiftieth is free: so that it is not done at every commit.
* Whatever goes is counted, and raises the horizon to when it was first sent; in one transaction, which takes a bounded time.

It runs inside the caller's transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["MOST", "Dropped", "evict", "expire", "oldest", "renew", "size"]

#: The most requests that go in one transaction: some 10 ms, if they are small.
MOST = 1_000

#: So many go before the first look at the size, at most twice as many before each further one.
_AT_FIRST = 8

#: ACKED, DONE, OPEN.
_ORDER = (2, 1, 0)

_NEVER = float("inf")

#: In SQL, running ids and all: a row that is fetched gives other threads the interpreter's lock.
_CHOICE = (
    "SELECT rowid FROM greensafe_requests WHERE state = ? AND changed < ?"
    " AND hex(id) NOT IN (SELECT value FROM json_each(?)) ORDER BY changed LIMIT ?"
)
_RENEW = (
    "UPDATE greensafe_requests SET changed = ? WHERE state = 0 AND changed < ? AND hex(id) IN (SELECT value FROM json_each(?))"
)
#: A `since` that is no number any more is damage; what was last changed then was not sent later.
_HORIZON = f"SELECT max(CASE WHEN since < 9e999 THEN since ELSE changed END) FROM greensafe_requests WHERE rowid IN ({_CHOICE})"
_STEPS = f"DELETE FROM greensafe_steps WHERE id IN (SELECT id FROM greensafe_requests WHERE rowid IN ({_CHOICE}))"
_REQUESTS = f"DELETE FROM greensafe_requests WHERE rowid IN ({_CHOICE})"


@dataclass
class Dropped:
    """The requests removed in one transaction."""

    count: int = 0
    #: The greatest `since` of it.
    horizon: float = -_NEVER


def size(connection: sqlite3.Connection) -> int:
    """Bytes of the pages in use, with what the open transaction has changed."""
    pages, free, each = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * each)


def oldest(connection: sqlite3.Connection) -> float | None:
    """Return the time at which the oldest has last changed; None if there is none."""
    found = "SELECT min(changed) FROM greensafe_requests WHERE changed < 9e999 AND state ="
    times = [connection.execute(f"{found} {state}").fetchone()[0] for state in _ORDER]
    return min((time for time in times if time is not None), default=None)


def renew(connection: sqlite3.Connection, running: Iterable[bytes], now: float, before: float) -> None:
    """Note as a change that these run, where nothing has changed since `before`."""
    connection.execute(_RENEW, (now, before, _as_json(running)))


def expire(connection: sqlite3.Connection, running: Iterable[bytes], before: float) -> Dropped:
    """Drop requests that have not changed since `before`."""
    dropped, keep = Dropped(), _as_json(running)
    for state in _ORDER:
        _drop(connection, dropped, state, before, keep, MOST - dropped.count)
    return dropped


def evict(connection: sqlite3.Connection, running: Iterable[bytes], enough: int) -> Dropped:
    """Drop until `enough` bytes or fewer are in use."""
    dropped, keep = Dropped(), _as_json(running)
    excess = size(connection) - enough
    for state in _ORDER:
        most = _AT_FIRST
        while dropped.count < MOST and excess > 0 and (count := _drop(connection, dropped, state, _NEVER, keep, most)):
            before, excess = excess, size(connection) - enough
            # Those that went tell how many more it takes, if pages came free.
            most = min(2 * most, excess * count // (before - excess) + 1 if before > excess else MOST)
    return dropped


def _drop(connection: sqlite3.Connection, dropped: Dropped, state: int, before: float, keep: str, most: int) -> int:
    """Drop the oldest in a state, but at most so many; return how many."""
    chosen = (state, before, keep, most)
    (horizon,) = connection.execute(_HORIZON, chosen).fetchone()
    if horizon is None:
        return 0
    if state == 0:
        connection.execute(_STEPS, chosen)
    count = connection.execute(_REQUESTS, chosen).rowcount
    dropped.count += count
    dropped.horizon = max(dropped.horizon, horizon)
    return count


def _as_json(ids: Iterable[bytes]) -> str:
    return json.dumps([id.hex().upper() for id in ids])
