"""Tests of greensafe.threads, and of every public method of the package when another thread than its object's calls it."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from gevent.event import Event
from gevent.monkey import get_original
from helpers import LONG, MS, ROOT, wait_until

import greensafe as zmq
from greensafe import LATER, Client, LocalProtocolError, RemoteError, Request, Server, deadline
from greensafe.auth import Authenticator
from greensafe.client import client as client_module
from greensafe.green.events import ConnectionEvents
from greensafe.hub import threads
from greensafe.hub.threads import call_in, check_here, wait_while
from greensafe.journal import SqliteJournal
from greensafe.server import server as server_module
from greensafe.server.watchdog import Watchdog
from greensafe.testing import FaultyLink, JournalConformance

pytestmark = pytest.mark.usefixtures("limit")

#: It needs no thread of its own; it is done in the thread of its object, and waited for; it is a RuntimeError that says what to
#: do instead; or it is as in pyzmq: one thread at a time, which the program sees to.
ANYWHERE, CARRIED, REFUSED, ONE_AT_A_TIME = "anywhere", "carried", "refused", "one at a time"

KINDS = ["a thread without a hub", "a thread with a hub"]

#: Every public method and property of every public class, but for errors and records, and what it does in another thread.
METHODS = {
    "Server": {
        ANYWHERE: "closed full healthy started state",
        CARRIED: "close stats stop",
        REFUSED: "serve_forever start",
    },
    "Client": {CARRIED: "close stats", REFUSED: "request request_multipart"},
    "Request": {
        ANYWHERE: "attempt body client id json metadata replied",
        CARRIED: "error reply reply_json",
        REFUSED: "step",
    },
    "deadline": {ANYWHERE: "current effective_at remaining", REFUSED: "cancel extend"},
    "Authenticator": {ANYWHERE: "start", CARRIED: "stop"},
    "Context": {ANYWHERE: "default_timeout get set term"},
    "ConnectionEvents": {ANYWHERE: "close", REFUSED: "get", ONE_AT_A_TIME: "on_event"},
    "FaultyLink": {
        ANYWHERE: "bytes_lost bytes_to_client bytes_to_server closed connections",
        REFUSED: "close corrupt cut delay half_close hang_up heal refuse reset stall throttle",
    },
    "JsonOrBytes": {ANYWHERE: "decode encode"},
    "SqliteJournal": {ONE_AT_A_TIME: "close commit dropped now open tidy"},
    "Poller": {ONE_AT_A_TIME: "poll"},
    "Socket": {
        ONE_AT_A_TIME: (
            "bind close connect connection_events default_timeout disable_monitor disconnect get get_monitor_socket getsockopt"
            " monitor on_disconnect on_timeout poll recv recv_into recv_json recv_multipart recv_pyobj recv_serialized"
            " recv_string recv_unicode reset send send_json send_multipart send_pyobj send_serialized send_string send_unicode"
            " set setsockopt unbind"
        )
    },
    "ManualClock": {ANYWHERE: "advance now"},
}

VERDICTS = {
    f"{name}.{method}": verdict
    for name, verdicts in METHODS.items()
    for verdict, methods in verdicts.items()
    for method in methods.split()
}

#: What is not called below: values alone, or tested elsewhere (test_faults, the journals' conformance).
_ELSEWHERE = {"JsonOrBytes", "ManualClock", "SqliteJournal", "Poller", "Socket"}

CALLED = [name for name in VERDICTS if name.split(".")[0] not in _ELSEWHERE and name != "ConnectionEvents.on_event"]

_GIVEN: dict[str, tuple[Any, ...]] = {
    "Client.request": (b"x",),
    "Client.request_multipart": ([b"x"],),
    "Context.get": (zmq.IO_THREADS,),
    "Context.set": (zmq.IPV6, 1),
    "FaultyLink.delay": (1,),
    "FaultyLink.half_close": ("to_client",),
    "FaultyLink.throttle": (1000,),
    "Request.error": ("ABORTED", "no"),
    "Request.reply": (b"from elsewhere",),
    "Request.reply_json": ("from elsewhere",),
    "Server.stop": (20 * MS,),
    "Request.step": ("step", lambda: pytest.fail("called")),
    "deadline.extend": (1,),
}


def _public_classes() -> Iterator[type]:
    for name in ("greensafe", "greensafe.auth", "greensafe.journal", "greensafe.testing", "greensafe.green"):
        module = importlib.import_module(name)
        for each in (getattr(module, name) for name in module.__all__):
            is_ours = isinstance(each, type) and each.__module__.startswith("greensafe")
            if not is_ours or issubclass(each, BaseException | tuple) or dataclasses.is_dataclass(each):
                continue
            if not getattr(each, "_is_protocol", False) and not getattr(each, "__abstractmethods__", None):
                yield each
    yield ConnectionEvents


def _public_names(kind: type) -> Iterator[str]:
    for each in kind.__mro__:
        if each.__module__.startswith("greensafe"):
            for name, value in vars(each).items():
                if not name.startswith("_") and (callable(value) or isinstance(value, property | staticmethod)):
                    yield name


def test_every_public_method_has_its_place() -> None:
    """A public method that is new says here, and in docs/operations.md, what it does in another thread."""
    found: dict[str, None] = {}
    for kind in _public_classes():
        if kind not in (zmq.move_on, zmq.shield, JournalConformance):  # deadlines of another name; tests
            found.update(dict.fromkeys(f"{kind.__name__}.{name}" for name in _public_names(kind)))
    assert set(found) == set(VERDICTS)
    section = (ROOT / "docs/operations.md").read_text().split("## Other threads")[1].split("\n## ")[0]
    for name in METHODS["Server"], METHODS["Client"], METHODS["Request"], METHODS["deadline"]:
        assert [each for methods in name.values() for each in methods.split() if f"`{each}`" not in section] == []


def _elsewhere(kind: str, act: Callable[[], Any]) -> Any:
    """Call something in a new thread, while this thread's hub turns; return its result, or raise its error."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((gevent.spawn(act).get() if kind == KINDS[1] else act(), None))
        except BaseException as error:
            outcome.append((None, error))
        hub = threads.get_hub_if_exists()
        if hub is not None:
            hub.destroy(destroy_loop=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: not thread.is_alive())
    result, error = outcome.pop()
    if error is not None:
        raise error
    return result


