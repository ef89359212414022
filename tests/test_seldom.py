"""Tests of greensafe.seldom: what is written, what is counted, and that nothing is lost or forged."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import weakref
from time import monotonic

import gevent
import pytest
from helpers import MS, wait_until

from greensafe import seldom
from greensafe.seldom import Seldom

pytestmark = pytest.mark.usefixtures("limit")

log = logging.getLogger("greensafe.test_seldom")

COUNT = re.compile(r" \(the last of (\d+) more within \d+\.\d s\)$")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seldom, "PERIOD", 30 * MS)


def _total(caplog: pytest.LogCaptureFixture) -> int:
    """How many lines those that were written stand for."""
    found = [COUNT.search(record.getMessage()) for record in caplog.records]
    return sum(1 if each is None else int(each[1]) for each in found)


def test_the_first_is_written_and_the_rest_counted(caplog: pytest.LogCaptureFixture) -> None:
    """One line at once; then one for all that followed, with their number and the last of them, though nothing follows it."""
    lines = Seldom()
    for number in range(1000):
        lines.say(log, logging.WARNING, "bad: %s", number, extra={"endpoint": "e", "request_id": str(number)})
    assert [record.getMessage() for record in caplog.records] == ["bad: 0"]
    wait_until(lambda: len(caplog.records) > 1)
    last = caplog.records[1]
    assert COUNT.sub("", last.getMessage()) == "bad: 999"
    assert (last.request_id, last.levelno, last.name) == ("999", logging.WARNING, "greensafe.test_seldom")
    assert _total(caplog) == 1000
    wait_until(lambda: "kinds=0" in repr(lines))
    lines.say(log, logging.WARNING, "bad: %s", "again")
    assert caplog.records[-1].getMessage() == "bad: again"
    lines.flush()
    assert len(caplog.records) == 3


def test_a_flood_is_one_line_in_each_period(caplog: pytest.LogCaptureFixture) -> None:
    """However long it lasts, and the counts stay exact."""
    lines, said, start = Seldom(), 0, monotonic()
    while len(caplog.records) < 4:
        lines.say(log, logging.WARNING, "bad")
        said += 1
        gevent.sleep(MS)
    assert len(caplog.records) <= 1 + (monotonic() - start) / (25 * MS)
    lines.flush()
    assert _total(caplog) == said


def test_kinds_are_counted_apart(caplog: pytest.LogCaptureFixture) -> None:
    """By their text, or by a key; a flood of one kind hides no other. More than so many keys are not told apart."""
    lines = Seldom()
    for _ in range(3):
        lines.say(log, logging.WARNING, "one")
        lines.say(log, logging.WARNING, "two")
        lines.say(log, logging.WARNING, "two", key="other")
    assert [record.getMessage() for record in caplog.records] == ["one", "two", "two"]
    for number in range(10 * seldom.KINDS):
        lines.say(log, logging.WARNING, "many", key=number)
    assert len(lines._kinds) <= seldom.KINDS + 1
    lines.flush()
    assert _total(caplog) == 9 + 10 * seldom.KINDS


def test_several_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A kind may have more than one line in a period."""
    lines = Seldom()
    for number in range(5):
        lines.say(log, logging.ERROR, "failed: %s", number, most=3)
    assert [record.getMessage() for record in caplog.records] == ["failed: 0", "failed: 1", "failed: 2"]
    lines.flush()
    assert _total(caplog) == 5


def test_a_level_that_is_not_logged_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is counted, and no timer is started, for a line that nobody would see."""
    caplog.set_level(logging.WARNING)
    lines = Seldom()
    lines.say(log, logging.INFO, "bad")
    assert repr(lines) == "<Seldom kinds=0 left_out=0>"


def test_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """What was counted lives no longer because of it."""

    class Thing(Exception):
        pass

    lines, things = Seldom(), [Thing() for _ in range(3)]
    refs = [weakref.ref(thing) for thing in things]
    for thing in things:
        lines.say(log, logging.WARNING, "bad: %s", thing, error=thing)
    caplog.clear()
    del things, thing
    gc.collect()
    assert [ref() for ref in refs[1:]] == [None] * 2
    lines.flush()


def test_the_place_of_a_line_is_the_callers(caplog: pytest.LogCaptureFixture) -> None:
    """Not this module's, also of one with a traceback that had to be made safe."""
    lines = Seldom()
    lines.say(log, logging.WARNING, "bad")
    lines.say(log, logging.WARNING, "worse", error=ValueError("a\nb"))
    assert {(record.filename, record.funcName) for record in caplog.records} == {
        ("test_seldom.py", "test_the_place_of_a_line_is_the_callers")
    }
    lines.flush()


