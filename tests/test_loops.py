"""The tests that depend on the loop, once more on gevent's other one."""

from __future__ import annotations

import os
from pathlib import Path

import gevent
import pytest
from helpers import HANG, run_python

HERE = Path(__file__).parent

TESTS = [
    "deadlines",
    "handlers",
    "watchdog",
    "hubwatch",
    "preemption",
    "systemd",
    "supervision",
    "answers",
    "tally",
    "server",
    "client",
    "journaled",
]

#: A journal's backend knows no loop.
LOOPLESS = HERE / "testing" / "test_conformance.py"


@pytest.mark.check
@pytest.mark.skipif("libuv" in type(gevent.get_hub().loop).__module__, reason="this is the other loop")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tests", ["green", "testing", *(f"test_{name}.py" for name in TESTS)])
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
