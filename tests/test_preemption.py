"""Tests of greensafe.preemption: handlers that really spin, and are interrupted."""

from __future__ import annotations

import gc
import io
import logging
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from time import monotonic
from typing import Any

import gevent
import gevent.event
import pytest
from helpers import LONG, MS, run_python, wait_until

import greensafe as zmq
from greensafe import Client, OperationTimeout, RemoteError, Request, Server, preemption, shield

pytestmark = pytest.mark.usefixtures("limit")

DEADLINE = 60 * MS


def _spin(seconds: float) -> None:
    end = monotonic() + seconds
    while monotonic() < end:
        pass


def _echo(request: Request) -> bytes:
    return request.body


def test_a_spinning_handler_is_interrupted(context: zmq.Context) -> None:
    """It is ended at its deadline, not before; the client is told, and the next request is served."""
    ran: list[float] = []

    def handler(request: Request) -> bytes:
        assert request.deadline.at is not None
        start = request.deadline.at - DEADLINE  # the server's clock, which may be ahead of this greenlet's
        try:
            if request.body == b"spin":
                _spin(LONG)
            elif request.body == b"sleep":
                time.sleep(LONG)
        finally:
            ran.append(monotonic() - start)
        return request.body

    with (
        Server("inproc://s", handler, deadline=DEADLINE, preempt=True, context=context),
        Client("inproc://s", context=context) as client,
    ):
        for body in (b"spin", b"sleep", b"spin"):
            with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
                client.request(body)
            assert DEADLINE - MS <= ran[-1] < LONG / 2
            assert client.request(b"x") == b"x"
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_the_callers_limit_is_the_callers(context: zmq.Context) -> None:
    """A handler that spins is interrupted at its caller's limit, who gets the exception of his own limit."""
    ran: list[float] = []

    def handler(request: Request) -> None:
        start = monotonic()
        try:
            _spin(LONG)
        finally:
            ran.append(monotonic() - start)

    with (
        Server("tcp://127.0.0.1:0", handler, deadline=LONG, preempt=True, context=context) as server,
        Client(str(server.endpoint), context=context) as client,
    ):
        with pytest.raises(OperationTimeout):
            client.request(b"spin", timeout=DEADLINE)
        wait_until(lambda: ran)
        assert ran[0] < LONG / 2


def test_an_innocent_greenlet_is_not_hit(context: zmq.Context) -> None:
    """Who computes while somebody else is overdue is interrupted neither in another server's handler nor outside of any."""
    pokes: list[int] = []
    overdue = gevent.event.Event()

    def waiting(request: Request) -> None:
        overdue.set()
        gevent.sleep(LONG)

    def computing(request: Request) -> bytes:
        _spin_until_poked(pokes)
        return b"done"

    with (
        Server("inproc://w", waiting, deadline=DEADLINE, preempt=True, context=context),
        Server("inproc://c", computing, deadline=DEADLINE / 2, context=context),
        Client("inproc://w", context=context) as client,
        Client("inproc://c", context=context) as other,
        _counted_pokes(pokes),
    ):
        for compute in (lambda: other.request(b"x"), lambda: _spin_until_poked(pokes)):
            overdue.clear()
            asked = gevent.spawn(client.request, b"x")
            overdue.wait()
            with suppress(RemoteError):  # the other server's own limit: told by the timer, after the handler has ended
                compute()
            with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
                asked.get()
    assert len(pokes) >= 6


class _counted_pokes:
    """Counts the signals, by standing in front of the handler's own look at the frame."""

    def __init__(self, seen: list[int]) -> None:
        self._seen = seen

    def __enter__(self) -> None:
        self._before = preemption._is_programs
        preemption._is_programs = self._look  # type: ignore[assignment]

    def __exit__(self, *details: object) -> None:
        preemption._is_programs = self._before

    def _look(self, frame: Any) -> bool:
        self._seen.append(1)
        return self._before(frame)


def _spin_until_poked(pokes: list[int]) -> None:
    """Three times from now."""
    before, end = len(pokes), monotonic() + LONG
    while len(pokes) < before + 3:
        assert monotonic() < end


def test_not_inside_of_a_shield(context: zmq.Context) -> None:
    """A shield holds the interruption back as it holds back every limit; it comes when the shield is left."""
    pokes: list[int] = []
    reached: list[str] = []

    def handler(request: Request) -> None:
        with shield():
            _spin_until_poked(pokes)
        reached.append("the shield's end")
        _spin(LONG)
        reached.append("the handler's end")

    with (
        Server("inproc://s", handler, deadline=DEADLINE, preempt=True, context=context),
        Client("inproc://s", context=context) as client,
        _counted_pokes(pokes),
        pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"),
    ):
        client.request(b"x")
    assert reached == ["the shield's end"]