class _World:
    """One of each, in this thread; a request is open, and its client waits."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.requests: list[Request] = []
        self.server = Server("tcp://127.0.0.1:0", self._handle, deadline=LONG, context=self.context)
        self.server.start()
        assert self.server.endpoint is not None
        self.client = Client(self.server.endpoint, context=self.context)
        self.asking = gevent.spawn(self._ask)
        wait_until(lambda: self.requests)
        self.authenticator = Authenticator(self.context)
        self.link = FaultyLink(self.server.endpoint)
        self.watched = self.context.socket(zmq.DEALER)
        self.events = self.watched.connection_events()
        self.listening = gevent.spawn(lambda: list(self.events))
        self.in_scope, self.leave = Event(), Event()
        self.scope = deadline(LONG)
        self.scoped = gevent.spawn(self._wait_in_scope)
        self.in_scope.wait()

    def _handle(self, request: Request) -> Any:
        if request.body == b"at once":
            return b"answered"
        self.requests.append(request)
        return LATER

    def _ask(self) -> Any:
        try:
            return self.client.request(b'"later"')
        except (RemoteError, zmq.Cancelled, zmq.PeerError) as error:
            return error

    def _wait_in_scope(self) -> None:
        with self.scope:
            self.in_scope.set()
            self.leave.wait()

    def of(self, name: str) -> Any:
        """The object of a class."""
        return {
            "Server": self.server,
            "Client": self.client,
            "Request": self.requests[0] if self.requests else None,
            "deadline": self.scope,
            "Authenticator": self.authenticator,
            "Context": self.context,
            "ConnectionEvents": self.events,
            "FaultyLink": self.link,
        }[name]

    def close(self) -> None:
        """End all of it."""
        self.leave.set()
        self.scoped.get()
        self.client.close()
        self.link.close()
        self.requests.clear()
        self.server.close()
        self.authenticator.stop()
        self.events.close()
        self.listening.get()
        self.asking.get()
        self.watched.close(0)
        self.context.destroy(linger=0)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[_World]:
    """One of each; it works when the test is over, so far as it was not closed."""
    made = _World(tmp_path)
    try:
        yield made
        if not made.server.closed and not made.client._closed:
            assert made.client.request(b"at once") == b"answered"
    finally:
        made.close()


@pytest.fixture
def acting(world: _World, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The threads in which sockets were used or closed, or stats taken."""
    found: set[int] = set()

    def note(kind: Any, name: str) -> None:
        act = getattr(kind, name)

        def noted(*args: Any, **options: Any) -> Any:
            found.add(threading.get_ident())
            return act(*args, **options)

        monkeypatch.setattr(kind, name, noted)

    note(plain.Socket, "close")
    note(Watchdog, "answer")
    note(client_module, "ClientStats")
    note(server_module, "ServerStats")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLED)
