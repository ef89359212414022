"""How does a request outlive the server that runs it?

A `Journaled` watchdog stores each request before its handler runs, each finished step's result before the handler goes on, and
the answer before it leaves. Only what comes with an id can come again: requests of plain clients are served as without journal.

    arrived -> its turn -> Begin stored -> handler runs -> answer given -> Finish stored -> answer leaves -> Ack
                           or known: see `sansio.resume`   (held: nothing leaves)

Rules:

* Until its Begin is stored a request waits like one whose turn has not come: it can expire, be cancelled or refused, and leaves
  no trace (`Forget`).
* The same request again joins the one that is open here. If that is answered already but its handler has not ended, and the
  answer was none to be kept, the next run waits for that end: a request never runs twice at a time. A handler that has survived
  its kill is not waited for: the client is told RESOURCE_EXHAUSTED.
* An answer that cannot be stored does not leave: its client is told UNAVAILABLE. That, and what else is not kept
  (`sansio.resume.is_kept`), leaves as INTERRUPTED, and the request stays open; so does an answer to nobody, whose client has
  vanished and may come back for more.
* An attempt that ends as INTERRUPTED, or before it was run, or whose handler has returned LATER, was not in vain (`Excuse`):
  only those count that have ended with their process.
* What waits for the journal for too long does not wait any longer (see `storing`): a request is refused, an answer leaves as
  INTERRUPTED. What can never be stored is answered for good.

It does not know how things are stored, nor when the client sends again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from ..errors import JournalError, RemoteError, Unstorable
from ..hub.interruptions import is_interruption
from ..journal.base import Journal
from ..journal.commits import Commits
from ..journal.steps import InTransaction
from ..sansio.envelope import Header, Kind
from ..sansio.exchange import Exchange
from ..sansio.records import Ack, Excuse, Finish, Forget, Known, Rerun
from ..sansio.resume import Refuse, Replay, Run, decide, is_kept
from ..stats import JournalStats
from .request import LATER, Request
from .stepping import Steps
from .storing import NOT_STORED, Memory, Storing, too_late, unstorable
from .watchdog import TURN, Watchdog

__all__ = ["Journaled"]

#: What a client is told whose request cannot be run again as long as its last run does not end. (Not UNAVAILABLE: of a rejected
#: request that says that the server is about to stop.)
_SURVIVED = RemoteError("RESOURCE_EXHAUSTED", "this request's last run has survived a kill and goes on", "HandlerStuck")

#: What a client is told when the journal fails. Why is for the log: it names the file, and what is wrong with the disk.
_ANSWER_NOT_STORED = RemoteError("UNAVAILABLE", "the answer could not be stored", "JournalError")

#: Writes that may wait for the disk before acknowledgements are left out: the answers then stay in the journal for longer.
ACKS = 10_000


class Journaled(Watchdog):
    """A Watchdog whose requests outlive it.

    Args:
        journal: Open. Its `commits` write to it.
        resume, max_attempts: See `sansio.resume.decide`.

    Attributes:
        replayed: Requests answered with what was stored.
        rerun: Requests that were begun again.
    """

    def __init__(self, *args: Any, journal: Journal, commits: Commits, resume: str, max_attempts: int, **options: Any) -> None:
        super().__init__(*args, journal=journal.id, **options)
        self._journal = journal
        self._commits = commits
        commits.on_look = self._see_to_late
        commits.on_interrupted = self._find_lost
        self._storing = Storing(journal, commits, self._on_begun, self._on_room, limit=options["limit"], grace=options["grace"])
        self._steps = Steps(commits, self._codec)
        self._resume = resume
        self._max_attempts = max_attempts
        self._beginning = self._storing.requests
        self._ready: deque[Exchange] = deque()
        #: Whose handler runs, by id; and who waits for its end.
        self._active: dict[bytes, Exchange] = {}
        self._after: dict[bytes, Exchange] = {}
        self.replayed = 0
        self.rerun = 0

    @property
    def stats(self) -> JournalStats:
        """How it stands now."""
        commits = self._commits
        return JournalStats(
            commits=commits.count,
            pending=commits.pending,
            failures=commits.failures,
            error="" if commits.error is None else str(commits.error),
            joined=self.responder.joined,
            replayed=self.replayed,
            rerun=self.rerun,
            dropped=dict(self._journal.dropped),
            oldest_seconds=commits.oldest_seconds,
            withdrawn=commits.queue.withdrawn,
            released=self._storing.released,
        )

    @property
    def is_full(self) -> bool:
        """Whether no more should be accepted for the time being."""
        return self._kept.is_full or (self._commits.on_room is not None and self._storing.is_full)

    def running(self) -> set[bytes]:
        """The ids of all requests that are open here, or whose handlers run."""
        return {*self.responder.open_ids(), *self._active}

    def _is_placed(self, key: int) -> bool:
        return self._storing.is_placed(key) or super()._is_placed(key)

    def _find_lost(self) -> None:
        super()._find_lost()
        for exchange in list(self._owed.values()):
            if exchange.is_answered and not exchange.is_delivered and exchange.key not in self._storing.held:
                exchange.is_held = False
                error = _ANSWER_NOT_STORED  # it may be, and then it is what the client gets when it asks again
                self._leave(exchange, [error.to_reply()], Kind.INTERRUPTED, error, self._send)

    # Before the handler runs.

    def _start(self, exchange: Exchange) -> None:
        header = exchange.envelope.header
        if not isinstance(header, Header):
            super()._start(exchange)
            return
        memory: Memory | None = exchange.memory
        if memory is not None and memory.is_begun:
            self._run_now(exchange)  # it is stored, and was interrupted on its way to its handler
            return
        self._storing.begin(exchange, header)

    def _take(self, key: int) -> Exchange | None:
        return super()._take(key) or self._storing.take(key)

    def _see_to_late(self) -> None:
        """The journal takes long: those whose time is over do not wait for it any more."""
        for exchange in self._storing.overdue_requests():
            self._guarded(self._drop, exchange, too_late())
        for exchange, error in self._storing.overdue_answers():
            self._guarded(self._release, exchange, error)

    def _refuse_unstored(self, exchange: Exchange, error: JournalError) -> None:
        """It could not be stored, and was not run. The client is not told the journal's path, nor what is wrong with it."""
        self._lines.not_stored(exchange, "it was not run: it", error)
        self._guarded(self._drop, exchange, NOT_STORED)

    def _on_begun(self, exchange: Exchange, known: Known | None, error: JournalError | None) -> None:
        exchange.memory.at = math.inf
        if exchange.key not in self._beginning:
            return  # over since this turn began
        if isinstance(error, Unstorable):
            self._lines.not_stored(exchange, "it was not run: it", error)
            self._guarded(self._refuse, exchange, unstorable("the request", "INVALID_ARGUMENT"))
        elif error is not None:
            self._refuse_unstored(exchange, error)
        elif known is None:
            self._run_stored(exchange)
        else:
            self._guarded(self._go_on, exchange, known)

    def _refuse(self, exchange: Exchange, error: RemoteError) -> None:
        """Answer a request that is not run, for good."""
        self._beginning.pop(exchange.key, None)
        try:
            self.fail(exchange, error)
        finally:
            self.finish(exchange)

    def _go_on(self, exchange: Exchange, known: Known) -> None:
        """What was stored before decides."""
        action = decide(known, self._resume, self._max_attempts)
        if isinstance(action, Run):
            self._again(exchange, known, action)
            return
        self._beginning.pop(exchange.key, None)
        try:
            if isinstance(action, Replay):
                self.replayed += 1
                error = RemoteError.from_reply(action.body[0], is_error=True) if action.kind == Kind.ERROR else None
                self._answer_now(exchange, action.body, Kind(action.kind), error)
            else:
                assert isinstance(action, Refuse)
                exchange.memory.is_begun = action.is_final
                self.fail(exchange, action.error)
        finally:
            self.finish(exchange)

    def _again(self, exchange: Exchange, known: Known, run: Run) -> None:
        if known.until is not None:
            self.responder.limit(exchange, monotonic() + known.until - self._journal.now())
            self._rearm()
            if exchange.at is not None and exchange.at <= monotonic():
                return  # the timer answers it
        request_id = _id(exchange)
        if (active := self._active.get(request_id)) is not None:
            if active.kills > 1:
                self._drop(exchange, _SURVIVED)
            else:
                self._after[request_id] = exchange
            return
        exchange.memory.attempt = run.attempt
        exchange.memory.steps = dict(run.steps)
        self.rerun += 1
        exchange.memory.at = monotonic() + self._storing.patience
        exchange.memory.number = self._commits.write(
            Rerun(request_id), lambda _, error: self._on_rerun(exchange, error), Excuse(request_id)
        )

    def _on_rerun(self, exchange: Exchange, error: JournalError | None) -> None:
        exchange.memory.at = math.inf
        if exchange.key not in self._beginning:
            return
        if error is not None:
            self._refuse_unstored(exchange, error)
        else:
            self._run_stored(exchange)

    def _run_stored(self, exchange: Exchange) -> None:
        memory: Memory = exchange.memory
        memory.is_begun = memory.is_counted = True
        if self._spent > TURN:
            self._ready.append(exchange)
            self._start_next_turn()
        else:
            self._run_now(exchange)

    def _run_now(self, exchange: Exchange) -> None:
        if exchange.is_running and not exchange.is_answered:
            self._active[exchange.memory.request_id] = exchange
            self._beginning.pop(exchange.key, None)
            super()._start(exchange)

    def _start_kept(self) -> None:
        self._spent = 0.0
        while self._ready and self._spent <= TURN:
            self._run_now(self._ready.popleft())
        super()._start_kept()
        if self._ready:
            self._start_next_turn()

    # While it runs.

    def step(self, exchange: Exchange, name: str, fn: Callable[..., Any] | InTransaction, args: tuple[Any, ...]) -> Any:
        if exchange.memory is None and not isinstance(fn, InTransaction):
            return super().step(exchange, name, fn, args)
        return self._steps.run(exchange, name, fn, args)

    # Its answer.

    def answer(
        self, exchange: Exchange, body: Sequence[bytes], kind: Kind = Kind.REPLY, error: RemoteError | None = None
    ) -> None:
        memory: Memory | None = exchange.memory
        if memory is not None and memory.is_begun and not memory.is_vanished and is_kept(error):
            self._keep(exchange, body, kind, error)
        elif isinstance(exchange.envelope.header, Header):
            if memory is not None and (memory.is_vanished or (memory.is_begun and not is_kept(error))):
                kind = Kind.INTERRUPTED
            self._answer_now(exchange, body, kind, error)
        else:
            super().answer(exchange, body, kind, error)

    def _returned(self, exchange: Exchange, request: Request, result: object) -> None:
        super()._returned(exchange, request, result)
        if result is LATER and exchange.memory is not None and not exchange.is_answered:
            self._excuse_run(exchange)

    def _reply(self, exchange: Exchange, frames: Sequence[bytes]) -> None:
        if exchange.memory is None:
            super()._reply(exchange, frames)
        else:
            self.answer(exchange, frames)

    def _keep(self, exchange: Exchange, body: Sequence[bytes], kind: Kind, error: RemoteError | None) -> None:
        self.responder.seal(exchange)
        try:
            self._hand_over(exchange, body, kind, error)
        except BaseException as interruption:
            if is_interruption(interruption):
                self._hand_over(exchange, body, kind, error)  # of two the second one finds that it has been stored
            raise

    def _hand_over(self, exchange: Exchange, body: Sequence[bytes], kind: Kind, error: RemoteError | None) -> None:
        self._storing.hold(exchange, error)
        self._commits.write(
            Finish(exchange.memory.request_id, kind, body), lambda _, failed: self._on_kept(exchange, body, kind, error, failed)
        )

    def _on_kept(
        self,
        exchange: Exchange,
        body: Sequence[bytes],
        kind: Kind,
        error: RemoteError | None,
        failed: JournalError | None,
    ) -> None:
        if isinstance(failed, Unstorable) and (error is None or error.type != "Unstorable"):
            # The handler has run, and would do so at each retry.
            self._lines.not_stored(exchange, "its answer", failed)
            told = unstorable("the answer", "INTERNAL")
            instead = [told.to_reply()]
            self._commits.write(
                Finish(_id(exchange), Kind.ERROR, instead),
                lambda _, failed: self._on_kept(exchange, instead, Kind.ERROR, told, failed),
            )
            return
        held = self._storing.held
        if exchange.key not in held:
            return  # it has left by another answer
        del held[exchange.key]  # neither this nor the next line is a call
        exchange.is_held = False
        if failed is not None:
            self._lines.not_stored(exchange, "its answer", failed)
            error = _ANSWER_NOT_STORED
            body, kind = [error.to_reply()], Kind.INTERRUPTED
        self._leave(exchange, body, kind, error, self._send_soon)

    def _release(self, exchange: Exchange, error: RemoteError) -> None:
        """Its client does not wait any longer for an answer that is not stored."""
        if self._storing.held.pop(exchange.key, None) is None:
            return
        exchange.is_held = False
        self._storing.released += 1
        self._leave(exchange, [error.to_reply()], Kind.INTERRUPTED, error, self._send)

    def _answer_now(self, exchange: Exchange, body: Sequence[bytes], kind: Kind, error: RemoteError | None) -> None:
        self.responder.seal(exchange)
        self._leave(exchange, body, kind, error, self._send)

    def _leave(
        self,
        exchange: Exchange,
        body: Sequence[bytes],
        kind: Kind,
        error: RemoteError | None,
        send: Callable[[list[bytes]], None],
    ) -> None:
        if exchange.memory is not None and (kind is Kind.INTERRUPTED or not exchange.memory.is_begun):
            self._excuse_run(exchange)
        frames = None
        try:
            frames = self.responder.deliver(exchange, body, kind)
            send(frames)
            for frames in self.responder.copies(exchange, body, kind):
                send(frames)
        except BaseException as interruption:
            if is_interruption(interruption):
                self._see_sent(exchange, body, kind, frames)
            raise
        finally:
            self._count(exchange, error)

    def _excuse_run(self, exchange: Exchange) -> None:
        """Once for a run, and only if there was one: what its predecessors have ended with is not forgotten."""
        if exchange.memory.is_counted:
            exchange.memory.is_counted = False
            # Nobody waits for it, so it stays whatever is wrong with the disk. What asks for this request stands behind it.
            self._commits.write(Excuse(_id(exchange)), is_soon=True)

    def _on_acked(self, request_id: bytes) -> None:
        if self._commits.pending < ACKS:
            self._commits.write(Ack(request_id))

    # Its end.

    def finish(self, exchange: Exchange) -> None:
        try:
            super().finish(exchange)
        finally:
            if exchange.memory is not None and self._active.get(request_id := exchange.memory.request_id) is exchange:
                del self._active[request_id]
                after = self._after.pop(request_id, None)
                if after is not None and self._beginning.pop(after.key, None) is not None:
                    self._start(after)

    def _on_zombie(self, exchange: Exchange) -> None:
        super()._on_zombie(exchange)
        if exchange.memory is not None and self._active.get(_id(exchange)) is exchange:
            after = self._after.pop(_id(exchange), None)
            if after is not None and self._beginning.get(after.key) is after:
                self._guarded(self._drop, after, _SURVIVED)

    def cancel_from(self, routing_id: bytes) -> None:
        for exchange in self._owed.values():
            if exchange.memory is not None and exchange.envelope.route[0] == routing_id:
                exchange.memory.is_vanished = True
        super().cancel_from(routing_id)

    def abort_all(self, error: RemoteError) -> None:
        for exchange in list(self._beginning.values()):
            memory: Memory = exchange.memory
            if memory.is_begun and memory.attempt == 1:
                # Stored, and its turn has not come: it is new to the next server.
                memory.is_begun = memory.is_counted = False
                self._commits.write(Forget(_id(exchange)))
            self._guarded(self._drop, exchange, error)
        super().abort_all(error)


def _id(exchange: Exchange) -> bytes:
    header = exchange.envelope.header
    assert isinstance(header, Header)
    return header.request_id
