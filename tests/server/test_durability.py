"""Tests of greensafe.server.durability: what a server with a journal does with requests that it has seen before."""

from __future__ import annotations

import gc
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import gevent.monkey
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import LATER, Client, JournalError, JournalUnavailable, RemoteError, Request, Server
from greensafe.hooks import RequestAnswered, RequestFailed, RequestStarted
from greensafe.journal import Begin, Finish, SqliteJournal, State, Step, Write, in_transaction
from greensafe.sansio.envelope import CALLER_LIMIT, GREET, OTHER_JOURNAL, Header, Kind, ServerHeader, decode
from greensafe.server.durability import Journaled

pytestmark = pytest.mark.usefixtures("limit")

ANY_PORT = "tcp://127.0.0.1:0"

Native = gevent.monkey.get_original("threading", "Event")


class Disk(SqliteJournal):
    """A journal whose commits wait for `gate`, and fail with `fault` while `fails` says so.

    `at_gate` is what waits there, and `seen` what was written.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self.gate = Native()
        self.gate.set()
        self.at_gate: Sequence[Write] = ()
        self.fails: Callable[[Write], bool] = lambda write: False
        self.fault = JournalError("the disk is full")
        self.seen: list[Write] = []

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        self.at_gate = writes
        self.gate.wait(LONG)
        self.at_gate = ()
        if any(map(self.fails, writes)):
            raise self.fault
        results = super().commit(writes)
        self.seen.extend(writes)
        return results

    def kinds(self, number: int = 1) -> list[str]:
        """What was written about a request."""
        return [type(write).__name__ for write in self.seen if write.request_id == _id(number)]


class Peer:
    """A client that says exactly what the test wants."""

    def __init__(self, context: zmq.Context, endpoint: str) -> None:
        self.sock = context.socket(plain.DEALER)
        self.sock.connect(endpoint)

    def ask(self, number: int = 1, body: bytes = b"body", age_ms: int = 0, limit_ms: int | None = None, **fields: Any) -> None:
        header = Header(Kind.REQUEST, _id(number), limit_ms, age_ms=age_ms, **fields)
        self.sock.send_multipart([header.encode(), b"", body])

    def tell(self, kind: Kind, number: int = 1) -> None:
        self.sock.send_multipart([Header(kind, _id(number)).encode(), b"", b""])

    def hear(self) -> tuple[int, bytes]:
        """The kind and the body of the next message; notes that a server drains are left out."""
        while True:
            header, _, body = self.sock.recv_multipart(timeout=LONG)
            decoded = decode(header)
            assert isinstance(decoded, ServerHeader)
            if decoded.kind != Kind.DRAINING:
                return decoded.kind, body

    def error(self) -> tuple[int, str, str]:
        """The kind, code and type of the next message, an error."""
        kind, body = self.hear()
        error = RemoteError.from_reply(body)
        assert error is not None, body
        return kind, error.code, error.type


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Site:
    """A server with a journal that is stopped and started again on the same file and address, and its handler."""

    def __init__(self, context: zmq.Context, path: Path, handler: Any, **options: Any) -> None:
        self.context = context
        self.disk = Disk(path)
        self.handler = handler
        self.runs: list[tuple[str, int]] = []
        options = {"deadline": LONG, **options}
        self.server = Server(ANY_PORT, self._handle, context=context, journal=self.disk, **options)
        self.server.start()
        self.peer = self.connect()

    def _handle(self, request: Request) -> Any:
        self.runs.append((request.body.decode(), request.attempt))
        return self.handler(request)

    def connect(self) -> Peer:
        assert self.server.endpoint is not None
        return Peer(self.context, self.server.endpoint)

    def restart(self) -> None:
        """Interrupt what runs, and start again."""
        self.server.close()
        self.server.start()
        self.peer = self.connect()

    def die(self) -> None:
        """The same, but as a killed process does it: nobody says that what ran was not in vain."""
        self.disk.fails = lambda write: type(write).__name__ == "Excuse"
        self.restart()
        self.disk.fails = lambda write: False

    @property
    def journal(self) -> Any:
        stats = self.server.stats.journal
        assert stats is not None
        return stats


Build = Callable[..., Site]


@pytest.fixture
def build(context: zmq.Context, tmp_path: Path) -> Iterator[Build]:
    with ExitStack() as stack:

        def build(handler: Any, **options: Any) -> Site:
            site = Site(context, tmp_path / "requests.db", handler, **options)
            stack.callback(site.server.close)
            stack.callback(site.disk.gate.set)
            return site

        yield build


def _echo(request: Request) -> bytes:
    return b"re: " + request.body


class Waiting:
    """A handler that waits until the test lets it go on, and says what it has been told."""

    def __init__(self) -> None:
        self.event = gevent.event.Event()

    def __call__(self, request: Request) -> bytes:
        self.event.wait()
        return b"re: " + request.body


def test_stored_before_it_runs_and_before_it_is_answered(build: Build) -> None:
    """Neither the handler nor the answer is ahead of the disk, and meanwhile the server serves others."""
    site = build(_echo)
    site.disk.gate.clear()
    site.peer.ask()
    wait_until(lambda: site.journal.pending)
    gevent.sleep(5 * MS)
    assert site.runs == []
    held = site.server._watchdog
    site.disk.fails = lambda write: False
    site.disk.gate.set()
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert site.disk.kinds() == ["Begin", "Finish"]
    site.disk.gate.clear()
    site.peer.ask(2)
    wait_until(lambda: site.server.stats.running)
    assert (site.server.stats.running, held is site.server._watchdog) == (1, True)
    with site.context.socket(plain.REQ) as other:
        other.connect(site.server.endpoint)
        other.send(b"plain")
        assert other.recv(timeout=LONG) == b"re: plain"
    site.disk.gate.set()
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


def test_the_answer_is_held_until_it_is_stored(build: Build) -> None:
    """The handler has returned, and its client hears WORKING, not the answer."""
    go = Waiting()
    site = build(go)
    site.peer.ask(patience_ms=500)
    wait_until(lambda: site.runs)
    site.disk.gate.clear()
    go.event.set()
    assert site.peer.hear() == (Kind.WORKING, _id(1))
    assert (site.server.stats.inflight, site.server.stats.running) == (1, 1)
    site.disk.gate.set()
    assert next(kind for kind, _ in iter(site.peer.hear, None) if kind != Kind.WORKING) == Kind.REPLY


def test_an_answered_request_gets_its_stored_answer(build: Build) -> None:
    """The handler does not run again, in this process or the next; errors are answers as well."""
    site = build(lambda request: _echo(request) if request.body == b"body" else request.error("NOT_FOUND", "no"))
    site.peer.ask(1)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    site.peer.ask(2, b"missing")
    first = site.peer.hear()
    assert first[0] == Kind.ERROR
    site.peer.ask(1, age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    site.restart()
    site.peer.ask(1, age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    site.peer.ask(2, b"missing", age_ms=5)
    assert site.peer.hear() == first
    assert site.runs == [("body", 1), ("missing", 1)]
    assert site.journal.replayed == 2
    assert site.server.stats.failures == {"NOT_FOUND": 1}


def test_an_acknowledged_answer_is_gone(build: Build) -> None:
    """Its id is not: the request is not run again."""
    site = build(_echo)
    site.peer.ask()
    site.peer.hear()
    site.peer.tell(Kind.ACK)
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "ABORTED", "AnswerGone")
    assert len(site.runs) == 1


def test_another_body_under_the_same_id(build: Build) -> None:
    """It is told, whether the first is answered or not, and gets nobody else's answer."""
    go = Waiting()
    site = build(go)
    site.peer.ask()
    wait_until(lambda: site.runs)
    site.peer.ask(body=b"other")
    assert site.peer.error() == (Kind.ERROR, "INVALID_ARGUMENT", "OtherBody")
    go.event.set()
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    site.peer.ask(body=b"other")
    assert site.peer.error() == (Kind.ERROR, "INVALID_ARGUMENT", "OtherBody")
    site.peer.ask()
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


