"""Tests of what the tests share: patience, and the guards that count it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

import helpers
import pytest
from helpers import HANG, MS, ROOT, Patience, kept_port, run_python, wait_until


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long somebody has stood in the queue for a core."""
    seconds = [7.0]
    monkeypatch.setattr(helpers, "_queued", lambda: seconds[0])
    return seconds


def test_patience_is_over(queued: list[float]) -> None:
    """When nobody waits for a core, every second counts."""
    assert 0 < Patience(HANG).left() <= HANG
    patience = Patience(5 * MS)
    wait_until(lambda: not patience.left())


def test_who_waits_for_a_core_is_given_more(queued: list[float]) -> None:
    """What was spent in the queue does not count, up to ten times the seconds."""
    patience = Patience(HANG)
    patience._start -= 2 * HANG
    assert patience.left() == 0.0
    queued[0] += 2 * HANG
    assert 0.9 * HANG < patience.left() <= HANG
    queued[0] += 1000 * HANG
    assert 7.9 * HANG < patience.left() <= 8 * HANG
    patience._start -= 10 * HANG
    assert patience.left() == 0.0
    queued[0] = 0.0
    assert 0 < Patience(HANG).left() <= HANG


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system does not tell")
def test_the_queue_is_that_of_the_process_and_its_children() -> None:
    """Two that share one core are in each other's way, and both count."""
    cores = os.sched_getaffinity(0)
    before, core = helpers._queued(), min(cores)
    spin = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            os.sched_setaffinity(0, [core])
            patience = Patience(HANG)
            while helpers._queued() < before + 50 * MS:
                assert patience.left()
        finally:
            os.sched_setaffinity(0, cores)
            child.kill()


def test_a_program_that_does_not_end() -> None:
    """It is killed, and what it had said by then is told."""
    with pytest.raises(AssertionError, match=r"did not end within .*'said\\n'"):
        run_python("import time; print('said', flush=True); time.sleep(600)", limit=1000 * MS)


def test_a_kept_port_is_given_to_nobody_else() -> None:
    """A server can listen on it, and again; port 0 is never it."""
    with kept_port() as port:
        for _ in range(2):
            with helpers.socket.socket() as server:
                server.setsockopt(helpers.socket.SOL_SOCKET, helpers.socket.SO_REUSEADDR, 1)
                server.bind(("127.0.0.1", port))
                server.listen()


SAMPLE = """
import threading
import gevent
import pytest


def test_waits_in_the_hub(limit):
    gevent.sleep(600)


@pytest.mark.timeout(1)
def test_hangs_in_a_greenlet():
    gevent.spawn(gevent.sleep, 600).join()


@pytest.mark.timeout(1)
def test_hangs_where_the_hub_does_not_turn():
    print("it said this")
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("waits_in_the_hub", 1, ["AssertionError: a wait did not end", "gevent.sleep(600)"]),
        ("hangs_in_a_greenlet", 1, ["hangs_in_a_greenlet hangs", "gevent.spawn(gevent.sleep, 600).join()"]),
        ("hangs_where_the_hub_does_not_turn", 1, ["it said this", "does_not_turn hangs", "lock.acquire()"]),
    ],
)
def test_a_test_that_hangs(tmp_path: Path, name: str, code: int, told: list[str]) -> None:
    """Wherever a test waits in vain, it is ended, and the line is told."""
    for file in ("conftest.py", "leaks.py"):
        shutil.copy(ROOT / "tests" / file, tmp_path)
    patient = (ROOT / "tests/helpers.py").read_text()
    assert "HANG = 60_000 * MS" in patient
    (tmp_path / "helpers.py").write_text(patient.replace("HANG = 60_000 * MS", "HANG = 500 * MS"))
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    options = ["-c", str(ROOT / "setup.cfg"), "--rootdir=.", "-q", f"test_sample.py::test_{name}"]
    start = monotonic()
    result = run_python(f"import os, sys, pytest; os.chdir({str(tmp_path)!r}); sys.exit(pytest.main({options!r}))")
    assert result.code == code, result
    assert monotonic() - start >= 500 * MS
    for text in told:
        assert text in result.out + result.err, result.out + result.err
