"""Tests of greensafe.preemption: handlers that really spin, and are interrupted."""

from __future__ import annotations

import gc
import io
import json
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import gevent
import gevent.event
import pytest
import zmq as plain
from helpers import LONG, MS, run_python, wait_until

import greensafe as zmq
from greensafe import Client, OperationTimeout, RemoteError, Request, Server, deadline, shield
from greensafe.deadlines import DeadlineSignal, preemptible
from greensafe.loops import preemption

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


CALLS: dict[str, Callable[[Request, Any, Any], object]] = {
    "send, NOBLOCK": lambda request, green, bare: green.send(b"x", zmq.NOBLOCK),
    "send_multipart, NOBLOCK": lambda request, green, bare: green.send_multipart([b"x", b"y"], zmq.NOBLOCK),
    "send": lambda request, green, bare: green.send(b"x"),
    "poll": lambda request, green, bare: green.poll(None, zmq.POLLOUT),
    "a plain send": lambda request, green, bare: bare.send(b"x"),
    "step": lambda request, green, bare: request.step("step", int),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_handler_that_does_nothing_but_call_is_interrupted(context: zmq.Context, call: str) -> None:
    """Nearly every signal comes while it is inside of greensafe or pyzmq; it is ended all the same, and soon."""
    reached: list[str] = []
    green, bare = context.socket(zmq.PUB), plain.Socket(context, zmq.PUB)
    green.bind("inproc://green")
    bare.bind("inproc://bare")

    def handler(request: Request) -> None:
        act = CALLS[call]
        for _ in range(3_000_000):  # seconds; before, hardly one in twenty was ended within them
            act(request, green, bare)
        reached.append("the end")

    with (
        Server("inproc://s", handler, deadline=5 * MS, preempt=True, context=context),
        Client("inproc://s", context=context) as client,
    ):
        for _ in range(3):
            with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
                client.request(b"x")
        assert not reached
    bare.close(0)
    assert sys.gettrace() is None


def test_no_message_is_torn(context: zmq.Context) -> None:
    """Handlers that do nothing but send are interrupted between messages only; and each request has one answer."""
    frames = [b"%d" % number for number in range(5)]
    with context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        push.set_hwm(0)
        pull.set_hwm(0)
        pull.bind("inproc://pull")
        push.connect("inproc://pull")

        def handler(request: Request) -> None:
            for _ in range(500_000):  # none that neither the loop nor a signal has ended by then
                push.send_multipart(frames, zmq.NOBLOCK if request.body == b"NOBLOCK" else 0)

        with Server("inproc://s", handler, deadline=5 * MS, preempt=True, context=context):
            raw = context.socket(zmq.DEALER)
            raw.connect("inproc://s")
            for number in range(10):
                raw.send_multipart([b"%d" % number, b"", b"NOBLOCK" if number % 2 else b""])
                answer = raw.recv_multipart()
                assert answer[0] == b"%d" % number
                assert b"DEADLINE_EXCEEDED" in answer[2]
                while pull.poll(0):
                    assert pull.recv_multipart() == frames
            assert not raw.poll(10 * MS * 1000)
        gc.collect()


# The mark that a signal leaves which comes while greensafe or a library is called. Here it comes when the test says so.


@pytest.fixture
def overdue() -> Iterator[deadline]:
    """A scope of this greenlet's that is over, as a handler's of a server that preempts."""
    if sys.gettrace() is not None:
        pytest.skip("a debugger traces these tests: there is no mark then")
    scope = preemptible(at=monotonic())
    preemption.listen()
    scope.attach(gevent.getcurrent())
    yield scope
    scope.detach()
    preemption.unlisten()
    assert sys.gettrace() is None


def _made_in(package: str, source: str) -> Any:
    """A function as if a library had it."""
    names: dict[str, Any] = {"__name__": package, "signal": signal}
    exec(source, names)
    return names["call"]


#: Returns what it is given; a signal comes meanwhile.
_interrupted = _made_in("zmq.library", "def call(value=None): signal.raise_signal(signal.SIGUSR2); return value")


def test_what_a_call_returns_is_not_lost(overdue: deadline) -> None:
    """The call goes on to its end and its result is kept; the loop does not call again."""
    got: list[int] = []
    with pytest.raises(DeadlineSignal):
        for number in range(3):
            got.append(_interrupted(number))
    assert got == [0]


def test_the_loop_may_be_further_out(overdue: deadline) -> None:
    """A function without a loop of its own runs to its end, whatever it calls of Python's library."""
    reached: list[str] = []

    def work() -> None:
        json.loads('{"a": 1}', object_hook=_interrupted)
        reached.append("behind the call")

    with pytest.raises(DeadlineSignal):
        for _ in range(3):
            work()
    assert reached == ["behind the call"]


def test_what_a_loop_has_taken_is_given_back(overdue: deadline) -> None:
    """Between the call and the loop's next turn every `with` and `finally` is left in order."""
    reached: list[str] = []
    lock = threading.Lock()

    class Guard:
        def __enter__(self) -> None:
            reached.append("taken")

        def __exit__(self, *details: object) -> None:
            reached.append("given back")

    with pytest.raises(DeadlineSignal):
        for _ in range(3):
            with lock, Guard():
                try:
                    _interrupted()
                finally:
                    reached.append("finally")
    assert reached == ["taken", "finally", "given back"]
    assert not lock.locked()


def test_what_is_taken_is_given_back_where_an_error_was_caught(overdue: deadline) -> None:
    """An `except` inside of a `finally` jumps back, too, and not past the `finally`."""
    call = _made_in("logging", "def call(): signal.raise_signal(signal.SIGUSR2); raise KeyError")
    lock = threading.Lock()
    with pytest.raises(DeadlineSignal):
        for _ in range(3):
            lock.acquire()
            try:
                try:
                    call()
                except KeyError:
                    pass
            finally:
                lock.release()
    assert not lock.locked()


def test_a_long_loop(overdue: deadline) -> None:
    """The jump at a loop's end is found however far it goes."""
    names: dict[str, Any] = {"__name__": "program"}
    exec("def run(call, got):\n for _ in range(3):\n  got.append(call())\n" + "  got.sort()\n" * 300, names)
    got: list[int] = []
    with pytest.raises(DeadlineSignal):
        names["run"](lambda: _interrupted(1), got)
    assert got == [1]


def test_a_call_that_fails(overdue: deadline) -> None:
    """Its error reaches the program, which may go on: not for long."""
    call = _made_in("logging", "def call(): signal.raise_signal(signal.SIGUSR2); raise KeyError")
    caught: list[Exception] = []
    with pytest.raises(DeadlineSignal):
        for _ in range(3):
            try:
                call()
            except KeyError as error:
                caught.append(error)
    assert len(caught) == 1


@pytest.mark.parametrize("end", ["left", "extended", "delivered"])
def test_a_mark_of_a_scope_that_has_ended_hits_nobody(overdue: deadline, end: str) -> None:
    """What comes after the scope, or after its signal, runs to its end, untraced."""
    for number in range(3):
        if not number:
            _interrupted()
            assert sys.gettrace() is not None
            if end == "left":
                overdue.detach()
            elif end == "extended":
                overdue.at = monotonic() + LONG
            else:
                overdue.delivered = True
    assert number == 2
    assert sys.gettrace() is None


@pytest.mark.parametrize("end", ["left", "delivered"])
def test_a_mark_does_not_outlive_what_it_is_for(overdue: deadline, end: str) -> None:
    """What is marked may wait for long after its signal, in no loop: whatever is called meanwhile is no longer traced."""
    _interrupted()
    assert sys.gettrace() is not None
    if end == "left":
        overdue.detach()
    else:
        overdue.delivered = True
    nothing = _made_in("program", "def call(): pass")
    nothing()
    assert sys.gettrace() is None
    assert not preemption._marked


def test_a_mark_hits_no_other_greenlet(overdue: deadline) -> None:
    """While the marked one waits others run their loops."""
    turns: list[int] = []

    def other() -> None:
        for number in range(3):
            turns.append(number)
            gevent.sleep(0)

    with pytest.raises(DeadlineSignal):
        for _ in range(2):
            _interrupted()
            gevent.joinall([gevent.spawn(other), gevent.spawn(other)])
    assert sorted(turns) == [0, 0, 1, 1, 2, 2]


def test_no_mark_inside_of_a_shield(overdue: deadline) -> None:
    """A shield holds it back; the next signal behind the shield leaves it."""
    reached: list[int] = []
    with shield():
        for number in range(2):
            _interrupted()
            reached.append(number)
    with pytest.raises(DeadlineSignal):
        for number in range(2, 4):
            _interrupted()
            reached.append(number)
    assert reached == [0, 1, 2]


def test_a_debugger_is_left_alone(overdue: deadline) -> None:
    """Where somebody traces already there is no mark."""

    def trace(*_: object) -> None:
        """Trace nothing."""

    sys.settrace(trace)
    try:
        for _ in range(2):
            _interrupted()
        assert sys.gettrace() is trace
    finally:
        sys.settrace(None)


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