def test_a_running_request_is_joined(build: Build) -> None:
    """By another connection, and by one that comes while the answer is held: one run, and all get the answer."""
    go = Waiting()
    site = build(go)
    site.peer.ask()
    wait_until(lambda: site.runs)
    second, third = site.connect(), site.connect()
    second.ask(age_ms=5, flags=GREET)
    assert second.hear() == (Kind.WORKING, _id(1))
    site.disk.gate.clear()
    go.event.set()
    wait_until(lambda: site.journal.pending)
    third.ask(age_ms=5)
    wait_until(lambda: site.journal.joined == 2)
    site.disk.gate.set()
    assert [peer.hear() for peer in (site.peer, second, third)] == [(Kind.REPLY, b"re: body")] * 3
    assert (site.runs, site.server.stats.answered) == ([("body", 1)], 1)


def test_a_body_that_the_handler_has_changed_is_the_same(build: Build) -> None:
    """What a handler does to request.frames is its own affair."""
    go = gevent.event.Event()

    def handler(request: Request) -> bytes:
        taken = request.frames.pop()
        go.wait()
        return taken

    site = build(handler)
    site.peer.ask()
    wait_until(lambda: site.runs)
    site.peer.ask(age_ms=5)
    wait_until(lambda: site.journal.joined == 1)
    go.set()
    assert site.peer.hear() == (Kind.REPLY, b"body")


def test_an_interrupted_request_goes_on_at_its_first_unfinished_step(build: Build) -> None:
    """A step that was finished is not called again; what it returned is the same in both runs, as JSON has it."""
    calls: list[str] = []
    stuck = gevent.event.Event()

    def handler(request: Request) -> bytes:
        first = request.step("first", lambda: calls.append("first") or (1, {"a": 2}))
        calls.append(json.dumps(first))
        request.step("second", lambda: (calls.append("second"), stuck.wait() if request.attempt == 1 else None) and 2)
        return request.step("third", lambda: b"%d" % request.attempt)

    site = build(handler)
    site.peer.ask()
    wait_until(lambda: "second" in calls)
    site.restart()
    assert calls == ["first", '[1, {"a": 2}]', "second"]
    gevent.sleep(5 * MS)
    assert site.runs == [("body", 1)], "it is run again when it is sent again, not before"
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"2")
    assert calls[3:] == ['[1, {"a": 2}]', "second"]
    assert (site.runs, site.journal.rerun) == ([("body", 1), ("body", 2)], 1)


def test_stopped_in_the_middle_it_is_interrupted_and_not_answered(build: Build) -> None:
    """UNAVAILABLE is not its answer: it says INTERRUPTED, and the request stays open."""
    site = build(Waiting())
    site.peer.ask()
    wait_until(lambda: site.runs)
    peer = site.peer
    site.restart()
    assert peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "ServerStopped")
    assert site.disk.kinds() == ["Begin", "Excuse"]


def test_steps_by_name_and_number(build: Build) -> None:
    """In a loop each turn is a step of its own; what a changed handler does not ask for is left alone, what is new is run."""
    calls: list[Any] = []
    stuck = gevent.event.Event()

    def old(request: Request) -> bytes:
        for item in range(3):
            request.step("item", calls.append, item)
        request.step("removed", calls.append, "removed")
        stuck.wait()
        return b""

    def new(request: Request) -> bytes:
        request.step("added", calls.append, "added")
        for item in range(4):
            request.step("item", calls.append, item)
        return b"new"

    site = build(old)
    site.peer.ask()
    wait_until(lambda: "removed" in calls and not site.journal.pending)
    site.handler = new
    site.restart()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"new")
    assert calls == [0, 1, 2, "removed", "added", 3]


def test_a_step_that_raises_is_not_stored(build: Build) -> None:
    """The handler sees its own exception, may go on, and the next run calls it again."""
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise ValueError("not today")

    def handler(request: Request) -> bytes:
        with pytest.raises(ValueError, match="not today"):
            request.step("fails", fails)
        with pytest.raises(TypeError):
            request.step("cannot be stored", object)
        if request.attempt == 1:
            stuck.wait()
        return b"done"

    stuck = gevent.event.Event()
    site = build(handler)
    site.peer.ask()
    wait_until(lambda: calls)
    site.restart()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"done")
    assert (len(calls), site.disk.kinds()) == (2, ["Begin", "Excuse", "Begin", "Rerun", "Finish"])


def test_a_step_that_cannot_be_stored(build: Build) -> None:
    """JournalError in the handler; let out, the client is told that the request is open, and it runs again."""
    site = build(lambda request: request.step("a", lambda: b"x"))
    site.disk.fails = lambda write: isinstance(write, Step)
    site.peer.ask()
    assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError")
    site.disk.fails = lambda write: False
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"x")
    assert site.runs == [("body", 1), ("body", 2)]


def test_a_request_that_cannot_be_stored_is_not_run(build: Build) -> None:
    """It is rejected; the server is not healthy, says why, and is well again with its disk."""
    site = build(_echo)
    site.disk.fails = lambda write: True
    site.peer.ask()
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError")
    assert (site.runs, site.server.healthy, site.journal.error) == ([], False, "the disk is full")
    assert (site.server.stats.inflight, site.server.stats.running) == (0, 0)
    site.disk.fails = lambda write: False
    site.peer.ask()
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert (site.server.healthy, site.journal.failures) == (True, 1)


def test_an_answer_that_cannot_be_stored_does_not_leave(build: Build) -> None:
    """The client is told that the request is open; sent again, it is run again."""
    site = build(_echo)
    site.disk.fails = lambda write: type(write).__name__ == "Finish"
    site.peer.ask()
    assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError")
    site.disk.fails = lambda write: False
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert site.runs == [("body", 1), ("body", 2)]
    assert site.server.stats.inflight == 0


@pytest.mark.parametrize("kind", ["Begin", "Finish"])
def test_a_journal_that_is_out_of_reach_for_a_while(build: Build, kind: str) -> None:
    """The server says so at once, its client waits, and has its answer when the journal is back: one run, one answer."""
    site = build(_echo)
    site.disk.fault = JournalUnavailable("the file is locked")
    site.disk.fails = lambda write: type(write).__name__ == kind
    site.peer.ask()
    wait_until(lambda: not site.server.healthy)
    assert (site.journal.error, site.journal.failures) == ("the file is locked", 0)
    assert site.server.stats.inflight == 1
    site.disk.fails = lambda write: False
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert (site.server.healthy, site.runs, site.disk.kinds()) == (True, [("body", 1)], ["Begin", "Finish"])


