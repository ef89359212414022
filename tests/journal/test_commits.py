"""Tests of greensafe.journal.commits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent.monkey
import pytest
from helpers import LONG, MS, wait_until

from greensafe.errors import JournalError
from greensafe.journal import Begin, Finish, Forget, Known, SqliteJournal, State, Step
from greensafe.journal.commits import Commits

pytestmark = pytest.mark.usefixtures("limit")

Native = gevent.monkey.get_original("threading", "Event")


class Gated(SqliteJournal):
    """A journal whose disk takes as long as the test wants, and fails when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = Native()
        self.gate.set()
        self.batches: list[int] = []
        self.fault: BaseException | None = None
        self.tidied: list[frozenset[bytes]] = []

    def commit(self, writes: Sequence[Any]) -> list[Any]:
        self.gate.wait(LONG)
        self.batches.append(len(writes))
        if self.fault is not None:
            raise self.fault
        return super().commit(writes)

    def tidy(self, running: Collection[bytes]) -> bool:
        self.tidied.append(frozenset(running))
        return super().tidy(running)


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _begin(number: int) -> Begin:
    return Begin(_id(number), [b"body"], since=0.0)


class Told:
    """What a write's `then` was called with."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def __call__(self, result: Any, error: JournalError | None) -> None:
        assert gevent.getcurrent() is gevent.get_hub() or "was stopped" in str(error)
        self.got.append((result, error))


@pytest.fixture
def journal(tmp_path: Path) -> Gated:
    return Gated(tmp_path / "requests.db")


@pytest.fixture
def commits(journal: Gated) -> Iterator[Commits]:
    made = Commits(journal, lambda: {_id(9)})
    made.open()
    yield made
    journal.gate.set()
    made.close()
    assert made.join(LONG)


def test_one_turn_is_one_batch(journal: Gated, commits: Commits) -> None:
    """What is written in one turn of the loop is committed together, and everybody is told, in order."""
    told = [Told() for _ in range(10)]
    for number, each in enumerate(told):
        commits.write(_begin(number), each)
    assert commits.pending == 10
    assert commits.flush(LONG)
    assert journal.batches == [10]
    assert [each.got for each in told] == [[(None, None)]] * 10
    assert (commits.count, commits.failures, commits.error) == (1, 0, None)


def test_what_comes_meanwhile_is_the_next_batch(journal: Gated, commits: Commits) -> None:
    """While one commit is under way writes gather, the hub turns, and one that depends on an earlier one sees it."""
    journal.gate.clear()
    first, known, last = Told(), Told(), Told()
    commits.write(_begin(1), first)
    wait_until(lambda: commits._is_busy)
    commits.write(_begin(1), known)
    commits.write(Finish(_id(1), 0x81, [b"x"]), last)
    gevent.sleep(MS)
    assert first.got == known.got == []
    journal.gate.set()
    assert commits.flush(LONG)
    assert journal.batches == [1, 2]
    assert isinstance(known.got[0][0], Known)
    assert last.got == [(None, None)]


def test_the_next_batch_is_started_before_the_last_ones_writers_are_told(journal: Gated, commits: Commits) -> None:
    """The disk works while the hub does."""
    commits.write(_begin(1), Told())
    wait_until(lambda: journal.tidied and not commits._is_busy)
    journal.gate.clear()
    pending: list[int] = []
    commits.write(_begin(2), lambda result, error: pending.append(len(commits._waiting)))
    wait_until(lambda: commits._is_busy)
    commits.write(_begin(3), Told())
    journal.gate.set()
    assert commits.flush(LONG)
    assert pending == [0]
    assert journal.batches == [1, 1, 1]


def test_what_nobody_waits_for_goes_with_the_next_batch(journal: Gated, commits: Commits) -> None:
    """It makes the disk do nothing of its own, and keeps its place."""
    commits.write(_begin(1))
    commits.write(_begin(2))
    gevent.sleep(MS)
    assert (journal.batches, commits.pending) == ([], 2)
    known = Told()
    commits.write(_begin(1), known)
    assert commits.flush(LONG)
    assert journal.batches == [3]
    assert isinstance(known.got[0][0], Known)


def test_what_nobody_waits_for_is_stored_in_the_end(journal: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing else comes, the timer takes it."""
    monkeypatch.setattr("greensafe.journal.commits.TIDY", 5 * MS)
    commits = Commits(journal, set)
    commits.open()
    try:
        wait_until(lambda: journal.tidied)
        commits.write(_begin(1))
        wait_until(lambda: journal.batches == [1] and not commits.pending)
    finally:
        commits.close()
        assert commits.join(LONG)


def test_a_write_that_cannot_be_stored_fails_alone(journal: Gated, commits: Commits, caplog: pytest.LogCaptureFixture) -> None:
    """A batch with one is tried in halves; the others are stored, in their order."""
    good, bad = [Told() for _ in range(20)], Told()
    for number, each in enumerate(good):
        commits.write(_begin(number), each)
        if number == 7:
            commits.write(Step(_id(99), "a", 1, b"x"), bad)
    assert commits.flush(LONG)
    assert [each.got for each in good] == [[(None, None)]] * 20
    ((result, error),) = bad.got
    assert (result, type(error)) == (None, JournalError)
    assert commits.failures == 1
    again = Told()
    commits.write(_begin(19), again)
    assert commits.flush(LONG)
    assert again.got[0][0].state is State.OPEN
    messages = [(record.levelno, record.name) for record in caplog.records]
    assert messages == [(logging.ERROR, "greensafe.journal.commits"), (logging.WARNING, "greensafe.journal.commits")]
    assert commits.error is None


