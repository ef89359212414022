"""How does a program serve requests so that no client is ever stuck?

`Server` owns a ROUTER. Each request that arrives runs in a greenlet of its own and is answered exactly once. (For a socket
that the caller owns see `supervision`.)

Rules:

* Nothing here waits for a handler, a client or a full pipe: the pump's callbacks and the watchdog's timer do all the work.
* `max_inflight` requests run at a time. The next ones are read all the same, so that their clients hear that they are not
  forgotten, and kept; when much is kept nothing is read any more and clients feel backpressure.
* When a loop of its own fails (see `restarts`) too often it closes, and serve_forever raises the error.
* Signal handlers are installed by `serve` and `serve_forever` only, in the main thread, and put back.

It does not know what a request is about, nor how the watchdog decides.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from time import monotonic
from types import TracebackType
from typing import Any, Self

import gevent
import zmq
from gevent.event import Event
from gevent.hub import Hub

from ..deadlines import preemptible, shield, to_seconds
from ..errors import RemoteError
from ..green.context import Context, check_context, close_first, plain_socket
from ..hooks import Hooks, HubBlocked, ServerStarted, ServerStopped, teller
from ..hub.forks import generation
from ..hub.log_limiter import write
from ..hub.threads import LIMIT, begin_in, call_in, check_here, is_elsewhere, is_in_hub, wait_while
from ..journal.base import Journal
from ..journal.commits import Commits
from ..journal.steps import Codec
from ..loops.hubwatch import HubWatch, Wish, watch
from ..loops.preemption import check_preempt
from ..loops.restarts import Restarts
from ..sansio.envelope import SERVER_STOPPED
from ..sansio.weights import MAX_FRAMES, check_max_frames
from ..stats import ServerStats
from ..transport.binding import Binding
from ..transport.endpoints import check_endpoint
from ..transport.inlet import LOST_FIRST
from ..transport.pump import Pump
from . import systemd
from .descriptors import DescriptorWatch
from .durability import Journaled
from .options import Handler, OnError, check_handler, check_journal, check_limits, check_options, check_resume, check_watch
from .signals import signals
from .stopping import Stop
from .vanished import Vanished
from .watchdog import Watchdog

__all__ = ["Server", "serve"]

log = logging.getLogger("greensafe.server")

#: Messages of one connection that libzmq keeps unread, unless the Context says otherwise; by itself it keeps 1000. They are not
#: weighed: one of 100,000 empty frames takes 6.4 MB. Fewer cost no time; see docs/design.md, "What is kept".
UNREAD = 32

#: Seconds that answers still queued in libzmq may take to leave after a server was stopped.
FLUSH = 1.0

#: Seconds that stop() waits by default for the handlers that still run.
STOP_TIMEOUT = 5.0

#: Seconds that a server which stops reads on, for clients that have asked before they heard of it.
LAST_REQUESTS = 0.05


class Server:
    """A server for REQ, DEALER and greensafe clients.

    Args:
        endpoint: Where to bind, for instance "tcp://127.0.0.1:5555"; port 0 or * takes a free one.
        handler: Called with each Request in a greenlet of its own; returns the answer (see Request).
        deadline: Seconds that a handler has before its client is answered DEADLINE_EXCEEDED; None, in writing, for no limit.
        grace: Seconds between the deadline and the kill.
        max_inflight: Requests handled at a time; those beyond it wait, clients in turn, up to 10,000 or 64 MiB in all; then
            nothing is read and clients feel backpressure.
        max_frames: Frames of one message, its envelope included. A client that sends more is answered INVALID_ARGUMENT.
        overload: "wait", or "reject": those beyond max_inflight are answered RESOURCE_EXHAUSTED at once, and not run.
        on_error: Called with (request, error) before an error is sent; returns what the client is told instead: a RemoteError
            for clients of either kind, bytes or frames for plain clients only, or None for the error as it is. It is often
            called in the hub, where it cannot wait. See "Errors" in docs/protocol.md.
        tell_errors: Clients are told the text of exceptions that handlers let out. False: only the class's name and the
            request's id, under which the log has the rest. A RemoteError of the handler's own is told in any case.
        blocked_after: Seconds without a turn of the hub after which what runs is logged; None for never.
        exit_when_blocked: The same, after which the process ends itself with code 70, for its supervisor to restart it.
        preempt: Experimental: end overdue handlers that do not wait, by an exception at whatever they do just then. Main thread
            only; takes SIGUSR2, which also interrupts system calls.
        max_zombies: Handlers that may have survived a kill before the server is no longer healthy. With max_inflight more of
            them it runs nothing: requests are answered UNAVAILABLE, so that zombies are bounded.
        cancel_vanished: Stop the handlers of a client whose connection is gone (tcp and ipc; behind a proxy, the proxy's).
        hooks: A function, or several, called with a record of each thing that happens; see `hooks`. They must not wait.
        journal: Where requests, steps and answers are kept, so that the next server goes on where this one has left off: a
            path, for a file of sqlite, or a Journal. See docs/journal.md.
        resume: What becomes of a request that the last server was interrupted at, when it is sent again: "rerun" or "abort"
            (ABORTED).
        max_attempts: How often such a request may end with its process without a step that is new; then it is ABORTED.
        step_codec: Has encode and decode for the results of steps; by default bytes and JSON.
        takeover: Take an ipc path over from a server that listens there, for a rolling restart: who connects from now on comes
            here, the other one keeps its clients until it ends. Other endpoints cannot be taken over: EADDRINUSE.
        handover: Whether a connection that announces a routing id takes the place of the one that has it; if not it is never
            read. For peers with a ROUTING_ID of their own that come back before their old connection is known to be dead. What
            is owed to the old connection goes to the new one: any peer can take over any other's answers, and a plain REQ that
            gave up a request may take its answer for the next one's. See docs/security.md.
        context: The Context to use; by default the shared one.

    Raises:
        TypeError, ValueError: An argument is not usable; the text says which.
    """

    def __init__(
        self,
        endpoint: str,
        handler: Handler,
        *,
        deadline: Any,
        grace: Any = 1.0,
        max_inflight: int = 1000,
        max_frames: int = MAX_FRAMES,
        overload: str = "wait",
        on_error: OnError | None = None,
        tell_errors: bool = True,
        blocked_after: Any = 1.0,
        exit_when_blocked: Any = None,
        preempt: bool = False,
        max_zombies: int = 100,
        cancel_vanished: bool = False,
        hooks: Hooks | None = None,
        journal: str | os.PathLike[str] | Journal | None = None,
        resume: str = "rerun",
        max_attempts: int = 3,
        step_codec: Codec | None = None,
        takeover: bool = False,
        handover: bool = False,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        check_handler(handler)
        check_options(max_inflight, on_error)
        check_context(context)
        self._max_frames = check_max_frames(max_frames)
        if overload not in ("wait", "reject"):
            raise ValueError(f'overload is "wait" or "reject", not {overload!r}')
        check_resume(resume, max_attempts, step_codec)
        self._journal = check_journal(journal)
        self._resume, self._max_attempts, self._codec = resume, max_attempts, step_codec
        self._commits: Commits | None = None
        self._bind_to = check_endpoint(endpoint)
        self._handler = handler
        self._limit, self._grace = check_limits(deadline, grace)
        self._blocked_after, self._exit_when_blocked = check_watch(blocked_after, exit_when_blocked, max_zombies)
        self._preempts = bool(preempt)
        self._max_zombies = max_zombies
        self._max_inflight = max_inflight
        self._rejects = overload == "reject"
        self._on_error = on_error
        self._tells_errors = bool(tell_errors)
        self._cancel_vanished = bool(cancel_vanished)
        self._takeover = bool(takeover)
        self._handover = bool(handover)
        self._vanished: Vanished | None = None
        self._tell = teller(hooks)
        self._context = context
        self._generation = generation()
        #: Of the thread in which it was started last.
        self._hub: Hub | None = None
        self._pump: Pump | None = None
        self._watchdog: Watchdog | None = None
        self._watch: tuple[HubWatch, Wish] | None = None
        self._descriptors: DescriptorWatch | None = None
        self._systemd: systemd.Notifier | None = None
        self._restarts = Restarts(self._bind_to, self._give_up, self._tell)
        self._undelivered = (0, 0)
        self._unsaid = 0
        self._stopped = Event()
        self._stopped.set()
        self._stopping = False
        self._stop: Stop | None = None
        self._binding = Binding()
        self.endpoint: str | None = None

    @property
    def started(self) -> bool:
        """Whether it is bound and reads requests."""
        return self._pump is not None and not self._stopping

    @property
    def closed(self) -> bool:
        """Whether it has no socket: not started yet, or stopped."""
        return self._pump is None

    @property
    def state(self) -> str:
        """One of "started", "stopping", "closed" and "failed": closed because a loop of its own had failed too often."""
        if self._pump is None:
            return "closed" if self._restarts.error is None else "failed"
        return "stopping" if self._stopping else "started"

    @property
    def stats(self) -> ServerStats:
        """How it stands now, counted since the last start. In another thread this waits for a turn of the server's hub."""
        self._forget_parent()
        if self._hub is not None and self._is_open_elsewhere:
            return call_in(self._hub, "Server.stats", lambda: self.stats)
        watchdog, pump, error = self._watchdog, self._pump, self._restarts.error
        hub = None if self._watch is None else self._watch[0]
        endpoint = self.endpoint or self._bind_to
        if watchdog is None:
            return ServerStats(endpoint, self.state)
        counts = watchdog.responder
        dropped, unreachable = self._undelivered if pump is None else (pump.outbox.dropped, pump.outbox.unreachable)
        return ServerStats(
            endpoint=endpoint,
            state=self.state,
            is_healthy=self.healthy,
            is_accepting=self._is_accepting,
            received=counts.received,
            answered=counts.answered,
            failures=dict(watchdog.failures),
            cancelled=counts.cancelled,
            inflight=counts.inflight,
            running=watchdog.load,
            backlog=watchdog.backlog,
            oldest_seconds=watchdog.oldest_seconds,
            zombie_count=counts.zombies,
            zombies=watchdog.zombies(),
            unsent=0 if pump is None else len(pump.outbox),
            drops={
                "malformed": counts.malformed,
                "ignored": counts.ignored,
                "duplicates": counts.duplicates,
                "unreachable": unreachable,
                "full_outbox": dropped,
                "unsaid": self._unsaid if pump is None else pump.outbox.unsaid,
                "misdirected": counts.misdirected,
                "forgotten": counts.forgotten,
            },
            journal=watchdog.stats if isinstance(watchdog, Journaled) and pump is not None else None,
            restarts=dict(self._restarts.counts),
            loop_error="" if error is None else f"{type(error).__name__}: {error}",
            hub_lag_seconds=None if hub is None else hub.late,
            worst_hub_lag_seconds=None if hub is None else hub.longest,
            hub_blocked=0 if hub is None else hub.blocked,
        )

    @property
    def full(self) -> bool:
        """Whether max_inflight is reached: what comes now waits for its turn, or is rejected."""
        return self._watchdog is not None and self._watchdog.load >= self._max_inflight

    @property
    def healthy(self) -> bool:
        """Whether it can do its work.

        Its loops work, no more than max_zombies handlers have survived a kill, the journal can be written and answers, its ipc
        path still leads to it, and a descriptor is left for the next client.
        """
        commits = self._commits  # another thread may ask while it stops
        if self._restarts.error is not None or (commits is not None and not commits.is_well):
            return False
        if not self._is_accepting or self._binding.trouble:
            return False
        return self._watchdog is None or self._watchdog.responder.zombies <= self._max_zombies

    def start(self) -> None:
        """Bind and begin to serve, in this thread's hub, to which it belongs from now on; returns at once.

        Does nothing if started already.

        Raises:
            zmq.ZMQError: The endpoint cannot be bound (in use, malformed, no such transport, no descriptor left); a note says
                what to try, and nothing is left behind.
            JournalError: The journal cannot be opened; nothing is left behind.
            RuntimeError: It is stopping: wait for `stop` to return. Or another thread has started it: stop it first. Or
                preempt=True cannot work here.
        """
        self._forget_parent()
        if self._stopping:
            raise RuntimeError("the server is stopping: start it again when stop() has returned")
        if self._hub is not None and not self.closed:
            check_here(self._hub, "Server.start", "another thread has started this server; stop() it first, from any thread")
        if self._pump is not None:
            return
        self._hub = gevent.get_hub()
        if self._preempts:
            check_preempt()
        if self._journal is None:
            self._open()
            return
        if self._commits is not None:
            raise RuntimeError("the server is starting: another greenlet has called start()")
        self._commits = Commits(self._journal, self._running)
        try:
            self._commits.open()
            self._open()
        except BaseException:
            self._close_journal()
            raise

    def _open(self) -> None:
        context = self._context or Context.instance()
        sock = plain_socket(context, zmq.ROUTER)
        self._binding = Binding()
        try:
            sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
            sock.setsockopt(zmq.ROUTER_HANDOVER, int(self._handover))
            if zmq.RCVHWM not in context.sockopts:
                sock.setsockopt(zmq.RCVHWM, UNREAD)
            self._binding.bind(sock, self._bind_to, sock.bind, takes_over=self._takeover)
            self.endpoint = sock.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
        except BaseException:
            self._binding.close(sock)
            sock.close(0)
            raise
        try:
            self._begin(context, sock)
        except BaseException:  # no memory, or no descriptor for the monitor
            self._undo(sock)
            raise
        write(log, logging.INFO, "serving at %s", self.endpoint, extra={"endpoint": self.endpoint})
        if self._tell is not None:
            self._tell(ServerStarted(str(self.endpoint)))

    def _begin(self, context: zmq.Context[Any], sock: zmq.Socket[Any]) -> None:
        """Serve by a socket that is bound."""
        assert self.endpoint is not None
        self._socket = sock
        self._stopped.clear()
        self._restarts = restarts = Restarts(self.endpoint, self._give_up, self._tell)
        self._pump = Pump(
            sock,
            self._on_message,
            self.close,
            on_failure=lambda error, go_on: restarts.failed("pump", error, go_on),
            on_torn=self._on_torn,
            most_frames=self._max_frames,
            on_interrupted=self._on_interrupted,
        )
        close_first(context, self)
        options: dict[str, Any] = {
            "send_soon": self._pump.send_soon,
            "send_if_read": self._pump.send_if_read,
            "max_frames": self._max_frames,
            "has_taken": self._pump.outbox.has_taken,
            "limit": self._limit,
            "grace": self._grace,
            "max_inflight": self._max_inflight,
            "max_zombies": self._max_zombies,
            "rejects": self._rejects,
            "instance": os.urandom(16),
            "on_error": self._on_error,
            "tell_errors": self._tells_errors,
            "on_room": self._on_room,
            "endpoint": self.endpoint,
            "tell": self._tell,
            "codec": self._codec,
            "restarts": restarts,
        }
        if self._journal is None or self._commits is None:
            self._watchdog = Watchdog(self._handler, self._pump.send, **options)
        else:
            options |= {"journal": self._journal, "commits": self._commits}
            options |= {"resume": self._resume, "max_attempts": self._max_attempts}
            self._watchdog = Journaled(self._handler, self._pump.send, **options)
        if self._preempts:
            self._watchdog.scope = preemptible
        self._watch = self._watch_hub(self._watchdog)
        if self._cancel_vanished:
            self._vanished = Vanished(sock, self._watchdog.cancel_from)
        if not self._bind_to.startswith("inproc:"):
            self._descriptors = DescriptorWatch(self.endpoint, self._tell, is_ipc=self._bind_to.startswith("ipc:"))
        self._pump.start()

    def _undo(self, sock: zmq.Socket[Any]) -> None:
        """Have nothing left of a start that has failed halfway; nothing was read."""
        pump, self._pump = self._pump, None
        self._watch_no_more()
        self._binding.close(sock)
        if pump is None:
            sock.close(0)
        else:
            pump.close(0)
        self._restarts.close()
        self._stopped.set()

    def stop(self, timeout: Any = STOP_TIMEOUT) -> None:
        """Finish what was received, then close.

        Greensafe clients are told at once, and send what they ask from then on elsewhere, if they have somewhere else, or to
        whoever is there next. What is not answered after `timeout` seconds is answered UNAVAILABLE: handlers that run are
        killed, requests that have arrived but were not run are refused. Called again (from a second signal, say) with a smaller
        timeout it ends the first call's wait. When it returns the address is free, for any process, and the server can be
        started again. Whatever is thrown into the caller meanwhile ends the wait, and the server is closed all the same.

        In one of this server's own handlers, and in the hub (where handlers of `signal.signal` may run), it begins all that and
        returns at once: the handler can answer, and `state` is "stopping" until the end.

        In another thread this waits until the server's thread has done it; who ends that wait does not end the stop. In that
        other thread's hub it only has it begun, and returns at once.

        Raises:
            TypeError, ValueError: The timeout is none.
            RuntimeError: In another thread: the server's hub has had no turn (see `threads.call_in`); nothing has changed.
        """
        limit = to_seconds(timeout)
        self._forget_parent()
        if self._hub is not None and self._is_open_elsewhere:
            self._stop_elsewhere(self._hub, limit)
            return
        is_hub = is_in_hub()
        if self._pump is None:
            if not is_hub and not self._is_over:
                self._stopped.wait()  # closed in the hub, perhaps: then its journal is not, yet
            self._wait_for_address(is_hub)
            return
        if is_hub and limit == 0:
            self._close()
            return
        stop = self._begin_stop(limit)
        assert self._watchdog is not None
        if stop is not None and not is_hub and not self._watchdog.is_handler(gevent.getcurrent()):
            stop.join()
            self._wait_for_address(is_hub)

    def _begin_stop(self, limit: float | None) -> Stop | None:
        if self._pump is None:
            return None
        self._stopping = True
        if self._stop is None:
            self._stop = Stop(_Run(self, self._pump), 0.0 if self._bind_to.startswith("inproc:") else LAST_REQUESTS)
        self._stop.end_by(math.inf if limit is None else monotonic() + limit)
        return self._stop

    def _stop_elsewhere(self, hub: Hub, limit: float | None) -> None:
        """Have it stopped in its own thread, which may end as soon as it is."""
        if is_in_hub():
            begin_in(hub, self._begin_stop, limit)
            return
        call_in(hub, "Server.stop", self._begin_stop, limit)
        if not wait_while(lambda: not self._is_over, hub, math.inf if limit is None else limit + LIMIT):
            raise RuntimeError("the server was told to stop, and then its thread has ended, or its hub did not turn any more")
        self._wait_for_address(False)

    def close(self) -> None:
        """Stop at once: what has arrived and is not answered is answered UNAVAILABLE.

        In one of this server's own handlers it returns before that: what the handler answers without waiting still leaves.
        """
        self.stop(0)

    def serve_forever(self, stop_timeout: Any = STOP_TIMEOUT) -> None:
        """Start, and return when the server was stopped, by `stop` or by SIGTERM or SIGINT.

        In the main thread the two signals stop it with `stop_timeout`, a second one at once. systemd is told,
        where there is one that asks (see `systemd`).

        Raises:
            TypeError, ValueError: The timeout is none; it is not started.
            RuntimeError: Another thread has started it; see also `start`.
            Exception: A loop of its own has failed too often, with this error, and the server is closed; see `restarts`.
        """
        to_seconds(stop_timeout)  # not when a signal comes
        self.start()
        restarts = self._restarts
        with signals(lambda: self.stop(stop_timeout), self.close), self._told():
            try:
                self._stopped.wait()
            finally:
                with shield():
                    self.stop(stop_timeout)
        if restarts.error is not None:
            raise restarts.error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        if self._watchdog is None:
            return f"<Server {self.state} {self._bind_to}>"
        counts = self._watchdog.responder
        return (
            f"<Server {self.state} {self.endpoint or self._bind_to} inflight={counts.inflight} answered={counts.answered}"
            f" cancelled={counts.cancelled} zombies={counts.zombies} malformed={counts.malformed}>"
        )

    @property
    def _is_over(self) -> bool:
        """Whether it is closed, and its journal as well; also while it starts, when there is nothing to stop yet."""
        return self._pump is None and self._stopped.is_set()

    @property
    def _is_open_elsewhere(self) -> bool:
        """Whether it runs, or ends, in another thread."""
        return not self._is_over and is_elsewhere(self._hub)

    @property
    def _is_accepting(self) -> bool:
        descriptors = self._descriptors
        return descriptors is None or not descriptors.is_exhausted

    def _running(self) -> set[bytes]:
        return self._watchdog.running() if isinstance(self._watchdog, Journaled) else set()

    def _close_journal(self) -> None:
        """Have all stored and the journal given free for the next server; later, in the hub, where nobody can wait."""
        commits, self._commits = self._commits, None
        if commits is None:
            return
        commits.close()  # if it is not
        if gevent.getcurrent() is not gevent.get_hub() and not commits.join(FLUSH):
            text = "the journal is not closed yet: its disk takes long"
            write(log, logging.WARNING, text, extra={"endpoint": self.endpoint})

    def _on_message(self, frames: list[bytes]) -> None:
        assert self._watchdog is not None and self._pump is not None
        if self._vanished is not None:
            self._vanished.note(frames[0], self._pump.inbox.source)
        self._watchdog.accept(frames)
        if self._watchdog.is_full:
            self._pump.inbox.is_paused = True

    def _on_torn(self, frames: list[bytes], why: str) -> None:
        if self._watchdog is None:
            return
        client = self._watchdog.responder.sender_of(frames) if why == LOST_FIRST else None
        if client is not None:
            self._on_message([client, *frames])  # nothing else of it is missing
        else:
            self._watchdog.refuse_torn([] if why == LOST_FIRST else frames, why)

    def _on_interrupted(self, frames: list[bytes]) -> None:
        if self._watchdog is not None:
            self._watchdog.recover(frames)

    def _on_room(self) -> None:
        if self._watchdog is None or self._pump is None:
            return  # a handler that has outlived its server
        if self._pump.inbox.is_paused and not self._watchdog.is_full:
            self._pump.resume()
        if self._stop is not None and not self._watchdog.load and not self._watchdog.backlog:
            self._stop.wake()

    def _give_up(self, error: Exception) -> None:
        """A loop has failed too often. Not closed here: this may be in the middle of a send."""
        gevent.spawn(self.close)

    def _watch_hub(self, watchdog: Watchdog) -> tuple[HubWatch, Wish] | None:
        after, exit_after = (math.inf if limit is None else limit for limit in (self._blocked_after, self._exit_when_blocked))
        if not self._preempts and after == exit_after == math.inf:
            return None
        restarts, tell, endpoint = self._restarts, self._tell, str(self.endpoint)
        wish = Wish(
            after,
            exit_after,
            soonest=(lambda: watchdog.soonest) if self._preempts else None,
            on_blocked=None if tell is None else lambda late, stack: tell(HubBlocked(endpoint, late, stack)),
            on_failure=lambda error, pause: restarts.note("hubwatch", error, pause),
        )
        return watch(wish), wish

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell systemd while inside."""
        with systemd.notifier(lambda: self.healthy, self._restarts.run) as self._systemd:
            try:
                yield
            finally:
                self._systemd = None

    def _forget_parent(self) -> None:
        """In a forked child, the running server is the parent's: here it is one that was not started yet."""
        if self._generation != generation():
            self._generation = generation()
            self._pump = self._watchdog = self._vanished = self._watch = self._systemd = self._commits = self.endpoint = None
            self._descriptors = self._hub = None
            self._binding = Binding()
            self._restarts = Restarts(self._bind_to, self._give_up, self._tell)
            self._stopping = False
            self._stop = None
            self._stopped.set()

    def _wait_for_address(self, is_hub: bool) -> None:
        """Wait until libzmq has closed the listener: then the address is free for whoever is next, in any process."""
        if not is_hub and not self._binding.wait():
            text = "%s is not free yet: libzmq's I/O thread is busy, or stopped"
            write(log, logging.WARNING, text, self.endpoint, extra={"endpoint": self.endpoint})

    def _close(self) -> None:
        self._forget_parent()
        pump, watchdog = self._pump, self._watchdog
        if pump is None or watchdog is None:
            return
        self._pump = None  # a hook that closes it once more does nothing
        self._stopping = True  # nor can one start it before the end
        try:
            self._give_back(pump, watchdog)
        finally:  # whatever fails: others wait for the end
            if self._commits is None:
                self._be_stopped()
            else:
                gevent.spawn(self._close_journal).rawlink(self._be_stopped)

    def _give_back(self, pump: Pump, watchdog: Watchdog) -> None:
        """Answer what is owed, and give back all that this run has."""
        stopped = RemoteError("UNAVAILABLE", "the server is stopping", SERVER_STOPPED)
        before = watchdog.failures.get(stopped.code, 0)
        watchdog.abort_all(stopped)
        if self._commits is not None:
            self._commits.close()  # who waits for it is told now, while that can still be sent
        run = self._restarts.run  # a pump that has failed does not keep this from its end
        run("pump", lambda: pump.refuse(lambda frames: watchdog.refuse(frames, stopped)))
        if not pump.outbox.dropped and not watchdog.responder.inflight:  # else a request may have been run that has no answer
            run("pump", watchdog.tell_closed)
        run("pump", pump.flush)
        self._watch_no_more()
        self._binding.close(self._socket)
        unread = len(pump.outbox)
        self._undelivered = (pump.outbox.dropped + unread, pump.outbox.unreachable)
        self._unsaid = pump.outbox.unsaid
        pump.close(int(FLUSH * 1000))
        self._restarts.close()
        watchdog.close()
        answered, endpoint = watchdog.responder.answered, str(self.endpoint)
        refused = watchdog.failures.get(stopped.code, 0) - before
        level = logging.WARNING if refused or unread else logging.INFO
        text = "stopped at %s; %d requests were answered, the last %d of them UNAVAILABLE, and %d messages were not read"
        write(log, level, text, endpoint, answered, refused, unread, extra={"endpoint": endpoint})
        if self._tell is not None:
            self._tell(ServerStopped(endpoint, answered))

    def _watch_no_more(self) -> None:
        if self._watch is not None:
            found, wish = self._watch
            found.remove(wish)
            self._watch = None
        if self._vanished is not None:
            self._vanished.close()
            self._vanished = None
        if self._descriptors is not None:
            self._descriptors.close()
            self._descriptors = None

    def _be_stopped(self, _: object = None) -> None:
        self._stopping = False
        stop, self._stop = self._stop, None
        self._stopped.set()
        if stop is not None:
            stop.end()


class _Run:
    """One run of a server, between a start and its end, as its `Stop` sees it."""

    def __init__(self, server: Server, pump: Pump) -> None:
        self._server = server
        self._pump = pump

    def drain(self) -> None:
        server = self._server
        if server._watchdog is not None:
            # Not unbound first: that would end the connections it accepted, and their answers with them.
            server._watchdog.drain()
        if server._systemd is not None:
            server._systemd.stopping()

    def is_open(self) -> bool:
        return self._server._pump is self._pump and not self._pump.is_inherited

    def is_busy(self) -> bool:
        watchdog, pump = self._server._watchdog, self._pump
        return watchdog is not None and (watchdog.load > 0 or watchdog.backlog > 0 or len(pump.outbox) > 0 or pump.has_input)

    def flush(self) -> None:
        if self._server._commits is not None:
            self._server._commits.flush(FLUSH)  # answers that wait for it, and no longer

    def close(self) -> None:
        self._server._close()


def serve(endpoint: str, handler: Handler, *, deadline: Any, **options: Any) -> None:
    """Serve until SIGTERM, SIGINT or an exception; blocks. See Server for the arguments."""
    Server(endpoint, handler, deadline=deadline, **options).serve_forever()
