"""How is a REP or ROUTER that the caller owns put under the watchdog?

`supervise` runs a handler per request until the socket is closed; `supervised` is the same for a program's own `while` loop.
What the seed calls resetting the socket is here: the pending request is answered with an error, which puts a REP back into
its receiving state. (Closing and binding again would lose the requests of every other client that are queued.)

A REP keeps the envelope to itself, so the watchdog is shown a made-up one, which is taken off again before sending.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import gevent
import zmq
from gevent.event import Event

from .deadlines import DeadlineSignal
from .descriptors import DescriptorWatch
from .errors import RemoteError
from .green._waits import Waiter
from .green.socket import Socket
from .lines import Lines
from .options import Handler, OnError, check_handler, check_limits, check_options
from .request import Request
from .restarts import Restarts
from .watchdog import Watchdog

__all__ = ["supervise", "supervised"]

log = logging.getLogger(__name__)

#: What stands for the envelope that a REP keeps: a routing id and the delimiter.
_REP_ROUTE = [b"REP", b""]

#: Seconds that an answer waits for a ROUTER's client whose pipe is full before it is dropped.
FULL_PEER = 30.0


def supervise(
    sock: Socket,
    handler: Handler,
    *,
    deadline: Any,
    grace: Any = 1.0,
    max_inflight: int = 1000,
    on_error: OnError | None = None,
    tell_errors: bool = True,
) -> None:
    """Serve a REP or ROUTER that the caller owns; returns when it is closed.

    A REP handles one request at a time, a ROUTER up to `max_inflight`. When the caller leaves early (a kill, a deadline),
    what is unanswered is answered UNAVAILABLE and the socket is left open, ready to receive. Handlers that still run when
    this ends are killed, also if it ends because the socket was closed.

    Args:
        sock: A bound or connected greensafe REP or ROUTER; nobody else may receive from it meanwhile.
        handler, deadline, grace, on_error, tell_errors: As for Server.
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
    room, lines = Event(), _lines_of(sock)
    is_rep = sock.type == zmq.REP
    # Held weakly: a killed greenlet keeps its traceback, and that this frame, so it would keep itself, and the socket.
    hub, caller = gevent.get_hub(), weakref.ref(gevent.getcurrent())
    ending: list[Any] = []
    restarts = Restarts(repr(sock), lambda error: ending.append(hub.loop.run_callback(_throw, caller, error)))
    watchdog = Watchdog(
        handler,
        _sender(sock, lines, room.set),
        limit=limit,
        grace=after,
        max_inflight=max_inflight,
        instance=_instance_of(sock),
        on_error=on_error,
        tell_errors=tell_errors,
        lines=lines,
        on_room=room.set,
        restarts=restarts,
    )
    stopped = RemoteError("UNAVAILABLE", "the server is stopping", "ServerStopped")
    descriptors = DescriptorWatch(repr(sock), is_ipc=(sock._endpoint() or "").startswith("ipc:"))
    try:
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
        on_error, tell_errors: As for Server.
    """

    def __init__(self, sock: Socket, *, deadline: Any, on_error: OnError | None = None, tell_errors: bool = True) -> None:
        _check_socket(sock)
        limit, grace = check_limits(deadline, 1.0)
        check_options(1, on_error)
        self._sock = sock
        self._watchdog = Watchdog(
            _no_handler,
            _sender(sock, _lines_of(sock)),
            limit=limit,
            grace=grace,
            instance=_instance_of(sock),
            reads_on=False,
            on_error=on_error,
            tell_errors=tell_errors,
            lines=_lines_of(sock),
        )
        self._request: Request | None = None

    def __enter__(self) -> Request:
        if self._request is not None:
            raise RuntimeError("a supervised block watches one request: make a new one inside of it")
        request = self._next()
        self._request = request
        request.deadline._attach(gevent.getcurrent())
        return request

    def _next(self) -> Request:
        """The next request that is worth running; what else arrives is dealt with."""
        while True:
            frames = _receive(self._sock)
            if frames is None:
                raise zmq.ZMQError(zmq.ENOTSOCK)
            request = self._watchdog.open(frames)
            if request is not None:
                if not request.replied:
                    self._watchdog.begin(request)
                    self._watchdog.greet(request)
                    return request
                self._watchdog.finish(request)  # overdue when it came

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        request = self._request
        assert request is not None
        request.deadline._detach()
        try:
            if not self._sock.closed:
                self._answer(request, error)
        finally:
            self._watchdog.close()
            self._request = None
        is_own_signal = isinstance(error, DeadlineSignal) and error.scope is request.deadline
        return is_own_signal or isinstance(error, Exception)

    def _answer(self, request: Request, error: BaseException | None) -> None:
        lockstep = self._sock._lockstep
        if lockstep is not None and not lockstep.is_open and not request.replied:
            self._watchdog.note_answered(request)
        try:
            if error is not None:
                self._watchdog.raised(request, error)
        finally:
            self._watchdog.finish(request)


def _instance_of(sock: Socket) -> bytes:
    """What tells clients this socket from one that is made later: the same for all its requests."""
    instance: bytes = sock.__dict__.setdefault("_instance", os.urandom(16))
    return instance


def _lines_of(sock: Socket) -> Lines:
    """What logs about this socket's requests: the same for all its `supervised` blocks, or each would begin to count anew."""
    lines: Lines | None = sock.__dict__.get("_lines")
    if lines is None:
        lines = sock.__dict__["_lines"] = Lines(repr(sock))
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
        frames: list[bytes] = sock.recv_multipart(timeout=None)
    except zmq.ZMQError as error:
        if error.errno in (zmq.ENOTSOCK, zmq.ETERM):
            return None
        raise
    return frames if sock.type == zmq.ROUTER else _REP_ROUTE + frames


def _sender(sock: Socket, lines: Lines, then: Callable[[], object] | None = None) -> Callable[[list[bytes]], None]:
    """What sends an answer without waiting, and then calls `then`."""

    def send(frames: list[bytes]) -> None:
        if sock.closed:
            lines.say(log, logging.WARNING, "answer dropped: the socket was closed before it")
        elif sock.type == zmq.REP:
            _send_rep(sock, frames[len(_REP_ROUTE) :])
        else:
            _send_router(sock, frames, lines)
        if then is not None:
            then()

    return send


def _send_rep(sock: Socket, body: list[bytes]) -> None:
    lockstep = sock._lockstep
    assert lockstep is not None
    if lockstep.is_half_sent:
        sock.reset()  # what went out cannot be taken back: the message is ended where it is
    elif lockstep.is_open:
        sock.send_multipart(body, zmq.NOBLOCK)


def _send_router(sock: Socket, frames: list[bytes], lines: Lines) -> None:
    try:
        sock.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        gevent.spawn(_send_later, sock, frames, lines)
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        lines.say(log, logging.INFO, "answer dropped: its client is gone")


def _send_later(sock: Socket, frames: list[bytes], lines: Lines) -> None:
    try:
        sock.send_multipart(frames, timeout=FULL_PEER)
    except zmq.ZMQError as error:
        lines.say(log, logging.WARNING, "answer dropped: %s", error)