def test_a_journal_that_stays_out_of_reach(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that wait are told together; the caller's limit is its own."""
    site = build(_echo)
    site.disk.fault = JournalUnavailable("the file is locked")
    site.disk.fails = lambda write: True
    site.peer.ask(1, limit_ms=1)
    assert site.peer.error() == (Kind.ERROR, "DEADLINE_EXCEEDED", CALLER_LIMIT)
    for number in (2, 3, 4):
        site.peer.ask(number)
    wait_until(lambda: site.server.stats.inflight == 3 and not site.server.healthy)
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", 0.0)
    for _ in range(3):
        assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError")
    assert (site.runs, site.server.healthy) == ([], False)


def test_stop_does_not_wait_for_a_journal_that_is_out_of_reach(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held for it is answered UNAVAILABLE; its answer is tried once more, and else the next server runs it again."""
    monkeypatch.setattr("greensafe.journal._patience.LIMIT", 2 * LONG)
    monkeypatch.setattr("greensafe.server.server.FLUSH", MS)
    site = build(_echo)
    site.disk.fault = JournalUnavailable("the file is locked")
    site.disk.fails = lambda write: type(write).__name__ == "Finish"
    site.peer.ask()
    wait_until(lambda: not site.server.healthy)
    site.server.stop(MS)
    assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError")
    wait_until(lambda: not Path(site.disk.path + ".lock").exists())
    site.disk.fails = lambda write: False
    site.server.start()
    site.peer = site.connect()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert site.runs == [("body", 1), ("body", 2)]


def test_a_rerun_that_cannot_be_counted_is_not_run(build: Build) -> None:
    """An attempt that nobody would know of is none."""
    go = Waiting()
    site = build(go)
    site.peer.ask()
    wait_until(lambda: site.runs)
    site.restart()
    site.disk.fails = lambda write: type(write).__name__ == "Rerun"
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError")
    assert len(site.runs) == 1
    site.disk.fails = lambda write: False
    go.event.set()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_not_now_is_no_answer_to_keep(build: Build, code: str) -> None:
    """A handler that says so is asked again."""

    def handler(request: Request) -> bytes:
        if request.attempt == 1:
            raise RemoteError(code, "not now")
        return b"now"

    site = build(handler)
    site.peer.ask()
    assert site.peer.error()[:2] == (Kind.INTERRUPTED, code)
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"now")


def test_attempts_are_bounded_as_long_as_nothing_new_is_finished(build: Build) -> None:
    """Each interruption counts until a step is new; in the end the request is ABORTED, for good, and others are served."""
    stuck = gevent.event.Event()

    def handler(request: Request) -> bytes:
        if request.body == b"good":
            return b"fine"
        if request.attempt <= 2:
            request.step(f"step {request.attempt}", int)
        stuck.wait()
        return b"never"

    site = build(handler, max_attempts=2)
    for attempt in (1, 2, 3, 4):
        site.peer.ask(1, b"poison", age_ms=attempt)
        wait_until(lambda attempt=attempt: ("poison", attempt) in site.runs and not site.journal.pending)
        site.die()
    for _ in range(2):
        site.peer.ask(1, b"poison", age_ms=5)
        assert site.peer.error() == (Kind.ERROR, "ABORTED", "TooManyAttempts")
    site.peer.ask(2, b"good")
    assert site.peer.hear() == (Kind.REPLY, b"fine")
    assert [attempt for body, attempt in site.runs if body == "poison"] == [1, 2, 3, 4]


def test_a_promise_is_no_attempt_in_vain(build: Build) -> None:
    """A request whose handler has returned LATER waits through any number of crashes."""
    kept: list[Request] = []

    def handler(request: Request) -> Any:
        kept.append(request)
        return LATER

    site = build(handler, max_attempts=2)
    for attempt in range(1, 6):
        site.peer.ask(age_ms=attempt)
        wait_until(lambda attempt=attempt: ("body", attempt) in site.runs and not site.journal.pending)
        site.die()
    site.peer.ask(age_ms=6)
    wait_until(lambda: len(kept) == 6)
    kept[5].reply(b"later")
    assert site.peer.hear() == (Kind.REPLY, b"later")
    kept.clear()
    gc.collect()


def test_only_attempts_that_end_with_the_process_are_in_vain(build: Build) -> None:
    """A server that is stopped in order, a handler that says "not now" and a full disk say nothing against a request."""
    waiting = Waiting()

    def handler(request: Request) -> bytes:
        if request.attempt in (2, 3):
            raise RemoteError("UNAVAILABLE", "not now")
        if request.attempt < 8:
            return waiting(request)
        return b"done"

    site = build(handler, max_attempts=2)
    site.peer.ask()
    wait_until(lambda: site.runs)
    site.restart()
    for _ in range(2):
        site.peer.ask(age_ms=5)
        assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "")
    site.peer.ask(age_ms=5)
    wait_until(lambda: len(site.runs) == 4)
    site.restart()
    waiting.event.set()
    # Neither can the answer be stored, nor that this was not the request's fault.
    site.disk.fails = lambda write: type(write).__name__ in ("Finish", "Excuse")
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError")
    site.disk.fails = lambda write: type(write).__name__ == "Finish"
    for _ in range(2):
        site.peer.ask(age_ms=5)
        assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError")
    site.disk.fails = lambda write: False
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"done")
    assert [attempt for _, attempt in site.runs] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_an_attempt_is_excused_once(build: Build) -> None:
    """One that has returned LATER and is stopped afterwards does not excuse the one before, which ended with its process."""
    kept: list[Request] = []

    def handler(request: Request) -> Any:
        kept.append(request)
        if request.attempt == 2:
            return LATER
        gevent.event.Event().wait()
        return b"never"

    site = build(handler, max_attempts=2)
    for attempt, end in ((1, site.die), (2, site.restart), (3, site.die)):
        site.peer.ask(age_ms=attempt)
        wait_until(lambda attempt=attempt: len(site.runs) == attempt and not site.journal.pending)
        end()
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "ABORTED", "TooManyAttempts")
    kept.clear()
    gc.collect()


def test_what_was_not_run_excuses_nothing(build: Build) -> None:
    """That a request is ABORTED cannot be stored: the attempts before are still those that ended with their process."""
    waiting = Waiting()
    site = build(waiting, max_attempts=1)
    site.peer.ask()
    wait_until(lambda: site.runs and not site.journal.pending)
    site.die()
    site.disk.fails = lambda write: type(write).__name__ == "Finish"
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError")
    site.disk.fails = lambda write: False
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "ABORTED", "TooManyAttempts")
    assert len(site.runs) == 1


def test_a_rerun_that_was_not_counted_excuses_nothing(build: Build) -> None:
    """It could not be stored, and was not run: the attempt before has ended with its process all the same."""
    site = build(Waiting(), max_attempts=2)
    site.peer.ask()
    wait_until(lambda: site.runs and not site.journal.pending)
    site.die()
    site.disk.fails = lambda write: type(write).__name__ == "Rerun"
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError")
    site.disk.fails = lambda write: False
    site.peer.ask(age_ms=5)
    wait_until(lambda: len(site.runs) == 2 and not site.journal.pending)
    site.die()
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "ABORTED", "TooManyAttempts")


def test_cancelled_before_its_rerun_is_stored(build: Build) -> None:
    """A rerun that was counted and not run was not in vain: it has not ended with its process."""
    waiting = Waiting()
    site = build(waiting, max_attempts=2)
    site.peer.ask()
    wait_until(lambda: site.runs and not site.journal.pending)
    site.die()
    is_held, go_on = Native(), Native()

    def hold(write: Write) -> bool:
        if type(write).__name__ == "Rerun":
            is_held.set()
            go_on.wait(LONG)
        return False

    site.disk.fails = hold
    site.peer.ask(age_ms=5)
    wait_until(is_held.is_set)
    site.peer.tell(Kind.CANCEL)
    assert site.peer.error() == (Kind.ERROR, "CANCELLED", "Cancelled")
    go_on.set()
    waiting.event.set()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


def test_abort(build: Build) -> None:
    """With resume="abort" an interrupted request is not run again, and that is its answer from then on."""
    site = build(Waiting(), resume="abort")
    site.peer.ask()
    wait_until(lambda: site.runs)
    site.restart()
    for _ in range(2):
        site.peer.ask(age_ms=5)
        assert site.peer.error() == (Kind.ERROR, "ABORTED", "Interrupted")
    assert len(site.runs) == 1
    assert site.disk.kinds() == ["Begin", "Excuse", "Begin", "Finish", "Begin"]


def test_the_callers_limit_survives(build: Build) -> None:
    """What has run out while the server was away is not run again, whatever the resend says."""
    site = build(Waiting())
    site.peer.ask(limit_ms=round(200 * MS * 1000))
    wait_until(lambda: site.runs)
    site.server.close()
    gevent.sleep(250 * MS)
    site.server.start()
    site.peer = site.connect()
    site.peer.ask(age_ms=500, limit_ms=round(LONG * 1000))
    assert site.peer.error() == (Kind.ERROR, "DEADLINE_EXCEEDED", "CallerLimit")
    assert len(site.runs) == 1
    assert site.server.stats.running == 0


def test_overdue_before_it_is_stored(build: Build) -> None:
    """A slow disk does not keep a caller waiting: it is answered in time and not run."""
    site = build(_echo)
    site.disk.gate.clear()
    site.peer.ask(limit_ms=20)
    assert site.peer.error() == (Kind.ERROR, "DEADLINE_EXCEEDED", "CallerLimit")
    assert site.server.stats.running == 0
    site.disk.gate.set()
    wait_until(lambda: site.disk.kinds() == ["Begin"])
    gevent.sleep(5 * MS)
    assert site.runs == []


def test_cancelled_before_it_is_stored_and_after(build: Build) -> None:
    """A caller that gives up is answered; what ran is closed in the journal, so nothing waits there for ever."""
    site = build(Waiting())
    site.disk.gate.clear()
    site.peer.ask(1)
    wait_until(lambda: site.journal.pending)
    site.peer.tell(Kind.CANCEL, 1)
    assert site.peer.error() == (Kind.ERROR, "CANCELLED", "Cancelled")
    site.disk.gate.set()
    site.peer.ask(2)
    wait_until(lambda: len(site.runs) == 1)
    site.peer.tell(Kind.CANCEL, 2)
    assert site.peer.error() == (Kind.ERROR, "CANCELLED", "Cancelled")
    assert site.disk.kinds(2) == ["Begin", "Finish"]
    assert site.disk.kinds(1) == ["Begin", "Forget"]


def test_what_never_ran_is_no_interruption(build: Build) -> None:
    """A request that was given up before it was stored is new when it comes again, also with resume="abort"."""
    site = build(_echo, resume="abort")
    site.disk.gate.clear()
    site.peer.ask(limit_ms=20)
    assert site.peer.error() == (Kind.ERROR, "DEADLINE_EXCEEDED", "CallerLimit")
    site.disk.gate.set()
    wait_until(lambda: site.disk.kinds() == ["Begin"])
    site.peer.ask(age_ms=50)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


@pytest.mark.parametrize("options", [{"resume": "abort"}, {"max_attempts": 1}])
def test_what_was_not_stored_when_the_server_stopped(
    build: Build, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """What a stop refuses because the disk hangs was not run, also if it is stored afterwards: the next server runs it."""
    monkeypatch.setattr("greensafe.server.server.FLUSH", 20 * MS)
    site = build(_echo, **options)
    site.disk.gate.clear()
    site.peer.ask(1)
    wait_until(lambda: site.journal.pending == 1)
    gevent.sleep(0)  # its batch is under way
    site.peer.ask(2)
    wait_until(lambda: site.journal.pending == 2)
    site.server.close()
    assert {site.peer.error()[0], site.peer.error()[0]} == {Kind.REJECTED}
    site.disk.gate.set()
    wait_until(lambda: not Path(f"{site.disk.path}.lock").exists())
    site.server.start()
    site.peer = site.connect()
    for number in (1, 2):
        site.peer.ask(number, age_ms=5)
        assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert site.runs == [("body", 1), ("body", 1)]


def test_what_was_stored_and_had_no_turn(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that comes between a request's Begin and its turn: it was not run, so the next server runs it."""
    with monkeypatch.context() as patch:
        patch.setattr("greensafe.server.durability.TURN", -1.0)  # nobody's turn comes
        site = build(_echo, resume="abort")
        site.peer.ask()
        wait_until(lambda: site.disk.kinds() == ["Begin"] and not site.journal.pending)
        site.server.close()
        assert site.peer.error()[0] == Kind.REJECTED
    site.server.start()
    site.peer = site.connect()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert site.runs == [("body", 1)]


def test_a_later_request_is_unfinished_until_it_is_answered(build: Build) -> None:
    """It runs again after a restart; until then a resend joins it."""
    kept: list[Request] = []

    def handler(request: Request) -> Any:
        kept.append(request)
        return LATER

    site = build(handler)
    site.peer.ask()
    wait_until(lambda: kept)
    site.peer.ask(age_ms=5)
    wait_until(lambda: site.journal.joined == 1)
    site.restart()
    site.peer.ask(age_ms=5)
    wait_until(lambda: len(kept) == 2)
    assert kept[1].step("late", lambda: "step") == "step"
    kept[1].reply(b"later")
    assert site.peer.hear() == (Kind.REPLY, b"later")
    assert site.disk.kinds()[-2:] == ["Step", "Finish"]
    kept.clear()
    gc.collect()


def test_an_effect_shares_the_steps_transaction(build: Build) -> None:
    """A table of the program's own, in the journal's file: done and recorded, or neither; once, however often it is run."""

    def pay(connection: Any, account: str, amount: int) -> int:
        connection.execute("CREATE TABLE IF NOT EXISTS paid (account TEXT, amount INTEGER)")
        connection.execute("INSERT INTO paid VALUES (?, ?)", (account, amount))
        if amount < 0:
            raise ValueError("not that way")
        return amount

    def handler(request: Request) -> Any:
        with pytest.raises(ValueError, match=r"^not that way"):
            request.step("bad", in_transaction(pay), "a", -1)
        paid = request.step("pay", in_transaction(pay), "a", 5)
        if request.attempt == 1 and request.body == b"body":
            stuck.wait()
        return b"%d" % paid

    stuck = gevent.event.Event()
    site = build(handler)
    site.peer.ask()
    wait_until(lambda: "Effect" in site.disk.kinds() and not site.journal.pending)
    site.restart()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"5")
    with site.context.socket(plain.REQ) as other:
        other.connect(site.server.endpoint)
        other.send(b"plain")
        assert other.recv(timeout=LONG) == b"5"
    site.server.close()
    rows: list[Any] = []
    site.disk.open()
    gevent.get_hub().threadpool.apply(
        lambda: rows.extend(site.disk._connection.execute("SELECT * FROM paid"))  # type: ignore[union-attr]
    )
    site.disk.close()
    assert rows == [("a", 5), ("a", 5)], "one for the request that came twice, one for the plain one"


def test_an_effect_that_ends_its_thread(build: Build) -> None:
    """Whatever an effect raises is the handler's; nobody whose write was in the same batch waits for ever."""

    def leave(connection: Any) -> None:
        raise SystemExit("enough")

    def handler(request: Request) -> bytes:
        if request.body == b"bad":
            request.step("leave", in_transaction(leave))
        return b"fine"

    site = build(handler)
    site.peer.ask(1, b"bad")
    assert site.peer.error() == (Kind.ERROR, "INTERNAL", "SystemExit")
    site.peer.ask(2, b"good")
    assert site.peer.hear() == (Kind.REPLY, b"fine")


def test_steps_without_a_journal(context: zmq.Context) -> None:
    """The handler sees the same results; an effect needs a journal and says so."""
    results: list[Any] = []

    def handler(request: Request) -> bytes:
        results.append(request.step("a", lambda: (1, 2)))
        with pytest.raises(JournalError, match="no journal"):
            request.step("b", in_transaction(lambda connection: None))
        with pytest.raises(TypeError, match="a step's name is a str"):
            request.step(b"a", int)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a step is a function"):
            request.step("a", 5)  # type: ignore[arg-type]
        return b"%d" % request.attempt

    with (
        Server(ANY_PORT, handler, deadline=LONG, context=context) as server,
        Client(server.endpoint, context=context) as client,
    ):
        assert client.request(b"x") == b"1"
    assert results == [[1, 2]]


class Hex:
    """A codec of one's own."""

    def encode(self, value: Any) -> bytes:
        return value.hex().encode()

    def decode(self, data: bytes) -> Any:
        return bytes.fromhex(data.decode())


def test_another_codec(build: Build) -> None:
    """It is asked both ways, in the first run too."""
    site = build(lambda request: request.step("a", lambda: request.body + b"!"), step_codec=Hex())
    site.peer.ask()
    assert site.peer.hear() == (Kind.REPLY, b"body!")
    assert next(write for write in site.disk.seen if isinstance(write, Step)).value == b"body!".hex().encode()


@pytest.mark.parametrize("encoded", [None, "text", 5])
def test_a_codec_that_encodes_no_bytes(build: Build, encoded: Any) -> None:
    """Its steps fail at once, and not when they are wanted back: what it returned could have been silently not stored."""

    class Odd:
        def encode(self, value: Any) -> Any:
            return encoded

        def decode(self, data: bytes) -> Any:
            return b""

    site = build(lambda request: request.step("a", bytes), step_codec=Odd())
    site.peer.ask()
    assert site.peer.error() == (Kind.ERROR, "INTERNAL", "TypeError")
    assert "Step" not in site.disk.kinds()


def test_nothing_is_stored_after_the_answer(build: Build) -> None:
    """A handler that goes on after its reply runs its steps as ever, and they are not for another run."""
    done = gevent.event.Event()

    def handler(request: Request) -> None:
        request.reply(b"first")
        assert request.step("after", lambda: (1,)) == [1]
        request.step("effect", in_transaction(lambda connection: 1))
        done.set()

    site = build(handler)
    site.peer.ask()
    assert site.peer.hear() == (Kind.REPLY, b"first")
    done.wait()
    assert site.disk.kinds() == ["Begin", "Finish"]


def test_a_rerun_waits_for_the_end_of_the_last_run(build: Build) -> None:
    """A handler that has answered "not now" and has not ended yet is not run twice at a time."""
    go = gevent.event.Event()
    running: list[int] = []

    def handler(request: Request) -> bytes | None:
        running.append(request.attempt)
        assert running == [request.attempt]
        if request.attempt == 1:
            request.error("UNAVAILABLE", "not now")
            go.wait()
        running.pop()
        return None if request.attempt == 1 else b"now"

    site = build(handler)
    site.peer.ask()
    assert site.peer.error()[0] == Kind.INTERRUPTED
    site.peer.ask(age_ms=5, flags=GREET)
    assert site.peer.hear() == (Kind.WORKING, _id(1))
    wait_until(lambda: site.disk.kinds().count("Begin") == 2 and not site.journal.pending)
    gevent.sleep(5 * MS)
    assert running == [1]
    go.set()
    assert site.peer.hear() == (Kind.REPLY, b"now")


def test_a_rerun_does_not_wait_for_what_cannot_be_ended(build: Build) -> None:
    """If the last run has survived its kill, who waits for its end is told, and who comes then as well."""
    over = gevent.event.Event()

    def handler(request: Request) -> None:
        request.error("UNAVAILABLE", "not now")
        while not over.is_set():
            with suppress(BaseException):
                over.wait()

    site = build(handler, deadline=100 * MS, grace=20 * MS)
    site.peer.ask()
    assert site.peer.error()[0] == Kind.INTERRUPTED
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "HandlerStuck")
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "HandlerStuck")
    assert site.runs == [("body", 1)]
    over.set()


