"""Tests of greensafe.hubwatch: hubs that are really blocked, in this process or in one that ends itself."""

from __future__ import annotations

import gc
import io
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import gevent
import gevent.event
import gevent.monkey
import pytest
from helpers import LONG, MS, run_python, running, wait_until

import greensafe as zmq
from greensafe import Client, OperationTimeout, RemoteError, Request, Server, hubwatch, shield
from greensafe.hooks import HubBlocked, LoopFailed
from greensafe.hubwatch import EXIT_CODE, HubWatch, Wish
from greensafe.sansio.backoff import RESTARTS

pytestmark = pytest.mark.usefixtures("limit")

AFTER = 50 * MS

DEADLINE = 60 * MS


@pytest.fixture
def watched(caplog: pytest.LogCaptureFixture) -> Iterator[HubWatch]:
    """This hub, watched with `AFTER`."""
    caplog.set_level(logging.WARNING)
    wish = Wish(after=AFTER)
    found = hubwatch.watch(wish)
    yield found
    found.remove(wish)


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def _hold_until_told(caplog: pytest.LogCaptureFixture) -> None:
    """Spin until the log says so."""
    end = monotonic() + LONG
    while not _errors(caplog):
        assert monotonic() < end


def _spin(seconds: float) -> None:
    end = monotonic() + seconds
    while monotonic() < end:
        pass


def test_who_blocks_is_told_once(watched: HubWatch, caplog: pytest.LogCaptureFixture) -> None:
    """While the hub is blocked the log has the stack of what blocks it, once; then it is counted, and told to be over."""
    start = monotonic()
    _hold_until_told(caplog)
    assert monotonic() - start >= AFTER
    assert watched.blocked == 0
    _spin(3 * AFTER)
    wait_until(lambda: watched.blocked == 1)
    assert watched.longest >= AFTER
    (told,) = _errors(caplog)
    assert "_hold_until_told" in told
    assert "turns again" in caplog.records[-1].getMessage()
    assert "nobody saw" not in caplog.records[-1].getMessage()
    assert "blocked=1" in repr(watched)
    caplog.clear()
    _hold_until_told(caplog)
    wait_until(lambda: watched.blocked == 2)


def test_below_the_limit_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A hub that does not turn for less than the limit is nobody's business."""
    wish = Wish(after=LONG)
    found = hubwatch.watch(wish)
    _spin(AFTER)
    gevent.sleep(MS)
    assert found.blocked == 0
    found.remove(wish)
    assert not caplog.records


def test_code_that_keeps_the_lock_is_counted_afterwards(watched: HubWatch, caplog: pytest.LogCaptureFixture) -> None:
    """While C code keeps the interpreter's lock no thread of Python's runs: the hub itself tells what was missed."""
    count, took = 1_000_000, 0.0
    while took < 5 * AFTER:
        count *= 2
        beat = watched._beaten_at
        wait_until(lambda beat=beat: watched._beaten_at != beat)
        start = monotonic()
        sum(range(count))
        took = monotonic() - start
    wait_until(lambda: watched.blocked)
    assert watched.longest >= AFTER
    assert "nobody saw" in caplog.text


def test_one_thread_for_all_servers_of_a_hub(context: zmq.Context) -> None:
    """Servers share their hub's thread, which ends with the last of them; the shortest limit holds."""
    first = Server("inproc://1", _echo, deadline=LONG, context=context, blocked_after=LONG)
    second = Server("inproc://2", _echo, deadline=LONG, context=context, blocked_after=AFTER)
    none = Server("inproc://3", _echo, deadline=LONG, context=context, blocked_after=None)
    with none:
        assert not hubwatch._watches
        with first:
            (found,) = hubwatch._watches.values()
            assert found._after == LONG
            with second:
                assert list(hubwatch._watches.values()) == [found]
                assert found._after == AFTER
            assert found._after == LONG
        assert not hubwatch._watches
    assert "over" in repr(found)


def test_a_thread_that_ends_without_stopping(caplog: pytest.LogCaptureFixture) -> None:
    """A hub that went with its thread is not blocked: its watch ends by itself."""

    def run() -> None:
        hubwatch.watch(Wish(after=AFTER))
        gevent.sleep(MS)
        gevent.get_hub().destroy(destroy_loop=True)

    start, done = gevent.monkey.get_original("_thread", "start_new_thread"), []
    start(lambda: done.append(run()), ())
    wait_until(lambda: done)
    wait_until(lambda: not hubwatch._watches)
    assert not _errors(caplog)