def test_in_another_thread(world: _World, acting: set[int], name: str, kind: str) -> None:
    """Each public method either just works there, or is a RuntimeError that says what to do instead and changes nothing."""
    owner, _, method = name.partition(".")
    target = world.of(owner)
    if name == "Authenticator.stop":
        target.start()
    if name == "Context.term":
        world.watched.close()  # a program's own sockets are its own to close

    def act() -> Any:
        found = getattr(target, method)
        result = found(*_GIVEN.get(name, ())) if callable(found) else found
        if name == "Authenticator.start":
            target.stop()  # it belongs to this thread now
            gevent.sleep(MS)
        return result

    if VERDICTS[name] == REFUSED:
        with pytest.raises(RuntimeError, match="thread") as caught:
            _elsewhere(kind, act)
        assert len(str(caught.value)) > 60  # it says what to do
    else:
        result = _elsewhere(kind, act)
        if owner in _CHECKS:
            _CHECKS[owner](world, method, result)
        if VERDICTS[name] == CARRIED:
            assert acting == {threading.get_ident()}


def _check_server(world: _World, method: str, result: Any) -> None:
    if method in ("stop", "close"):
        assert world.server.closed
        assert isinstance(world.asking.get(), RemoteError)
    elif method == "stats":
        assert result.inflight == 1
    else:
        assert result == getattr(world.server, method)


def _check_client(world: _World, method: str, result: Any) -> None:
    if method == "close":
        assert isinstance(world.asking.get(), zmq.Cancelled)
    else:
        assert (result.state, result.inflight) == ("open", 1)


def _check_request(world: _World, method: str, result: Any) -> None:
    request = world.requests[0]
    if method in ("reply", "reply_json"):
        assert b"from elsewhere" in world.asking.get()
    elif method == "error":
        assert world.asking.get().code == "ABORTED"
    else:
        found = getattr(request, method)
        assert result == (found() if callable(found) else found)


