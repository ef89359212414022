"""Does a backend keep the rules of a journal?

    class TestMine(JournalConformance):
        def make(self, folder, *, ttl=86_400.0, max_bytes=2**30):
            return MyJournal(folder / "requests.mine", ttl=ttl, max_bytes=max_bytes)

in a test file is all that a backend needs; pytest runs the tests, hypothesis is needed for one of them. There is a test for
each rule of `greensafe.journal.base` and `greensafe.sansio.records`; `Model` says the same in code.

What it does not test, since only the backend knows how: what happens when the place is full, read-only, damaged or somebody
else's, and what a loss of power leaves.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import JournalError
from ..journal.base import Journal
from ..sansio.records import Ack, Begin, Effect, Excuse, Failed, Finish, Forget, Known, Rerun, State, Step, Write

__all__ = ["JournalConformance", "Model"]

#: Kinds of answers, as on the wire.
_REPLY, _ERROR = 0x81, 0x82

_HOUR = 3_600.0


class JournalConformance:
    """Tests of a Journal; see the module's head. A subclass stands at the top of its file, and needs nothing to be made."""

    def make(self, folder: Path, *, ttl: float = 86_400.0, max_bytes: int = 2**30) -> Journal:
        """A journal that is not open yet. The same folder means the same place, with what was stored there.

        Args:
            folder: Is there, and empty at first.
            ttl: Seconds after which something that has not changed is dropped.
            max_bytes: How much may be kept.
        """
        raise NotImplementedError

    # What comes back.

    def test_new_request(self, tmp_path: Path) -> None:
        """An unknown request is stored: its Begin's result is None, the next one's what is known of it."""
        with self._open(tmp_path) as journal:
            assert journal.commit([_begin(1, until=17.25, client=b"\0c", metadata=b"m")]) == [None]
            assert _look(journal, 1) == Known(State.OPEN, True, 1, 1, 17.25, reply=[], steps={})

    def test_known_request_is_not_changed_by_a_begin(self, tmp_path: Path) -> None:
        """Begin of a known id changes nothing: not the body, not its limit, not the attempts."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1, b"a", until=1.0)])
            journal.commit([_begin(1, b"b", until=2.0)])
            assert _look(journal, 1, b"a") == Known(State.OPEN, True, 1, 1, 1.0, reply=[])

    def test_another_body_is_told(self, tmp_path: Path) -> None:
        """The same id with other frames is not the same, in every state; how bytes are cut into frames counts."""
        others = ([b"ab"], [b"a", b"b", b""], [b"", b"a", b"b"], [b"b", b"a"], [b""], [b"a\0\0\0\1b"])
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1, b"a", b"b")])
            for writes in ([], [_finish(1)], [Ack(_id(1))]):
                journal.commit(writes)
                assert _look(journal, 1, b"a", b"b").is_same
                assert [_look(journal, 1, *other).is_same for other in others] == [False] * len(others)

    def test_answer(self, tmp_path: Path) -> None:
        """A finished request is DONE, with the kind and the frames of its answer; none, empty ones and many are kept apart."""
        answers = [[], [b""], [b"", b""], [b"a"], [b"a", b"", b"b"], [bytes(range(256))] * 3]
        with self._open(tmp_path) as journal:
            for number, frames in enumerate(answers):
                journal.commit([_begin(number), Finish(_id(number), _ERROR, frames)])
                known = _look(journal, number)
                assert (known.state, known.kind, list(known.reply)) == (State.DONE, _ERROR, frames)

    def test_ack(self, tmp_path: Path) -> None:
        """An answer that has arrived is gone, the request is known still; a second Ack changes nothing."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _finish(1)])
            for _ in range(2):
                assert journal.commit([Ack(_id(1))]) == [None]
                known = _look(journal, 1)
                assert (known.state, list(known.reply), known.is_same) == (State.ACKED, [], True)

    def test_ack_of_what_is_not_done(self, tmp_path: Path) -> None:
        """An Ack of an unknown or an open request does nothing."""
        with self._open(tmp_path) as journal:
            assert journal.commit([Ack(_id(1)), _begin(2), Ack(_id(2))]) == [None] * 3
            assert _look(journal, 2).state is State.OPEN
            assert journal.commit([_begin(1)]) == [None]

    def test_forget(self, tmp_path: Path) -> None:
        """What is forgotten, in whatever state, is new again, and counts as dropped by nobody; the unknown can be forgotten."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _step(1, "a"), _begin(2), _finish(2), _begin(3), _finish(3), Ack(_id(3))])
            assert journal.commit([Forget(_id(number)) for number in range(5)]) == [None] * 5
            assert journal.commit([_begin(1, b"other"), *map(_begin, (2, 3))]) == [None] * 3
            assert _look(journal, 1, b"other") == Known(State.OPEN, attempts=1, fruitless=1, reply=[])
            assert sum(journal.dropped.values()) == 0

    def test_is_resent_alone_drops_nothing(self, tmp_path: Path) -> None:
        """A request that was sent again is new as long as nothing was dropped, however old it is."""
        with self._open(tmp_path) as journal:
            assert journal.commit([_begin(1, since=-_HOUR, is_resent=True)]) == [None]

    # Attempts and steps.

    def test_rerun(self, tmp_path: Path) -> None:
        """Each Rerun counts one attempt, and one that has not brought a step."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1)])
            for attempt in (2, 3, 4):
                assert journal.commit([Rerun(_id(1))]) == [None]
                assert _counts(_look(journal, 1)) == (attempt, attempt)

    def test_excuse(self, tmp_path: Path) -> None:
        """An Excuse takes back what a Rerun or the Begin has counted as in vain, and no more; nor of others."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), Rerun(_id(1)), _begin(2), _finish(2)])
            for fruitless in (1, 0, 0):
                assert journal.commit([Excuse(_id(1)), Excuse(_id(2)), Excuse(_id(3))]) == [None] * 3
                assert _counts(_look(journal, 1)) == (2, fruitless)
            journal.commit([Rerun(_id(1))])
            assert _counts(_look(journal, 1)) == (3, 1)
            assert (_look(journal, 2).state, journal.commit([_begin(3)])) == (State.DONE, [None])

    def test_step(self, tmp_path: Path) -> None:
        """Steps come back by name and number, in the order in which they were stored; a new one makes attempts fruitful."""
        keys = [("b", 0), ("a", 1), ("a", 0), ("", 7), ("a b\0\n\u00e4\U0001f40d", -1)]
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), Rerun(_id(1)), Rerun(_id(1))])
            for at, (name, number) in enumerate(keys):
                assert journal.commit([_step(1, name, number, b"%d" % at)]) == [None]
            known = _look(journal, 1)
            assert list(known.steps.items()) == [(key, b"%d" % at) for at, key in enumerate(keys)]
            assert _counts(known) == (3, 0)
            journal.commit([Rerun(_id(1))])
            assert _counts(_look(journal, 1)) == (4, 1)

    def test_step_that_is_stored_already(self, tmp_path: Path) -> None:
        """A step that is stored stays as it is, and a second time is no progress."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _step(1, "a", value=b"first"), Rerun(_id(1))])
            assert journal.commit([_step(1, "a", value=b"second")]) == [None]
            known = _look(journal, 1)
            assert (dict(known.steps), _counts(known)) == ({("a", 0): b"first"}, (2, 1))

    def test_steps_belong_to_their_request(self, tmp_path: Path) -> None:
        """Steps of the same name of two requests are two; new and stored ones in one batch are told apart."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _begin(2), _begin(3), _step(1, "a", value=b"1"), Rerun(_id(1)), Rerun(_id(2))])
            journal.commit([_step(1, "a", value=b"x"), _step(2, "a", value=b"2")])
            assert [dict(_look(journal, number).steps) for number in (1, 2, 3)] == [{("a", 0): b"1"}, {("a", 0): b"2"}, {}]
            assert [_counts(_look(journal, number)) for number in (1, 2)] == [(2, 1), (2, 0)]

    def test_steps_go_with_the_answer(self, tmp_path: Path) -> None:
        """A request that is not open shows no steps, and one that was forgotten has none when it comes again."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _step(1, "a"), _finish(1)])
            assert not _look(journal, 1).steps
            journal.commit([Forget(_id(1)), _begin(1)])
            assert not _look(journal, 1).steps

    def test_only_what_is_open_goes_on(self, tmp_path: Path) -> None:
        """Rerun, Step, Effect and Finish of a request that is not open are a JournalError, and change nothing."""
        calls: list[Any] = []
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _finish(1), _begin(2), _finish(2), Ack(_id(2))])
            before = [_look(journal, number) for number in (1, 2)]
            for number in (1, 2, 3):
                effect = Effect(_id(number), "a", 0, _noting(calls))
                for write in (Rerun(_id(number)), _step(number, "a"), effect, Finish(_id(number), _ERROR, [b"other"])):
                    _refuse(journal, [write])
            assert [_look(journal, number) for number in (1, 2)] == before
            assert not calls

    # Effects.

    def test_effect(self, tmp_path: Path) -> None:
        """What an effect returns is its result, and the step that is stored."""
        with self._open(tmp_path) as journal:
            assert journal.commit([_begin(1), Rerun(_id(1)), Effect(_id(1), "e", 3, lambda _: b"value")]) == [
                None,
                None,
                b"value",
            ]
            known = _look(journal, 1)
            assert (dict(known.steps), _counts(known)) == ({("e", 3): b"value"}, (2, 0))

    def test_effect_that_is_stored_already(self, tmp_path: Path) -> None:
        """An effect whose step is stored is not called again: its result is what is stored."""
        calls: list[Any] = []
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _step(1, "e", 3, b"stored"), Rerun(_id(1))])
            assert journal.commit([Effect(_id(1), "e", 3, _noting(calls))]) == [b"stored"]
            assert not calls
            assert _counts(_look(journal, 1)) == (2, 1)

    def test_effect_that_raises(self, tmp_path: Path) -> None:
        """What an effect raises is its result, Failed; nothing of it is stored, everything else in the batch is."""
        error = ValueError("mine")
        with self._open(tmp_path) as journal:
            writes: list[Write] = [_begin(1), Effect(_id(1), "e", 0, _raising(error)), _begin(2), _step(1, "a")]
            none, failed, *others = journal.commit(writes)
            assert isinstance(failed, Failed)
            assert failed.error is error
            assert [none, *others] == [None] * 3
            assert (dict(_look(journal, 1).steps), _look(journal, 2).state) == ({("a", 0): b""}, State.OPEN)
            assert journal.commit([Effect(_id(1), "e", 0, lambda _: b"at last")]) == [b"at last"]

    def test_effect_without_bytes(self, tmp_path: Path) -> None:
        """An effect that returns no bytes has failed."""
        with self._open(tmp_path) as journal:
            for value in (None, "text", 1):
                (failed,) = journal.commit([_begin(1), Effect(_id(1), "e", 0, _returning(value))])[1:]
                assert isinstance(failed, Failed)
                assert isinstance(failed.error, TypeError)
                assert not _look(journal, 1).steps

    def test_effect_of_no_request(self, tmp_path: Path) -> None:
        """An effect without a request's id is called each time, and leaves no step."""
        calls: list[Any] = []
        error = ValueError("mine")
        with self._open(tmp_path) as journal:
            nobody = [Effect(b"", "e", 0, _noting(calls)), Effect(b"", "e", 0, _raising(error))]
            none, *results = journal.commit([_begin(1), *nobody, *nobody])
            assert (none, results[::2], len(calls)) == (None, [b"", b""], 2)
            assert [each.error for each in results[1::2]] == [error, error]
            assert not _look(journal, 1).steps

    # Batches.

    def test_order_in_a_batch(self, tmp_path: Path) -> None:
        """A write sees what those before it in the batch have done."""
        with self._open(tmp_path) as journal:
            look = _begin(1)
            results = journal.commit(
                [
                    look,
                    look,
                    Rerun(_id(1)),
                    look,
                    _step(1, "a"),
                    look,
                    _finish(1),
                    look,
                    Ack(_id(1)),
                    look,
                    Forget(_id(1)),
                    look,
                ]
            )
            assert results[::2] == [None, None, None, None, None, None]
            known = results[1::2]
            assert [each and each.state.value for each in known] == ["open", "open", "open", "done", "acked", None]
            assert [_counts(each) for each in known[:3]] == [(1, 1), (2, 2), (2, 0)]

    def test_batch_is_all_or_nothing(self, tmp_path: Path) -> None:
        """If one write cannot be done, wherever it stands, none is; the same batch without it is done."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _begin(2), _finish(2), _begin(3), _step(3, "s")])
            good: list[Write] = [
                _begin(4),
                _step(1, "a"),
                Ack(_id(2)),
                _finish(3),
                Forget(_id(9)),
                Effect(_id(1), "e", 0, lambda _: b""),
            ]
            before = [_look(journal, number) for number in (1, 2, 3)]
            for place in range(len(good) + 1):
                _refuse(journal, [*good[:place], _step(77, "bad"), *good[place:]])
                assert [_look(journal, number) for number in (1, 2, 3)] == before
            assert journal.commit(good) == [None, None, None, None, None, b""]
            assert [_look(journal, number).state.value for number in (1, 2, 3, 4)] == ["open", "acked", "done", "open"]

    def test_large_batch(self, tmp_path: Path) -> None:
        """A batch of 1,000 requests is stored, answered, acknowledged, and asked about, each in its place."""
        many = range(1_000)
        with self._open(tmp_path) as journal:
            assert journal.commit([_begin(number, b"%d" % number) for number in many]) == [None] * len(many)
            journal.commit([write for number in many for write in (_finish(number, b"%d" % number), _begin(number + 5_000))])
            known = journal.commit([_begin(number, b"%d" % number) for number in many])
            assert [(each.is_same, list(each.reply)) for each in known] == [(True, [b"%d" % number]) for number in many]
            journal.commit([Ack(_id(number)) for number in many])
            known = journal.commit([_begin(number + 5_000 * (number % 2)) for number in many])
            assert [each.state for each in known] == [State.ACKED, State.OPEN] * 500

    def test_empty_batch(self, tmp_path: Path) -> None:
        """No writes have no results."""
        with self._open(tmp_path) as journal:
            assert journal.commit([]) == []

    def test_large_and_empty_frames(self, tmp_path: Path) -> None:
        """Frames of 10 MB and of nothing are kept as they are: in requests, steps and answers."""
        large = random.Random(1).randbytes(10_000_000)
        with self._open(tmp_path) as journal:
            assert journal.commit([_begin(1, large, b""), _step(1, "a", value=large), _step(1, "b", value=b"")]) == [None] * 3
        with self._open(tmp_path) as journal:
            known = _look(journal, 1, large, b"")
            assert known.is_same
            assert known.steps[("a", 0)] == large
            assert known.steps[("b", 0)] == b""
            journal.commit([Finish(_id(1), _REPLY, [b"", large, b""])])
        with self._open(tmp_path) as journal:
            assert list(_look(journal, 1, large, b"").reply) == [b"", large, b""]

    def test_any_history(self, tmp_path: Path) -> None:
        """Whatever is written in whatever order, reopened now and then, the results are those of the model."""
        from hypothesis import HealthCheck, given, settings

        folders = iter(range(1_000_000))

        @settings(deadline=None, max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(_histories())
        def history(batches: list[list[Write] | None]) -> None:
            folder = tmp_path / str(next(folders))
            folder.mkdir()
            model = Model()
            journal = self.make(folder)
            journal.open()
            try:
                for batch in batches:
                    if batch is None:
                        journal.close()
                        journal.open()
                    else:
                        assert _outcome(journal, batch) == _outcome(model, batch)
                everything: list[Write] = [_begin(number) for number in range(4)]
                assert _outcome(journal, everything) == _outcome(model, everything)
            finally:
                journal.close()

        history()

    # What lasts.

    def test_reopened(self, tmp_path: Path) -> None:
        """Everything is there again after close and open, by the same object or another; so are id and counts."""
        with self._open(tmp_path) as journal:
            journal.commit(
                [_begin(1, until=5.5), Rerun(_id(1)), _step(1, "a", 1, b"x"), _begin(2), _finish(2, b"r"), _begin(3)]
            )
            journal.commit([_finish(3), Ack(_id(3))])
            before = [_look(journal, number) for number in (1, 2, 3)]
            id, dropped = journal.id, dict(journal.dropped)
            journal.close()
            journal.open()
            assert [_look(journal, number) for number in (1, 2, 3)] == before
        with self._open(tmp_path) as journal:
            assert [_look(journal, number) for number in (1, 2, 3)] == before
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
            journal.commit([_begin(1)])
            for other in (self.make(tmp_path), journal):
                try:
                    other.open()
                except JournalError:
                    continue
                other.close()
                raise AssertionError("a journal was opened a second time")
            assert journal.commit([_begin(2)]) == [None]
        with self._open(tmp_path) as other:
            assert _look(other, 1).state is _look(other, 2).state is State.OPEN

    def test_closed(self, tmp_path: Path) -> None:
        """A journal that is not open is a JournalError to commit and tidy; closing it again is none."""
        journal = self.make(tmp_path)
        for _ in range(2):
            _refuse(journal, [_begin(1)])
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
        calls: list[tuple[Any, ...]] = [(journal.open,), *((journal.commit, [_begin(number)]) for number in range(5))]
        for each in [*calls, (journal.tidy, ()), (journal.close,)]:
            thread = threading.Thread(target=call, args=each)
            thread.start()
            thread.join()
        assert not failures
        with self._open(tmp_path) as journal:
            assert [_look(journal, number).state for number in range(5)] == [State.OPEN] * 5

    def test_killed(self, tmp_path: Path) -> None:
        """Of a process that is killed while it commits, every batch whose commit had returned is there, and none by halves."""
        source = random.Random(tmp_path.name)
        for number, lines in enumerate((1, 2, 5, 20, 60)):
            folder = tmp_path / str(number)
            folder.mkdir()
            returned = self._kill(folder, lines, source.random() * 0.002)
            with self._open(folder) as journal:
                there = [_generation(journal, at) for at in range(returned + 3)]
            # The one that was underway may have been finished.
            assert there[: returned + 1] == [True] * (returned + 1), (returned, there)
            assert not there[returned + 2], (returned, there)

    # What is dropped.

    def test_too_old(self, tmp_path: Path) -> None:
        """What has not changed for the TTL is dropped, in any state, and counted; sent again, it is DROPPED, otherwise new."""
        with self._open(tmp_path, ttl=0.05) as journal:
            since = journal.now()
            journal.commit([_begin(1, since=since), _begin(2, since=since), _finish(2), _begin(3), _finish(3), Ack(_id(3))])
            _tidy(journal)
            _wait(journal, journal.now() + 0.05)
            _tidy(journal)
            assert sum(journal.dropped.values()) == 3
            assert (
                journal.commit([_begin(number, since=since, is_resent=True) for number in (1, 2)]) == [Known(State.DROPPED)] * 2
            )
            assert journal.commit([_begin(4, since=since - 1.0, is_resent=True)]) == [Known(State.DROPPED)]
            assert journal.commit([_begin(5, since=since + _HOUR, is_resent=True), _begin(1, since=since)]) == [None] * 2
            assert not _look(journal, 1).steps

    def test_dropped_is_remembered(self, tmp_path: Path) -> None:
        """What was dropped, how much and up to when, is known after a restart; asking about it stores nothing."""
        with self._open(tmp_path, ttl=0.05) as journal:
            since = journal.now()
            journal.commit([_begin(1, since=since), _begin(2, since=since - _HOUR)])
            _wait(journal, journal.now() + 0.05)
            _tidy(journal)
            dropped = dict(journal.dropped)
        with self._open(tmp_path) as journal:
            assert sum(dropped.values()) == 2
            assert dict(journal.dropped) == dropped
            again = _begin(1, since=since, is_resent=True)
            assert journal.commit([again, again]) == [Known(State.DROPPED)] * 2
            assert journal.commit([_begin(1, since=since)]) == [None]

    def test_age_counts_from_the_last_change(self, tmp_path: Path) -> None:
        """What has changed within the TTL is kept, however long ago it began: by an attempt, a step, an answer, an ack."""
        ttl = 0.2
        changes: list[Write] = [Rerun(_id(1)), _step(1, "a"), _finish(1), Ack(_id(1))]
        is_telling = False
        for attempt in range(100):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            with self._open(folder, ttl=ttl) as journal:
                journal.commit([_begin(1)])
                is_telling = True
                for change in changes:
                    began = journal.now()
                    _wait(journal, began + ttl * 0.6)
                    _tidy(journal)
                    # A busy machine may have taken longer: then nothing can be said.
                    is_telling = is_telling and journal.now() < began + ttl
                    if not is_telling:
                        break
                    journal.commit([change])
                    is_telling = is_telling and journal.now() < began + ttl
                if is_telling:
                    assert _look(journal, 1).state is State.ACKED
                    assert sum(journal.dropped.values()) == 0
                    return
        raise AssertionError("this machine was too busy each time")

    def test_running_are_kept(self, tmp_path: Path) -> None:
        """What is running is never dropped, however old it is and however much there is."""
        with self._open(tmp_path, ttl=0.05, max_bytes=2**18) as journal:
            journal.commit([_begin(number, bytes(8_192)) for number in range(64)])
            running = [_id(number) for number in range(0, 64, 2)]
            _wait(journal, journal.now() + 0.05)
            _tidy(journal, running)
            assert [_is_there(journal, number) for number in range(64)] == [True, False] * 32
            assert sum(journal.dropped.values()) == 32

    def test_running_do_not_age(self, tmp_path: Path) -> None:
        """What has run for longer than the TTL is not dropped as soon as it does not run any more: it may be sent again."""
        ttl = 0.2
        for attempt in range(100):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            with self._open(folder, ttl=ttl) as journal:
                journal.commit([_begin(1)])
                for _ in range(4):
                    _wait(journal, journal.now() + ttl * 0.6)
                    ran = journal.now()
                    _tidy(journal, [_id(1)])
            with self._open(folder, ttl=ttl) as journal:
                _tidy(journal)
                # A busy machine may have taken longer: then nothing can be said.
                if journal.now() < ran + ttl * 0.4:
                    assert _look(journal, 1).state is State.OPEN
                    return
        raise AssertionError("this machine was too busy each time")

    def test_too_much(self, tmp_path: Path) -> None:
        """The oldest go first, ACKED before DONE before OPEN, and no more than is needed; they are counted."""
        large = bytes(8_192)
        with self._open(tmp_path, max_bytes=2**19) as journal:
            journal.commit([_begin(number, large) for number in range(20)])
            journal.commit([_begin(number) for number in range(100, 200)])
            for number in range(100, 200):
                journal.commit([_finish(number, large if number < 160 else b"")])
            journal.commit([Ack(_id(number)) for number in range(160, 200)])
            _tidy(journal)
            opened, done, acked = (
                [_is_there(journal, number) for number in numbers] for numbers in (range(20), range(100, 160), range(160, 200))
            )
            assert sum(journal.dropped.values()) == (opened + done + acked).count(False)
            assert not any(acked)
            assert all(opened)
            assert done == sorted(done)
            assert 25 <= done.count(True) <= 55

    def test_too_much_of_what_is_open(self, tmp_path: Path) -> None:
        """At last what is open goes as well, the oldest first: the bound holds."""
        with self._open(tmp_path, max_bytes=2**18) as journal:
            journal.commit([_begin(100), _finish(100)])
            for number in range(64):
                journal.commit([_begin(number, bytes(8_192)), _step(number, "a")])
            _tidy(journal)
            assert not _is_there(journal, 100)
            there = [_is_there(journal, number) for number in range(64)]
            assert there == sorted(there)
            assert 5 <= there.count(True) <= 40

    def test_nothing_is_dropped_without_need(self, tmp_path: Path) -> None:
        """Neither age nor size: tidy has nothing to do, and says so."""
        with self._open(tmp_path) as journal:
            journal.commit([_begin(1), _begin(2), _finish(2), _begin(3), _finish(3), Ack(_id(3))])
            assert journal.tidy(()) is False
            assert [_is_there(journal, number) for number in (1, 2, 3)] == [True] * 3
            assert sum(journal.dropped.values()) == 0

    # Inside.

    @contextmanager
    def _open(self, folder: Path, **limits: Any) -> Iterator[Journal]:
        journal = self.make(folder, **limits)
        journal.open()
        try:
            yield journal
        finally:
            journal.close()

    def _kill(self, folder: Path, lines: int, pause: float) -> int:
        """Have a process commit, and kill it when so many commits have returned; returns the number of the last that had."""
        command = [sys.executable, "-c", _PROGRAM, inspect.getfile(type(self)), type(self).__qualname__, str(folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            try:
                seen = [child.stdout.readline() for _ in range(lines)]
                time.sleep(pause)
            finally:
                child.kill()
            seen += child.stdout.readlines()
            assert seen[0], child.stderr.read().decode()
        return max(int(line) for line in seen if line.endswith(b"\n"))


_PROGRAM = "import sys; from greensafe.testing.conformance import _commit_until_killed as run; run(*sys.argv[1:])"

#: Requests that one commit of the process that is killed begins, and the next one answers.
_WIDTH = 20


def _commit_until_killed(file: str, name: str, folder: str) -> None:
    """Commit one batch after the other, and say so each time; not for ever, in case nobody kills."""
    spec = importlib.util.spec_from_file_location("_conformance_of", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    journal: Journal = getattr(module, name)().make(Path(folder))
    journal.open()
    for number in range(20_000):
        journal.commit([*(_finish(each, b"%d" % each) for each in _of(number - 1)), *(_begin(each) for each in _of(number))])
        os.write(1, b"%d\n" % number)


def _of(number: int) -> range:
    return range(max(number, 0) * _WIDTH, (number + 1) * _WIDTH)


def _generation(journal: Journal, number: int) -> bool:
    """Whether that process's batch is there: its requests begun, those of the one before answered."""
    writes = [_begin(each) for each in (*_of(number - 1), *_of(number))]
    known = _ask(journal, writes)
    begun = [each is not None for each in known[-_WIDTH:]]
    answered = [each is not None and each.state is State.DONE for each in known[:-_WIDTH]]
    assert len({*begun, *answered}) == 1, f"batch {number} is there by halves: {begun} {answered}"
    return begun[0]


