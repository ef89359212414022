"""The statements that a batch of writes becomes.

Rules:

* Writes about different requests do not depend on each other, so they may change places. A batch is cut into *rounds* in which
  no request occurs twice; in a round all writes of one kind are one statement, however many they are. An Effect is alone.
* Why: between two statements another thread may take the interpreter's lock, and the hub's keeps it for milliseconds. 100 rows
  in one statement give it one chance to do so; one by one, or by executemany, 200.

It runs inside the caller's transaction; whatever it raises means that the transaction has to be rolled back.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from ..errors import JournalError, Unstorable
from ..sansio.records import Ack, Begin, Effect, Excuse, Finish, Forget, Known, Rerun, State, Step, Write
from ._checking import misfit
from ._effects import run
from ._rows import MOST, execute, fetch, marks, rows

__all__ = ["STATES", "Writing", "digest", "pack", "unpack"]

#: By the number that stands in the file.
STATES = (State.OPEN, State.DONE, State.ACKED)
_OPEN, _DONE, _ACKED = range(3)

_LENGTH = struct.Struct(">I")

#: Where a request's row has it.
_DIGEST = 3


def pack(frames: Iterable[bytes]) -> bytes:
    """Frames as one piece of bytes: each behind its length, so that no two messages are the same piece.

    Raises:
        Unstorable: A frame has 4 GiB or more.
    """
    try:
        return b"".join([part for frame in frames for part in (_LENGTH.pack(len(frame)), frame)])
    except struct.error:
        raise Unstorable("a frame of 4 GiB or more cannot be stored in a journal") from None


def unpack(packed: bytes) -> list[bytes]:
    """The frames that `pack` was given.

    Raises:
        JournalError: These bytes are not what it made of any.
    """
    frames, at = [], 0
    while at + _LENGTH.size <= len(packed):
        (length,) = _LENGTH.unpack_from(packed, at)
        at += _LENGTH.size + length
        frames.append(packed[at - length : at])
    if at != len(packed):
        raise JournalError("frames in the journal are damaged: they do not have the lengths that stand before them")
    return frames


def digest(packed: bytes) -> bytes:
    """Return what stays of a body: 16 bytes by which another one is told from it."""
    return hashlib.blake2b(packed, digest_size=16).digest()


class Writing:
    """The writes of one batch, into a connection's open transaction.

    Args:
        connection: With a transaction.
        now: The journal's time.
        horizon: Who is unknown, was sent again, and at first before it, is DROPPED.
        has_steps: Whether there may be any in the file.
    """

    def __init__(self, connection: sqlite3.Connection, now: float, horizon: float, has_steps: bool) -> None:
        self._connection = connection
        self._execute = connection.execute
        self._now = now
        self._horizon = horizon
        self.has_steps = has_steps

    def run(self, writes: Sequence[Write]) -> list[Any]:
        """Do them all, in their order; return their results.

        Raises:
            JournalError: One of them cannot be done.
            sqlite3.Error, OverflowError, UnicodeError: As sqlite3 has them.
        """
        results: list[Any] = [None] * len(writes)
        for kind, group in _grouped(writes):
            _DO[kind](self, group, results)
        return results

    # Each of these gets the places in the batch and the writes there, all of one kind and for different requests.

    def _begin(self, group: _Group, results: list[Any]) -> None:
        for start in range(0, len(group), MOST):
            self._begin_some(group[start : start + MOST], results)

    def _begin_some(self, group: _Group, results: list[Any]) -> None:
        """Begin as many requests as one statement takes."""
        rows = [self._row(write) for _, write in group]
        if not any(write.is_resent for _, write in group):
            # Most are new, and then nobody need ask: what is not makes sqlite undo the whole statement.
            with suppress(sqlite3.IntegrityError):
                self._many(_insert_sql, rows, self._now)
                return
        known = self._known([row[0] for row in rows])
        new = []
        for (place, write), row in zip(group, rows):
            if found := known.get(write.request_id):
                stored, what = found
                results[place] = what if stored == row[_DIGEST] else Known(what.state, False, *what[2:])
            elif write.is_resent and write.since <= self._horizon:
                results[place] = Known(State.DROPPED)
            else:
                new.append(row)
        self._many(_insert_sql, new, self._now)

    def _row(self, write: Begin) -> tuple[Any, ...]:
        body = pack(write.body)
        return write.request_id, write.since, write.until, digest(body), write.client, write.metadata, body

    def _known(self, ids: Iterable[bytes]) -> dict[bytes, tuple[bytes, Known]]:
        found = {}
        for row in self._all(_known_sql, ids):
            _check(row[0], _KNOWN, row)
            id, state, stored, attempts, fruitless, until, kind, reply = row
            steps = self._steps(id) if state == _OPEN else {}
            frames = [] if reply is None else unpack(reply)
            found[id] = (stored, Known(STATES[state], True, attempts, fruitless, until, kind, frames, steps))
        return found

    def _steps(self, id: bytes) -> dict[tuple[str, int], bytes]:
        steps = {}
        for row in self._execute(_STEPS, (id,)):
            _check(id, _STEP, row)
            steps[row[:2]] = row[2]
        return steps

    def _rerun(self, group: _Group, results: list[Any]) -> None:
        ids = [write.request_id for _, write in group]
        if self._many(_rerun_sql, list(zip(ids)), self._now) != len(ids):
            self._raise_not_open(ids)

    def _excuse(self, group: _Group, results: list[Any]) -> None:
        self._many(_excuse_sql, [(write.request_id,) for _, write in group], self._now)

    def _step(self, group: _Group, results: list[Any]) -> None:
        keys = [(write.request_id, write.name, write.number) for _, write in group]
        if self._many(_fruitful_sql, keys, self._now) != len(keys):
            # Some are stored already, or cannot be.
            self._check_open([write.request_id for _, write in group])
        self._many(_store_sql, [(*key, write.value) for key, (_, write) in zip(keys, group)])
        self.has_steps = True

    def _effect(self, group: _Group, results: list[Any]) -> None:
        ((place, write),) = group
        if not write.request_id:
            results[place] = run(self._connection, write.act)
            return
        self._check_open([write.request_id])
        key = (write.request_id, write.name, write.number)
        if stored := self._execute(_STORED, key).fetchone():
            results[place] = stored[0]
            return
        results[place] = run(self._connection, write.act)
        if isinstance(results[place], bytes):
            self._step([(place, Step(*key, results[place]))], results)

    def _finish(self, group: _Group, results: list[Any]) -> None:
        answers = [(write.request_id, int(write.kind), pack(write.body)) for _, write in group]
        ids = [answer[0] for answer in answers]
        if self._many(_finish_sql, answers, self._now) != len(ids):
            self._raise_not_open(ids)
        if self.has_steps:
            self._many(_forget_steps_sql, list(zip(ids)))

    def _ack(self, group: _Group, results: list[Any]) -> None:
        self._many(_ack_sql, [(write.request_id,) for _, write in group], self._now)

    def _forget(self, group: _Group, results: list[Any]) -> None:
        ids = [(write.request_id,) for _, write in group]
        self._many(_forget_sql, ids)
        self._many(_forget_steps_sql, ids)

    # Inside.

    def _many(self, statement: Callable[[int], str], rows: Sequence[Sequence[Any]], *first: Any) -> int:
        return execute(self._connection, statement, rows, *first)

    def _all(self, statement: Callable[[int], str], ids: Iterable[bytes]) -> Iterator[Any]:
        return fetch(self._connection, statement, list(zip(ids)))

    def _check_open(self, ids: list[bytes]) -> None:
        if sum(row[1] == _OPEN for row in self._all(_states_sql, ids)) != len(ids):
            self._raise_not_open(ids)

    def _raise_not_open(self, ids: list[bytes]) -> None:
        """Raise for one request that was not open; the others may have been changed already."""
        states = {}
        for row in self._all(_states_sql, ids):
            _check(row[0], ("id", "state", "changed"), row)
            states[row[0]] = STATES[row[1]], row[2]
        for id in ids:
            state, changed = states.get(id, (None, None))
            if state is None or (state is not State.OPEN and (changed != self._now or len(ids) == 1)):
                raise JournalError(f"request {id.hex()} is {state.value if state else 'unknown'} in the journal, not open")
        raise JournalError("a request was answered twice in one batch")


_Group = list[tuple[int, Any]]

_DO: dict[type, Callable[[Writing, _Group, list[Any]], None]] = {
    Begin: Writing._begin,
    Rerun: Writing._rerun,
    Excuse: Writing._excuse,
    Step: Writing._step,
    Effect: Writing._effect,
    Finish: Writing._finish,
    Ack: Writing._ack,
    Forget: Writing._forget,
}


def _check(id: Any, columns: Sequence[str], row: Sequence[Any]) -> None:
    if (fault := misfit(columns, row)) is not None:
        name = id.hex() if isinstance(id, bytes) else repr(id)
        raise JournalError(f"request {name} is damaged in the journal, it {fault}: `greensafe journal verify` tells of all")


def _grouped(writes: Sequence[Write]) -> Iterator[tuple[type, _Group]]:
    """Group writes that may be done as one, with their places; those that depend on each other stay in order."""
    seen: set[bytes] = set()
    groups: dict[type, _Group] = {}
    for place, write in enumerate(writes):
        kind = type(write)
        if write.request_id in seen or kind is Effect:
            yield from groups.items()
            seen, groups = set(), {}
        if kind is Effect:
            yield kind, [(place, write)]
        else:
            seen.add(write.request_id)
            groups.setdefault(kind, []).append((place, write))
    yield from groups.items()


# Statements, by how many rows they are for. Parameters that all rows have in common come first.


_KNOWN = ("id", "state", "digest", "attempts", "fruitless", "until", "kind", "payload")
_STEP = ("name", "number", "value")


@cache
def _known_sql(size: int) -> str:
    return (
        "SELECT id, state, digest, attempts, fruitless, until, kind, CASE state WHEN 1 THEN payload END"
        f" FROM greensafe_requests WHERE id IN ({marks(size)})"
    )


@cache
def _states_sql(size: int) -> str:
    return f"SELECT id, state, changed FROM greensafe_requests WHERE id IN ({marks(size)})"


@cache
def _insert_sql(size: int) -> str:
    return (
        "INSERT INTO greensafe_requests (id, state, changed, since, until, digest, client, metadata, payload)"
        " SELECT column1, 0, ?, column2, column3, column4, column5, column6, column7"
        f" FROM (VALUES {rows(size, 7)}) WHERE column1 IS NOT NULL"
    )


@cache
def _rerun_sql(size: int) -> str:
    return (
        "UPDATE greensafe_requests SET attempts = attempts + 1, fruitless = fruitless + 1, changed = ?"
        f" WHERE id IN ({marks(size)}) AND state = 0"
    )


@cache
def _excuse_sql(size: int) -> str:
    return (
        "UPDATE greensafe_requests SET fruitless = max(fruitless - 1, 0), changed = ?"
        f" WHERE id IN ({marks(size)}) AND state = 0"
    )


@cache
def _fruitful_sql(size: int) -> str:
    return (
        f"UPDATE greensafe_requests SET fruitless = 0, changed = ? FROM (VALUES {rows(size, 3)}) AS new"
        " WHERE greensafe_requests.id = new.column1 AND state = 0 AND NOT EXISTS (SELECT 1 FROM greensafe_steps AS step"
        " WHERE step.id = new.column1 AND step.name = new.column2 AND step.number = new.column3)"
    )


@cache
def _store_sql(size: int) -> str:
    return (
        "INSERT OR IGNORE INTO greensafe_steps (id, name, number, value) SELECT column1, column2, column3, column4"
        f" FROM (VALUES {rows(size, 4)}) WHERE column1 IS NOT NULL"
    )


@cache
def _finish_sql(size: int) -> str:
    return (
        "UPDATE greensafe_requests SET state = 1, changed = ?, kind = new.column2, payload = new.column3"
        f" FROM (VALUES {rows(size, 3)}) AS new WHERE greensafe_requests.id = new.column1 AND state = 0"
    )


@cache
def _ack_sql(size: int) -> str:
    return f"UPDATE greensafe_requests SET state = 2, changed = ?, payload = NULL WHERE id IN ({marks(size)}) AND state = 1"


@cache
def _forget_sql(size: int) -> str:
    return f"DELETE FROM greensafe_requests WHERE id IN ({marks(size)})"


@cache
def _forget_steps_sql(size: int) -> str:
    return f"DELETE FROM greensafe_steps WHERE id IN ({marks(size)})"


_STORED = "SELECT value FROM greensafe_steps WHERE id = ? AND name = ? AND number = ?"

_STEPS = "SELECT name, number, value FROM greensafe_steps WHERE id = ? ORDER BY rowid"
