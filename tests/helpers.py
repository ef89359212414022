"""What tests share: one scaled unit of time, waiting for a condition, and running programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import gevent

ROOT = Path(__file__).resolve().parent.parent

#: The unit of every duration in a test, in seconds; a slow machine stretches it.
MS = 0.001 * float(os.environ.get("GREENSAFE_TEST_SCALE", "1"))

#: Longer than anything that works takes: only a hang reaches it.
LONG = 30_000 * MS


def wait_until(predicate: Callable[[], Any], limit: float = LONG) -> Any:
    """Turn the hub until `predicate()` is true; AssertionError after `limit` seconds."""
    end = monotonic() + limit
    while True:
        value = predicate()
        if value:
            return value
        assert monotonic() < end, f"{predicate} did not come true within {limit} s"
        gevent.sleep(MS)


@dataclass
class Result:
    """How a program ended."""

    code: int
    out: str
    err: str
    seconds: float


def run_python(program: str | Path, *args: str, limit: float = LONG, env: dict[str, str] | None = None) -> Result:
    """Run a Python program (a Path, or source text) to its end; AssertionError if it takes longer than `limit` seconds."""
    command: Sequence[str]
    command = [sys.executable, str(program), *args] if isinstance(program, Path) else [sys.executable, "-c", program, *args]
    start = monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{command} did not end within {limit} s: {error.stdout!r} {error.stderr!r}") from None
    return Result(done.returncode, done.stdout, done.stderr, monotonic() - start)


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