_CHECKS: dict[str, Callable[[_World, str, Any], None]] = {
    "Server": _check_server,
    "Client": _check_client,
    "Request": _check_request,
    "Context": lambda world, method, result: (
        method != "term" or (world.context.closed and world.server.closed) or pytest.fail("still open")
    ),
    "ConnectionEvents": lambda world, method, result: world.listening.get(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_reply(world: _World, kind: str) -> None:
    """The gate opens once, whichever threads knock: the later one is told, and `replied` is true by then."""
    request = world.requests[0]
    _elsewhere(kind, lambda: request.reply(b"first"))
    assert request.replied
    with pytest.raises(LocalProtocolError):
        _elsewhere(kind, lambda: request.reply(b"second"))
    with pytest.raises(LocalProtocolError):
        request.reply(b"third")
    assert world.asking.get() == b"first"


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_sent(world: _World, kind: str) -> None:
    """It is a TypeError in the thread that called, and the request can still be answered."""
    request = world.requests[0]
    with pytest.raises(TypeError, match="frame 0"):
        _elsewhere(kind, lambda: request.reply("text"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NONSENSE"):
        _elsewhere(kind, lambda: request.error("NONSENSE", ""))
    request.reply(b"x")


def test_threads_that_answer_at_once(context: zmq.Context) -> None:
    """Many threads answer while the hub reads and sends: each client gets its own answer. (libzmq aborted the process.)"""
    waiting: list[Request] = []

    def handle(request: Request) -> Any:
        waiting.append(request)
        return LATER

    def answer() -> None:
        pause = get_original("time", "sleep")
        while not has_ended:
            try:
                request = waiting.pop()
            except IndexError:
                pause(MS / 10)
                continue
            request.reply(request.body)

    has_ended: list[bool] = []
    with Server("tcp://127.0.0.1:0", handle, deadline=LONG, context=context) as server:
        assert server.endpoint is not None
        answering = [threading.Thread(target=answer, daemon=True) for _ in range(4)]
        for thread in answering:
            thread.start()
        with Client(server.endpoint, context=context) as client:
            asking = [gevent.spawn(client.request, b"%d" % number) for number in range(200)]
            assert [each.get() for each in asking] == [b"%d" % number for number in range(200)]
        has_ended.append(True)
        wait_until(lambda: not any(thread.is_alive() for thread in answering))


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_answered_under_supervise(context: zmq.Context, kind: int) -> None:
    """A socket of the program's own, under `supervise`, sends what another thread answers in its own thread."""
    with context.socket(kind) as sock, context.socket(zmq.REQ) as peer:
        sock.bind("inproc://own")

        def handle(request: Request) -> Any:
            gevent.spawn(_elsewhere, KINDS[0], lambda: request.reply(b"from elsewhere"))
            return LATER

        serving = gevent.spawn(zmq.supervise, sock, handle, deadline=LONG)
        peer.connect("inproc://own")
        peer.send(b"x")
        assert peer.recv() == b"from elsewhere"
        serving.kill()


def test_stopped_from_a_handlers_thread(context: zmq.Context) -> None:
    """stop() in a thread that a handler waits for ends within its limit, and the handler is killed."""
    server = Server(
        "inproc://server",
        lambda request: gevent.get_hub().threadpool.apply(server.stop, (20 * MS,)),
        deadline=LONG,
        context=context,
    )
    server.start()
    with Client("inproc://server", context=context) as client, pytest.raises(RemoteError) as caught:
        client.request(b"x")
    assert caught.value.code == "UNAVAILABLE"
    wait_until(lambda: server.closed)
    server.stop()


def test_serving_in_a_thread(context: zmq.Context) -> None:
    """A server that another thread serves for ever is stopped from here, and started in this thread then."""
    server = Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=LONG, context=context)

    def serve() -> None:
        server.serve_forever()
        ends.acquire()
        gevent.get_hub().destroy(destroy_loop=True)

    ends = threading.Lock()
    ends.acquire()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    with pytest.raises(RuntimeError, match="another thread has started"):
        server.start()
    server.stop()
    assert server.closed
    assert server.stats.state == "closed"
    ends.release()
    wait_until(lambda: not thread.is_alive())
    server.stop()  # though its thread has ended
    assert _elsewhere(KINDS[0], lambda: (server.stop(), threads.get_hub_if_exists())) == (None, None)
    with server:
        with Client(server.endpoint, context=context) as client:
            assert client.request(b"x") == b"x"


@pytest.mark.parametrize("kind", KINDS)
def test_thread_that_has_left_them_behind(context: zmq.Context, kind: str) -> None:
    """A client and a server whose thread has ended are anybody's to close, and the context's end need not wait for them."""
    made: list[Any] = []

    def make() -> None:
        server = Server("inproc://server", lambda request: request.body, deadline=LONG, blocked_after=None, context=context)
        server.start()
        client = Client("inproc://server", context=context)
        assert client.request(b"x") == b"x"
        made.extend([client, server])

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    wait_until(lambda: not thread.is_alive())
    client, server = made
    with pytest.raises(RuntimeError, match="another thread"):
        server.start()
    for each in made:
        _elsewhere(kind, each.close)
    assert server.closed
    assert client._closed
    client._hub.destroy(destroy_loop=True)


def test_thread_that_ends_instead(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a server's stop is told that its thread has ended in the middle of it, instead of waiting on."""
    monkeypatch.setattr(Server, "_begin_stop", lambda *_: stopped.set())
    stopped, made = Event(), []

    def make() -> None:
        made.append(Server("inproc://server", lambda request: b"", deadline=LONG, blocked_after=None, context=context))
        made[0].start()
        stopped.wait()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    wait_until(lambda: made and made[0].started)
    with pytest.raises(RuntimeError, match="thread has ended"):
        made[0].stop()
    monkeypatch.undo()
    made[0].stop()
    made[0]._hub.destroy(destroy_loop=True)


@pytest.mark.parametrize("method", ["stop", "close"])
def test_stopped_in_another_threads_hub(context: zmq.Context, method: str) -> None:
    """There, where handlers of `signal.signal` may run and nothing can wait, it is begun, as in the hub of its own thread."""
    server = Server("inproc://server", lambda request: b"", deadline=LONG, context=context)
    server.start()

    def act() -> list[Any]:
        found: list[Any] = []
        gevent.get_hub().loop.run_callback(lambda: found.append(getattr(server, method)()))
        wait_until(lambda: found)
        return found

    assert _elsewhere(KINDS[1], act) == [None]
    wait_until(lambda: server.closed)
    server.stop()


class _SlowToOpen(SqliteJournal):
    """A journal that is not open before it may be."""

    def open(self) -> Any:
        opening.append(self)
        may_open.acquire()
        return super().open()


opening: list[Any] = []
may_open = get_original("_thread", "allocate_lock")()


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_while_it_starts(context: zmq.Context, tmp_path: Path, kind: str) -> None:
    """Nothing is to be stopped yet: it returns at once in any thread, and the server starts. (It waited for ever.)"""
    opening.clear()
    may_open.acquire()
    journal = _SlowToOpen(tmp_path / "journal")
    server = Server("inproc://server", lambda request: b"", deadline=LONG, journal=journal, context=context)
    starting = gevent.spawn(server.start)
    wait_until(lambda: opening)
    _elsewhere(kind, lambda: server.stop(None))
    may_open.release()
    starting.get()
    assert server.started
    may_open.acquire(False)
    may_open.release()
    server.stop()


# call_in itself.


@pytest.mark.parametrize("kind", KINDS)
def test_result_and_error(kind: str) -> None:
    """The caller gets what the function returns or raises, in a greenlet of the hub's thread, which may wait there."""
    hub = gevent.get_hub()

    def act(text: str) -> str:
        gevent.sleep(MS)
        assert gevent.get_hub() is hub
        if not text:
            raise KeyError("no text")
        return text.upper()

    assert _elsewhere(kind, lambda: call_in(hub, "act", act, "text")) == "TEXT"
    with pytest.raises(KeyError, match="no text"):
        _elsewhere(kind, lambda: call_in(hub, "act", act, ""))


@pytest.mark.parametrize("kind", KINDS)
def test_hub_that_does_not_turn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is told after a limit, and the function is not called when the hub turns again."""
    monkeypatch.setattr(threads, "LIMIT", 5 * MS)
    hub, called, told = gevent.get_hub(), [], []

    def ask() -> None:
        try:
            call_in(hub, "act", called.append, 1)
        except RuntimeError as error:
            told.append(str(error))

    def run() -> None:
        _ = gevent.spawn(ask).get() if kind == KINDS[1] else ask()
        if kind == KINDS[1]:
            gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()  # the hub does not turn
    gevent.sleep(MS)
    assert "has not turned" in told[0]
    assert called == []


def test_hub_that_turns_no_more_when_it_should_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has heard of the call and then does not turn: the caller is told all the same, and the function is not called."""
    monkeypatch.setattr(threads, "LIMIT", 5 * MS)
    hub, called, told = gevent.get_hub(), [], []
    begin = threads._Errand.begin

    def begin_behind_another(errand: Any) -> None:
        gevent.spawn(thread.join, LONG)
        begin(errand)

    monkeypatch.setattr(threads._Errand, "begin", begin_behind_another)

    def ask() -> None:
        try:
            call_in(hub, "act", called.append, 1)
        except RuntimeError as error:
            told.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    wait_until(lambda: not thread.is_alive())
    assert "has not turned" in told[0]
    gevent.sleep(MS)
    assert called == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_of_an_error(kind: str) -> None:
    """What the function was called with is gone with the error, and not when the garbage is collected."""
    hub, found = gevent.get_hub(), []

    class Argument:
        pass

    def fail(argument: Argument) -> None:
        raise ValueError

    def act() -> None:
        argument = Argument()
        found.append(weakref.ref(argument))
        with suppress(ValueError):
            call_in(hub, "act", fail, argument)

    gc.collect()
    gc.disable()
    try:
        _elsewhere(kind, act)
        assert found[0]() is None
    finally:
        gc.enable()


def test_interrupted_in_the_other_thread() -> None:
    """Ctrl-C while a function runs for another thread is raised in its own thread as well as in the caller's."""
    hub, told = gevent.get_hub(), []

    def fail() -> None:
        raise KeyboardInterrupt

    def ask() -> None:
        try:
            call_in(hub, "act", fail)
        except KeyboardInterrupt:
            told.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        wait_until(lambda: False)
    wait_until(lambda: not thread.is_alive())
    assert told == [True]


def test_thread_that_has_ended() -> None:
    """Its hub does nothing any more: the caller is told at once."""
    hubs: list[Any] = []

    def run() -> None:
        hubs.append(gevent.get_hub())
        gevent.sleep(0)
        hubs[0].destroy(destroy_loop=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="has ended"):
        call_in(hubs[0], "act", lambda: None)


def test_caller_that_gives_up() -> None:
    """A deadline in the calling thread ends the wait; what has not begun by then is never called."""
    hub, called = gevent.get_hub(), []
    outcome: list[str] = []

    def run() -> None:
        def ask() -> None:
            try:
                with deadline(2 * MS):
                    call_in(hub, "act", called.append, 1)
            except zmq.DeadlineExceeded:
                outcome.append("deadline")

        gevent.spawn(ask).get()
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()  # the hub does not turn
    gevent.sleep(MS)
    assert outcome == ["deadline"]
    assert called == []


def test_hub_that_calls() -> None:
    """A callback of another thread's hub cannot wait, and is told so."""
    hub = gevent.get_hub()

    def act() -> Any:
        found: list[str] = []

        def call() -> None:
            try:
                call_in(hub, "act", lambda: None)
            except RuntimeError as error:
                found.append(str(error))

        gevent.get_hub().loop.run_callback(call)
        gevent.sleep(MS)
        return found

    assert "cannot wait" in _elsewhere(KINDS[1], act)[0]


def test_check_here() -> None:
    """In the hub's own thread it says nothing."""
    check_here(gevent.get_hub(), "act", "do something else")
    hub = gevent.get_hub()
    with pytest.raises(RuntimeError, match="do something else"):
        _elsewhere(KINDS[0], lambda: check_here(hub, "act", "do something else"))


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_for_what_nothing_tells_of(kind: str) -> None:
    """It ends when that has come; after the seconds, or with the other thread, it says that it has not."""
    hub, ended = gevent.get_hub(), []
    looks = iter([True, True, False])
    assert _elsewhere(kind, lambda: wait_while(lambda: next(looks), hub, LONG))
    assert not _elsewhere(kind, lambda: wait_while(lambda: True, hub, MS))
    _elsewhere(KINDS[1], lambda: ended.append(gevent.get_hub()))
    assert not wait_while(lambda: True, ended[0], LONG)
