"""Tests of greensafe.seldom: what is written, what is counted, and that nothing is lost or forged."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from time import monotonic

import gevent
import pytest
from gevent.event import Event
from helpers import MS, run_python, wait_until

from greensafe.hub import log_limiter as seldom
from greensafe.hub.log_limiter import Seldom

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
        ("test_log_limiter.py", "test_the_place_of_a_line_is_the_callers")
    }
    lines.flush()


@pytest.mark.parametrize("where", ["itself", "its cause", "its context", "a note", "a group", "too long", "no str"])
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
            if where == "no str":
                error = _UnshowableValueError()
                error.add_note(forged)
                raise error from None
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


class _UnshowableValueError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("source", ["\x1b[2J =", "a\u2028= ="])
def test_a_peers_python_forges_nothing(caplog: pytest.LogCaptureFixture, source: str) -> None:
    """A SyntaxError's traceback shows the line that was parsed, which its str does not: `ast.literal_eval(request.body)`."""
    lines = Seldom()
    with pytest.raises(SyntaxError) as caught:
        compile(source, "<a peer's>", "eval")
    lines.say(log, logging.ERROR, "failed", error=caught.value)
    lines.flush()
    text = logging.Formatter().format(caplog.records[0])
    assert "SyntaxError" in text
    assert text.replace("\n", "").isprintable()


def test_a_syntax_error_of_the_programs_own_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Its line ends with a line end, which forges nothing."""
    lines = Seldom()
    with pytest.raises(SyntaxError) as caught:
        compile("a = =\n", "module.py", "exec")
    lines.say(log, logging.ERROR, "failed", error=caught.value)
    lines.flush()
    assert "  | " not in logging.Formatter().format(caplog.records[0])


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


class _Broken(logging.Handler):
    """What a program may have in its logging: it raises, or waits, which fails in the hub."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def emit(self, record: logging.LogRecord) -> None:
        self.act()


def _raise() -> None:
    raise OSError("no room\non the log's disk")


@pytest.fixture
def broken() -> Iterator[_Broken]:
    """A logging handler that raises."""
    handler = _Broken(_raise)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


def test_logging_that_fails(broken: _Broken, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing comes out of it: the line, or the count, goes to stderr, with the reason, and nothing is written twice."""
    lines = Seldom()
    for number in range(3):
        lines.say(log, logging.WARNING, "bad: %s", number, error=ValueError("x\ny"))
    wait_until(lambda: repr(lines) == "<Seldom kinds=1 left_out=0>")
    lines.flush()
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("not logged: bad: 0")] == ["not logged: bad: 0"]
    assert [COUNT.sub(r" \1", line) for line in said if "bad: 2" in line] == ["not logged: bad: 2 2"]
    assert "  | OSError: no room" in said
    assert {line[:4] for line in said} == {"not ", "  | "}


def test_logging_that_may_fail(broken: _Broken, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With `logging.raiseExceptions` off the program has said that it does not want to know."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    Seldom().say(log, logging.WARNING, "bad")
    assert capfd.readouterr().err == ""


def test_logging_that_waits(broken: _Broken, capfd: pytest.CaptureFixture[str]) -> None:
    """In the hub it fails, which touches nothing there; in a greenlet others go on, and what is said meanwhile is counted."""
    lines, go_on = Seldom(), Event()
    broken.act = go_on.wait
    waiting = gevent.spawn(lines.say, log, logging.WARNING, "bad: %s", 1)
    gevent.sleep(0)
    for number in range(2, 5):
        lines.say(log, logging.WARNING, "bad: %s", number)
    wait_until(lambda: "bad: 4 (the last of 3 more within" in capfd.readouterr().err)
    assert not waiting.ready()
    go_on.set()
    waiting.get()
    lines.flush()


def test_counts_of_a_hub_that_is_gone() -> None:
    """At exit the counts of a thread that has ended are written, too, whatever has become of its timers."""
    program = """if 1:
        import gevent, logging, threading
        from greensafe.hub.log_limiter import Seldom
        logging.basicConfig(format="%(message)s")
        def run():
            for _ in range(8):
                lines.say(logging.getLogger("x"), logging.WARNING, "bad")
            gevent.get_hub().destroy(destroy_loop=True)
        lines = Seldom()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    """
    ended = run_python(program)
    assert re.fullmatch(r"bad\nbad \(the last of 7 more within \d\.\d s\)\n", ended.err)


def test_counts_are_written_at_exit() -> None:
    """A program that ends within the second, without closing anything, has written all counts."""
    program = """if 1:
        import logging
        from greensafe.hub.log_limiter import Seldom
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
    seldom._tell_all()  # what other tests have left
    caplog.clear()
    seldom_of_another_thread = Seldom()
    for _ in range(3):
        seldom_of_another_thread.say(log, logging.WARNING, "a line")
    (kind,) = seldom_of_another_thread._kinds.values()
    seldom._tell_all()
    assert _total(caplog) == 3
    assert kind._timer.active
    seldom_of_another_thread.flush()
    assert _total(caplog) == 3


def test_a_forked_child_does_not_write_its_parents_counts() -> None:
    """Each line is counted by the process in which it was said."""
    program = """if 1:
        import logging, os, gevent
        from greensafe.hub import log_limiter as seldom
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
