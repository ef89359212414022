"""Every way in which a handler can go wrong, against Server, supervise (REP and ROUTER) and supervised.

Each is asked by a raw plain-pyzmq peer that counts what arrives on the wire, also after the handler has ended.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import gevent
import gevent.event
import pytest
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import LATER, Request, Server, supervise, supervised

pytestmark = [pytest.mark.usefixtures("limit"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

DEADLINE = 60 * MS
GRACE = 40 * MS


def _raise(error: BaseException) -> None:
    raise error


def _swallow(kind: type[BaseException], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(kind):
            gevent.sleep(max(MS, end - time.monotonic()))  # less than 1 ms is a warning on libuv, and here an error


def _recurse() -> Any:
    return _recurse()


def _blocking_cleanup(request: Request) -> None:
    try:
        gevent.sleep(LONG)
    finally:
        gevent.sleep(4 * DEADLINE)


def _own_timeout(request: Request) -> None:
    with gevent.Timeout(5 * MS):
        gevent.sleep(LONG)


def _reply_twice(request: Request) -> None:
    request.reply(b"first")
    request.reply(b"second")


def _reply_and_return(request: Request) -> bytes:
    request.reply(b"first")
    return b"second"


def _reply_later(request: Request) -> Any:
    gevent.spawn_later(5 * MS, request.reply, b"later")
    return LATER


#: Requests that were promised an answer, and kept.
_kept: list[Request] = []


def _promise_and_keep(request: Request) -> Any:
    _kept.append(request)
    return LATER


def _kill_itself(request: Request) -> None:
    gevent.getcurrent().kill()


def _reply_and_raise(request: Request) -> None:
    request.reply(b"first")
    raise ValueError("after the reply")


def _cancel(request: Request, cause: object) -> None:
    request.deadline.cancel(cause)
    gevent.sleep(LONG)


def _hang_after_reply(request: Request) -> None:
    request.reply(b"first")
    gevent.sleep(LONG)


#: name -> (handler, what the client is to get: bytes, or an error code, and whether it may take the deadline)
CASES: dict[str, tuple[Callable[[Request], Any], bytes | str, bool]] = {
    "returns": (lambda request: b"first", b"first", False),
    "raises": (lambda request: _raise(ValueError("no")), "INTERNAL", False),
    "hangs": (lambda request: gevent.sleep(LONG), "DEADLINE_EXCEEDED", True),
    "swallows Exception": (lambda request: _swallow(Exception, LONG), "DEADLINE_EXCEEDED", True),
    "swallows BaseException": (lambda request: _swallow(BaseException, 6 * DEADLINE), "DEADLINE_EXCEEDED", True),
    "returns None": (lambda request: None, "INTERNAL", False),
    "returns a wrong type": (lambda request: 42, "INTERNAL", False),
    "returns str": (lambda request: "text", "INTERNAL", False),
    "returns an empty list": (lambda request: [], "INTERNAL", False),
    "returns a list of str": (lambda request: ["text"], "INTERNAL", False),
    "replies twice": (_reply_twice, b"first", False),
    "replies and returns": (_reply_and_return, b"first", False),
    "replies and raises": (_reply_and_raise, b"first", False),
    "replies and hangs": (_hang_after_reply, b"first", False),
    "replies later": (_reply_later, b"later", False),
    "promises and never replies": (lambda request: LATER, "INTERNAL", False),
    "promises, keeps it and never replies": (_promise_and_keep, "DEADLINE_EXCEEDED", True),
    "spins past its deadline": (lambda request: time.sleep(1.5 * DEADLINE) or b"first", b"first", True),
    "kills itself": (_kill_itself, "ABORTED", False),
    "SystemExit": (lambda request: sys.exit(3), "INTERNAL", False),
    "KeyboardInterrupt": (lambda request: _raise(KeyboardInterrupt()), "INTERNAL", False),
    "GreenletExit": (lambda request: _raise(gevent.GreenletExit()), "ABORTED", False),
    "BaseException": (lambda request: _raise(BaseException("bare")), "INTERNAL", False),
    "GeneratorExit": (lambda request: _raise(GeneratorExit()), "INTERNAL", False),
    "its own gevent.Timeout": (_own_timeout, "INTERNAL", False),
    "StopIteration": (lambda request: _raise(StopIteration()), "INTERNAL", False),
    "RecursionError": (lambda request: _recurse(), "INTERNAL", False),
    "MemoryError": (lambda request: _raise(MemoryError()), "RESOURCE_EXHAUSTED", False),
    "blocking cleanup": (_blocking_cleanup, "DEADLINE_EXCEEDED", True),
    "invalid JSON": (lambda request: request.json(), "INVALID_ARGUMENT", False),
    "unprintable error": (lambda request: _raise(_Unprintable(RuntimeError("no text"))), "INTERNAL", False),
    "error whose text exits": (lambda request: _raise(_Unprintable(SystemExit(7))), "INTERNAL", False),
    "error by hand": (lambda request: request.error("NOT_FOUND", "no such thing"), "NOT_FOUND", False),
    "cancels itself": (lambda request: _cancel(request, "enough"), "CANCELLED", False),
    "cancels itself with an error": (lambda request: _cancel(request, zmq.RemoteError("NOT_FOUND", "no")), "NOT_FOUND", False),
    "raises RemoteError": (lambda request: _raise(zmq.RemoteError("NOT_FOUND", "no")), "NOT_FOUND", False),
}


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise self.args[0]


#: The handlers that have started and not ended.
_running: set[Any] = set()


def _handle(request: Request) -> Any:
    if request.body == b"next":
        return b"fine"
    _running.add(gevent.getcurrent())
    try:
        return CASES[request.body.decode()][0](request)
    finally:
        _running.discard(gevent.getcurrent())


@pytest.fixture
def server(context: zmq.Context) -> Iterator[str]:
    with Server("tcp://127.0.0.1:0", _handle, deadline=DEADLINE, grace=GRACE, context=context) as running:
        assert running.endpoint is not None
        yield running.endpoint
        wait_until(lambda: running._watchdog is not None and not running._watchdog._owed)


@pytest.fixture(params=["REP", "ROUTER"])
def loop(request: pytest.FixtureRequest, context: zmq.Context) -> Iterator[str]:
    """The endpoint of a socket of our own under `supervise`."""
    sock = context.socket(getattr(zmq, request.param))
    sock.bind("tcp://127.0.0.1:0")
    runner = gevent.spawn(supervise, sock, _handle, deadline=DEADLINE, grace=GRACE)
    yield sock.last_endpoint.decode()
    sock.close(0)
    runner.get()


def _check_case(context: zmq.Context, endpoint: str, case: str) -> None:
    _, expected, is_overdue = CASES[case]
    with context.socket(zmq.DEALER) as raw:
        raw.connect(endpoint)
        start = time.monotonic()
        raw.send_multipart([b"", case.encode()])
        delimiter, answer = raw.recv_multipart()
        seconds = time.monotonic() - start
        assert delimiter == b""
        if isinstance(expected, bytes):
            assert answer == expected
        else:
            assert json.loads(answer)["error"]["code"] == expected
        assert seconds >= DEADLINE if is_overdue else seconds < LONG
        raw.send_multipart([b"", b"next"])
        assert raw.recv_multipart() == [b"", b"fine"]
        # Later than the handler's end nothing more may have left: it would arrive before the answer to one more request.
        wait_until(lambda: not _running)
        _kept.clear()
        raw.send_multipart([b"", b"next"])
        assert raw.recv_multipart() == [b"", b"fine"]
        assert not raw.poll(1000 * 5 * MS)


@pytest.mark.parametrize("case", CASES)
def test_server_gives_exactly_one_answer(context: zmq.Context, server: str, case: str) -> None:
    """Whatever a Server's handler does: one answer on the wire, and the next request is answered normally."""
    _check_case(context, server, case)