def test_one_whose_client_has_vanished_stays_open(build: Build) -> None:
    """Its handler is stopped (cancel_vanished), and goes on when its client is back."""
    calls: list[int] = []
    stuck = gevent.event.Event()

    def handler(request: Request) -> bytes:
        request.step("a", calls.append, 1)
        if request.attempt == 1:
            stuck.wait()
        return b"done"

    site = build(handler, cancel_vanished=True)
    peer = site.connect()
    peer.ask()
    wait_until(lambda: calls)
    peer.sock.close(0)
    wait_until(lambda: site.server.stats.running == 0)
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"done")
    assert (calls, site.runs) == ([1], [("body", 1), ("body", 2)])


def test_another_way_than_the_one_that_vanished(build: Build) -> None:
    """A client whose latest connection is gone is not told by an earlier one that it has cancelled: the request is open."""
    waiting = Waiting()
    site = build(waiting, cancel_vanished=True)
    site.peer.ask()
    wait_until(lambda: site.runs)
    peer = site.connect()
    peer.ask(age_ms=5)
    wait_until(lambda: site.journal.joined == 1)
    peer.sock.close(0)
    assert site.peer.error() == (Kind.INTERRUPTED, "CANCELLED", "Cancelled")
    waiting.event.set()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert site.runs == [("body", 1), ("body", 2)]


