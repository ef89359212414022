"""The tests that depend on the loop, once more on gevent's other one."""

from __future__ import annotations

import os
from pathlib import Path

import gevent
import pytest
from helpers import HANG, run_python

HERE = Path(__file__).parent

TESTS = [
    "green",
    "hub",
    "transport",
    "testing",
    "test_deadlines.py",
    "client/test_client.py",
    "loops/test_hubwatch.py",
    "loops/test_preemption.py",
    "server/test_answers.py",
    "server/test_durability.py",
    "server/test_handlers.py",
    "server/test_server.py",
    "server/test_supervision.py",
    "server/test_systemd.py",
    "server/test_tally.py",
    "server/test_watchdog.py",
]

#: A journal's backend knows no loop.
LOOPLESS = HERE / "testing" / "test_conformance.py"


@pytest.mark.check
@pytest.mark.skipif("libuv" in type(gevent.get_hub().loop).__module__, reason="this is the other loop")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tests", TESTS)
def test_on_libuv(tests: str) -> None:
    """Sockets, deadlines, handlers, servers, clients and faulty links behave the same on libuv."""
    pytest.importorskip("cffi")
    result = run_python(
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "-q",
        f"--ignore={LOOPLESS}",
        "--rootdir",
        str(HERE.parent),
        str(HERE / tests),
        limit=10 * HANG,
        env={"GEVENT_LOOP": "libuv-cffi", "PATH": os.environ["PATH"]},
    )
    assert result.code == 0, result.out + result.err
