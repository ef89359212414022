"""How is a REP or ROUTER that the caller owns put under the watchdog?

`supervise` runs a handler per request until the socket is closed; `supervised` is the same for a program's own `while` loop.
What the seed calls resetting the socket is here: the pending request is answered with an error, which puts a REP back into
its receiving state. (Closing and binding again would lose the requests of every other client that are queued.)

A REP keeps the envelope to itself, so the watchdog is shown a made-up one, which is taken off again before sending (see
`answers`). What is counted of a socket stays with it (see `tally`).
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import gevent
import zmq
from gevent.event import Event

from ..deadlines import DeadlineSignal
from ..errors import RemoteError
from ..green._waits import Waiter
from ..green.socket import Socket
from ..hooks import Hooks, ServerStarted, ServerStopped, teller
from ..loops.restarts import Restarts
from ..sansio.exchange import Exchange
from ..sansio.weights import MAX_FRAMES, check_max_frames
from ..stats import ServerStats
from .answers import Sender, SocketWatchdog, has_sent
from .descriptors import DescriptorWatch
from .log_lines import Lines
from .options import Handler, OnError, check_handler, check_limits, check_options
from .reports import started
from .request import Request
from .tally import Tally, tally_of
from .watchdog import Watchdog

__all__ = ["stats_of", "supervise", "supervised"]

#: What stands for a REP's client whose address libzmq does not tell.
NO_ADDRESS = b"REP"


def supervise(
    sock: Socket,
    handler: Handler,
    *,
    deadline: Any,
    grace: Any = 1.0,
    max_inflight: int = 1000,
    max_frames: int = MAX_FRAMES,
    on_error: OnError | None = None,
    tell_errors: bool = True,
    hooks: Hooks | None = None,
) -> None:
    """Serve a REP or ROUTER that the caller owns; returns when it is closed.

    A REP handles one request at a time, a ROUTER up to `max_inflight`. When the caller leaves early (a kill, a deadline),
    what is unanswered is answered UNAVAILABLE and the socket is left open, ready to receive. Handlers that still run when
    this ends are killed, also if it ends because the socket was closed.

    Args:
        sock: A bound or connected greensafe REP or ROUTER; nobody else may receive from it meanwhile.
        handler, deadline, grace, max_frames, on_error, tell_errors, hooks: As for Server. `stats_of` has the counts.
        max_inflight: For a ROUTER: requests handled at a time; see Server.

    Raises:
        TypeError, ValueError: An argument is not usable.
        zmq.ZMQError: The socket cannot receive, for instance EFSM if a request was read from the REP before.
        Exception: A loop of the watchdog's has failed too often, with this error; see `restarts`.
    """
    _check_socket(sock)
    check_handler(handler)
    limit, after = check_limits(deadline, grace)
    check_options(max_inflight, on_error)
    check_max_frames(max_frames)
    room, lines = Event(), _lines_of(sock)
    tell = teller(hooks, lines.seldom)
    is_rep = sock.type == zmq.REP
    # Held weakly: a killed greenlet keeps its traceback, and that this frame, so it would keep itself, and the socket.
    hub, caller = gevent.get_hub(), weakref.ref(gevent.getcurrent())
    ending: list[Any] = []
    tally, endpoint = tally_of(sock), _name_of(sock)
    restarts = Restarts(endpoint, lambda error: ending.append(hub.loop.run_callback(_throw, caller, error)), tell)
    sender = Sender(sock, tally, lines, room.set)
    watchdog = SocketWatchdog(
        handler,
        sender,
        send_if_read=sender.send_if_read,
        limit=limit,
        grace=after,
        max_inflight=max_inflight,
        max_frames=max_frames,
        instance=tally.instance,
        on_error=on_error,
        tell_errors=tell_errors,
        lines=lines,
        on_room=room.set,
        endpoint=endpoint,
        tell=tell,
        restarts=restarts,
    )
    stopped = RemoteError("UNAVAILABLE", "the server is stopping", "ServerStopped")
    descriptors = DescriptorWatch(endpoint, tell, is_ipc=endpoint.startswith("ipc:"))
    tally.begin(endpoint, watchdog, restarts, descriptors)
    before = watchdog.responder.answered
    try:
        if tell is not None:
            tell(ServerStarted(endpoint))
        while not sock.closed:
            frames = _receive(sock)
            if frames is None:
                return
            _accept(watchdog, frames, stopped)
            while not sock.closed and (watchdog.responder.inflight if is_rep else watchdog.is_full):
                _wait_for_room(sock, room)
    finally:
        descriptors.close()
        restarts.close()
        for callback in ending:
            callback.stop()  # the caller is elsewhere soon
        watchdog.abort_all(stopped)
        watchdog.close()
        lines.flush()
        tally.end(watchdog)
        if tell is not None:
            tell(ServerStopped(endpoint, watchdog.responder.answered - before))


def stats_of(sock: Socket) -> ServerStats:
    """Return how a socket under `supervise` or `supervised` stands now, in the words of `Server.stats`.

    All counts begin when the socket is supervised for the first time. `state` is "started" while `supervise` runs or a block of
    `supervised` receives or handles a request, else "closed", or "failed" if `supervise` has ended because a loop of its own
    had failed too often. Call it in the socket's own thread; the socket may be closed, or never have been supervised.

    Raises:
        TypeError: It is no greensafe REP or ROUTER.
    """
    _check_socket(sock)
    return tally_of(sock).stats()


def _throw(caller: weakref.ref[Any], error: Exception) -> None:
    greenlet = caller()
    if greenlet is not None:
        greenlet.throw(error)


def _accept(watchdog: Watchdog, frames: list[bytes], stopped: RemoteError) -> None:
    """Have the handler started in the hub; whoever is interrupted before that has the request refused."""
    starting = gevent.get_hub().loop.run_callback(watchdog.accept, frames)
    try:
        gevent.sleep(0)
    finally:
        if starting.pending:
            starting.stop()
            watchdog.refuse(frames, stopped)


def _wait_for_room(sock: Socket, room: Event) -> None:
    """Wait until a request is over or the socket is closed."""
    room.clear()
    waiter = Waiter(room.set, 0)  # no event of the socket wakes it, but its end does
    sock._waits.add(sock, waiter)
    try:
        room.wait()
    finally:
        waiter.asleep = False
        sock._waits.remove(waiter)


class supervised:
    """Receive one request on entry, answer it on any exit; for a program's own loop.

        while True:
            with supervised(rep_socket, deadline=30) as request:
                rep_socket.send(work(request.body))

    Inside, answer with the socket's own send (REP) or with `request.reply`. If the block ends without an answer the client
    gets an error: INTERNAL, or DEADLINE_EXCEEDED as soon as the deadline has come. An Exception is logged and ends here, so
    that the loop goes on; SystemExit, KeyboardInterrupt, GreenletExit and other people's timeouts are passed on after the
    client was answered.

    Args:
        sock: A greensafe REP or ROUTER.
        deadline: Seconds from the request's arrival until it is answered DEADLINE_EXCEEDED and the block gets the signal;
            None, in writing, for no limit. The block runs in the caller's greenlet, so it is never killed.
        max_frames, on_error, tell_errors, hooks: As for Server; no record says that a server was started or stopped.
            `stats_of` has the counts.
    """

    def __init__(
        self,
        sock: Socket,
        *,
        deadline: Any,
        max_frames: int = MAX_FRAMES,
        on_error: OnError | None = None,
        tell_errors: bool = True,
        hooks: Hooks | None = None,
    ) -> None:
        _check_socket(sock)
        self._limit, self._grace = check_limits(deadline, 1.0)
        check_options(1, on_error)
        self._max_frames = check_max_frames(max_frames)
        self._sock = sock
        self._on_error = on_error
        self._tell_errors = tell_errors
        self._tell = (
            None if hooks is None else teller(hooks, _lines_of(sock).seldom)
        )  # else each block would begin to count anew
        self._watchdog: Watchdog | None = None
        self._exchange: Exchange | None = None

    def __enter__(self) -> Request:
        if self._watchdog is not None:
            raise RuntimeError("a supervised block watches one request: make a new one inside of it")
        self._tally = tally = tally_of(self._sock)
        lines = _lines_of(self._sock)
        self._endpoint = tally.endpoint or _name_of(self._sock)  # to ask libzmq costs 2 % of a block
        self._restarts = Restarts(self._endpoint, lambda error: None, self._tell)
        sender = Sender(self._sock, tally, lines)
        self._watchdog = watchdog = SocketWatchdog(
            _no_handler,
            sender,
            send_if_read=sender.send_if_read,
            limit=self._limit,
            grace=self._grace,
            max_frames=self._max_frames,
            instance=tally.instance,
            reads_on=False,
            on_error=self._on_error,
            tell_errors=self._tell_errors,
            lines=lines,
            endpoint=self._endpoint,
            tell=self._tell,
            restarts=self._restarts,
        )
        tally.begin(self._endpoint, watchdog, self._restarts)
        try:
            self._exchange = exchange = self._next(watchdog, tally)
            return Request(watchdog, exchange, exchange.owner)
        except BaseException:
            self._end(watchdog)
            raise

    def _next(self, watchdog: Watchdog, tally: Tally) -> Exchange:
        """The next request that is worth running; what else arrives is dealt with."""
        while True:
            frames = _receive(self._sock)
            if frames is None:
                raise zmq.ZMQError(zmq.ENOTSOCK)
            tally.renumber(watchdog)
            exchange = watchdog.open(frames)
            if exchange is None:
                continue
            if exchange.is_answered:
                watchdog.finish(exchange)  # overdue when it came
            elif self._begin(watchdog, exchange):
                return exchange

    def _begin(self, watchdog: Watchdog, exchange: Exchange) -> bool:
        """Watch over a request. False: its deadline has come in a hook, and it is answered."""
        try:
            watchdog.begin(exchange)
            watchdog.greet(exchange)
            exchange.owner.attach(gevent.getcurrent())
            if self._tell is not None:
                self._tell(started(self._endpoint, exchange))
        except BaseException as error:  # nobody else would answer: the block is not entered
            exchange.owner.detach()
            self._answer(watchdog, exchange, error)
            if _is_signal_of(exchange, error):
                return False
            raise
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        watchdog, exchange = self._watchdog, self._exchange
        assert watchdog is not None
        assert exchange is not None
        exchange.owner.detach()
        try:
            self._answer(watchdog, exchange, error)
        finally:
            self._end(watchdog)
        return error is not None and (isinstance(error, Exception) or _is_signal_of(exchange, error))

    def _end(self, watchdog: Watchdog) -> None:
        self._restarts.close()
        watchdog.close()
        self._tally.end(watchdog)
        self._watchdog = self._exchange = None

    def _answer(self, watchdog: Watchdog, exchange: Exchange, error: BaseException | None) -> None:
        try:
            if not exchange.is_answered and has_sent(self._sock):
                watchdog.note_answered(exchange)
        finally:
            try:
                if error is not None:
                    watchdog.raised(exchange, error)
            finally:
                watchdog.finish(exchange)


def _is_signal_of(exchange: Exchange, error: BaseException | None) -> bool:
    return isinstance(error, DeadlineSignal) and error.scope is exchange.owner


def _name_of(sock: Socket) -> str:
    """What records and log lines call this socket: where it was bound or connected last."""
    return sock._endpoint() or repr(sock)


def _lines_of(sock: Socket) -> Lines:
    """What logs about this socket's requests: the same for all its `supervised` blocks, or each would begin to count anew."""
    lines: Lines | None = sock.__dict__.get("_lines")
    if lines is None:
        lines = sock.__dict__["_lines"] = Lines(_name_of(sock))
    return lines