@pytest.mark.parametrize("where", ["__del__", "garbage"])
def test_what_python_drops_does_not_count(context: zmq.Context, where: str) -> None:
    """Interrupted where Python drops what is raised, a handler is interrupted once more; nothing is printed."""
    pokes: list[int] = []
    reached: list[str] = []

    class Slow:
        def __del__(self) -> None:
            _spin_until_poked(pokes)
            reached.append("the end of __del__")

    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and not reached:
            reached.append("a callback")
            _spin_until_poked(pokes)
            reached.append("its end")

    def handler(request: Request) -> None:
        reached.clear()
        if where == "__del__":
            Slow()
        else:
            gc.callbacks.append(collected)
            try:
                gc.collect()
            finally:
                gc.callbacks.remove(collected)
        reached.append("spinning")
        _spin(LONG)
        reached.append("the handler's end")

    before = sys.unraisablehook
    with (
        Server("inproc://s", handler, deadline=DEADLINE, preempt=True, context=context),
        Client("inproc://s", context=context) as client,
        _counted_pokes(pokes),
    ):
        with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
            client.request(b"x")
        assert reached == (["spinning"] if where == "__del__" else ["a callback", "spinning"])
    assert sys.unraisablehook is before


@pytest.mark.parametrize("what", ["queue", "logging"])
def test_no_lock_stays_held(context: zmq.Context, what: str) -> None:
    """Handlers that do little but take and give back locks of Python's library are interrupted while they hold none."""
    jobs: queue.Queue[bytes] = queue.Queue()
    log = logging.getLogger("test_no_lock_stays_held")
    log.propagate = False
    lines = logging.StreamHandler(io.StringIO())
    log.addHandler(lines)

    def handler(request: Request) -> None:
        end = monotonic() + LONG
        while monotonic() < end:
            if what == "queue":
                jobs.put(b"x")
                jobs.get()
            else:
                log.warning("x")

    free: list[bool] = []

    def look() -> None:
        """In another thread: to this one a lock of its own would always be free."""
        lock = jobs.mutex if what == "queue" else lines.lock
        assert lock is not None
        free.append(lock.acquire(blocking=False))
        if free[-1]:
            lock.release()

    with (
        Server("inproc://s", handler, deadline=5 * MS, preempt=True, context=context),
        Client("inproc://s", context=context) as client,
    ):
        for _ in range(25):
            with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
                client.request(b"x")
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            assert free.pop()
    log.removeHandler(lines)


def test_no_message_is_torn(context: zmq.Context) -> None:
    """Handlers that do nothing but send are interrupted between messages only; and each request has one answer."""
    frames = [b"%d" % number for number in range(5)]
    with context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        push.set_hwm(0)
        pull.set_hwm(0)
        pull.bind("inproc://pull")
        push.connect("inproc://pull")

        def handler(request: Request) -> None:
            end = monotonic() + LONG
            while monotonic() < end:
                for _ in range(100):  # not so many that the socket yields
                    push.send_multipart(frames)
                    for _ in range(200):  # as long as the send, or nearly every signal would come during one
                        pass

        with Server("inproc://s", handler, deadline=5 * MS, preempt=True, context=context):
            raw = context.socket(zmq.DEALER)
            raw.connect("inproc://s")
            for number in range(10):
                raw.send_multipart([b"%d" % number, b"", b"x"])
                answer = raw.recv_multipart()
                assert answer[0] == b"%d" % number
                assert b"DEADLINE_EXCEEDED" in answer[2]
                while pull.poll(0):
                    assert pull.recv_multipart() == frames
            assert not raw.poll(10 * MS * 1000)
        gc.collect()


def test_refused_where_it_cannot_work(context: zmq.Context) -> None:
    """preempt=True is refused where SIGUSR2 is taken, and in a thread; nothing is left behind."""
    server = Server("inproc://s", _echo, deadline=1, preempt=True, context=context)
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError, match="SIGUSR2"):
            server.start()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert server.closed
    program = """
import threading, greensafe
def run():
    try:
        greensafe.Server("inproc://s", print, deadline=1, preempt=True).start()
    except RuntimeError as error:
        print(error)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    result = run_python(program)
    assert "main thread only" in result.out, result.err