@pytest.mark.parametrize("case", CASES)
def test_supervise_gives_exactly_one_answer(context: zmq.Context, loop: str, case: str) -> None:
    """The same over a REP or ROUTER that the caller owns."""
    _check_case(context, loop, case)


#: In supervised the block is the caller's own: what it does with these is its own business, so they pass on.
PASSED_ON = {"SystemExit", "KeyboardInterrupt", "GreenletExit", "BaseException", "GeneratorExit", "kills itself"}
PASSED_ON |= {"its own gevent.Timeout"}
#: What a block cannot do, since it returns nothing: neither an answer, nor a promise.
RETURNS = {name for name in CASES if "returns" in name or name.startswith(("replies later", "promises", "spins"))}


@pytest.mark.parametrize("case", sorted(set(CASES) - (RETURNS - {"returns None"})))
@pytest.mark.parametrize("kind", ["REP", "ROUTER"])
def test_supervised_gives_exactly_one_answer(context: zmq.Context, case: str, kind: str) -> None:
    """The same for a program's own loop; what is not an Exception is passed on after the answer."""
    sock = context.socket(getattr(zmq, kind))
    sock.bind("tcp://127.0.0.1:0")
    passed: list[BaseException] = []

    def run() -> None:
        while True:
            try:
                with supervised(sock, deadline=DEADLINE) as request:
                    answer = _handle(request)
                    if answer == b"fine":
                        request.reply(answer)
            except zmq.ZMQError:
                return
            except BaseException as error:
                passed.append(error)

    runner = gevent.spawn(run)
    _check_case(context, sock.last_endpoint.decode(), case)
    assert bool(passed) == (case in PASSED_ON)
    sock.close(0)
    runner.join()


