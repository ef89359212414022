"""Tests of greensafe.journal.commits."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent.monkey
import pytest
from gevent import threadpool
from helpers import LONG, MS, wait_until
from interrupting import Interrupter

from greensafe.errors import JournalError, JournalUnavailable, Unstorable
from greensafe.journal import Begin, Effect, Finish, Forget, Known, SqliteJournal, State, Step
from greensafe.journal._reports import Reports
from greensafe.journal._worker import Worker
from greensafe.journal.commits import LOOK, Commits
from greensafe.journal.steps import Act, JsonOrBytes, in_transaction

pytestmark = pytest.mark.usefixtures("limit")

Native = gevent.monkey.get_original("threading", "Event")


class Gated(SqliteJournal):
    """A journal whose disk takes as long as the test wants, and fails when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = Native()
        self.gate.set()
        self.is_at_gate = False
        self.batches: list[int] = []
        self.fault: BaseException | None = None
        self.tidied: list[frozenset[bytes]] = []

    def commit(self, writes: Sequence[Any]) -> list[Any]:
        self.is_at_gate = True
        self.gate.wait(LONG)
        self.is_at_gate = False
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
    wait_until(lambda: commits._worker.is_busy)
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
    wait_until(lambda: journal.tidied and not commits._worker.is_busy)
    journal.gate.clear()
    pending: list[int] = []
    commits.write(_begin(2), lambda result, error: pending.append(len(commits.queue.waiting)))
    wait_until(lambda: commits._worker.is_busy)
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


def test_what_nobody_waits_for_and_is_not_to_be_late(journal: Gated, commits: Commits) -> None:
    """It starts a batch."""
    commits.write(_begin(1))
    commits.write(Forget(_id(2)), is_soon=True)
    wait_until(lambda: journal.batches == [2])


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
    """After the limit; then each further batch has one try, until one is stored; what nobody waits for goes with each."""
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
        wait_until(lambda after=after: after.got)
        assert after.got == [(None, LOCKED)]
        assert journal.batches[tries:] == [2] * count
    assert _levels(caplog) == [logging.ERROR] * 2
    journal.fault = None
    commits.write(_begin(1), after)
    assert commits.flush(LONG)
    assert after.got[1] == (None, None)
    assert journal.batches[-1] == 2
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


