"""The benchmarks run."""

from __future__ import annotations

import sys

import pytest
from helpers import HANG, ROOT, run


@pytest.mark.check
@pytest.mark.timeout(400)
def test_quick_run() -> None:
    """`python -m benchmarks --quick` prints a row for every measurement."""
    done = run([sys.executable, "-m", "benchmarks", "--quick"], cwd=ROOT, limit=5 * HANG)
    assert done.code == 0, done.err
    for row in (
        "send",
        "ready recv",
        "ready recv_multipart",
        "Poller.poll, ready",
        "with a limit",
        "wait and wake",
        "ping-pong inproc",
        "ping-pong ipc",
        "200 in recv",
        "200 in Poller.poll",
        "ipc, one at a time",
        "tcp, 50 greenlets",
        "100 waiting, tcp",
        "100 waiting, ipc",
        "1 in flight",
        "100 in flight",
        "1000 in flight",
        "of 200 idle clients",
        "of 200 requests in flight",
        "a handler that waits",
    ):
        assert f"\n  {row}" in done.out
