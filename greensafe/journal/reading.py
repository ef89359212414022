"""Reading of a journal's file, while its server runs or after it has died.

A `Reading` only reads, and needs no lock: what it sees is one moment's. `forget` and `vacuum` write; what could pull the ground
from under a running server they leave alone. All of them may be used in the server's own process as well: a file that is open
there is opened by sqlite only, see `_descriptors`.

It does not know how anything is shown; see `cli`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ..errors import JournalError
from ..sansio.records import State
from ._checking import misfit
from ._clock import moment, offset
from ._descriptors import sweep
from ._files import Files
from ._lock import Lock, holder
from ._log import log_faults
from ._schema import SQLITE_ERRORS, check, check_version, connect, explain, head
from ._writing import STATES, digest, unpack

__all__ = ["Entry", "Reading", "Summary", "forget", "vacuum"]

_COLUMNS = "id, state, changed, since, until, attempts, fruitless, kind, client, metadata, payload, digest"
_REQUEST = _COLUMNS.split(", ")
_STEP = ("id", "name", "number", "value")


@dataclass(frozen=True, slots=True)
class Entry:
    """A request in a journal.

    Attributes:
        request_id: As `Request.id`.
        state: "open", "done" or "acked".
        attempts, fruitless: As in `records.Known`.
        since_seconds: How long ago it was first sent.
        changed_seconds: How long ago anything of it was stored, be it only that it still runs.
        left_seconds: Until its caller gives up, less than 0 if it has; None if it does not.
        client, metadata: As in Request.
        kind: Of its answer, 0 while it is open.
        frames: The request's while it is open, the answer's when it is done.
        steps: (name, number, result) of those that are stored, in their order.
    """

    request_id: str
    state: str
    attempts: int
    fruitless: int
    since_seconds: float
    changed_seconds: float
    left_seconds: float | None
    client: bytes
    metadata: bytes
    kind: int
    frames: Sequence[bytes]
    steps: Sequence[tuple[str, int, bytes]]


@dataclass(frozen=True, slots=True)
class Summary:
    """A journal as a whole.

    Attributes:
        journal_id: In hex, as servers say it.
        counts: Requests by state.
        dropped: Requests that were dropped since it was made, by cause.
        bytes: Of the file, without its write-ahead log.
        process: Of the server that writes to it, None if there is none, 0 if it cannot be told (its lock file is gone).
    """

    journal_id: str
    counts: dict[str, int]
    dropped: dict[str, int]
    bytes: int
    process: int | None


class Reading:
    """One look at the journal at `path`.

    Raises:
        JournalError: There is none, or it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)
        if not check(self.path):
            raise JournalError(f"there is no journal {self.path}")
        self._connection = connect(self.path, "ro")
        try:
            self._connection.execute("BEGIN")
            check_version(self.path, self._connection)
            self._head = head(self.path, self._connection)
            here = moment()
            self._now = here.monotonic + offset(self._head.clock, here)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, SQLITE_ERRORS):
                raise explain(self.path, error) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()
        sweep()

    def summary(self) -> Summary:
        """The whole."""
        found = dict(self._all("SELECT state, count(*) FROM greensafe_requests GROUP BY state"))
        counts = {state.value: found.get(number, 0) for number, state in enumerate(STATES)}
        dropped = {"expired": self._head.expired, "evicted": self._head.evicted}
        return Summary(self._head.id.hex(), counts, dropped, os.path.getsize(self.path), holder(self.path))

    def entries(self, states: Sequence[str], most: int) -> list[Entry]:
        """Return the requests in these states that have not changed for longest, up to `most` of each, state by state."""
        found: list[Entry] = []
        for state in states:
            where = "WHERE state = ? ORDER BY changed, id LIMIT ?"
            rows = self._all(f"SELECT {_COLUMNS} FROM greensafe_requests {where}", _number(state), most)
            found += [self._entry(row) for row in rows]
        return found

    def find(self, part: str) -> Entry:
        """Find the request whose id begins or ends so, in hex. (A client's ids all begin alike.)

        Raises:
            JournalError: There is none, or more than one.
        """
        part = _hex(part)
        where = "WHERE hex(id) LIKE ? OR hex(id) LIKE ? LIMIT 2"
        rows = self._all(f"SELECT {_COLUMNS} FROM greensafe_requests {where}", f"{part}%", f"%{part}")
        if len(rows) != 1:
            how = "no request" if not rows else "more than one request"
            raise JournalError(f"the journal {self.path} has {how} whose id begins or ends with {part}")
        return self._entry(rows[0])

    def faults(self) -> Iterator[str]:
        """Describe the faults of the file in whole sentences, none if it is sound. All of it is read, as far as that can be."""
        try:
            yield from self._faults()
        except JournalError as error:
            yield f"the rest cannot be read: {error}"

    def _faults(self) -> Iterator[str]:
        yield from log_faults(self.path)
        for (found,) in self._all("PRAGMA integrity_check"):
            if found != "ok":
                yield f"sqlite: {found}"
        for row in self._rows(f"SELECT {_COLUMNS} FROM greensafe_requests"):
            fault = _fault(row)
            if fault is not None:
                yield f"request {_name(row[0])} {fault}"
        for row in self._rows("SELECT id, name, number, value FROM greensafe_steps"):
            if (fault := misfit(_STEP, row)) is not None:
                yield f"a step of request {_name(row[0])} {fault}"
        lost = "SELECT id FROM greensafe_steps WHERE id NOT IN (SELECT id FROM greensafe_requests WHERE state = 0) GROUP BY id"
        for (request_id,) in self._all(lost):
            yield f"request {_name(request_id)} has steps and is not open"

    def _entry(self, row: Sequence[Any]) -> Entry:
        if (fault := misfit(_REQUEST, row)) is not None:
            raise JournalError(f"the journal {self.path} is damaged: request {_name(row[0])} {fault}; see `verify`")
        request_id, state, changed, since, until, attempts, fruitless, kind, client, metadata, payload, _ = row
        steps = self._all("SELECT id, name, number, value FROM greensafe_steps WHERE id = ? ORDER BY rowid", request_id)
        for step in steps:
            if (fault := misfit(_STEP, step)) is not None:
                raise JournalError(
                    f"the journal {self.path} is damaged: a step of request {request_id.hex()} {fault}; see `verify`"
                )
        return Entry(
            request_id=request_id.hex(),
            state=STATES[state].value,
            attempts=attempts,
            fruitless=fruitless,
            since_seconds=self._now - since,
            changed_seconds=self._now - changed,
            left_seconds=None if until is None else until - self._now,
            client=client,
            metadata=metadata,
            kind=kind,
            frames=_frames(payload),
            steps=[step[1:] for step in steps],
        )

    def _all(self, sql: str, *parameters: object) -> list[Any]:
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except SQLITE_ERRORS as error:
            raise explain(self.path, error) from error

    def _rows(self, sql: str) -> Iterator[Any]:
        """One by one, since they may be more than fit into memory."""
        try:
            yield from self._connection.execute(sql)
        except SQLITE_ERRORS as error:
            raise explain(self.path, error) from error


