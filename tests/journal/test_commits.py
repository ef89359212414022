"""Tests of greensafe.journal.commits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent.monkey
import pytest
from gevent import threadpool
from helpers import LONG, MS, wait_until

from greensafe.errors import JournalError, JournalUnavailable
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


LOCKED = JournalUnavailable("the file is locked")


def _levels(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in caplog.records]


def test_a_batch_that_the_place_cannot_take_is_tried_again_as_a_whole(
    journal: Gated, commits: Commits, caplog: pytest.LogCaptureFixture
) -> None:
    """It is noted at the first failure and nobody is told; what comes meanwhile waits; in the end all is stored, once."""
    journal.fault = LOCKED
    told, late = [Told() for _ in range(3)], Told()
    for number, each in enumerate(told):
        commits.write(_begin(number), each)
    wait_until(lambda: commits.error is LOCKED)
    assert _levels(caplog) == [logging.ERROR]
    commits.write(_begin(0), late)
    wait_until(lambda: len(journal.batches) == 3)
    assert [each.got for each in told] == [[]] * 3
    assert (commits.pending, commits.failures) == (4, 0)
    journal.fault = None
    assert commits.flush(LONG)
    assert [each.got for each in told] == [[(None, None)]] * 3
    assert late.got[0][0].attempts == 1
    assert set(journal.batches[:-1]) == {3}
    assert journal.batches[-1] == 1
    assert (commits.error, commits.failures, _levels(caplog)) == (None, 0, [logging.ERROR, logging.WARNING])


def test_all_are_told_at_once_when_the_place_stays_ill(
    journal: Gated, commits: Commits, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the limit; then each further batch has one try, until one is stored."""
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", LONG)
    journal.fault = LOCKED
    told = [Told() for _ in range(9)]
    for number, each in enumerate(told):
        commits.write(_begin(number), each)
    wait_until(lambda: len(journal.batches) == 2)
    late = Told()
    commits.write(Forget(_id(20)))
    commits.write(_begin(10), late)
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", 0.0)
    wait_until(lambda: late.got)
    assert [each.got for each in (*told, late)] == [[(None, LOCKED)]] * 10
    tries = len(journal.batches)
    assert journal.batches == [9] * tries
    assert tries > 1
    assert (commits.failures, commits.pending) == (10, 1)
    assert "10 writes have failed" in caplog.messages[-1]
    for count in (1, 2):
        after = Told()
        commits.write(_begin(1), after)
        assert commits.flush(LONG)
        assert after.got == [(None, LOCKED)]
        assert journal.batches[tries:] == [2, 1][:count]
    assert _levels(caplog) == [logging.ERROR] * 2
    journal.fault = None
    commits.write(_begin(1), after)
    assert commits.flush(LONG)
    assert after.got[1] == (None, None)
    assert (commits.error, _levels(caplog)) == (None, [logging.ERROR] * 2 + [logging.WARNING])