def test_on_error_replaces_what_a_plain_client_gets(context: zmq.Context) -> None:
    """on_error returns the frames for a plain client; if it fails itself the standard error is sent."""

    def on_error(request: Request, error: zmq.RemoteError) -> Any:
        if request.body == b"raises":
            return [b"sorry", error.code.encode()]
        if request.body == b"returns None":
            return None
        raise RuntimeError("on_error fails")

    with Server("inproc://s", _handle, deadline=DEADLINE, on_error=on_error, context=context):
        req = context.socket(zmq.REQ)
        req.connect("inproc://s")
        req.send(b"raises")
        assert req.recv_multipart() == [b"sorry", b"INTERNAL"]
        for body in (b"returns None", b"SystemExit"):
            req.send(body)
            assert json.loads(req.recv())["error"]["code"] == "INTERNAL"


@pytest.mark.parametrize("how", ["Server", "supervise"])
def test_a_killed_handler_that_has_not_started(context: zmq.Context, how: str) -> None:
    """A handler that is killed by another one before it starts, or right after, still answers."""
    victims: list[Any] = []

    def handler(request: Request) -> bytes:
        victims.append(gevent.getcurrent())
        for victim in victims[:-1]:
            victim.kill(block=False)
        if request.body == b"last":
            return b"done"
        gevent.sleep(LONG)
        return b"never"

    with contextlib.ExitStack() as stack:
        if how == "Server":
            stack.enter_context(Server("inproc://s", handler, deadline=LONG, context=context))
        else:
            sock = context.socket(zmq.ROUTER)
            sock.bind("inproc://s")
            stack.callback(gevent.spawn(supervise, sock, handler, deadline=LONG).kill)
        raw = context.socket(zmq.DEALER)
        raw.connect("inproc://s")
        for body in (b"1", b"2", b"3", b"last"):
            raw.send_multipart([b"", body])
        answers = [raw.recv_multipart()[1] for _ in range(4)]
        assert sorted(answers)[0] == b"done"
        assert [json.loads(answer)["error"]["code"] for answer in answers if answer != b"done"] == ["ABORTED"] * 3
        assert not raw.poll(5)


def test_zombies_are_counted_and_forgotten(context: zmq.Context) -> None:
    """A handler that survives signal and kill is a zombie until it ends."""

    may_end = gevent.event.Event()

    def handler(request: Request) -> None:
        while not may_end.is_set():
            _swallow(BaseException, 5 * MS)

    with Server("inproc://s", handler, deadline=20 * MS, grace=20 * MS, context=context) as server:
        req = context.socket(zmq.REQ)
        req.connect("inproc://s")
        req.send(b"x")
        assert json.loads(req.recv())["error"]["code"] == "DEADLINE_EXCEEDED"
        assert server._watchdog is not None
        responder = server._watchdog.responder
        wait_until(lambda: responder.zombies == 1)
        assert "zombies=1" in repr(server)
        may_end.set()
        wait_until(lambda: responder.zombies == 0 and responder.running == 0)