def test_forgotten(build: Build) -> None:
    """What may have been dropped is ABORTED when it comes again, and run when it comes for the first time."""
    site = build(_echo)
    site.disk._horizon = site.disk.now() + 3600
    site.peer.ask(1, age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "ABORTED", "Forgotten")
    site.peer.ask(2)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert len(site.runs) == 1


def test_forgotten_by_its_age(build: Build) -> None:
    """What counts is when it was first sent, not when it comes."""
    site = build(_echo)
    site.disk._horizon = site.disk.now() - 3600
    site.peer.ask(1, age_ms=4_000_000)
    assert site.peer.error() == (Kind.ERROR, "ABORTED", "Forgotten")
    site.peer.ask(2, age_ms=3_000_000)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


def test_stop_waits_for_answers_that_are_held(build: Build) -> None:
    """What was answered in time leaves, also if the disk takes its time."""
    go = Waiting()
    site = build(go)
    site.peer.ask()
    wait_until(lambda: site.runs)
    site.disk.gate.clear()
    go.event.set()
    wait_until(lambda: site.journal.pending)
    stopping = gevent.spawn(site.server.stop, LONG)
    gevent.sleep(100 * MS)
    site.disk.gate.set()
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    stopping.get()


def test_stopped_before_it_is_stored(build: Build) -> None:
    """It was not run: it is rejected, and nothing of it is owed."""
    site = build(_echo)
    site.disk.gate.clear()
    site.peer.ask()
    wait_until(lambda: site.journal.pending)
    watchdog = site.server._watchdog
    assert watchdog is not None
    gevent.spawn(site.server.stop, 0)
    assert site.peer.error() == (Kind.REJECTED, "UNAVAILABLE", "ServerStopped")
    assert (watchdog.load, watchdog.responder.inflight) == (0, 0)
    site.disk.gate.set()


def test_rejected_requests_are_not_stored(build: Build) -> None:
    """Neither what is full nor another journal's request leaves a trace."""
    go = Waiting()
    site = build(go, max_inflight=1, overload="reject")
    site.peer.ask(1)
    wait_until(lambda: site.runs)
    site.peer.ask(2)
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "ServerFull")
    site.peer.ask(3, journal=b"other".ljust(16), age_ms=5)
    assert site.peer.error() == (Kind.REJECTED, "FAILED_PRECONDITION", OTHER_JOURNAL)
    assert {write.request_id for write in site.disk.seen} == {_id(1)}
    go.event.set()
    assert site.peer.hear()[0] == Kind.REPLY


def test_a_kept_request_that_is_joined(build: Build) -> None:
    """One that waits for its turn is joined as one that runs is, and both ways get the answer."""
    go = Waiting()
    site = build(go, max_inflight=1)
    site.peer.ask(1)
    wait_until(lambda: site.runs)
    site.peer.ask(2, b"two")
    other = site.connect()
    wait_until(lambda: site.server.stats.backlog == 1)
    other.ask(2, b"two", age_ms=5)
    wait_until(lambda: site.journal.joined == 1)
    go.event.set()
    assert {site.peer.hear()[1], site.peer.hear()[1]} == {b"re: body", b"re: two"}
    assert other.hear() == (Kind.REPLY, b"re: two")