def _ask(journal: Journal, writes: Sequence[Begin]) -> list[Known | None]:
    """What is known of requests; those that are not stay unknown."""
    known: list[Known | None] = journal.commit(writes)
    journal.commit([Forget(write.request_id) for write, each in zip(writes, known) if each is None])
    return known


class Model:
    """What a journal does, without keeping anything: the rules in code, with which `test_any_history` compares.

    Attributes:
        requests: By their id.
    """

    def __init__(self) -> None:
        self.requests: dict[bytes, Request] = {}

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        """As in Journal."""
        before = deepcopy(self.requests)
        try:
            return [self.write(write) for write in writes]
        except JournalError:
            self.requests = before
            raise

    def write(self, write: Write) -> Any:
        """Do one of them, and return its result; JournalError if that cannot be."""
        match write:
            case Begin():
                return self.begin(write)
            case Ack(id):
                if (request := self.requests.get(id)) and request.state is State.DONE:
                    request.state, request.reply = State.ACKED, []
                return None
            case Excuse(id):
                if (request := self.requests.get(id)) and request.state is State.OPEN:
                    request.fruitless = max(request.fruitless - 1, 0)
                return None
            case Forget(id):
                self.requests.pop(id, None)
                return None
            case Effect(b"", _, _, act):
                return self.call(act)
        request = self.requests.get(write.request_id)
        if request is None or request.state is not State.OPEN:
            raise JournalError("it is not open")
        return self.go_on(request, write)

    def begin(self, write: Begin) -> Known | None:
        """The result of a Begin."""
        request = self.requests.get(write.request_id)
        if request is None:
            self.requests[write.request_id] = Request(list(write.body), write.until)
            return None
        return request.known(request.body == list(write.body))

    def go_on(self, request: Request, write: Write) -> Any:
        """The result of a write about a request that is open."""
        match write:
            case Rerun():
                request.attempts += 1
                request.fruitless += 1
            case Step(_, name, number, value):
                self.step(request, (name, number), value)
            case Effect(_, name, number, act):
                return self.effect(request, (name, number), act)
            case Finish(_, kind, body):
                request.state, request.kind, request.reply, request.steps = State.DONE, kind, list(body), {}
        return None

    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        """Store a step, unless it is."""
        if key not in request.steps:
            request.steps[key] = value
            request.fruitless = 0

    def effect(self, request: Request, key: tuple[str, int], act: Callable[[Any], bytes]) -> Any:
        """The result of an Effect."""
        if key in request.steps:
            return request.steps[key]
        value = self.call(act)
        if not isinstance(value, Failed):
            self.step(request, key, value)
        return value

    def call(self, act: Callable[[Any], bytes]) -> bytes | Failed:
        """What it returns, or what it raises."""
        try:
            value = act(None)
            if not isinstance(value, bytes):
                raise TypeError(f"not bytes: {value!r}")
        except Exception as error:  # noqa: BLE001 - it is the result
            return Failed(error)
        return value


