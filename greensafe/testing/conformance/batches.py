"""Tests of batches: done in order, and as a whole or not at all.

`test_any_history` asks that of batches that nobody has thought of: hypothesis, which is imported for it alone, puts them
together, and `Model` says what comes of them. It compares results only, so it does not know how long anything is kept.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ...errors import JournalError, JournalUnavailable, Unstorable
from ...journal.base import Journal
from ...sansio.records import Ack, Begin, Effect, Excuse, Failed, Finish, Forget, Known, Rerun, State, Step, Write
from .asking import ERROR, REPLY, Opens, begin, counts, finish, id_of, look, refuse, returning, step
from .model import Model

__all__ = ["Batches"]


class Batches(Opens):
    """Tests of many writes at once, and of one batch after the other."""

    def test_order_in_a_batch(self, tmp_path: Path) -> None:
        """A write sees what those before it in the batch have done."""
        with self._open(tmp_path) as journal:
            again = begin(1)
            results = journal.commit(
                [
                    again,
                    again,
                    Rerun(id_of(1)),
                    again,
                    step(1, "a"),
                    again,
                    finish(1),
                    again,
                    Ack(id_of(1)),
                    again,
                    Forget(id_of(1)),
                    again,
                ]
            )
            assert results[::2] == [None, None, None, None, None, None]
            known = results[1::2]
            assert [each and each.state.value for each in known] == ["open", "open", "open", "done", "acked", None]
            assert [counts(each) for each in known[:3]] == [(1, 1), (2, 2), (2, 0)]

    def test_batch_is_all_or_nothing(self, tmp_path: Path) -> None:
        """If one write cannot be done, wherever it stands, none is; the same batch without it is done."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), begin(2), finish(2), begin(3), step(3, "s")])
            good: list[Write] = [
                begin(4),
                step(1, "a"),
                Ack(id_of(2)),
                finish(3),
                Forget(id_of(9)),
                Effect(id_of(1), "e", 0, lambda _: b""),
            ]
            before = [look(journal, number) for number in (1, 2, 3)]
            for place in range(len(good) + 1):
                refuse(journal, [*good[:place], step(77, "bad"), *good[place:]])
                assert [look(journal, number) for number in (1, 2, 3)] == before
            assert journal.commit(good) == [None, None, None, None, None, b""]
            assert [look(journal, number).state.value for number in (1, 2, 3, 4)] == ["open", "acked", "done", "open"]

    def test_a_writes_own_fault(self, tmp_path: Path) -> None:
        """A write that cannot be done is no fault of the place: else all that came with it would be tried again and again."""
        with self._open(tmp_path) as journal:
            batches: list[list[Write]] = [[step(1, "a")], [begin(1), finish(2)], [begin(1), Rerun(id_of(2)), begin(3)]]
            for writes in batches:
                error = refuse(journal, writes)
                assert not isinstance(error, JournalUnavailable), f"the place is blamed for {writes}: {error!r}"

    def test_what_can_never_be_stored(self, tmp_path: Path) -> None:
        """A step's name that is no text is stored as it is, or Unstorable: then nothing of its batch is there."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1)])
            bad: list[Step | Effect] = [step(1, "\ud800"), Effect(id_of(1), "a\udfff", 1, lambda _: b"x")]
            for write in bad:
                before = look(journal, 1)
                try:
                    journal.commit([step(1, "good"), write])
                except Unstorable:
                    assert look(journal, 1) == before
                else:
                    assert (write.name, write.number) in look(journal, 1).steps

    def test_large_batch(self, tmp_path: Path) -> None:
        """A batch of 1,000 requests is stored, answered, acknowledged, and asked about, each in its place."""
        many = range(1_000)
        with self._open(tmp_path) as journal:
            assert journal.commit([begin(number, b"%d" % number) for number in many]) == [None] * len(many)
            journal.commit([write for number in many for write in (finish(number, b"%d" % number), begin(number + 5_000))])
            known = journal.commit([begin(number, b"%d" % number) for number in many])
            assert [(each.is_same, list(each.reply)) for each in known] == [(True, [b"%d" % number]) for number in many]
            journal.commit([Ack(id_of(number)) for number in many])
            known = journal.commit([begin(number + 5_000 * (number % 2)) for number in many])
            assert [each.state for each in known] == [State.ACKED, State.OPEN] * 500

    def test_empty_batch(self, tmp_path: Path) -> None:
        """No writes have no results."""
        with self._open(tmp_path) as journal:
            assert journal.commit([]) == []

    def test_large_and_empty_frames(self, tmp_path: Path) -> None:
        """Frames of 10 MB and of nothing are kept as they are: in requests, steps and answers."""
        large = random.Random(1).randbytes(10_000_000)
        with self._open(tmp_path) as journal:
            assert journal.commit([begin(1, large, b""), step(1, "a", value=large), step(1, "b", value=b"")]) == [None] * 3
        with self._open(tmp_path) as journal:
            known = look(journal, 1, large, b"")
            assert known.is_same
            assert known.steps[("a", 0)] == large
            assert known.steps[("b", 0)] == b""
            journal.commit([Finish(id_of(1), REPLY, [b"", large, b""])])
        with self._open(tmp_path) as journal:
            assert list(look(journal, 1, large, b"").reply) == [b"", large, b""]

    def test_any_history(self, tmp_path: Path) -> None:
        """Whatever is written in whatever order, reopened now and then, the results are those of the model."""
        from hypothesis import HealthCheck, given, settings

        folders = iter(range(1_000_000))

        @settings(deadline=None, max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(histories())
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
                        assert outcome(journal, batch) == outcome(model, batch)
                everything: list[Write] = [begin(number) for number in range(4)]
                assert outcome(journal, everything) == outcome(model, everything)
            finally:
                journal.close()

        history()


def histories() -> Any:
    """Lists of batches, and None for being reopened; about few requests, so that they meet."""
    from hypothesis import strategies as st

    ids = st.integers(0, 3).map(id_of)
    small = st.binary(max_size=3)
    frames = st.lists(small, min_size=1, max_size=3)
    names, numbers = st.sampled_from(["", "a", "b"]), st.integers(0, 1)
    acts = st.one_of(small, st.none()).map(returning)
    writes = st.one_of(
        st.builds(Begin, ids, frames, since=st.just(1.0), is_resent=st.booleans(), until=st.sampled_from([None, 1.5])),
        st.builds(Begin, ids, st.just([b"body"]), since=st.just(1.0)),
        st.builds(Rerun, ids),
        st.builds(Excuse, ids),
        st.builds(Step, ids, names, numbers, small),
        st.builds(Effect, st.one_of(ids, st.just(b"")), names, numbers, acts),
        st.builds(Finish, ids, st.sampled_from([REPLY, ERROR]), st.lists(small, max_size=3)),
        st.builds(Ack, ids),
        st.builds(Forget, ids),
    )
    return st.lists(st.one_of(st.none(), *[st.lists(writes, max_size=6)] * 4), max_size=12)


def outcome(place: Journal | Model, batch: list[Write]) -> list[Any] | str:
    """Return the results in a form that can be compared."""
    try:
        results = place.commit(batch)
    except JournalError:
        return "JournalError"
    return [comparable(result) for result in results]


def comparable(result: Any) -> Any:
    if isinstance(result, Failed):
        return type(result.error)
    if isinstance(result, Known):
        return (*result[:6], list(result.reply), list(result.steps.items()))
    return result