def test_a_file_is_one_servers(build: Build, context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """A second server on it is refused at once and leaves nothing; when the first has stopped it may."""
    site = build(_echo)
    second = Server(ANY_PORT, _echo, deadline=LONG, context=context, journal=site.disk.path)
    with pytest.raises(JournalError, match="in use"):
        second.start()
    assert second.closed
    assert "not closed yet" not in caplog.text
    site.server.stop()
    second.start()
    second.stop()
    site.server.start()


def test_an_address_that_is_in_use_leaves_the_journal_free(build: Build, context: zmq.Context, tmp_path: Path) -> None:
    """What cannot be bound gives the file back."""
    site = build(_echo)
    path = tmp_path / "second.db"
    other = Server(site.server.endpoint, _echo, deadline=LONG, context=context, journal=path)  # type: ignore[arg-type]
    with pytest.raises(plain.ZMQError):
        other.start()
    with Server(ANY_PORT, _echo, deadline=LONG, context=context, journal=path):
        pass


def test_stop_does_not_wait_for_a_disk_that_hangs(build: Build) -> None:
    """It returns, and the next start waits for the file."""
    site = build(_echo)
    site.disk.gate.clear()
    site.peer.ask()
    wait_until(lambda: site.journal.pending)
    site.server.stop(0)
    assert site.server.closed
    with pytest.raises(JournalError, match="open already"):
        site.server.start()
    site.disk.gate.set()
    wait_until(lambda: not Path(site.disk.path + ".lock").exists())
    site.server.start()
    site.peer = site.connect()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


def test_the_journals_id_is_in_every_header(build: Build) -> None:
    """It is the file's, the instance another one each time: so a client sees a restart."""
    site = build(_echo)
    seen = []
    for number in (1, 2):
        site.peer.ask(number)
        decoded = decode(site.peer.sock.recv_multipart()[0])
        assert isinstance(decoded, ServerHeader)
        seen.append(decoded)
        site.restart()
    assert seen[0].journal == seen[1].journal == site.disk.id
    assert seen[0].instance != seen[1].instance


def test_hooks_are_told_of_each_attempt(build: Build) -> None:
    """A run is told with its attempt, a stored answer as one without a run, each request once."""
    told: list[Any] = []
    go = Waiting()
    site = build(go, hooks=told.append)
    site.peer.ask()
    wait_until(lambda: site.runs)
    site.restart()
    go.event.set()
    for _ in range(2):
        site.peer.ask(age_ms=5)
        assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert [record.attempt for record in told if isinstance(record, RequestStarted)] == [1, 2]
    ends = [type(record) for record in told if isinstance(record, (RequestAnswered, RequestFailed))]
    assert ends == [RequestFailed, RequestAnswered, RequestAnswered]


def test_states_in_the_file(build: Build) -> None:
    """OPEN while it runs, DONE when it is answered, ACKED when a real client has its answer."""
    site = build(_echo)
    with Client(site.server.endpoint, context=site.context) as client:
        assert client.request(b"x") == b"re: x"
    wait_until(lambda: site.journal.pending)  # for the next batch, or the server's end
    site.server.stop()
    assert [type(write).__name__ for write in site.disk.seen] == ["Begin", "Finish", "Ack"]
    (begin,) = (write for write in site.disk.seen if type(write).__name__ == "Begin")
    site.disk.open()
    (known,) = site.disk.commit([begin])
    site.disk.close()
    assert known.state is State.ACKED


class FullDisk(SqliteJournal):
    """One that takes no page more while `is_full`."""

    is_full = False

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        # sqlite makes of 1 the pages that are there.
        self._ready().execute(f"PRAGMA max_page_count = {1 if self.is_full else 2**30}")
        return super().commit(writes)


@pytest.mark.parametrize("phase", ["begin", "step", "finish"])
def test_a_disk_that_is_full_for_a_while(context: zmq.Context, tmp_path: Path, phase: str) -> None:
    """Whatever cannot be stored then, its client gets its answer when there is room, and no finished step is run again."""
    disk = FullDisk(tmp_path / "requests.db")
    large = {name: b"x" * (500_000 if name == phase else 5) for name in ("begin", "step", "finish")}
    waiting = Waiting()
    calls: list[str] = []

    def handler(request: Request) -> bytes:
        request.step("first", calls.append, "first")
        waiting(request)
        request.step("large", lambda: large["step"])
        return large["finish"]

    with (
        Server(ANY_PORT, handler, deadline=LONG, context=context, journal=disk, max_attempts=1) as server,
        Client(str(server.endpoint), context=context, retries=10_000) as client,
    ):
        disk.is_full = phase == "begin"
        asked = gevent.spawn(client.request, large["begin"])
        wait_until(lambda: calls or disk.is_full)
        disk.is_full = True
        waiting.event.set()
        wait_until(lambda: client.stats.retries >= 2)
        assert server.stats.journal is not None
        assert server.stats.journal.failures >= 2
        disk.is_full = False
        assert asked.get() == large["finish"]
        wait_until(lambda: server.healthy)
    assert calls == ["first"]


# A journal that does not come back.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at what takes long are milliseconds apart."""
    monkeypatch.setattr("greensafe.journal._stall.LOOK", MS)
    monkeypatch.setattr("greensafe.server.storing.LOOK", MS)


def _patient(site: Site, seconds: float) -> None:
    """Have requests wait for the journal for so long: a busy machine may take its time to store what is to run."""
    watchdog = site.server._watchdog
    assert isinstance(watchdog, Journaled)
    watchdog._storing.patience = seconds


@pytest.mark.usefixtures("quick")
def test_a_stalled_journal_holds_no_deadline(build: Build) -> None:
    """The client is told that it is over, and that nobody knows whether that is stored; it may ask again, and is told."""

    def handler(request: Request) -> None:
        site.disk.gate.clear()
        gevent.sleep(LONG)

    site = build(handler, deadline=20 * MS, grace=20 * MS)
    _patient(site, LONG)
    site.peer.ask()
    assert site.peer.error() == (Kind.INTERRUPTED, "DEADLINE_EXCEEDED", "DeadlineExceeded")
    assert site.journal.released == 1
    site.disk.gate.set()
    wait_until(lambda: not site.journal.pending)
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "DEADLINE_EXCEEDED", "DeadlineExceeded")
    assert site.runs == [("body", 1)]
    assert site.server.stats.failures == {"DEADLINE_EXCEEDED": 2}


@pytest.mark.usefixtures("quick")
def test_an_answer_that_is_not_stored_in_time(build: Build) -> None:
    """It leaves as what is true of it, and is there when the client asks again."""

    def handler(request: Request) -> bytes:
        site.disk.gate.clear()
        return b"done"

    site = build(handler, deadline=20 * MS, grace=20 * MS)
    _patient(site, LONG)
    site.peer.ask()
    assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError")
    assert (site.server.stats.inflight, site.server.stats.running) == (0, 0)
    site.disk.gate.set()
    site.peer.ask(age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"done")
    assert site.runs == [("body", 1)]


