"""A server that can be killed at each point of its work: what `test_kills` starts. It is no test itself.

It reads orders, one JSON list a line: [endpoint, journal, log, max_attempts, points, deadly]. For each it forks a child that
serves, and says its process id, and then how it has ended: having imported everything once, a server is there within
milliseconds.

A *point* is a passage before or after a write to the journal is handed over, before and after the statements and after the
COMMIT of each batch (in the journal's thread), before and after each message is handed to libzmq, and before and after each
acknowledgement. All children write them to one file, a letter for each; the passages with a number in `deadly` are a child's
last: SIGKILL, at once. Nothing in greensafe knows of this.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import gevent

import greensafe
from greensafe.journal import SqliteJournal, in_transaction
from greensafe.journal._writing import Writing
from greensafe.journal.commits import Commits
from greensafe.server.durability import Journaled
from greensafe.transport.outbox import Outbox

#: Seconds in which libzmq surely hands a message to the kernel: a death before that and one after it are two points.
LEAVES = 0.005

#: Bytes of the log that others write meanwhile: then a poisonous request kills the process.
FATAL = 1_000


class Points:
    """Counts the passages of all children, and ends this one at the deadly ones."""

    def __init__(self, path: str, deadly: list[int]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._count = os.fstat(self._file).st_size
        self._deadly = frozenset(deadly)
        self._lock = gevent.monkey.get_original("threading", "Lock")()

    def passed(self, letter: bytes, pause: float = 0.0) -> None:
        with self._lock:
            os.write(self._file, letter)
            self._count += 1
            if self._count in self._deadly:
                sleep(pause)
                os.kill(os.getpid(), signal.SIGKILL)

    def surround(self, owner: Any, name: str, before: bytes, after: bytes) -> None:
        """Have these two passed whenever this method is called."""
        act: Callable[..., Any] = getattr(owner, name)

        def surrounded(*args: Any, **options: Any) -> Any:
            self.passed(before)
            result = act(*args, **options)
            self.passed(after)
            return result

        setattr(owner, name, surrounded)


def _install(points: Points) -> None:
    points.surround(Commits, "write", b"w", b"W")
    points.surround(SqliteJournal, "open", b"o", b"O")
    points.surround(SqliteJournal, "commit", b"c", b"C")
    points.surround(Writing, "run", b"r", b"R")
    points.surround(Journaled, "_on_acked", b"a", b"A")
    points.surround(Outbox, "_try_send", b"s", b"S")
    handed: Callable[..., bool] = Outbox._try_send

    def left(outbox: Outbox, frames: list[bytes]) -> bool:
        result = handed(outbox, frames)
        points.passed(b"L", LEAVES)
        return result

    Outbox._try_send = left  # type: ignore[method-assign]


def _handler(log: str) -> Callable[[greensafe.Request], Any]:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    folder = Path(log).parent

    def note(what: str, name: str) -> None:
        os.write(file, f"{what} {name}\n".encode())

    def wait(name: str) -> None:
        while not (folder / name.replace(" ", "-")).exists():
            gevent.sleep(0.002)

    def die() -> None:
        size = os.fstat(file).st_size
        while os.fstat(file).st_size < size + FATAL:
            gevent.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    def handle(request: greensafe.Request) -> Any:
        name = request.body.decode()
        if name == "poison":
            die()

        def effect(step: str) -> str:
            note(f"run {step}", name)
            return step

        def insert(connection: sqlite3.Connection) -> str:
            connection.execute("CREATE TABLE IF NOT EXISTS effects (name TEXT)")
            connection.execute("INSERT INTO effects VALUES (?)", (name,))
            return "row"

        def step(step: str, fn: Any, *args: Any) -> str:
            result: str = request.step(step, fn, *args)
            note(f"done {step}", name)
            return result

        def finish() -> bytes:
            if name.startswith(("held", "later")):
                wait(name)
            if name.startswith("failing"):
                raise ValueError(first)
            row = step("row", in_transaction(insert))
            return f"{name}: {first} {row} {step('last', effect, 'last')}".encode()

        first = step("first", effect, "first")
        if name.startswith("later"):
            gevent.spawn(lambda: request.reply(finish()))
            return greensafe.LATER
        return finish()

    return handle


def _serve(endpoint: str, journal: str, log: str, max_attempts: int, points: str, deadly: list[int]) -> None:
    _install(Points(points, deadly))
    server = greensafe.Server(endpoint, _handler(log), deadline=60, journal=journal, max_attempts=max_attempts)
    server.serve_forever(stop_timeout=0.02)


def main() -> None:
    # Who is told to stop before it serves has nothing to do for that.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _serve(*order)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    assert threading.active_count() == 1
    main()
