"""JournalConformance: a backend that is nothing like sqlite passes it, one that breaks a rule fails, whichever it is."""

from __future__ import annotations

import fcntl
import os
import pickle
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from greensafe import JournalError, JournalUnavailable
from greensafe.journal import Begin, Effect, Failed, Finish, Journal, Known, Rerun, State, Step, Write
from greensafe.testing.conformance.suite import JournalConformance, Model, Request


class WholeFileJournal(Journal):
    """Keeps everything in memory, and writes all of it at each commit."""

    #: About what pickling adds.
    OVERHEAD = 100

    def __init__(self, path: Path, ttl: float, max_bytes: int) -> None:
        self.path, self.ttl, self.max_bytes = path, ttl, max_bytes
        self.model = self.new_model()
        self.lock = -1

    def new_model(self) -> Model:
        return Model()

    def open(self) -> None:
        if self.lock >= 0:
            raise JournalError("open already")
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise JournalError("in use") from None
        self.lock = lock
        self.changed: dict[bytes, float] = {}
        self.since: dict[bytes, float] = {}
        self.model = self.new_model()
        self.counts, self.horizon, self.id, self.offset = {"dropped": 0}, -1e300, os.urandom(16), 0.0
        if self.path.exists():
            self.load(pickle.loads(self.path.read_bytes()))
        self.save()

    def close(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def load(self, state: tuple[Any, ...]) -> None:
        self.model.requests, self.changed, self.since, self.counts, self.horizon, self.id = state

    def save(self) -> None:
        state = (self.model.requests, self.changed, self.since, self.counts, self.horizon, self.id)
        draft = self.path.with_suffix(".new")
        draft.write_bytes(pickle.dumps(state))
        os.replace(draft, self.path)

    def now(self) -> float:
        return time.monotonic() + self.offset

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        self.check_open()
        before = dict(self.changed), dict(self.since)
        asked = [self.is_dropped(write) for write in writes]
        try:
            results = self.model.commit([write for write, is_dropped in zip(writes, asked) if not is_dropped])
        except JournalError:
            self.changed, self.since = before
            raise
        found = iter(results)
        results = [Known(State.DROPPED) if is_dropped else next(found) for is_dropped in asked]
        for write, result in zip(writes, results):
            self.note(write, result)
        self.save()
        return results

    def is_dropped(self, write: Write) -> bool:
        if not isinstance(write, Begin) or write.request_id in self.model.requests:
            return False
        return write.is_resent and write.since <= self.horizon

    def note(self, write: Write, result: Any) -> None:
        if not isinstance(write, Begin) or result is None:
            self.changed[write.request_id] = self.now()
        if isinstance(write, Begin) and result is None:
            self.since[write.request_id] = write.since

    def tidy(self, running: Collection[bytes]) -> bool:
        self.check_open()
        self.renew(running)
        too_old = [id for id in self.model.requests if id not in running and self.age(id) > self.ttl]
        self.drop(too_old)
        while self.size() > self.max_bytes and (id := self.first(running)) is not None:
            self.drop([id])
        self.save()
        return False

    def renew(self, running: Collection[bytes]) -> None:
        for id in running:
            if (request := self.model.requests.get(id)) is not None and request.state is State.OPEN:
                self.changed[id] = self.now()

    def age(self, id: bytes) -> float:
        return self.now() - self.changed[id]

    def first(self, running: Collection[bytes]) -> bytes | None:
        order = [State.ACKED, State.DONE, State.OPEN]
        ids = [id for id in self.model.requests if id not in running]
        return min(ids, key=lambda each: (order.index(self.model.requests[each].state), self.changed[each]), default=None)

    def drop(self, ids: list[bytes]) -> None:
        for id in ids:
            del self.model.requests[id]
            self.horizon = max(self.horizon, self.since[id])
            self.counts["dropped"] += 1

    def size(self) -> int:
        return sum(self.OVERHEAD + size_of(request) for request in self.model.requests.values())

    @property
    def dropped(self) -> Mapping[str, int]:
        return self.counts

    def check_open(self) -> None:
        if self.lock < 0:
            raise JournalError("not open")


def size_of(request: Request) -> int:
    """Bytes that are kept of it."""
    body = request.body if request.state is State.OPEN else []
    return sum(map(len, [*body, *request.reply, *request.steps.values()]))


class TestWholeFile(JournalConformance):
    """A backend in a hundred lines."""

    def make(self, folder: Path, *, ttl: float = 86_400.0, max_bytes: int = 2**30) -> Journal:
        return WholeFileJournal(folder / "all", ttl, max_bytes)


# One rule broken each.


class OverwritesBody(Model):
    def begin(self, write: Begin) -> Known | None:
        known = super().begin(write)
        self.requests[write.request_id].body = list(write.body)
        return known


class CountsBegins(Model):
    def begin(self, write: Begin) -> Known | None:
        known = super().begin(write)
        if known is not None:
            self.requests[write.request_id].attempts += 1
        return known


class JoinsFrames(Model):
    def begin(self, write: Begin) -> Known | None:
        return super().begin(write._replace(body=[b"".join(write.body)]))


class ForgetsLimit(Model):
    def begin(self, write: Begin) -> Known | None:
        return super().begin(write._replace(until=None))


class KeepsHalves(Model):
    def commit(self, writes: Sequence[Write]) -> list[Any]:
        return [self.write(write) for write in writes]


class ReversesBatches(Model):
    def commit(self, writes: Sequence[Write]) -> list[Any]:
        return super().commit(writes[::-1])[::-1]


class OverwritesSteps(Model):
    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        request.steps[key] = value
        request.fruitless = 1


class SortsSteps(Model):
    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        super().step(request, key, value)
        request.steps = dict(sorted(request.steps.items()))


class IgnoresNumbers(Model):
    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        super().step(request, (key[0], 0), value)


class EndsNamesAtNul(Model):
    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        super().step(request, (key[0].partition("\0")[0], key[1]), value)


class LosesSurrogates(Model):
    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        super().step(request, (key[0].encode(errors="ignore").decode(), key[1]), value)


class NeverFruitful(Model):
    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        request.steps.setdefault(key, value)


class ExcusesTooMuch(Model):
    def write(self, write: Write) -> Any:
        if type(write).__name__ == "Excuse" and (request := self.requests.get(write.request_id)):
            request.fruitless -= 1
            return None
        return super().write(write)


class ExcusesNothing(Model):
    def write(self, write: Write) -> Any:
        return None if type(write).__name__ == "Excuse" else super().write(write)


class LetsEffectsRaise(Model):
    def call(self, act: Any) -> Any:
        return act(None)


class TakesAnyValue(Model):
    def call(self, act: Any) -> Any:
        try:
            return bytes(act(None) or b"")
        except Exception as error:
            return Failed(error)


class CallsEffectsAgain(Model):
    def effect(self, request: Request, key: tuple[str, int], act: Any) -> Any:
        value = self.call(act)
        return request.steps.setdefault(key, value)


class StoresFailures(Model):
    def effect(self, request: Request, key: tuple[str, int], act: Any) -> Any:
        value = super().effect(request, key, act)
        request.steps.setdefault(key, b"")
        return value


class AnswersTwice(Model):
    def write(self, write: Write) -> Any:
        if isinstance(write, Finish) and (request := self.requests.get(write.request_id)):
            request.state = State.OPEN
        return super().write(write)


class TakesUnknown(Model):
    def write(self, write: Write) -> Any:
        if isinstance(write, (Rerun, Step)) and write.request_id not in self.requests:
            return None
        return super().write(write)


class AcksAnything(Model):
    def write(self, write: Write) -> Any:
        if type(write).__name__ == "Ack" and (request := self.requests.get(write.request_id)):
            request.state = State.ACKED
        return super().write(write)


class KeepsAckedReply(Model):
    def write(self, write: Write) -> Any:
        reply = getattr(self.requests.get(write.request_id), "reply", None)
        result = super().write(write)
        if reply and (request := self.requests.get(write.request_id)):
            request.reply = reply
        return result


class ForgetsNothing(Model):
    def write(self, write: Write) -> Any:
        return None if type(write).__name__ == "Forget" else super().write(write)


class LosesEmptyFrames(Model):
    def go_on(self, request: Request, write: Write) -> Any:
        result = super().go_on(request, write)
        request.reply = list(filter(None, request.reply))
        return result


class RecordsEffectsOfNobody(Model):
    def write(self, write: Write) -> Any:
        if isinstance(write, Effect) and not write.request_id:
            raise JournalError("of no request")
        return super().write(write)


class KeepsSteps(Model):
    def go_on(self, request: Request, write: Write) -> Any:
        steps = request.steps
        result = super().go_on(request, write)
        request.steps = steps
        return result


class CannotDoNothing(Model):
    def commit(self, writes: Sequence[Write]) -> list[Any]:
        if not writes:
            raise JournalError("nothing to do")
        return super().commit(writes)


class BlamesThePlace(Model):
    def write(self, write: Write) -> Any:
        try:
            return super().write(write)
        except JournalError as error:
            raise JournalUnavailable(str(error)) from None


class StopsAtFiveHundred(Model):
    def commit(self, writes: Sequence[Write]) -> list[Any]:
        return super().commit(writes[:500]) + [None] * len(writes[500:])


class NewId(WholeFileJournal):
    def load(self, state: tuple[Any, ...]) -> None:
        super().load((*state[:-1], os.urandom(16)))


class SameId(WholeFileJournal):
    def open(self) -> None:
        super().open()
        self.id = b"x" * 16


class StartsAnew(WholeFileJournal):
    def load(self, state: tuple[Any, ...]) -> None:
        pass


class LosesCounts(WholeFileJournal):
    def load(self, state: tuple[Any, ...]) -> None:
        super().load((*state[:3], {"dropped": 0}, *state[4:]))


class LosesHorizon(WholeFileJournal):
    def load(self, state: tuple[Any, ...]) -> None:
        super().load((*state[:4], -1e300, state[5]))


class SavesLate(WholeFileJournal):
    commits = 0

    def save(self) -> None:
        self.commits += 1
        if self.commits % 2 or self.commits < 2:
            super().save()

    def close(self) -> None:
        if self.lock >= 0:
            super().save()
        super().close()


class SavesHalves(WholeFileJournal):
    def commit(self, writes: Sequence[Write]) -> list[Any]:
        half = len(writes) // 2
        results = super().commit(writes[:half])
        # What a writer without transactions would leave there for a while.
        time.sleep(0.002)
        return results + super().commit(writes[half:])


class NeedsNoLock(WholeFileJournal):
    def open(self) -> None:
        if self.lock < 0:
            self.path.with_suffix(".lock").unlink(missing_ok=True)
        super().open()


class OpensTwice(WholeFileJournal):
    def open(self) -> None:
        if self.lock < 0:
            super().open()


class NeedsNoOpening(WholeFileJournal):
    def check_open(self) -> None:
        if self.lock < 0:
            self.changed, self.since, self.horizon, self.counts, self.id = {}, {}, 0.0, {"dropped": 0}, b""


class GoesBack(WholeFileJournal):
    def open(self) -> None:
        super().open()
        self.offset = -2 * time.monotonic()


class RunsFast(WholeFileJournal):
    def now(self) -> float:
        return time.monotonic() * 50


class NeverDrops(WholeFileJournal):
    def tidy(self, running: Collection[bytes]) -> bool:
        self.check_open()
        return False


class DropsAll(WholeFileJournal):
    def age(self, id: bytes) -> float:
        return 1e300


class DropsRunning(WholeFileJournal):
    def tidy(self, running: Collection[bytes]) -> bool:
        return super().tidy(())


class AgesRunning(WholeFileJournal):
    def renew(self, running: Collection[bytes]) -> None:
        pass


class CountsFromTheBeginning(WholeFileJournal):
    def note(self, write: Write, result: Any) -> None:
        if write.request_id not in self.changed:
            super().note(write, result)


class DropsSilently(WholeFileJournal):
    def drop(self, ids: list[bytes]) -> None:
        count = self.counts["dropped"]
        super().drop(ids)
        self.counts["dropped"] = count


class TakesDroppedForNew(WholeFileJournal):
    def is_dropped(self, write: Write) -> bool:
        return False


class TakesNewForDropped(WholeFileJournal):
    def is_dropped(self, write: Write) -> bool:
        return super().is_dropped(write._replace(is_resent=True) if isinstance(write, Begin) else write)


class TakesAllForDropped(WholeFileJournal):
    def is_dropped(self, write: Write) -> bool:
        return isinstance(write, Begin) and write.is_resent and write.request_id not in self.model.requests


class DropsNewest(WholeFileJournal):
    def first(self, running: Collection[bytes]) -> bytes | None:
        return max((id for id in self.model.requests if id not in running), key=self.changed.__getitem__, default=None)


class DropsOpenFirst(WholeFileJournal):
    def first(self, running: Collection[bytes]) -> bytes | None:
        return min((id for id in self.model.requests if id not in running), key=self.changed.__getitem__, default=None)


class KeepsOpen(WholeFileJournal):
    def first(self, running: Collection[bytes]) -> bytes | None:
        first = super().first(running)
        return None if first is None or self.model.requests[first].state is State.OPEN else first


class DropsTooMuch(WholeFileJournal):
    def size(self) -> int:
        return super().size() * 100


class NeverEnds(WholeFileJournal):
    def tidy(self, running: Collection[bytes]) -> bool:
        super().tidy(running)
        return True


BROKEN = [
    (OverwritesBody, JournalConformance.test_known_request_is_not_changed_by_a_begin),
    (CountsBegins, JournalConformance.test_known_request_is_not_changed_by_a_begin),
    (JoinsFrames, JournalConformance.test_another_body_is_told),
    (ForgetsLimit, JournalConformance.test_new_request),
    (KeepsHalves, JournalConformance.test_batch_is_all_or_nothing),
    (ReversesBatches, JournalConformance.test_order_in_a_batch),
    (OverwritesSteps, JournalConformance.test_step_that_is_stored_already),
    (OverwritesSteps, JournalConformance.test_steps_belong_to_their_request),
    (SortsSteps, JournalConformance.test_step),
    (IgnoresNumbers, JournalConformance.test_step),
    (NeverFruitful, JournalConformance.test_step),
    (EndsNamesAtNul, JournalConformance.test_any_text_is_a_steps_name),
    (LosesSurrogates, JournalConformance.test_what_can_never_be_stored),
    (ExcusesTooMuch, JournalConformance.test_excuse),
    (ExcusesNothing, JournalConformance.test_excuse),
    (LetsEffectsRaise, JournalConformance.test_effect_that_raises),
    (TakesAnyValue, JournalConformance.test_effect_without_bytes),
    (CallsEffectsAgain, JournalConformance.test_effect_that_is_stored_already),
    (CallsEffectsAgain, JournalConformance.test_effect),
    (StoresFailures, JournalConformance.test_effect_that_raises),
    (AnswersTwice, JournalConformance.test_only_what_is_open_goes_on),
    (TakesUnknown, JournalConformance.test_only_what_is_open_goes_on),
    (AcksAnything, JournalConformance.test_ack_of_what_is_not_done),
    (KeepsAckedReply, JournalConformance.test_ack),
    (ForgetsNothing, JournalConformance.test_forget),
    (LosesEmptyFrames, JournalConformance.test_answer),
    (LosesEmptyFrames, JournalConformance.test_large_and_empty_frames),
    (RecordsEffectsOfNobody, JournalConformance.test_effect_of_no_request),
    (CountsBegins, JournalConformance.test_rerun),
    (KeepsSteps, JournalConformance.test_steps_go_with_the_answer),
    (KeepsHalves, JournalConformance.test_any_history),
    (BlamesThePlace, JournalConformance.test_a_writes_own_fault),
    (CannotDoNothing, JournalConformance.test_empty_batch),
    (StopsAtFiveHundred, JournalConformance.test_large_batch),
    (NewId, JournalConformance.test_reopened),
    (SameId, JournalConformance.test_id),
    (StartsAnew, JournalConformance.test_reopened),
    (StartsAnew, JournalConformance.test_any_thread),
    (LosesCounts, JournalConformance.test_dropped_is_remembered),
    (LosesHorizon, JournalConformance.test_dropped_is_remembered),
    (NeedsNoLock, JournalConformance.test_one_at_a_time),
    (OpensTwice, JournalConformance.test_one_at_a_time),
    (NeedsNoOpening, JournalConformance.test_closed),
    (GoesBack, JournalConformance.test_time),
    (RunsFast, JournalConformance.test_time),
    (NeverDrops, JournalConformance.test_too_old),
    (DropsAll, JournalConformance.test_nothing_is_dropped_without_need),
    (DropsRunning, JournalConformance.test_running_are_kept),
    (AgesRunning, JournalConformance.test_running_do_not_age),
    (CountsFromTheBeginning, JournalConformance.test_age_counts_from_the_last_change),
    (DropsSilently, JournalConformance.test_too_old),
    (TakesDroppedForNew, JournalConformance.test_too_old),
    (TakesNewForDropped, JournalConformance.test_too_old),
    (TakesAllForDropped, JournalConformance.test_is_resent_alone_drops_nothing),
    (DropsNewest, JournalConformance.test_too_much),
    (DropsOpenFirst, JournalConformance.test_too_much),
    (KeepsOpen, JournalConformance.test_too_much_of_what_is_open),
    (DropsTooMuch, JournalConformance.test_too_much),
    (NeverEnds, JournalConformance.test_nothing_is_dropped_without_need),
    (SavesLate, JournalConformance.test_killed),
    (SavesHalves, JournalConformance.test_killed),
]


class _Broken(JournalConformance):
    """The suite for one that breaks a rule; `kind` is a Model or a Journal."""

    kind: type[Model] | type[Journal]

    def __init__(self) -> None:
        self.made: list[WholeFileJournal] = []

    def make(self, folder: Path, *, ttl: float = 86_400.0, max_bytes: int = 2**30) -> Journal:
        made = (self.kind if issubclass(self.kind, WholeFileJournal) else WholeFileJournal)(folder / "all", ttl, max_bytes)
        if issubclass(self.kind, Model):
            made.new_model = self.kind  # type: ignore[method-assign]
        self.made.append(made)
        return made


# Processes that are killed find them by name.


class _SavesLate(_Broken):
    kind = SavesLate


class _SavesHalves(_Broken):
    kind = SavesHalves


@pytest.mark.check
@pytest.mark.parametrize(("kind", "test"), BROKEN, ids=lambda value: value.__name__)
def test_a_broken_rule_is_found(kind: type[Any], test: Any, tmp_path: Path) -> None:
    """A backend that breaks a rule fails the test of that rule; a process is not killed at the right moment each time."""
    suites: dict[str, type[_Broken]] = {"SavesLate": _SavesLate, "SavesHalves": _SavesHalves}
    suite = suites.get(kind.__name__, _Broken)()
    suite.kind = kind
    is_found = False
    for attempt in range(20 if kind.__name__ in suites else 1):
        (tmp_path / str(attempt)).mkdir()
        try:
            test(suite, tmp_path / str(attempt))
        except Exception as error:
            assert not isinstance(error, NotImplementedError)
            is_found = True
            break
    for made in suite.made:
        made.close()
    assert is_found


def test_every_test_can_fail() -> None:
    """No test of the suite is there that nothing has been seen to fail."""
    tests = {name for name in dir(JournalConformance) if name.startswith("test_")}
    assert tests == {test.__name__ for _, test in BROKEN}
