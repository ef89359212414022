"""The agents' master of the examples, as a process that kills itself at a point that it is told; the master does not know.

    python doomed_master.py ENDPOINT FOLDER TRACE [POINT]

The points are before and after everything that a journaled request consists of, each named after the request and what is done.
Each that is reached is a line in TRACE; the first that is POINT is also the process's last.

    ... waits          it is about to be handed to the journal
    ... is done        an effect has happened, in a transaction that is not committed
    ... is stored      the transaction is committed, and nobody knows
    ... is told        whoever waited for it was told; whatever that caused at once has happened
    ... leaves, left   of an answer: before its first frame is handed to libzmq, and after its last
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import master
import zmq

from greensafe.journal import Begin, Effect, SqliteJournal
from greensafe.journal.commits import Commits
from greensafe.sansio.envelope import MAGIC, Kind
from greensafe.transport import outbox as _outbox

_ENDPOINT, _FOLDER, _TRACE, _POINT = [*sys.argv[1:], ""][:4]
_trace = os.open(_TRACE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

#: What each request is about, by its id.
_requests: dict[bytes, str] = {}

#: The answer whose first frame has been handed to libzmq and whose last has not.
_leaving: list[str] = []


def reach(point: str) -> None:
    os.write(_trace, f"{point}\n".encode())
    if point == _POINT:
        os.kill(os.getpid(), signal.SIGKILL)


def named(write: Any) -> str:
    """What is written, for whom."""
    if isinstance(write, Begin):
        _requests[write.request_id] = json.loads(write.body[0])["do"]
    what = getattr(write, "name", type(write).__name__)
    return f"{_requests.get(write.request_id, 'unknown')}: {what}"


def write(
    self: Commits, write: Any, then: Any = None, undo: Any = None, weight: int = 0, *, _write: Any = Commits.write
) -> int:
    name = named(write)

    def told(result: Any, error: Any) -> None:
        if then is not None:
            then(result, error)
        reach(f"{name} is told")

    if isinstance(write, Effect):
        act = write.act

        def done(connection: Any) -> bytes:
            value = act(connection)
            reach(f"{name} is done")
            return value

        write = write._replace(act=done)
    reach(f"{name} waits")
    return int(_write(self, write, told, undo, weight))


def commit(self: SqliteJournal, writes: Any, *, _commit: Any = SqliteJournal.commit) -> list[Any]:
    results: list[Any] = _commit(self, writes)
    for write in writes:
        reach(f"{named(write)} is stored")
    return results


def send(sock: Any, frame: bytes, flags: int, *, _send: Any = _outbox._send) -> Any:
    is_answer = frame[:4] == MAGIC and frame[5] == Kind.REPLY
    if is_answer:
        _leaving.append(_requests[frame[8:24]])
        reach(f"{_leaving[-1]}: answer leaves")
    result = _send(sock, frame, flags)
    if _leaving and flags == int(zmq.NOBLOCK):
        reach(f"{_leaving.pop()}: answer left")
    return result


Commits.write = write
SqliteJournal.commit = commit
_outbox._send = send

master.main(_ENDPOINT, Path(_FOLDER))
