"""Tests of single requests: body, answer, attempts, steps and effects.

Each test writes few things and asks at once, with the journal open all the time. What several writes in one batch have to do
with each other is in `batches`, what is there later in `lasting`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...sansio.records import Ack, Effect, Excuse, Failed, Finish, Forget, Known, Rerun, State, Write
from .asking import ERROR, HOUR, Opens, begin, counts, finish, id_of, look, noting, raising, refuse, returning, step

__all__ = ["Requests"]


class Requests(Opens):
    """Tests that ask about a request right after something was written of it."""

    # What comes back.

    def test_any_text_is_a_steps_name(self, tmp_path: Path) -> None:
        """Whatever UTF-8 can encode: NUL, names that differ behind one, long ones. For showing, a client may be any bytes."""
        names = ["", "\0", "a\0b", "a\0c", "a", "\u00e4", "a\u0308", "\U0001f600", "\uffff", "x" * 10_000, "' OR 1=1 --"]
        everything = bytes(range(256))
        with self._open(tmp_path) as journal:
            journal.commit([begin(1, client=everything[:255], metadata=everything * 255)])
            journal.commit([step(1, name, index, b"%d" % index) for index, name in enumerate(names)])
            journal.commit([step(1, name, index, b"again") for index, name in enumerate(names)])
            assert look(journal, 1).steps == {(name, index): b"%d" % index for index, name in enumerate(names)}

    def test_new_request(self, tmp_path: Path) -> None:
        """An unknown request is stored: its Begin's result is None, the next one's what is known of it."""
        with self._open(tmp_path) as journal:
            assert journal.commit([begin(1, until=17.25, client=b"\0c", metadata=b"m")]) == [None]
            assert look(journal, 1) == Known(State.OPEN, True, 1, 1, 17.25, reply=[], steps={})

    def test_known_request_is_not_changed_by_a_begin(self, tmp_path: Path) -> None:
        """Begin of a known id changes nothing: not the body, not its limit, not the attempts."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1, b"a", until=1.0)])
            journal.commit([begin(1, b"b", until=2.0)])
            assert look(journal, 1, b"a") == Known(State.OPEN, True, 1, 1, 1.0, reply=[])

    def test_another_body_is_told(self, tmp_path: Path) -> None:
        """The same id with other frames is not the same, in every state; how bytes are cut into frames counts."""
        others = ([b"ab"], [b"a", b"b", b""], [b"", b"a", b"b"], [b"b", b"a"], [b""], [b"a\0\0\0\1b"])
        with self._open(tmp_path) as journal:
            journal.commit([begin(1, b"a", b"b")])
            for writes in ([], [finish(1)], [Ack(id_of(1))]):
                journal.commit(writes)
                assert look(journal, 1, b"a", b"b").is_same
                assert [look(journal, 1, *other).is_same for other in others] == [False] * len(others)

    def test_answer(self, tmp_path: Path) -> None:
        """A finished request is DONE, with the kind and the frames of its answer; none, empty ones and many are kept apart."""
        answers = [[], [b""], [b"", b""], [b"a"], [b"a", b"", b"b"], [bytes(range(256))] * 3]
        with self._open(tmp_path) as journal:
            for number, frames in enumerate(answers):
                journal.commit([begin(number), Finish(id_of(number), ERROR, frames)])
                known = look(journal, number)
                assert (known.state, known.kind, list(known.reply)) == (State.DONE, ERROR, frames)

    def test_ack(self, tmp_path: Path) -> None:
        """An answer that has arrived is gone, the request is known still; a second Ack changes nothing."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), finish(1)])
            for _ in range(2):
                assert journal.commit([Ack(id_of(1))]) == [None]
                known = look(journal, 1)
                assert (known.state, list(known.reply), known.is_same) == (State.ACKED, [], True)

    def test_ack_of_what_is_not_done(self, tmp_path: Path) -> None:
        """An Ack of an unknown or an open request does nothing."""
        with self._open(tmp_path) as journal:
            assert journal.commit([Ack(id_of(1)), begin(2), Ack(id_of(2))]) == [None] * 3
            assert look(journal, 2).state is State.OPEN
            assert journal.commit([begin(1)]) == [None]

    def test_forget(self, tmp_path: Path) -> None:
        """What is forgotten, in whatever state, is new again, and counts as dropped by nobody; the unknown can be forgotten."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), step(1, "a"), begin(2), finish(2), begin(3), finish(3), Ack(id_of(3))])
            assert journal.commit([Forget(id_of(number)) for number in range(5)]) == [None] * 5
            assert journal.commit([begin(1, b"other"), *map(begin, (2, 3))]) == [None] * 3
            assert look(journal, 1, b"other") == Known(State.OPEN, attempts=1, fruitless=1, reply=[])
            assert sum(journal.dropped.values()) == 0

    def test_is_resent_alone_drops_nothing(self, tmp_path: Path) -> None:
        """A request that was sent again is new as long as nothing was dropped, however old it is."""
        with self._open(tmp_path) as journal:
            assert journal.commit([begin(1, since=-HOUR, is_resent=True)]) == [None]

    # Attempts and steps.

    def test_rerun(self, tmp_path: Path) -> None:
        """Each Rerun counts one attempt, and one that has not brought a step."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1)])
            for attempt in (2, 3, 4):
                assert journal.commit([Rerun(id_of(1))]) == [None]
                assert counts(look(journal, 1)) == (attempt, attempt)

    def test_excuse(self, tmp_path: Path) -> None:
        """An Excuse takes back what a Rerun or the Begin has counted as in vain, and no more; nor of others."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), Rerun(id_of(1)), begin(2), finish(2)])
            for fruitless in (1, 0, 0):
                assert journal.commit([Excuse(id_of(1)), Excuse(id_of(2)), Excuse(id_of(3))]) == [None] * 3
                assert counts(look(journal, 1)) == (2, fruitless)
            journal.commit([Rerun(id_of(1))])
            assert counts(look(journal, 1)) == (3, 1)
            assert (look(journal, 2).state, journal.commit([begin(3)])) == (State.DONE, [None])

    def test_step(self, tmp_path: Path) -> None:
        """Steps come back by name and number, in the order in which they were stored; a new one makes attempts fruitful."""
        keys = [("b", 0), ("a", 1), ("a", 0), ("", 7), ("a b\0\n\u00e4\U0001f40d", -1)]
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), Rerun(id_of(1)), Rerun(id_of(1))])
            for at, (name, number) in enumerate(keys):
                assert journal.commit([step(1, name, number, b"%d" % at)]) == [None]
            known = look(journal, 1)
            assert list(known.steps.items()) == [(key, b"%d" % at) for at, key in enumerate(keys)]
            assert counts(known) == (3, 0)
            journal.commit([Rerun(id_of(1))])
            assert counts(look(journal, 1)) == (4, 1)

    def test_step_that_is_stored_already(self, tmp_path: Path) -> None:
        """A step that is stored stays as it is, and a second time is no progress."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), step(1, "a", value=b"first"), Rerun(id_of(1))])
            assert journal.commit([step(1, "a", value=b"second")]) == [None]
            known = look(journal, 1)
            assert (dict(known.steps), counts(known)) == ({("a", 0): b"first"}, (2, 1))

    def test_steps_belong_to_their_request(self, tmp_path: Path) -> None:
        """Steps of the same name of two requests are two; new and stored ones in one batch are told apart."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), begin(2), begin(3), step(1, "a", value=b"1"), Rerun(id_of(1)), Rerun(id_of(2))])
            journal.commit([step(1, "a", value=b"x"), step(2, "a", value=b"2")])
            assert [dict(look(journal, number).steps) for number in (1, 2, 3)] == [{("a", 0): b"1"}, {("a", 0): b"2"}, {}]
            assert [counts(look(journal, number)) for number in (1, 2)] == [(2, 1), (2, 0)]

    def test_steps_go_with_the_answer(self, tmp_path: Path) -> None:
        """A request that is not open shows no steps, and one that was forgotten has none when it comes again."""
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), step(1, "a"), finish(1)])
            assert not look(journal, 1).steps
            journal.commit([Forget(id_of(1)), begin(1)])
            assert not look(journal, 1).steps

    def test_only_what_is_open_goes_on(self, tmp_path: Path) -> None:
        """Rerun, Step, Effect and Finish of a request that is not open are a JournalError, and change nothing."""
        calls: list[Any] = []
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), finish(1), begin(2), finish(2), Ack(id_of(2))])
            before = [look(journal, number) for number in (1, 2)]
            for number in (1, 2, 3):
                effect = Effect(id_of(number), "a", 0, noting(calls))
                for write in (Rerun(id_of(number)), step(number, "a"), effect, Finish(id_of(number), ERROR, [b"other"])):
                    refuse(journal, [write])
            assert [look(journal, number) for number in (1, 2)] == before
            assert not calls

    # Effects.

    def test_effect(self, tmp_path: Path) -> None:
        """What an effect returns is its result, and the step that is stored."""
        with self._open(tmp_path) as journal:
            assert journal.commit([begin(1), Rerun(id_of(1)), Effect(id_of(1), "e", 3, lambda _: b"value")]) == [
                None,
                None,
                b"value",
            ]
            known = look(journal, 1)
            assert (dict(known.steps), counts(known)) == ({("e", 3): b"value"}, (2, 0))

    def test_effect_that_is_stored_already(self, tmp_path: Path) -> None:
        """An effect whose step is stored is not called again: its result is what is stored."""
        calls: list[Any] = []
        with self._open(tmp_path) as journal:
            journal.commit([begin(1), step(1, "e", 3, b"stored"), Rerun(id_of(1))])
            assert journal.commit([Effect(id_of(1), "e", 3, noting(calls))]) == [b"stored"]
            assert not calls
            assert counts(look(journal, 1)) == (2, 1)

    def test_effect_that_raises(self, tmp_path: Path) -> None:
        """What an effect raises is its result, Failed; nothing of it is stored, everything else in the batch is."""
        error = ValueError("mine")
        with self._open(tmp_path) as journal:
            writes: list[Write] = [begin(1), Effect(id_of(1), "e", 0, raising(error)), begin(2), step(1, "a")]
            none, failed, *others = journal.commit(writes)
            assert isinstance(failed, Failed)
            assert failed.error is error
            assert [none, *others] == [None] * 3
            assert (dict(look(journal, 1).steps), look(journal, 2).state) == ({("a", 0): b""}, State.OPEN)
            assert journal.commit([Effect(id_of(1), "e", 0, lambda _: b"at last")]) == [b"at last"]

    def test_effect_without_bytes(self, tmp_path: Path) -> None:
        """An effect that returns no bytes has failed."""
        with self._open(tmp_path) as journal:
            for value in (None, "text", 1):
                (failed,) = journal.commit([begin(1), Effect(id_of(1), "e", 0, returning(value))])[1:]
                assert isinstance(failed, Failed)
                assert isinstance(failed.error, TypeError)
                assert not look(journal, 1).steps

    def test_effect_of_no_request(self, tmp_path: Path) -> None:
        """An effect without a request's id is called each time, and leaves no step."""
        calls: list[Any] = []
        error = ValueError("mine")
        with self._open(tmp_path) as journal:
            nobody = [Effect(b"", "e", 0, noting(calls)), Effect(b"", "e", 0, raising(error))]
            none, *results = journal.commit([begin(1), *nobody, *nobody])
            assert (none, results[::2], len(calls)) == (None, [b"", b""], 2)
            assert [each.error for each in results[1::2]] == [error, error]
            assert not look(journal, 1).steps