@dataclass
class Request:
    """What the model keeps of one."""

    body: list[bytes]
    until: float | None
    state: State = State.OPEN
    attempts: int = 1
    fruitless: int = 1
    kind: int = 0
    reply: list[bytes] = field(default_factory=list)
    steps: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def known(self, is_same: bool) -> Known:
        """What a journal says of it."""
        until, steps = self.until, dict(self.steps)
        return Known(self.state, is_same, self.attempts, self.fruitless, until, self.kind, list(self.reply), steps)


def _histories() -> Any:
    """Lists of batches, and None for being reopened; about few requests, so that they meet."""
    from hypothesis import strategies as st

    ids = st.integers(0, 3).map(_id)
    small = st.binary(max_size=3)
    frames = st.lists(small, min_size=1, max_size=3)
    names, numbers = st.sampled_from(["", "a", "b"]), st.integers(0, 1)
    acts = st.one_of(small, st.none()).map(_returning)
    writes = st.one_of(
        st.builds(Begin, ids, frames, since=st.just(1.0), is_resent=st.booleans(), until=st.sampled_from([None, 1.5])),
        st.builds(Begin, ids, st.just([b"body"]), since=st.just(1.0)),
        st.builds(Rerun, ids),
        st.builds(Excuse, ids),
        st.builds(Step, ids, names, numbers, small),
        st.builds(Effect, st.one_of(ids, st.just(b"")), names, numbers, acts),
        st.builds(Finish, ids, st.sampled_from([_REPLY, _ERROR]), st.lists(small, max_size=3)),
        st.builds(Ack, ids),
        st.builds(Forget, ids),
    )
    return st.lists(st.one_of(st.none(), *[st.lists(writes, max_size=6)] * 4), max_size=12)