@pytest.mark.parametrize("where", ["itself", "its cause", "its context", "a note", "a group", "too long"])
def test_no_exception_forges_a_line(caplog: pytest.LogCaptureFixture, where: str) -> None:
    """An exception's text is the peer's, often: its line ends, escapes and length do no harm in the traceback."""
    forged = "no\n2026-01-01 CRITICAL root: forged \x1b[2J" if where != "too long" else "x" * 10**6
    try:
        try:
            raise ValueError(forged if where in ("its cause", "its context", "itself", "too long") else "no")
        except ValueError as inner:
            if where == "its cause":
                raise RuntimeError("outer") from inner
            if where == "its context":
                raise RuntimeError("outer")  # noqa: B904
            if where == "a note":
                inner.add_note(forged)
            if where == "a group":
                raise ExceptionGroup("all", [ValueError(forged)])  # noqa: B904
            raise
    except Exception as error:
        lines = Seldom()
        lines.say(log, logging.ERROR, "failed: %s", error, error=error)
        lines.flush()
        assert caplog.records[0].exc_info[1] is error  # type: ignore[index]
    text = logging.Formatter("%(levelname)s %(message)s").format(caplog.records[0])
    assert "ValueError" in text
    assert "test_no_exception_forges_a_line" in text
    assert "\x1b" not in text
    assert len(text) < 40_000
    assert all(line.startswith("  | ") for line in text.split("\n")[1:])


def test_an_ordinary_traceback_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It looks as everywhere else."""
    lines = Seldom()
    lines.say(log, logging.ERROR, "failed", error=ValueError("no"))
    assert logging.Formatter().format(caplog.records[0]) == "failed\nValueError: no"
    lines.flush()


def test_what_cannot_be_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Arguments whose str fails cost nobody anything."""

    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    lines = Seldom()
    lines.say(log, logging.ERROR, "failed: %s", Bad(), error=Bad())
    lines.say(log, logging.ERROR, "failed: %s", Bad())
    lines.flush()
    assert caplog.records[0].getMessage() == "failed: <Bad that cannot be shown>"
    assert _total(caplog) == 2


def test_counts_are_written_at_exit() -> None:
    """A program that ends within the second, without closing anything, has written all counts."""
    program = """if 1:
        import logging
        from greensafe.seldom import Seldom
        logging.basicConfig(format="%(message)s")
        lines = Seldom()
        for _ in range(8):
            lines.say(logging.getLogger("x"), logging.WARNING, "bad")
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"bad\nbad \(the last of 7 more within \d\.\d s\)\n", ended.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_at_exit_other_threads_timers_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Counts are written, and no timer is touched: its loop may be another thread's, which does not stand that."""
    seldom_of_another_thread = Seldom()
    for _ in range(3):
        seldom_of_another_thread.say(log, logging.WARNING, "a line")
    (kind,) = seldom_of_another_thread._kinds.values()
    seldom._flush_all()
    assert _total(caplog) == 3
    assert kind._timer.active
    seldom_of_another_thread.flush()
    assert _total(caplog) == 3


def test_a_forked_child_does_not_write_its_parents_counts() -> None:
    """Each line is counted by the process in which it was said."""
    program = """if 1:
        import logging, os, gevent
        from greensafe import seldom
        seldom.PERIOD = 0.05
        logging.basicConfig(format="%(process)d %(message)s")
        lines = seldom.Seldom()
        for _ in range(3):
            lines.say(logging.getLogger("x"), logging.WARNING, "bad")
        pid = gevent.os.fork()
        for _ in range(2):
            lines.say(logging.getLogger("x"), logging.WARNING, "bad")
        while "kinds=0" not in repr(lines):
            gevent.sleep(0.01)
        if pid:
            gevent.os.waitpid(pid, 0)
        print("parent" if pid else "child", os.getpid())
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {number: name for name, number in map(str.split, ended.stdout.splitlines())}
    said = [(names[line.split()[0]], COUNT.sub(r" \1", line).split()[1:]) for line in ended.stderr.splitlines()]
    assert sorted(said) == [
        ("child", ["bad"]),
        ("child", ["bad", "1"]),
        ("parent", ["bad"]),
        ("parent", ["bad", "4"]),
    ]
