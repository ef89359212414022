"""Tests of what a journal keeps: after a close, a kill, a TTL, and when there is too much.

Times are the journal's own, and short. Where what is right depends on how fast the test was, it is done again until it was fast
enough; what a loss of power leaves is not known here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import JournalError
from ...sansio.records import Ack, Known, Rerun, State, Write
from .asking import HOUR, Opens, begin, finish, id_of, is_there, look, refuse, step, tidy, wait
from .killed import has_batch, kill_while_it_commits

__all__ = ["Lasting"]


class Lasting(Opens):
    """Tests of what a journal keeps, for how long, and for whom."""

    # What lasts.

    def test_reopened(self, tmp_path: Path) -> None:
        """Everything is there again after close and open, by the same object or another; so are id and counts."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1, until=5.5), Rerun(id_of(1)), step(1, "a", 1, b"x"), begin(2), finish(2, b"r"), begin(3)])
            journal.commit([finish(3), Ack(id_of(3))])
            before = [look(journal, number) for number in (1, 2, 3)]
            id, dropped = journal.id, dict(journal.dropped)
            journal.close()
            journal.open()
            assert [look(journal, number) for number in (1, 2, 3)] == before
        with self._open(tmp_path) as journal:
            assert [look(journal, number) for number in (1, 2, 3)] == before
            assert (journal.id, dict(journal.dropped)) == (id, dropped)

    def test_id(self, tmp_path: Path) -> None:
        """Two journals have two ids, of 16 bytes, which are not all zero."""
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            folder.mkdir()
        with self._open(folders[0]) as first, self._open(folders[1]) as second:
            assert len(first.id) == len(second.id) == 16
            assert len({first.id, second.id, bytes(16)}) == 3

    def test_time(self, tmp_path: Path) -> None:
        """The journal's time goes on as the monotonic clock does, open or not."""
        with self._open(tmp_path) as journal:
            began, first = time.monotonic(), journal.now()
        with self._open(tmp_path) as journal:
            second, ended = journal.now(), time.monotonic()
            assert 0 <= second - first <= ended - began + 0.001

    def test_one_at_a_time(self, tmp_path: Path) -> None:
        """A second server is refused as long as the first has the journal, and disturbs nothing; then it gets it."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1)])
            for other in (self.make(tmp_path), journal):
                try:
                    other.open()
                except JournalError:
                    continue
                other.close()
                raise AssertionError("a journal was opened a second time")
            assert journal.commit([begin(2)]) == [None]
        with self._open(tmp_path) as other:
            assert look(other, 1).state is look(other, 2).state is State.OPEN

    def test_closed(self, tmp_path: Path) -> None:
        """A journal that is not open is a JournalError to commit and tidy; closing it again is none."""
        journal = self.make(tmp_path)
        for _ in range(2):
            refuse(journal, [begin(1)])
            try:
                journal.tidy(())
            except JournalError:
                pass
            else:
                raise AssertionError("a closed journal was tidied")
            journal.close()
            journal.open()
            journal.close()

    def test_any_thread(self, tmp_path: Path) -> None:
        """Each call may come from another thread, and the journal is closed by yet another."""
        failures: list[BaseException] = []

        def call(function: Callable[..., Any], *args: Any) -> None:
            try:
                function(*args)
            except BaseException as error:
                failures.append(error)
                raise

        journal = self.make(tmp_path)
        calls: list[tuple[Any, ...]] = [(journal.open,), *((journal.commit, [begin(number)]) for number in range(5))]
        for each in [*calls, (journal.tidy, ()), (journal.close,)]:
            thread = threading.Thread(target=call, args=each)
            thread.start()
            thread.join()
        assert not failures
        with self._open(tmp_path) as journal:
            assert [look(journal, number).state for number in range(5)] == [State.OPEN] * 5

    def test_killed(self, tmp_path: Path) -> None:
        """Of a process that is killed while it commits, every batch whose commit had returned is there, and none by halves."""
        source = random.Random(tmp_path.name)
        for number, lines in enumerate((1, 2, 5, 20, 60)):
            folder = tmp_path / str(number)
            folder.mkdir()
            returned = kill_while_it_commits(type(self), folder, lines, source.random() * 0.002)
            with self._open(folder) as journal:
                there = [has_batch(journal, at) for at in range(returned + 3)]
            # The one that was underway may have been finished.
            assert there[: returned + 1] == [True] * (returned + 1), (returned, there)
            assert not there[returned + 2], (returned, there)

    # What is dropped.

    def test_too_old(self, tmp_path: Path) -> None:
        """What has not changed for the TTL is dropped, in any state, and counted; sent again, it is DROPPED, otherwise new."""
        with self._open(tmp_path, ttl=0.05) as journal:
            since = journal.now()
            journal.commit([begin(1, since=since), begin(2, since=since), finish(2), begin(3), finish(3), Ack(id_of(3))])
            tidy(journal)
            wait(journal, journal.now() + 0.05)
            tidy(journal)
            assert sum(journal.dropped.values()) == 3
            assert (
                journal.commit([begin(number, since=since, is_resent=True) for number in (1, 2)]) == [Known(State.DROPPED)] * 2
            )
            assert journal.commit([begin(4, since=since - 1.0, is_resent=True)]) == [Known(State.DROPPED)]
            assert journal.commit([begin(5, since=since + HOUR, is_resent=True), begin(1, since=since)]) == [None] * 2
            assert not look(journal, 1).steps

    def test_dropped_is_remembered(self, tmp_path: Path) -> None:
        """What was dropped, how much and up to when, is known after a restart; asking about it stores nothing."""
        with self._open(tmp_path, ttl=0.05) as journal:
            since = journal.now()
            journal.commit([begin(1, since=since), begin(2, since=since - HOUR)])
            wait(journal, journal.now() + 0.05)
            tidy(journal)
            dropped = dict(journal.dropped)
        with self._open(tmp_path) as journal:
            assert sum(dropped.values()) == 2
            assert dict(journal.dropped) == dropped
            again = begin(1, since=since, is_resent=True)
            assert journal.commit([again, again]) == [Known(State.DROPPED)] * 2
            assert journal.commit([begin(1, since=since)]) == [None]

    def test_age_counts_from_the_last_change(self, tmp_path: Path) -> None:
        """What has changed within the TTL is kept, however long ago it began: by an attempt, a step, an answer, an ack."""
        ttl = 0.2
        changes: list[Write] = [Rerun(id_of(1)), step(1, "a"), finish(1), Ack(id_of(1))]
        is_telling = False
        for attempt in range(100):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            with self._open(folder, ttl=ttl) as journal:
                journal.commit([begin(1)])
                is_telling = True
                for change in changes:
                    began = journal.now()
                    wait(journal, began + ttl * 0.6)
                    tidy(journal)
                    # A busy machine may have taken longer: then nothing can be said.
                    is_telling = is_telling and journal.now() < began + ttl
                    if not is_telling:
                        break
                    journal.commit([change])
                    is_telling = is_telling and journal.now() < began + ttl
                if is_telling:
                    assert look(journal, 1).state is State.ACKED
                    assert sum(journal.dropped.values()) == 0
                    return
        raise AssertionError("this machine was too busy each time")

    def test_running_are_kept(self, tmp_path: Path) -> None:
        """What is running is never dropped, however old it is and however much there is."""
        with self._open(tmp_path, ttl=0.05, max_bytes=2**18) as journal:
            journal.commit([begin(number, bytes(8_192)) for number in range(64)])
            running = [id_of(number) for number in range(0, 64, 2)]
            wait(journal, journal.now() + 0.05)
            tidy(journal, running)
            assert [is_there(journal, number) for number in range(64)] == [True, False] * 32
            assert sum(journal.dropped.values()) == 32

    def test_running_do_not_age(self, tmp_path: Path) -> None:
        """What has run for longer than the TTL is not dropped as soon as it does not run any more: it may be sent again."""
        ttl = 0.2
        for attempt in range(100):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            with self._open(folder, ttl=ttl) as journal:
                journal.commit([begin(1)])
                for _ in range(4):
                    wait(journal, journal.now() + ttl * 0.6)
                    ran = journal.now()
                    tidy(journal, [id_of(1)])
            with self._open(folder, ttl=ttl) as journal:
                tidy(journal)
                # A busy machine may have taken longer: then nothing can be said.
                if journal.now() < ran + ttl * 0.4:
                    assert look(journal, 1).state is State.OPEN
                    return
        raise AssertionError("this machine was too busy each time")

    def test_too_much(self, tmp_path: Path) -> None:
        """The oldest go first, ACKED before DONE before OPEN, and no more than is needed; they are counted."""
        large = bytes(8_192)
        with self._open(tmp_path, max_bytes=2**19) as journal:
            journal.commit([begin(number, large) for number in range(20)])
            journal.commit([begin(number) for number in range(100, 200)])
            for number in range(100, 200):
                journal.commit([finish(number, large if number < 160 else b"")])
            journal.commit([Ack(id_of(number)) for number in range(160, 200)])
            tidy(journal)
            opened, done, acked = (
                [is_there(journal, number) for number in numbers] for numbers in (range(20), range(100, 160), range(160, 200))
            )
            assert sum(journal.dropped.values()) == (opened + done + acked).count(False)
            assert not any(acked)
            assert all(opened)
            assert done == sorted(done)
            assert 25 <= done.count(True) <= 55

    def test_too_much_of_what_is_open(self, tmp_path: Path) -> None:
        """At last what is open goes as well, the oldest first: the bound holds."""
        with self._open(tmp_path, max_bytes=2**18) as journal:
            journal.commit([begin(100), finish(100)])
            for number in range(64):
                journal.commit([begin(number, bytes(8_192)), step(number, "a")])
            tidy(journal)
            assert not is_there(journal, 100)
            there = [is_there(journal, number) for number in range(64)]
            assert there == sorted(there)
            assert 5 <= there.count(True) <= 40

    def test_nothing_is_dropped_without_need(self, tmp_path: Path) -> None:
        """Neither age nor size: tidy has nothing to do, and says so."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), begin(2), finish(2), begin(3), finish(3), Ack(id_of(3))])
            assert journal.tidy(()) is False
            assert [is_there(journal, number) for number in (1, 2, 3)] == [True] * 3
            assert sum(journal.dropped.values()) == 0
