"""The fixture that fails a test which leaves something behind: what it finds, what it names, what it leaves alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest
import zmq
from helpers import HANG, LONG, MS, ROOT, run_python
from leaks import census, left_behind

import greensafe

#: Enough for something to end that has been told to, and short: what is left on purpose is waited for this long.
SOON = 30 * MS

#: What a test could leave: makes it, and returns what ends it.
Leak = Callable[[], Callable[[], object]]


def _greenlet() -> Callable[[], object]:
    return gevent.spawn(gevent.sleep, LONG).kill


def _unstarted_greenlet() -> Callable[[], object]:
    lot = [gevent.spawn_later(LONG, print)]
    return lambda: lot.pop().kill()


def _descriptor() -> Callable[[], object]:
    left, right = socket.socketpair()
    return lambda: (left.close(), right.close())


def _thread() -> Callable[[], object]:
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="left on purpose")
    thread.start()
    return lambda: (gate.set(), thread.join())


def _context() -> Callable[[], object]:
    return zmq.Context().term


def _green_context() -> Callable[[], object]:
    return greensafe.Context().term


def _socket() -> Callable[[], object]:
    made = zmq.Context()
    sock = made.socket(zmq.REQ)
    return lambda: (sock.close(), made.term())


def _child() -> Callable[[], object]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    return lambda: child.communicate(b"\n")


LEAKS: dict[str, tuple[Leak, str]] = {
    "greenlet": (_greenlet, "greenlet <Greenlet"),
    "unstarted greenlet": (_unstarted_greenlet, "greenlet <Greenlet"),
    "descriptor": (_descriptor, "socket:["),
    "thread": (_thread, "left on purpose"),
    "context": (_context, "context not closed: <zmq.Context"),
    "green context": (_green_context, "context not closed: <greensafe"),
    "socket": (_socket, "anon_inode:[eventfd]"),
    "child": (_child, "-c input()"),
}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", LEAKS)
def test_names_what_is_left_and_nothing_once_it_has_ended(name: str) -> None:
    """Each kind of thing is reported by name while it is there, and not after it was ended."""
    leak, words = LEAKS[name]
    before = census()
    end = leak()
    try:
        found = left_behind(before, SOON)
    finally:
        end()
    assert any(words in line for line in found), found
    assert left_behind(before, LONG) == []


class _Ring:
    """Garbage that only the collector finds, with two descriptors."""

    def __init__(self) -> None:
        self.ends = os.pipe()
        self.ring = self

    def __del__(self) -> None:
        for end in self.ends:
            os.close(end)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_names_a_child_that_nobody_has_waited_for() -> None:
    """A child that has ended counts until it was waited for."""
    before = census()
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = census().since(before)
    child.wait()
    assert found == [f"child process {child.pid}: ended, but nobody has waited for it"]


def test_says_where_a_greenlet_waits() -> None:
    """The line at which a greenlet waits is named, not one inside gevent."""

    def wait_here() -> None:
        gevent.sleep(LONG)

    before = census()
    greenlet = gevent.spawn(wait_here)
    found = left_behind(before, SOON)
    greenlet.kill()
    assert [line for line in found if f"in wait_here, {__file__}:" in line], found


def test_waits_for_what_is_about_to_end() -> None:
    """What ends within the limit, or is garbage that nobody has collected yet, was not left behind."""
    before = census()
    gevent.spawn(gevent.sleep, 5 * MS)
    _Ring()
    assert left_behind(before, LONG) == []


def test_does_not_report_what_was_there_before() -> None:
    """What a wider fixture keeps running over several tests is not this test's."""
    end = _greenlet()
    before = census()
    found = left_behind(before, SOON)
    end()
    assert found == []


SAMPLE = """
import sys

import gevent
import gevent.signal
import gevent.socket
import gevent.subprocess
import greensafe
import pytest
import zmq


def test_leaves_a_greenlet():
    gevent.spawn(gevent.sleep, 100)


def test_is_not_blamed_for_the_one_before():
    pass


def test_leaves_what_is_made_once(tmp_path):
    gevent.get_hub().threadpool.apply(sum, ((1, 2),))
    gevent.socket.getaddrinfo("localhost", 80)
    gevent.signal_handler(gevent.signal.SIGUSR1, print).cancel()
    gevent.subprocess.check_output([sys.executable, "-c", ""])
    for kind in greensafe, zmq:
        kind.Context.instance().socket(zmq.REQ).close()


@pytest.mark.parametrize("number", range(200))
def test_is_cheap(number):
    pass
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("loop", ["", "libuv"])
def test_fails_the_test_that_leaks_and_no_other(tmp_path: Path, loop: str) -> None:
    """In a run of its own: one error that names the greenlet; what gevent and pyzmq make once and keep is nobody's leak."""
    for name in ("helpers.py", "leaks.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    patient = (ROOT / "tests/conftest.py").read_text()
    assert "RELEASE = 10_000 * MS" in patient
    (tmp_path / "conftest.py").write_text(patient.replace("RELEASE = 10_000 * MS", "RELEASE = 1_000 * MS"))
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    code = (
        f"import sys, pytest; sys.exit(pytest.main(['-c', {str(ROOT / 'setup.cfg')!r}, '--rootdir=.', '-q', 'test_sample.py']))"
    )
    result = run_python(
        f"import os; os.chdir({str(tmp_path)!r}); {code}",
        limit=10 * HANG,
        env={"GEVENT_LOOP": loop} if loop else None,
    )
    assert result.code == 1, result
    assert "left behind by this test:\n    greenlet <Greenlet" in result.out, result.out
    assert "ERROR at teardown of test_leaves_a_greenlet" in result.out, result.out
    assert "203 passed, 1 error" in result.out, result.out