def test_halves_end_where_the_place_fails(journal: Gated, commits: Commits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that fails while a batch is cut for a bad write: what stands behind keeps its order, and is stored later."""
    store, fail = journal.commit, [False]

    def commit(writes: Sequence[Any]) -> list[Any]:
        if fail[0] and len(writes) == 1:
            fail[0] = False
            raise LOCKED
        return store(writes)

    monkeypatch.setattr(journal, "commit", commit)
    fail[0] = True
    told = [Told() for _ in range(5)]
    step, bad = Step(_id(1), "a", 1, b"x"), Step(_id(99), "a", 1, b"x")
    for write, each in zip((_begin(1), step, bad, Finish(_id(1), 0x81, [b"x"]), _begin(2)), told, strict=True):
        commits.write(write, each)
    assert commits.flush(LONG)
    good = [each.got for each in (*told[:2], *told[3:])]
    assert good == [[(None, None)]] * 4
    ((_, error),) = told[2].got
    assert type(error) is JournalError


def test_halving_ends(journal: Gated, commits: Commits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that takes long to fail, and does not say that the fault is its own, is not tried for each half of a batch."""
    monkeypatch.setattr("greensafe.journal._acts.LIMIT", 0.0)
    journal.fault = JournalError("it takes long")
    told = [Told() for _ in range(9)]
    for number, each in enumerate(told):
        commits.write(_begin(number), each)
    assert commits.flush(LONG)
    assert journal.batches == [9]
    assert [each.got for each in told] == [[(None, journal.fault)]] * 9


def test_that_the_place_is_well_again_is_found_without_writes(
    journal: Gated, commits: Commits, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is not healthy may be asked nothing any more: an empty batch tells."""
    monkeypatch.setattr("greensafe.journal.commits.ASK", 5 * MS)
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", 0.0)
    journal.fault, told = LOCKED, Told()
    commits.write(_begin(1), told)
    wait_until(lambda: journal.batches[:3] == [1, 0, 0])
    assert (told.got, commits.error) == ([(None, LOCKED)], LOCKED)
    journal.fault = None
    wait_until(lambda: commits.error is None)
    assert _levels(caplog) == [logging.ERROR] * 2 + [logging.WARNING]
    asked = len(journal.batches)
    commits.write(_begin(1), told)
    assert commits.flush(LONG)
    assert journal.batches[asked:] == [1]


def test_a_place_that_cannot_be_tidied(
    journal: Gated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is noted as for a batch, once, and asked about."""
    monkeypatch.setattr("greensafe.journal.commits.TIDY", 5 * MS)
    tidy = journal.tidy

    def fail(running: Collection[bytes]) -> bool:
        journal.fault = LOCKED
        raise LOCKED

    monkeypatch.setattr(journal, "tidy", fail)
    commits = Commits(journal, set)
    commits.open()
    try:
        wait_until(lambda: journal.batches[:3] == [0, 0, 0])
        assert (commits.error, _levels(caplog)) == (LOCKED, [logging.ERROR])
        monkeypatch.setattr(journal, "tidy", tidy)
        journal.fault = None
        wait_until(lambda: journal.tidied)
        assert commits.error is None
    finally:
        commits.close()
        assert commits.join(LONG)


@pytest.mark.parametrize("is_trying", [True, False])
def test_close_while_the_place_is_ill(journal: Gated, is_trying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries or in one: who waits is told, and what is wanted all the same is tried once more."""
    monkeypatch.setattr("greensafe.journal._patience.SHORTEST", LONG)
    monkeypatch.setattr("greensafe.journal._patience.LONGEST", LONG)
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", 2 * LONG)
    store = journal.commit

    def fail_once(writes: Sequence[Any]) -> list[Any]:
        try:
            return store(writes)
        finally:
            journal.fault = None

    monkeypatch.setattr(journal, "commit", fail_once)
    commits = Commits(journal, set)
    commits.open()
    journal.fault = LOCKED
    if is_trying:
        journal.gate.clear()
    told = Told()
    commits.write(_begin(1), told)
    commits.write(_begin(2), told, Forget(_id(2)))
    wait_until(lambda: commits._is_busy if is_trying else commits.error)
    commits.write(_begin(3))
    commits.close()
    assert ["was stopped" in str(error) for _, error in told.got] == [True, True]
    journal.gate.set()
    assert commits.join(LONG)
    assert journal.batches == [2, 2]
    journal.open()
    assert [result and result.attempts for result in journal.commit([_begin(1), _begin(2), _begin(3)])] == [1, None, 1]
    journal.close()


def test_what_cannot_be_stored_at_the_end_is_logged(journal: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with how many writes it is, and the journal is closed all the same."""
    commits = Commits(journal, set)
    commits.open()
    journal.fault = LOCKED
    commits.write(_begin(1))
    commits.write(_begin(2))
    commits.close()
    assert commits.join(LONG)
    assert [record.getMessage() for record in caplog.records] == [
        "the journal is closed without 2 writes, which it cannot store: the file is locked"
    ]
    journal.open()
    journal.close()


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


def test_the_thread_ends_with_it(journal: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has handed over its last result and is not done with that task yet, when the hub comes to it."""
    over = Native()
    monkeypatch.setattr(threadpool._WorkerGreenlet, "_after_run_task", lambda *_: over.wait(LONG))
    commits = Commits(journal, set)
    commits.open()
    commits.close()
    gevent.spawn_later(5 * MS, over.set)
    assert commits.join(LONG)
    assert commits._pool.size == 0


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