def test_who_shares_a_batch_with_what_can_never_be_stored(
    journal: Gated, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When there is no time to find out which write it is, none of them is told that it can never be: it may be tried again."""
    monkeypatch.setattr("greensafe.journal._acts.LIMIT", 0.0)
    journal.fault = Unstorable("too large")
    told = [Told() for _ in range(4)]
    for number, each in enumerate(told):
        commits.write(_begin(number), each)
    assert commits.flush(LONG)
    assert [type(error) for each in told for _, error in each.got] == [JournalError] * 4
    assert "too large" in str(told[0].got[0][1])
    commits.write(_begin(9), told[0])
    assert commits.flush(LONG)
    assert told[0].got[1] == (None, journal.fault)


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
    wait_until(lambda: commits._worker.is_busy if is_trying else commits.error)
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
    wait_until(lambda: commits._worker.is_busy)
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
    assert commits._worker._pool.size == 0


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
        wait_until(lambda: commits._worker.is_busy)
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


# What nobody wants any more.


def test_what_is_withdrawn_in_time_is_not_written(journal: Gated, commits: Commits) -> None:
    """However much of it there is: the disk does nothing for it, and nobody is told."""
    numbers = [commits.write(_begin(number), Told(), Forget(_id(number)), 10) for number in range(100)]
    assert commits.queue.weight == 1000
    assert [commits.withdraw(number) for number in numbers] == [True] * 100
    assert (commits.queue.weight, commits.pending, commits.queue.withdrawn) == (0, 0, 100)
    told = Told()
    commits.write(_begin(1), told)
    assert commits.flush(LONG)
    assert (journal.batches, told.got) == ([1], [(None, None)])


def test_what_is_withdrawn_while_it_is_written_was_never_there(journal: Gated, commits: Commits) -> None:
    """For whoever comes with the same id meanwhile: its write is behind the one that undoes the first."""
    journal.gate.clear()
    first, second = Told(), Told()
    number = commits.write(_begin(1), first, Forget(_id(1)))
    wait_until(lambda: commits._worker.is_busy)
    assert not commits.withdraw(number)
    commits.write(_begin(1), second, Forget(_id(1)))
    journal.gate.set()
    assert commits.flush(LONG)
    assert (first.got, second.got, journal.batches) == ([], [(None, None)], [1, 2])


def test_there_is_room(journal: Gated, commits: Commits) -> None:
    """Whoever waits for it is called once, when a batch is taken, and when what waits is withdrawn."""
    rooms: list[int] = []

    def on_room() -> None:
        rooms.append(commits.queue.weight)

    journal.gate.clear()
    commits.write(_begin(1), Told(), weight=10)
    commits.on_room = on_room
    wait_until(lambda: rooms)
    number = commits.write(_begin(2), Told(), weight=10)
    commits.write(_begin(3), Told(), weight=7)
    commits.on_room = on_room
    commits.withdraw(number)
    wait_until(lambda: len(rooms) == 2)
    assert (rooms, commits.on_room) == ([0, 7], None)
    journal.gate.set()


# A thread that does not come back.


@pytest.fixture
def stall(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether the thread is stalled as soon as it has been looked at: only while it does not come back anyway."""
    monkeypatch.setattr("greensafe.journal._stall.LOOK", MS)
    monkeypatch.setattr("greensafe.journal._stall.LOOKS", 2)

    def stall(is_on: bool) -> None:
        monkeypatch.setattr("greensafe.journal._stall.LIMIT", 0.0 if is_on else LONG)

    stall(False)
    return stall


def test_a_disk_that_hangs_keeps_nobody_waiting(
    journal: Gated, stall: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    """All are told, what comes later too; it is logged once, and once that it goes on; what is new by then is undone."""
    commits = Commits(journal, set)
    commits.open()
    journal.gate.clear()
    told = [Told() for _ in range(3)]
    commits.write(_begin(1), told[0], Forget(_id(1)))
    wait_until(lambda: journal.is_at_gate)
    assert commits.oldest_seconds is not None
    assert commits.is_well
    commits.write(_begin(2), told[1], Forget(_id(2)))
    commits.write(Forget(_id(9)))
    stall(True)
    wait_until(lambda: told[1].got)
    assert (commits.is_well, commits.failures, commits.pending) == (False, 2, 2)
    commits.write(_begin(3), told[2])
    wait_until(lambda: told[2].got)
    assert [type(error) for each in told for _, error in each.got] == [JournalUnavailable] * 3
    assert "does not answer" in str(told[2].got[0][1])
    assert not commits.flush(LONG)
    assert _levels(caplog) == [logging.ERROR]
    stall(False)
    journal.gate.set()
    wait_until(lambda: commits.is_well)
    again = Told()
    commits.write(_begin(1), again)
    assert commits.flush(LONG)
    assert again.got == [(None, None)]
    assert [len(each.got) for each in told] == [1] * 3
    assert _levels(caplog) == [logging.ERROR, logging.WARNING]
    commits.close()
    assert commits.join(LONG)


def test_closed_while_it_hangs(journal: Gated, stall: Callable[[bool], None]) -> None:
    """Nobody waits for it to be closed either; it is when it comes back, and what was wanted anyway is stored."""
    commits = Commits(journal, set)
    commits.open()
    journal.gate.clear()
    told = Told()
    commits.write(_begin(1), told, Forget(_id(1)))
    wait_until(lambda: journal.is_at_gate)
    stall(True)
    wait_until(lambda: told.got)
    commits.write(_begin(2))
    commits.close()
    assert not commits.join(LONG)
    journal.gate.set()
    wait_until(lambda: commits.join(MS))
    assert len(told.got) == 1
    journal.open()
    assert [result and result.attempts for result in journal.commit([_begin(1), _begin(2)])] == [None, 1]
    journal.close()


def test_whose_effect_it_is_waits_for_it(
    journal: Gated, stall: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It is a function that runs: what it returns arrives; everybody else is told, and the log names the step."""
    over = Native()
    act = Act(in_transaction(lambda connection: over.wait(LONG) and 5), (), JsonOrBytes())
    mine, other = Told(), Told()
    commits = Commits(journal, set)
    commits.open()
    commits.write(_begin(1))
    commits.write(Effect(_id(1), "pay", 1, act), mine)
    commits.write(_begin(2), other)
    wait_until(lambda: act.is_under_way)
    stall(True)
    wait_until(lambda: other.got)
    assert "the effect of step 'pay' has not returned" in caplog.messages[-1]
    stall(False)
    over.set()
    wait_until(lambda: mine.got)
    assert mine.got == [(b"j5", None)]
    assert [len(other.got), act.is_under_way] == [1, False]
    commits.close()
    assert commits.join(LONG)


def test_flush_ends_with_a_stall(journal: Gated, stall: Callable[[bool], None]) -> None:
    """A wait that has begun before it does not last for its limit."""
    commits = Commits(journal, set)
    commits.open()
    journal.gate.clear()
    commits.write(_begin(1), Told())
    flushing = gevent.spawn(commits.flush, 2 * LONG)
    wait_until(lambda: journal.is_at_gate)
    stall(True)
    assert not flushing.get()
    assert commits.pending == 1
    journal.gate.set()
    wait_until(lambda: commits.is_well)
    commits.close()
    assert commits.join(LONG)


def test_a_tidying_that_hangs(journal: Gated, stall: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait behind it are told, and what they wanted is not done."""
    over, tidy = Native(), journal.tidy
    monkeypatch.setattr(journal, "tidy", lambda running: over.wait(LONG) and tidy(running))
    commits = Commits(journal, set)
    commits.open()
    commits.write(_begin(1), Told())
    wait_until(lambda: commits.count and commits._worker.is_busy)
    told = Told()
    commits.write(_begin(2), told)
    stall(True)
    wait_until(lambda: told.got)
    assert isinstance(told.got[0][1], JournalUnavailable)
    stall(False)
    over.set()
    wait_until(lambda: commits.is_well)
    assert journal.batches == [1]
    commits.close()
    assert commits.join(LONG)


def test_an_open_that_hangs_is_logged(
    journal: Gated, stall: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that does not start says why."""
    over, open = Native(), journal.open
    monkeypatch.setattr(journal, "open", lambda: over.wait(LONG) and open())
    stall(True)
    commits = Commits(journal, set)
    opening = gevent.spawn(commits.open)
    wait_until(lambda: caplog.messages)
    assert "could not be opened" in caplog.messages[0]
    over.set()
    opening.get()
    commits.close()
    assert commits.join(LONG)


def test_looks_at_what_takes_long(journal: Gated, commits: Commits) -> None:
    """Whoever has limits of its own is called while it lasts, and not afterwards."""
    ages: list[float | None] = []
    commits.on_look = lambda: ages.append(commits.oldest_seconds)
    journal.gate.clear()
    commits.write(_begin(1), Told())
    wait_until(lambda: len(ages) == 2)
    journal.gate.set()
    assert commits.flush(LONG)
    assert all(age is not None and age >= LOOK for age in ages)


def test_a_write_that_makes_the_journal_fail_fails_alone(
    journal: Gated, commits: Commits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if what it raises is no JournalError; that is logged once."""
    store = journal.commit

    def commit(writes: Sequence[Any]) -> list[Any]:
        if any(write.request_id == _id(3) for write in writes):
            raise BufferError("a bug")
        return store(writes)

    monkeypatch.setattr(journal, "commit", commit)
    told = [Told() for _ in range(8)]
    for number, each in enumerate(told):
        commits.write(_begin(number), each)
    assert commits.flush(LONG)
    assert [each.got == [(None, None)] for each in told] == [number != 3 for number in range(8)]
    assert sum(message.startswith("<SqliteJournal") for message in caplog.messages) == 1


def test_what_can_never_be_stored_is_no_fault_of_the_journals(
    journal: Gated, commits: Commits, caplog: pytest.LogCaptureFixture
) -> None:
    """Its writer is told, and nobody takes the journal for ill."""
    journal.fault, told = Unstorable("too large"), Told()
    commits.write(_begin(1), told)
    assert commits.flush(LONG)
    assert told.got == [(None, journal.fault)]
    assert (commits.is_well, commits.failures, caplog.messages) == (True, 1, [])


def test_what_can_never_be_stored_does_not_make_the_journal_well(journal: Gated, commits: Commits) -> None:
    """Nor does it end what its place is known for."""
    journal.fault, told = JournalError("the disk is full"), Told()
    commits.write(_begin(1), told)
    wait_until(lambda: told.got)
    journal.fault = Unstorable("too large")
    commits.write(_begin(1), told)
    wait_until(lambda: len(told.got) == 2)
    assert str(commits.error) == "the disk is full"


def test_there_is_room_when_all_have_been_told(journal: Gated, commits: Commits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait for the next batch come to it although nothing is left that would start one."""
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", LONG)
    journal.fault, told, rooms = LOCKED, Told(), Told()
    commits.write(_begin(1), told)
    wait_until(lambda: commits.error)
    commits.write(_begin(2), told)
    commits.write(Forget(_id(9)))
    commits.on_room = lambda: rooms(None, None)
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", 0.0)
    wait_until(lambda: rooms.got)
    assert len(told.got) == 2
    journal.fault = None


@pytest.mark.parametrize(("owner", "name"), [(Worker, "_on_done"), (Commits, "_on_committed"), (Reports, "send")])
def test_a_result_whose_handing_over_is_interrupted(
    commits: Commits, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """Wherever a signal's handler raises in it: who waits is told, and the journal goes on."""
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: None)
    real, current = getattr(owner, name), [Interrupter(0)]

    def interrupted(*args: Any) -> None:
        if current[0].has_begun:
            real(*args)
            return
        with current[0]:
            real(*args)

    monkeypatch.setattr(owner, name, interrupted)
    told = [Told(), Told()]
    for number in itertools.count():
        interrupter = current[0] = Interrupter(number, "journal/commits", "journal/_worker", "journal/_reports")
        for index, then in enumerate(told):
            commits.write(_begin(2 * number + index), then)
            wait_until(lambda: all(each.got for each in told[: index + 1]))  # noqa: B023 - it is waited for here
            assert then.got[0] == (None, None)
        for then in told:
            then.got.clear()
        wait_until(lambda: not commits.pending)
        if not interrupter.has_raised:
            break
    assert number > 1