def _no_handler(request: Request) -> None:
    raise AssertionError("supervised runs its block, not a handler")


def _check_socket(sock: object) -> None:
    if not isinstance(sock, Socket):
        raise TypeError(
            f"a greensafe socket is needed (greensafe.Context().socket(...)), not {type(sock).__module__}.{type(sock).__name__}"
        )
    if sock.type not in (zmq.REP, zmq.ROUTER):
        raise TypeError(f"a REP or ROUTER can be supervised, not {sock!r}")


def _receive(sock: Socket) -> list[bytes] | None:
    """The next request as a ROUTER receives it, None when the socket is closed."""
    try:
        if sock.type == zmq.ROUTER:
            return sock.recv_multipart(timeout=None)
        frames = sock.recv_multipart(timeout=None, copy=False)
    except zmq.ZMQError as error:
        if error.errno in (zmq.ENOTSOCK, zmq.ETERM):
            return None
        raise
    return [_address_in(frames[0]), b"", *[frame.bytes for frame in frames]]


def _address_in(frame: zmq.Frame) -> bytes:
    """Where a message has come from, as far as libzmq tells: by tcp a number without the port, by ipc user and process."""
    try:
        return str(frame.get("Peer-Address")).encode()
    except zmq.ZMQError:  # inproc
        return NO_ADDRESS