def _outcome(place: Journal | Model, batch: list[Write]) -> list[Any] | str:
    """Results in a form that can be compared."""
    try:
        results = place.commit(batch)
    except JournalError:
        return "JournalError"
    return [_comparable(result) for result in results]


def _comparable(result: Any) -> Any:
    if isinstance(result, Failed):
        return type(result.error)
    if isinstance(result, Known):
        return result._replace(reply=list(result.reply), steps=list(result.steps.items()))  # type: ignore[arg-type]
    return result


# Writes, briefly.


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _begin(number: int, *frames: bytes, since: float = 1.0, **more: Any) -> Begin:
    return Begin(_id(number), list(frames) or [b"body"], since=since, **more)


def _step(number: int, name: str, index: int = 0, value: bytes = b"") -> Step:
    return Step(_id(number), name, index, value)


def _finish(number: int, *frames: bytes) -> Finish:
    return Finish(_id(number), _REPLY, list(frames) or [b"reply"])


def _raising(error: Exception) -> Callable[[Any], bytes]:
    def act(place: Any) -> bytes:
        raise error

    return act


def _noting(calls: list[Any]) -> Callable[[Any], bytes]:
    def act(place: Any) -> bytes:
        calls.append(place)
        return b""

    return act


def _returning(value: Any) -> Callable[[Any], Any]:
    return lambda place: value


# Questions.


def _look(journal: Journal, number: int, *frames: bytes) -> Known:
    """What is known of a request, which has to be there."""
    (known,) = journal.commit([_begin(number, *frames)])
    assert isinstance(known, Known), f"request {number} is not there"
    return known._replace(reply=list(known.reply), steps=dict(known.steps))


def _is_there(journal: Journal, number: int) -> bool:
    return _ask(journal, [_begin(number)]) != [None]


def _counts(known: Known) -> tuple[int, int]:
    return known.attempts, known.fruitless


def _refuse(journal: Journal, writes: Sequence[Write]) -> None:
    with suppress(JournalError):
        journal.commit(writes)
        raise AssertionError(f"no JournalError for {writes}")


def _tidy(journal: Journal, running: Sequence[bytes] = ()) -> None:
    """Until there is no more to do, which has to come to an end."""
    for _ in range(1_000):
        if not journal.tidy(running):
            return
    raise AssertionError("tidy does not come to an end")


def _wait(journal: Journal, until: float) -> None:
    """Until the journal's time is later than that."""
    while journal.now() <= until:
        time.sleep(0.001)
