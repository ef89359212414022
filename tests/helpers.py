"""What tests share: one scaled unit of time, patience, waiting for a condition, and running programs."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import gevent

ROOT = Path(__file__).resolve().parent.parent

#: The unit of every duration in a test, in seconds; a slow machine stretches it.
MS = 0.001 * float(os.environ.get("GREENSAFE_TEST_SCALE", "1"))

#: A limit that is not to be reached: a guard ends a test that hangs long before.
LONG = 900_000 * MS

#: Seconds of patience after which a wait hangs.
HANG = 60_000 * MS

_PROC = Path("/proc")


class Patience:
    """Counts seconds, but not those which a busy machine took.

    The time that the threads of this process, and of those it has started, stood in the queue for a core is taken off: who gets
    a tenth of a core has ten times as long, and who waits in vain stands in no queue. It ends at ten times the seconds, or
    several threads that spin would make it last for ever. Where the kernel does not tell, every second counts.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = monotonic()
        self._queued = _queued()

    def left(self) -> float:
        """Return how many seconds are left, at the soonest; 0.0 when patience is over."""
        elapsed = monotonic() - self._start
        if elapsed < self.seconds:
            return self.seconds - elapsed
        queued = max(0.0, _queued() - self._queued)  # less than nothing if a process has ended that had stood there for long
        return max(0.0, min(self.seconds + queued, 10 * self.seconds) - elapsed)


def _queued() -> float:
    """Count the seconds that this process's threads, and those of its descendants, have stood in the queue for a core."""
    total, processes = 0, ["self"]
    for process in processes:
        with suppress(OSError):  # not Linux; or it has just ended
            for thread in (_PROC / process / "task").iterdir():
                with suppress(OSError):
                    total += int((thread / "schedstat").read_text().split()[1])
                    processes += (thread / "children").read_text().split()
    return total / 1e9


def wait_until(predicate: Callable[[], Any], limit: float = HANG) -> Any:
    """Turn the hub until `predicate()` is true; AssertionError after `limit` seconds of patience."""
    patience = None
    while True:
        value = predicate()
        if value:
            return value
        patience = patience or Patience(limit)
        assert patience.left(), f"{predicate} did not come true within {limit} s"
        gevent.sleep(MS)


def check_freed_by_a_kill(act: Callable[[Callable[[Any], Any]], object]) -> None:
    """Kill a greenlet in its first wait: it and what it has tracked has to be freed then, without the garbage collector.

    Args:
        act: What the greenlet runs; called with `track`, which notes something and returns it.
    """
    tracked: list[weakref.ref[Any]] = []

    def track(what: Any) -> Any:
        tracked.append(weakref.ref(what))
        return what

    gc.collect()
    gc.disable()
    try:
        greenlet = track(gevent.spawn(act, track))
        wait_until(lambda: len(tracked) > 1)
        gevent.sleep(MS)
        greenlet.kill()
        del greenlet
        wait_until(lambda: all(each() is None for each in tracked))
    finally:
        gc.enable()


@dataclass
class Result:
    """How a program ended."""

    code: int
    out: str
    err: str
    seconds: float


def run_python(program: str | Path, *args: str, limit: float = HANG, env: dict[str, str] | None = None) -> Result:
    """Run a Python program (a Path, or source text) to its end; AssertionError after `limit` seconds of patience."""
    return run([sys.executable, *([program] if isinstance(program, Path) else ["-c", program]), *args], limit=limit, env=env)


def run(
    command: Sequence[str | Path],
    *,
    limit: float = HANG,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
) -> Result:
    """Run a program to its end, without turning the hub; AssertionError after `limit` seconds of patience."""
    start, patience = monotonic(), Patience(limit)
    process = subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        cwd=cwd,
    )
    with process:
        given: str | None = stdin
        while True:
            try:
                out, err = process.communicate(given, timeout=patience.left())
                return Result(process.returncode, out, err, monotonic() - start)
            except subprocess.TimeoutExpired:
                given = None
                if not patience.left():
                    process.kill()
                    out, err = process.communicate()
                    raise AssertionError(f"{command} did not end within {limit} s: {out!r} {err!r}") from None
            except BaseException:
                process.kill()
                raise


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that serves, and the first line that it prints; it is killed on leaving."""
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        first = process.stdout.readline().strip().rstrip("\0")
        assert first, process.stderr.read()
        yield process, first
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@contextmanager
def kept_port() -> Iterator[int]:
    """A port of 127.0.0.1 for a server that comes and goes: the system gives it to nobody else meanwhile.

    Linux lets a server listen on a port to which another socket is bound that does not. Elsewhere it is merely free at first.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        if sys.platform != "linux":
            sock.close()
        yield port