def forget(path: str, part: str) -> Entry:
    """Delete a request, so that its id is new again: sent again, it is run again. Returns what it was.

    Raises:
        JournalError: There is no such request; or it is open and a server holds the journal, which may be running it just now.
    """
    with Reading(path) as reading:
        entry = reading.find(part)
        path = reading.path
    process = holder(path)
    if entry.state == State.OPEN.value and process is not None:
        raise JournalError(
            f"request {entry.request_id} is open, and process {process or 'unknown'} may be running it: stop that server "
            "first, or let it be"
        )
    try:
        with _alone(path) if process is None else nullcontext(), closing(connect(path, "rw")) as connection:
            connection.execute("BEGIN IMMEDIATE")
            what = (bytes.fromhex(entry.request_id), _number(entry.state))
            # Not if it was changed meanwhile.
            found = connection.execute("DELETE FROM greensafe_requests WHERE id = ? AND state = ?", what).rowcount
            connection.execute("DELETE FROM greensafe_steps WHERE id = ?", what[:1])
            connection.execute("COMMIT" if found else "ROLLBACK")
    except SQLITE_ERRORS as error:
        raise explain(path, error) from error
    if not found:
        raise JournalError(f"request {entry.request_id} was changed meanwhile: look again")
    return entry


def vacuum(path: str) -> tuple[int, int]:
    """Write the file anew without what is free in it; return its bytes before and after.

    Raises:
        JournalError: A server holds it: it would be held up for as long as that takes.
    """
    with Reading(path) as reading:
        path = reading.path
    try:
        with _alone(path):
            before = os.path.getsize(path)
            with closing(connect(path, "rw")) as connection:
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return before, os.path.getsize(path)
    except SQLITE_ERRORS as error:
        raise explain(path, error) from error


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Keep servers away, as a server does."""
    lock = Lock(path)
    try:
        files = Files(path)
        try:
            yield
        finally:
            files.close()
    finally:
        lock.release()


def _number(state: str) -> int:
    return STATES.index(State(state))


def _hex(part: str) -> str:
    text = part.upper()
    if not text or len(text) > 32 or set(text) - set("0123456789ABCDEF"):
        raise JournalError(f"an id is up to 32 hexadecimal digits, as Request.id is, not {part!r}")
    return text


def _name(request_id: Any) -> str:
    """Format an id as Request.id does, or show what stands in its place."""
    return request_id.hex() if isinstance(request_id, bytes) else repr(request_id)


def _frames(payload: Any) -> Sequence[bytes]:
    """The frames in a row, as far as they can be told from each other."""
    try:
        return [] if payload is None else unpack(payload)
    except JournalError:
        return [payload]


def _fault(row: Sequence[Any]) -> str | None:
    """Describe what is wrong with a request's row."""
    request_id, state, _, _, _, attempts, fruitless, kind, _, _, payload, checksum = row
    if (fault := misfit(_REQUEST, row)) is not None:
        return fault
    if len(request_id) != 16:
        return f"has an id of {len(request_id)} bytes, not 16"
    if attempts < 1 or fruitless < 0:
        return f"has {attempts} attempts, {fruitless} of them fruitless"
    if (payload is None) != (STATES[state] is State.ACKED):
        return f"is {STATES[state].value} and has {'no' if payload is None else 'still its'} bytes"
    if STATES[state] is State.OPEN and digest(payload or b"") != checksum:
        return "has a body that is not the one it came with"
    if payload and _frames(payload) == [payload]:
        return "has frames that do not have the lengths that stand before them"
    if (kind == 0) != (STATES[state] is State.OPEN):
        return f"is {STATES[state].value} and its answer is of kind {kind}"
    return None