def test_servers_tell_how_their_hub_is(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """By how much it was late, now and at worst, and each incident, with what ran: the servers that it is one for."""
    told: list[Any] = []
    where: list[bool] = []

    def hook(record: Any) -> None:
        if isinstance(record, HubBlocked):
            told.append(record)
            where.append(gevent.getcurrent() is gevent.get_hub())

    unwatched = Server("inproc://1", _echo, deadline=1, context=context, blocked_after=None, hooks=hook)
    patient = Server("inproc://2", _echo, deadline=1, context=context, blocked_after=LONG, hooks=hook)
    with unwatched, patient:
        assert unwatched.stats.hub_lag_seconds is unwatched.stats.worst_hub_lag_seconds is None
        with Server("inproc://3", _echo, deadline=1, context=context, blocked_after=AFTER, hooks=hook) as server:
            _hold_until_told(caplog)
            wait_until(lambda: told)
            assert server.stats.hub_blocked == 1
            assert (server.stats.worst_hub_lag_seconds or 0) >= AFTER
            wait_until(lambda: (server.stats.hub_lag_seconds or 0) < AFTER)
            assert (server.stats.worst_hub_lag_seconds or 0) >= AFTER
            assert server.healthy
    (record,) = told
    assert where == [True]
    assert record.endpoint == "inproc://3"
    assert record.seconds >= AFTER
    assert "_hold_until_told" in record.stack
    assert record.stack in _errors(caplog)[0]
    assert server.stats.hub_lag_seconds is None


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """The errors that the watch will meet, one at a look."""
    errors: list[Exception] = []
    real = HubWatch._judge

    def judge(*args: Any) -> None:
        if errors:
            raise errors.pop()
        real(*args)

    monkeypatch.setattr(HubWatch, "_judge", judge)
    return errors


def test_a_thread_that_fails_goes_on(context: zmq.Context, caplog: pytest.LogCaptureFixture, judging: list[Exception]) -> None:
    """It is logged, counted and told, and afterwards it sees a hub that is blocked as ever."""
    told: list[Any] = []
    error = RuntimeError("injected")
    with Server(
        "inproc://s", _echo, deadline=1, context=context, blocked_after=AFTER, exit_when_blocked=LONG, hooks=told.append
    ) as server:
        judging.append(error)
        wait_until(lambda: server.stats.restarts == {"hubwatch": 1})
        (record,) = [record for record in told if isinstance(record, LoopFailed)]
        assert (record.loop, record.error, record.seconds is None) == ("hubwatch", error, False)
        wait_until(lambda: _errors(caplog))
        assert caplog.records[-1].exc_info is not None
        caplog.clear()
        _hold_until_told(caplog)
        assert "has not turned" in _errors(caplog)[0]
        assert server.healthy


def test_a_thread_that_goes_on_failing(context: zmq.Context, judging: list[Exception]) -> None:
    """It ends, and its servers with its error: nobody would end the process when the hub is blocked."""
    errors = [RuntimeError(str(number)) for number in range(RESTARTS + 1)]
    server = Server("inproc://s", _echo, deadline=1, context=context, blocked_after=AFTER)
    runner = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    judging.extend(errors)
    runner.join()
    assert runner.exception is errors[0]
    assert (server.state, server.stats.restarts) == ("failed", {"hubwatch": RESTARTS})
    assert not hubwatch._watches


BLOCKED = """
import sys
PATCH
import logging, time
import greensafe
HEAD
def guilty(request):
    HOLD
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass

server = greensafe.Server("inproc://s", guilty, deadline=None, exit_when_blocked=0.2, blocked_after=None)
with server, greensafe.Client("inproc://s") as client:
    client.request(b"x")
"""


@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
def test_exit_when_blocked(patch: str) -> None:
    """The process ends with code 70 and says why, with the stack of who holds the hub."""
    program = BLOCKED.replace("PATCH", patch).replace("HEAD", "").replace("HOLD", "")
    result = run_python(program)
    assert result.code == EXIT_CODE, result.err
    assert "code 70" in result.err
    assert "in guilty" in result.err


@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
def test_exit_although_logging_is_blocked(patch: str) -> None:
    """Who blocks while it holds a lock of logging's does not keep the process from ending, nor from saying why."""
    program = (
        BLOCKED.replace("PATCH", patch)
        .replace("HEAD", "logging.basicConfig()")
        .replace("HOLD", "logging.root.handlers[0].acquire()")
    )
    result = run_python(program)
    assert result.code == EXIT_CODE, result.err
    assert result.err.count("in guilty") == 1


SERVING = """
import os, signal, time, greensafe
def handler(request):
    if request.body == b"stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        end = time.monotonic() + SECONDS / 5
        while time.monotonic() < end:  # so that the thread has its look before the hub turns
            pass
    return b"%d" % server._watch[0].blocked
server = greensafe.Server("tcp://127.0.0.1:0", handler, deadline=30, exit_when_blocked=SECONDS, blocked_after=SECONDS)
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_stopped_process_is_not_blamed() -> None:
    """A process that was stopped for longer than the limit goes on; the time is counted, as clients have missed it."""
    seconds = 1000 * MS
    program = SERVING.replace("SECONDS", str(seconds))
    with running([sys.executable, "-c", program]) as (process, endpoint), Client(endpoint, heartbeat=None) as client:
        asked = gevent.spawn(client.request, b"stop")
        wait_until(lambda: os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)[0])
        gevent.sleep(2 * seconds)
        process.send_signal(signal.SIGCONT)
        assert asked.get() == b"0"
        wait_until(lambda: client.request(b"x") == b"1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0


FORKED = """
import os, time, logging, gevent, greensafe
from greensafe import hubwatch
seen = []
class Handler(logging.Handler):
    def emit(self, record):
        seen.append(record.levelno)
logging.getLogger("greensafe").addHandler(Handler())

def block():
    seen.clear()
    end = time.monotonic() + 30
    while logging.ERROR not in seen:
        assert time.monotonic() < end

server = greensafe.Server("inproc://s", lambda request: request.body, deadline=30, blocked_after=0.1, preempt=True)
server.start()
gevent.sleep(0.01)
child = os.fork()
if not child:
    try:
        assert not hubwatch._watches
        server.start()
        gevent.sleep(0.01)
        block()
        server.stop()
        assert not hubwatch._watches
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
block()
while not (done := os.waitpid(child, os.WNOHANG))[0]:
    gevent.sleep(0.01)
server.stop()
print(os.waitstatus_to_exitcode(done[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_begins_anew() -> None:
    """The child has no thread until a server is started there, and then one of its own; the parent's goes on."""
    result = run_python(FORKED, env={"PYTHONWARNINGS": "ignore"})
    assert (result.code, result.out) == (0, "0\n"), result.err


# Preemption.


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
        self._before = hubwatch._is_programs
        hubwatch._is_programs = self._look  # type: ignore[assignment]

    def __exit__(self, *details: object) -> None:
        hubwatch._is_programs = self._before

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
        for _ in range(50):
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ValueError, {"blocked_after": 0}),
        (TypeError, {"blocked_after": "1"}),
        (ValueError, {"exit_when_blocked": -1}),
        (ValueError, {"exit_when_blocked": float("nan")}),
        (ValueError, {"max_zombies": -1}),
        (ValueError, {"max_zombies": None}),
    ],
)
def test_wrong_arguments(kind: type[Exception], options: dict[str, Any]) -> None:
    """A wrong argument is an error of the constructor."""
    with pytest.raises(kind, match=r"limit|blocked|zombies|NaN"):
        Server("inproc://s", _echo, deadline=1, **options)


def test_zombies_make_a_server_unhealthy(context: zmq.Context) -> None:
    """A handler that survives a kill counts; when more have than max_zombies the server is not healthy, until they end."""
    go = gevent.event.Event()

    def handler(request: Request) -> None:
        while not go.is_set():
            with suppress(BaseException):
                go.wait()

    with (
        Server("inproc://s", handler, deadline=5 * MS, grace=5 * MS, max_zombies=1, context=context) as server,
        Client("inproc://s", context=context) as client,
    ):
        for healthy in (True, False):
            zombies = server._watchdog.responder.zombies  # type: ignore[union-attr]
            with pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
                client.request(b"x")
            wait_until(lambda before=zombies: server._watchdog.responder.zombies > before)  # type: ignore[union-attr]
            assert server.healthy is healthy
        go.set()
        wait_until(lambda: server.healthy)