@pytest.mark.parametrize("phase", ["request", "answer"])
def test_stored_while_the_hub_was_blocked(build: Build, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody could see in time was in time: the first look after a pause of the server's own judges nothing."""
    monkeypatch.setattr("greensafe.journal._stall.LOOK", 50 * MS)
    sleep = gevent.monkey.get_original("time", "sleep")

    def handler(request: Request) -> bytes:
        if phase == "answer":
            site.disk.gate.clear()
        return b"done"

    site = build(handler)
    if phase == "request":
        site.disk.gate.clear()
    site.peer.ask()
    wait_until(lambda: not site.disk.gate.is_set() and site.server._commits.queue.batch)
    storing = site.server._watchdog._storing
    (exchange,) = [*storing.requests.values()] + [held for held, _ in storing.held.values()]
    exchange.memory.at = monotonic()
    count = len(site.disk.seen)
    site.disk.gate.set()
    while len(site.disk.seen) == count:
        sleep(MS)
    sleep(200 * MS)
    assert site.peer.hear() == (Kind.REPLY, b"done")
    assert site.journal.released == 0


@pytest.mark.usefixtures("quick")
def test_a_request_that_is_not_stored_in_time_is_not_run(build: Build) -> None:
    """Its client is told after the handler's limit and the grace; sent again, it is new."""
    site = build(_echo, grace=20 * MS, resume="abort")
    _patient(site, 20 * MS)
    site.disk.gate.clear()
    site.peer.ask(1)
    wait_until(lambda: site.server._commits.queue.batch)
    site.peer.ask(2)
    for _ in range(2):
        assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError")
    assert (site.journal.pending, site.journal.withdrawn) == (1, 1)
    _patient(site, LONG)
    site.peer.ask(1, age_ms=50)
    wait_until(lambda: site.journal.pending == 2)
    site.disk.gate.set()
    assert site.peer.hear()[1] == b"re: body"
    assert site.runs == [("body", 1)]
    assert site.disk.kinds(2) == []


@pytest.mark.usefixtures("quick")
def test_without_a_deadline_a_stall_ends_the_waits(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests, steps and answers: each is told what is true of it, and the server is not healthy until it is over."""
    monkeypatch.setattr("greensafe.journal._stall.LIMIT", LONG)
    monkeypatch.setattr("greensafe.journal._stall.LOOKS", 2)
    go = Waiting()

    def handler(request: Request) -> bytes:
        go(request)
        return request.step("a", lambda: b"x") if request.body == b"step" else b"plain"

    site = build(handler, deadline=None)
    site.peer.ask(1, b"step")
    site.peer.ask(2, b"answer")
    wait_until(lambda: len(site.runs) == 2 and not site.journal.pending)
    site.disk.gate.clear()
    go.event.set()
    site.peer.ask(3, b"request")
    wait_until(lambda: site.journal.pending == 3 and any(isinstance(each, (Step, Finish)) for each in site.disk.at_gate))
    assert site.server.healthy
    monkeypatch.setattr("greensafe.journal._stall.LIMIT", 0.0)
    heard = sorted(site.peer.error() for _ in range(3))
    assert heard == [
        (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError"),
        (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError"),
        (Kind.INTERRUPTED, "UNAVAILABLE", "JournalError"),
    ]
    assert (site.server.healthy, site.server.stats.inflight) == (False, 0)
    assert site.journal.oldest_seconds > 0
    site.peer.ask(4)
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError")
    monkeypatch.setattr("greensafe.journal._stall.LIMIT", LONG)
    site.disk.gate.set()
    wait_until(lambda: site.server.healthy)
    site.peer.ask(4)
    assert site.peer.hear() == (Kind.REPLY, b"plain")


@pytest.mark.usefixtures("quick")
def test_stopped_in_a_stall_it_was_no_attempt_in_vain(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it has not ended with its process is stored as soon as the journal is back, whatever stalls meanwhile."""
    monkeypatch.setattr("greensafe.journal._stall.LIMIT", LONG)
    monkeypatch.setattr("greensafe.journal._stall.LOOKS", 2)
    waiting = Waiting()
    site = build(waiting, deadline=None, max_attempts=1)
    site.peer.ask(1)
    wait_until(lambda: site.runs and not site.journal.pending)
    site.disk.gate.clear()
    site.peer.ask(2)
    wait_until(lambda: any(each.request_id == _id(2) for each in site.disk.at_gate))
    monkeypatch.setattr("greensafe.journal._stall.LIMIT", 0.0)
    assert site.peer.error() == (Kind.REJECTED, "RESOURCE_EXHAUSTED", "JournalError")
    commits = site.server._commits
    site.server.close()
    assert site.peer.error() == (Kind.INTERRUPTED, "UNAVAILABLE", "ServerStopped")
    monkeypatch.setattr("greensafe.journal._stall.LIMIT", LONG)
    site.disk.gate.set()
    wait_until(lambda: commits.join(MS))
    site.server.start()
    waiting.event.set()
    site.peer = site.connect()
    site.peer.ask(1, age_ms=5)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert [attempt for _, attempt in site.runs] == [1, 2]


@pytest.mark.usefixtures("quick")
def test_an_effect_that_does_not_end_keeps_nobody(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither others, nor its own client beyond the deadline, nor a stop beyond its limit."""
    monkeypatch.setattr("greensafe.server.server.FLUSH", MS)
    over = Native()

    def handler(request: Request) -> bytes:
        if request.body == b"effect":
            request.step("e", in_transaction(lambda connection: over.wait(LONG)))
        return b"fine"

    site = build(handler, deadline=20 * MS, grace=20 * MS)
    _patient(site, LONG)
    try:
        site.peer.ask(1, b"effect")
        wait_until(lambda: site.server._commits.queue.under_way())
        _patient(site, 20 * MS)
        site.peer.ask(2)
        heard = {site.peer.error()[:2] for _ in range(2)}
        assert heard == {(Kind.INTERRUPTED, "DEADLINE_EXCEEDED"), (Kind.REJECTED, "RESOURCE_EXHAUSTED")}
        site.server.stop(MS)
        assert site.server.closed
    finally:
        over.set()
    wait_until(lambda: not Path(f"{site.disk.path}.lock").exists())


@pytest.mark.parametrize("is_in_batch", [True, False])
def test_an_effect_that_has_not_begun_at_the_deadline_is_not_done(build: Build, is_in_batch: bool) -> None:
    """Its request is over: nobody would be told what it has done. It may be in the batch, or wait for the next one."""
    calls: list[str] = []
    go = Waiting()

    def handler(request: Request) -> bytes:
        go(request)
        request.step("e", in_transaction(lambda connection: calls.append(request.id)))
        return b"done"

    site = build(handler)
    site.peer.ask(1)
    wait_until(lambda: site.runs and not site.server._commits._worker.is_busy)
    site.disk.gate.clear()
    if not is_in_batch:
        site.peer.ask(2)
        wait_until(lambda: site.server._commits.queue.batch)
    go.event.set()
    wait_until(lambda: site.journal.pending == (1 if is_in_batch else 2))
    wait_until(lambda: site.server._commits.queue.batch)
    site.peer.tell(Kind.CANCEL, 1)
    watchdog = site.server._watchdog
    assert watchdog is not None
    wait_until(lambda: watchdog.responder.running == (0 if is_in_batch else 1))
    assert site.journal.withdrawn == (0 if is_in_batch else 1)
    site.disk.gate.set()
    assert site.peer.error()[:2] == (Kind.ERROR, "CANCELLED")
    assert [write for write in site.disk.seen if type(write).__name__ == "Step"] == []
    if not is_in_batch:
        assert site.peer.hear()[0] == Kind.REPLY
    assert calls == [_id(2).hex()] * (not is_in_batch)


# What is over before it is stored, and whose turn it is.


def test_a_flood_of_cancelled_requests_costs_no_write(build: Build) -> None:
    """What is cancelled before its batch begins leaves no trace, and nobody waits for it."""
    site = build(_echo, max_inflight=20)
    site.disk.gate.clear()
    site.peer.ask(1)
    wait_until(lambda: site.server._commits.queue.batch)
    for number in range(2, 102):
        site.peer.ask(number)
        site.peer.tell(Kind.CANCEL, number)
    other = site.connect()
    other.ask(200)
    wait_until(lambda: site.server.stats.cancelled == 100 and site.server.stats.inflight == 2)
    assert (site.journal.pending, site.journal.withdrawn) == (2, 100)
    site.disk.gate.set()
    assert other.hear() == (Kind.REPLY, b"re: body")
    assert {write.request_id for write in site.disk.seen} == {_id(1), _id(200)}


def test_a_vanished_clients_requests_leave_the_queue(build: Build) -> None:
    """With cancel_vanished: also those that wait for their turn to be written."""
    site = build(_echo, cancel_vanished=True)
    site.disk.gate.clear()
    site.peer.ask(1)
    wait_until(lambda: site.server._commits.queue.batch)
    other = site.connect()
    for number in range(2, 12):
        other.ask(number)
    wait_until(lambda: site.journal.pending == 11)
    other.sock.close(0)
    wait_until(lambda: site.journal.pending == 1)
    assert site.journal.withdrawn == 10
    site.disk.gate.set()
    assert site.peer.hear() == (Kind.REPLY, b"re: body")


def test_clients_take_turns_in_the_queue(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sends much does not put it before everybody else's, and what waits is bounded."""
    monkeypatch.setattr("greensafe.server.storing.AT_ONCE", 3)
    monkeypatch.setattr("greensafe.server.storing._weigh", lambda exchange: 1)
    site = build(_echo)
    site.disk.gate.clear()
    site.peer.ask(1)
    wait_until(lambda: site.server._commits.queue.batch)
    for number in range(2, 12):
        site.peer.ask(number)
    wait_until(lambda: site.server.stats.inflight == 11)
    assert site.journal.pending == 4
    other = site.connect()
    other.ask(50)
    wait_until(lambda: site.server.stats.inflight == 12)
    site.disk.gate.set()
    assert other.hear() == (Kind.REPLY, b"re: body")
    assert sorted(site.peer.hear()[0] for _ in range(11)) == [Kind.REPLY] * 11
    begun = [int.from_bytes(write.request_id, "big") for write in site.disk.seen if type(write).__name__ == "Begin"]
    assert begun[:4] == [1, 2, 3, 4]
    assert 50 in begun[4:7]
    assert sorted(begun) == [*range(1, 12), 50]


def test_what_waits_in_turn_is_no_younger_for_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times count from when it came: its caller's limit does not grow by what it has waited."""
    monkeypatch.setattr("greensafe.server.storing.AT_ONCE", 1)
    site = build(_echo)
    site.disk.gate.clear()
    for number in (1, 2, 3):
        site.peer.ask(number, limit_ms=10**6)
    wait_until(lambda: site.server.stats.inflight == 3 and site.server._commits.queue.batch)
    now = site.disk.now()
    gevent.sleep(20 * MS)
    site.disk.gate.set()
    assert [site.peer.hear()[0] for _ in range(3)] == [Kind.REPLY] * 3
    (last,) = [write for write in site.disk.seen if isinstance(write, Begin) and write.request_id == _id(3)]
    assert last.since <= now
    assert last.until is not None
    assert last.until <= now + 1000


def test_what_is_over_in_turn_is_not_written(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled, or behind others that are: those who wait in turn come to the journal although no batch is taken."""
    monkeypatch.setattr("greensafe.server.storing.AT_ONCE", 1)
    monkeypatch.setattr("greensafe.server.storing._weigh", lambda exchange: 1)
    site = build(_echo)
    site.disk.gate.clear()
    for number in (1, 2, 3, 4):
        site.peer.ask(number)
    wait_until(lambda: site.server.stats.inflight == 4 and site.server._commits.queue.batch)
    site.peer.tell(Kind.CANCEL, 3)
    assert site.peer.error() == (Kind.ERROR, "CANCELLED", "Cancelled")
    site.peer.tell(Kind.CANCEL, 2)
    assert site.peer.error() == (Kind.ERROR, "CANCELLED", "Cancelled")
    wait_until(lambda: site.journal.pending == 2)
    site.disk.gate.set()
    assert [site.peer.hear()[0] for _ in range(2)] == [Kind.REPLY] * 2
    assert [site.disk.kinds(number)[:1] for number in (1, 2, 3, 4)] == [["Begin"], [], [], ["Begin"]]


def test_nothing_more_is_read_when_the_queue_is_full(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients feel it, as with requests whose turn to run has not come; then all of it is answered."""
    monkeypatch.setattr("greensafe.server.storing.AT_ONCE", 1)
    monkeypatch.setattr("greensafe.server.backlog.BACKLOG", 5)
    site = build(_echo)
    site.disk.gate.clear()
    for number in range(1, 30):
        site.peer.ask(number)
    watchdog = site.server._watchdog
    assert watchdog is not None
    wait_until(lambda: watchdog.is_full)
    gevent.sleep(5 * MS)
    assert site.server.stats.received < 29
    site.disk.gate.set()
    assert [site.peer.hear()[0] for _ in range(29)] == [Kind.REPLY] * 29
    assert not watchdog.is_full


def test_stopped_while_requests_wait_in_turn(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused, and nothing of them is stored."""
    monkeypatch.setattr("greensafe.server.storing.AT_ONCE", 1)
    monkeypatch.setattr("greensafe.server.server.FLUSH", MS)
    site = build(_echo)
    site.disk.gate.clear()
    for number in range(1, 5):
        site.peer.ask(number)
    wait_until(lambda: site.server.stats.inflight == 4)
    site.server.close()
    assert [site.peer.error()[:2] for _ in range(4)] == [(Kind.REJECTED, "UNAVAILABLE")] * 4
    site.disk.gate.set()
    wait_until(lambda: not Path(f"{site.disk.path}.lock").exists())
    assert {write.request_id for write in site.disk.seen} <= {_id(1)}


# What can never be stored.


def _tight(site: Site) -> None:
    """Have sqlite store nothing that is larger than 10,000 bytes, on this connection."""
    site.disk._ready().setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)


@pytest.mark.parametrize("name", ["half \ud800", "\udfff"])
def test_a_steps_name_that_is_no_text(build: Build, context: zmq.Context, name: str) -> None:
    """ValueError before its function is called, with a journal and without; the request is answered for good."""
    calls: list[None] = []

    def handler(request: Request) -> None:
        request.step(name, calls.append, None)

    site = build(handler)
    for age in (0, 5):
        site.peer.ask(age_ms=age)
        assert site.peer.error() == (Kind.ERROR, "INTERNAL", "ValueError")
    assert len(site.runs) == 1
    with (
        Server(ANY_PORT, handler, deadline=LONG, context=context) as server,
        Client(server.endpoint, context=context) as client,
        pytest.raises(RemoteError, match="surrogate"),
    ):
        client.request(b"x")
    assert calls == []
    assert site.server.healthy


def test_a_steps_result_that_can_never_be_stored(build: Build) -> None:
    """The handler gets a ValueError, others are not affected, and let out it is the answer: nothing runs again."""
    caught: list[BaseException] = []

    def handler(request: Request) -> bytes:
        if request.body != b"large":
            return b"fine"
        try:
            return request.step("a", lambda: bytes(20_000))
        except ValueError as error:
            caught.append(error)
            raise

    site = build(handler)
    _tight(site)
    site.peer.ask(1, b"large")
    assert site.peer.error() == (Kind.ERROR, "INTERNAL", "Unstorable")
    assert site.server.healthy
    site.peer.ask(1, b"large", age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "INTERNAL", "Unstorable")
    site.restart()
    site.peer.ask(1, b"large", age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "INTERNAL", "Unstorable")
    assert site.runs == [("large", 1)]
    assert [isinstance(error, JournalError) for error in caught] == [True]


def test_an_effect_whose_result_can_never_be_stored_is_undone(build: Build) -> None:
    """As one whose own constraint rolls everything back: its handler is told, for good, and its record is not there."""

    def large(connection: Any) -> bytes:
        connection.execute("INSERT INTO mine VALUES (1)")
        return bytes(20_000)

    def broken(connection: Any) -> None:
        connection.execute("INSERT OR ROLLBACK INTO mine VALUES (NULL)")

    site = build(lambda request: request.step("e", in_transaction({b"large": large, b"broken": broken}[request.body])))
    site.disk._ready().execute("CREATE TABLE mine (a INTEGER NOT NULL)")
    _tight(site)
    for number, body in enumerate((b"large", b"broken"), 1):
        for age in (0, 5):
            site.peer.ask(number, body, age_ms=age)
            assert site.peer.error() == (Kind.ERROR, "INTERNAL", "Unstorable")
    assert len(site.runs) == 2
    assert site.disk._ready().execute("SELECT count(*) FROM mine").fetchone() == (0,)


def test_a_request_that_can_never_be_stored(build: Build) -> None:
    """It is not run, and its client is told that trying again is no use; the server is well."""
    site = build(_echo)
    _tight(site)
    for number in (1, 1, 2):
        site.peer.ask(number, bytes(20_000))
        assert site.peer.error() == (Kind.ERROR, "INVALID_ARGUMENT", "Unstorable")
    site.peer.ask(3)
    assert site.peer.hear() == (Kind.REPLY, b"re: body")
    assert (site.runs, site.server.healthy, site.server.stats.inflight) == ([("body", 1)], True, 0)


def test_an_answer_that_can_never_be_stored(build: Build) -> None:
    """The handler has run, once: that it can never be stored is the answer that is kept."""
    site = build(lambda request: bytes(20_000))
    _tight(site)
    site.peer.ask()
    assert site.peer.error() == (Kind.ERROR, "INTERNAL", "Unstorable")
    site.peer.ask(age_ms=5)
    assert site.peer.error() == (Kind.ERROR, "INTERNAL", "Unstorable")
    assert len(site.runs) == 1
    assert site.server.healthy


def test_what_a_codec_encodes_is_stored_as_bytes(build: Build) -> None:
    """And decoded from bytes, in the first run too. A view that is not contiguous would fail as a fault of the journal's."""

    class Views(Hex):
        def encode(self, value: Any) -> Any:
            return memoryview(super().encode(value))

    site = build(lambda request: request.step("a", lambda: b"x"), step_codec=Views())
    site.peer.ask()
    assert site.peer.hear() == (Kind.REPLY, b"x")
    assert [type(write.value) for write in site.disk.seen if isinstance(write, Step)] == [bytes]


def test_an_error_whose_text_is_none_is_kept(build: Build) -> None:
    """What a handler says with half of a surrogate pair in it arrives, and is the stored answer as any other."""

    def handler(request: Request) -> None:
        raise ValueError("half \ud800")

    site = build(handler)
    for age in (0, 5):
        site.peer.ask(age_ms=age)
        kind, body = site.peer.hear()
        error = RemoteError.from_reply(body)
        assert error is not None
        assert (kind, error.code, error.message) == (Kind.ERROR, "INTERNAL", "half \ud800")
    assert len(site.runs) == 1
