"""Tests of greensafe.hubwatch: hubs that are really blocked, in this process or in one that ends itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
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
from greensafe import Client, RemoteError, Request, Server
from greensafe.hooks import HubBlocked, LoopFailed
from greensafe.loops import hubwatch
from greensafe.loops.hubwatch import EXIT_CODE, HubWatch, Wish
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
    end = time.monotonic() + 600
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
from greensafe.loops import hubwatch
seen = []
class Handler(logging.Handler):
    def emit(self, record):
        seen.append(record.levelno)
logging.getLogger("greensafe").addHandler(Handler())

def block():
    seen.clear()
    end = time.monotonic() + 300
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


# Servers.


def _echo(request: Request) -> bytes:
    return request.body


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