@pytest.mark.parametrize("fault", [JournalError("the disk is full"), ZeroDivisionError("a bug"), SystemExit("a bug")])
def test_a_journal_that_fails(journal: Gated, commits: Commits, fault: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """Everybody is told, once is logged, and the next writes are stored when it is well again."""
    journal.fault = fault
    told = [Told() for _ in range(3)]
    for number, each in enumerate(told):
        commits.write(_begin(number), each)
    assert commits.flush(LONG)
    for each in told:
        ((result, error),) = each.got
        assert result is None
        assert isinstance(error, JournalError)
        assert error is fault or error.__cause__ is fault
    assert commits.error is not None
    journal.fault = None
    after = Told()
    commits.write(_begin(0), after)
    assert commits.flush(LONG)
    assert after.got == [(None, None)]
    assert commits.error is None
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_one_that_is_told_and_raises_does_not_stop_the_next(commits: Commits, capsys: pytest.CaptureFixture[str]) -> None:
    """It is reported as gevent reports what fails in the hub."""
    told = Told()
    commits.write(_begin(1), lambda result, error: 1 / 0)
    commits.write(_begin(2), told)
    assert commits.flush(LONG)
    assert told.got == [(None, None)]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_flush_does_not_wait_longer(journal: Gated, commits: Commits) -> None:
    """A disk that hangs holds up nobody for longer than they want."""
    journal.gate.clear()
    commits.write(_begin(1))
    assert not commits.flush(20 * MS)
    assert commits.pending == 1
    assert "pending=1" in repr(commits)


def test_close_stores_what_is_pending(journal: Gated, tmp_path: Path) -> None:
    """Who waits is told that nobody knows, and it is there for the next server; what comes afterwards fails."""
    commits = Commits(journal, set)
    commits.open()
    journal.gate.clear()
    told = Told()
    commits.write(_begin(1), told)
    wait_until(lambda: commits._is_busy)
    commits.write(_begin(2), told)
    commits.close()
    commits.close()
    assert [(result, type(error)) for result, error in told.got] == [(None, JournalError)] * 2
    commits.write(_begin(3), told)
    assert not commits.join(20 * MS)  # and the hub turns
    assert "is closed" in str(told.got[2][1])
    journal.gate.set()
    assert commits.join(LONG)
    assert len(told.got) == 3
    journal.open()
    assert [result.state for result in journal.commit([_begin(1), _begin(2)])] == [State.OPEN] * 2
    journal.close()


def test_what_cannot_be_opened_leaves_nothing(tmp_path: Path) -> None:
    """The error is the journal's, and no thread stays."""
    commits = Commits(SqliteJournal(tmp_path / "no" / "folder.db"), set)
    with pytest.raises(JournalError, match="folder"):
        commits.open()
    commits.close()


def test_open_that_is_given_up(journal: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not wait until it is open has it closed when it is: the next one can open it."""
    opening = Native()
    open = journal.open
    monkeypatch.setattr(journal, "open", lambda: opening.wait(LONG) and open())
    commits = Commits(journal, set)
    with pytest.raises(gevent.Timeout), gevent.Timeout(5 * MS):
        commits.open()
    assert not commits.join(0)
    opening.set()
    assert commits.join(LONG)
    again = Commits(journal, set)
    again.open()
    again.close()
    assert again.join(LONG)


def test_tidies_between_commits(journal: Gated, commits: Commits) -> None:
    """The journal may tidy up after a commit, and is told what it must keep."""
    commits.write(Forget(_id(1)), Told())
    wait_until(lambda: journal.tidied)
    assert journal.tidied == [frozenset({_id(9)})]


def test_tidies_however_much_there_is_to_store(journal: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is never idle does not outgrow its limits; one that has much to tidy stores between the parts."""
    monkeypatch.setattr("greensafe.journal.commits.TIDY", 5 * MS)
    commits = Commits(journal, set)
    commits.open()
    is_enough = False

    def again(result: Any, error: JournalError | None) -> None:
        if not is_enough:
            commits.write(Forget(_id(1)), again)

    try:
        journal.gate.clear()
        commits.write(Forget(_id(1)), again)
        wait_until(lambda: commits._is_busy)
        commits.write(Forget(_id(1)), again)
        journal.gate.set()  # from now on one is always waiting while another is stored
        wait_until(lambda: len(journal.tidied) > 3)
        monkeypatch.setattr(journal, "tidy", lambda running: journal.tidied.append(frozenset(running)) or True)
        tidied = len(journal.tidied)
        wait_until(lambda: len(journal.tidied) > tidied + 1)
        stored, tidied = len(journal.batches), len(journal.tidied)
        wait_until(lambda: len(journal.tidied) > tidied + 10)
        assert len(journal.batches) > stored + 5
    finally:
        is_enough = True
        commits.close()
        assert commits.join(LONG)
