"""Tests of greensafe.transport.monitor: events of real connections, and every way in which a monitor could stop a context."""

from __future__ import annotations

import errno
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from gevent.monkey import get_original
from helpers import LONG, MS, check_freed_by_a_kill, run_python, wait_until

import greensafe as zmq
from greensafe import OperationTimeout, deadline, move_on
from greensafe.transport.monitor import ConnectionEvent, Monitor

pytestmark = pytest.mark.usefixtures("limit")

UP = [zmq.Event.CONNECT_DELAYED, zmq.Event.CONNECTED, zmq.Event.HANDSHAKE_SUCCEEDED]
GONE = [zmq.Event.DISCONNECTED, zmq.Event.CONNECT_RETRIED]


@pytest.fixture
def router(context: zmq.Context) -> Any:
    """Somebody to connect to, over tcp."""
    sock = context.socket(zmq.ROUTER)
    sock.bind("tcp://127.0.0.1:*")
    return sock


@pytest.fixture
def address(router: Any) -> str:
    """Where `router` is."""
    return router.last_endpoint.decode().rstrip("\0")


@pytest.fixture
def dealer(context: zmq.Context) -> Iterator[plain.Socket[bytes]]:
    """A plain DEALER, as a client has."""
    with plain.Socket(context, zmq.DEALER) as sock:
        sock.linger = 0
        yield sock


def _kinds(events: list[ConnectionEvent]) -> list[zmq.Event]:
    return [event.kind for event in events]


def _echo_works(context: zmq.Context) -> None:
    """The context's I/O thread runs: a message comes through over tcp."""
    with context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        pull.bind("tcp://127.0.0.1:*")
        push.connect(pull.last_endpoint.decode())
        push.send(b"alive")
        assert pull.recv(timeout=LONG) == b"alive"


def test_a_connection_comes_and_goes(router: Any, address: str, dealer: plain.Socket[bytes]) -> None:
    """Each event is handed over in order, with its descriptor and endpoint."""
    got: list[ConnectionEvent] = []
    monitor = Monitor(dealer, got.append)
    dealer.connect(address)
    wait_until(lambda: len(got) == 3)
    assert _kinds(got) == UP
    assert {event.endpoint for event in got} == {address}
    router.close(0)
    wait_until(lambda: len(got) >= 5)
    assert _kinds(got[3:5]) == GONE
    assert got[3].value == got[1].value > 0
    monitor.close()
    monitor.close()
    assert monitor.is_closed


def test_drain_delivers_without_the_loop(address: str, dealer: plain.Socket[bytes]) -> None:
    """What has arrived is delivered here and now, also when `on_event` itself drains; nothing twice, nothing out of order."""
    got: list[ConnectionEvent] = []

    def on_event(event: ConnectionEvent) -> None:
        got.append(event)
        monitor.drain()

    monitor = Monitor(dealer, on_event)
    dealer.connect(address)
    while len(got) < 3:
        monitor.drain()
    assert _kinds(got) == UP
    monitor.close()
    monitor.drain()


def test_an_exception_of_on_event_is_reported(address: str, dealer: plain.Socket[bytes]) -> None:
    """The next event is delivered all the same."""
    got, reported = [], []

    def on_event(event: ConnectionEvent) -> None:
        got.append(event.kind)
        raise ValueError(event.kind)

    hub = gevent.get_hub()
    hub.handle_error = lambda context, kind, *rest: reported.append(kind)
    try:
        monitor = Monitor(dealer, on_event)
        dealer.connect(address)
        wait_until(lambda: len(got) == 3)
    finally:
        del hub.handle_error
    assert reported == [ValueError] * 3
    monitor.close()


def test_an_unread_monitor_does_not_stop_the_context(context: zmq.Context, dealer: plain.Socket[bytes]) -> None:
    """3,000 events that nobody has read leave the I/O thread running; with a high-water mark 2,000 stop it."""
    got: list[ConnectionEvent] = []
    monitor = Monitor(dealer, got.append)
    with plain.Socket(context, zmq.ROUTER) as router:
        router.bind("inproc://unused")
        for _ in range(1_000):
            router.bind("tcp://127.0.0.1:*")
            endpoint = router.last_endpoint
            dealer.connect(endpoint.decode())
            router.unbind(endpoint)
            dealer.disconnect(endpoint)
    _echo_works(context)
    monitor.drain()
    monitor.close()


def test_events_are_read_in_the_background(context: zmq.Context, dealer: plain.Socket[bytes]) -> None:
    """Nobody waits for an event, and yet none stays in the PAIR."""
    got: list[ConnectionEvent] = []
    monitor = Monitor(dealer, got.append)
    dealer.setsockopt(zmq.RECONNECT_IVL, 1)
    dealer.connect("ipc:///nowhere/greensafe")
    wait_until(lambda: len(got) > 20)
    monitor.close()


@pytest.mark.parametrize("order", ["socket first", "monitor first", "cycle", "cycle with a live peer"])
def test_dropped_in_any_order(context: zmq.Context, router: Any, address: str, order: str) -> None:
    """However socket and monitor are collected, the I/O thread runs on and the context ends."""

    class Owner:
        def __init__(self) -> None:
            self.sock: plain.Socket[bytes] = plain.Socket(context, zmq.DEALER)
            self.sock.linger = 0
            self.got: list[ConnectionEvent] = []
            self.monitor = Monitor(self.sock, self.on_event)
            self.sock.connect(address)
            self.me = self if order.startswith("cycle") else None

        def on_event(self, event: ConnectionEvent) -> None:
            self.got.append(event)

    owners = [Owner()]
    wait_until(lambda: len(owners[0].got) == 3)
    gone = weakref.ref(owners[0])

    def drop() -> None:
        if order == "socket first":
            del owners[0].sock
        elif order == "monitor first":
            del owners[0].monitor
        owners.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="Unclosed socket"):
        drop()
    assert gone() is None
    if order != "cycle with a live peer":
        router.close(0)
    _echo_works(context)


def test_collected_in_another_thread(context: zmq.Context, address: str) -> None:
    """The watcher is closed in its own thread, and the context ends."""
    got: list[ConnectionEvent] = []
    dealer: plain.Socket[bytes] = plain.Socket(context, zmq.DEALER)
    held = [Monitor(dealer, got.append)]
    dealer.connect(address)
    wait_until(lambda: len(got) == 3)
    gevent.get_hub().threadpool.apply(held.clear)
    _echo_works(context)
    dealer.close(0)


@pytest.mark.parametrize("end", ["thread ends", "hub destroyed"])
def test_made_in_a_thread_that_has_ended(context: zmq.Context, address: str, end: str) -> None:
    """A socket outlives the thread whose hub watched it, and is closed by another."""
    made: list[Any] = []

    def work() -> None:
        req = context.socket(zmq.REQ)
        req.connect(address)
        events = req.connection_events()
        made.extend([gevent.get_hub(), req, events, [events.get(timeout=LONG) for _ in range(3)]])
        if end == "hub destroyed":
            gevent.get_hub().destroy(destroy_loop=True)

    thread = get_original("threading", "Thread")(target=work)
    thread.start()
    wait_until(lambda: not thread.is_alive())
    hub, req, events, got = made
    assert _kinds(got) == UP
    with pytest.raises(OperationTimeout):
        events.get(timeout=1 * MS)
    req.close(0)
    assert list(events) == []
    _echo_works(context)
    if end == "thread ends":
        hub.loop.destroy()  # or its descriptors stay, monitor or not


@pytest.mark.parametrize("back", ["taken back", "left there"])
def test_a_socket_that_moves_takes_its_monitor_along(router: Any, address: str, back: str) -> None:
    """Used in another thread afterwards, it is told there; when that one turns its loop no more, its context ends yet."""
    context = zmq.Context()
    req = context.socket(zmq.REQ)
    req.connect(address)
    events = req.connection_events()
    assert events.get().kind == UP[0]

    got: list[zmq.Event] = []
    native = get_original("threading", "Event")
    seen, over = native(), native()

    def elsewhere() -> None:
        got.extend(events.get(timeout=LONG).kind for _ in range(2))
        seen.set()
        over.wait()  # the thread lives on, and its loop does not turn
        gevent.get_hub().destroy(destroy_loop=True)

    thread = get_original("threading", "Thread")(target=elsewhere)
    thread.start()
    wait_until(seen.is_set)
    assert got == UP[1:]
    if back == "taken back":
        router.close(0)
        assert events.get(timeout=LONG).kind == GONE[0]
    req.close(0)
    assert _is_ended_by(context)
    over.set()
    wait_until(lambda: not thread.is_alive())


def _is_ended_by(context: zmq.Context) -> bool:
    context.term()
    return context.closed


def test_too_many_sockets_leave_nothing_behind() -> None:
    """EMFILE is raised, at the PAIR as at libzmq's end of it, and the socket and its context work on."""
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 2)  # six of libzmq's
        others: list[Any] = []
        with plain.Socket(context, zmq.DEALER) as dealer:
            for count in (4, 5):
                while len(others) < count:
                    # libzmq gives a slot back only when its reaper has run
                    wait_until(lambda: _works(lambda: others.append(context.socket(zmq.PAIR))))
                with pytest.raises(zmq.ZMQError, match="Too many open files"):
                    Monitor(dealer, print)
            for each in others:
                each.close(0)
            wait_until(lambda: _works(lambda: Monitor(dealer, print).close()))


def _works(make: Callable[[], object]) -> bool:
    try:
        make()
    except zmq.ZMQError:
        return False
    return True


def test_the_end_of_the_context_is_the_last_event() -> None:
    """Whoever waits for events is woken; term() returns although the monitor was not closed."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    events = dealer.connection_events()
    waiter = gevent.spawn(list, events)
    gevent.sleep(0)
    ending = gevent.spawn(context.term)
    assert waiter.get() == []
    dealer.close(0)
    ending.get()


def test_a_socket_closed_before_its_monitor(context: zmq.Context, address: str) -> None:
    """Against the rules, and still nothing stops: the monitor ends by itself."""
    got: list[ConnectionEvent] = []
    dealer: plain.Socket[bytes] = plain.Socket(context, zmq.DEALER)
    monitor = Monitor(dealer, got.append, zmq.Event.CONNECTED)
    dealer.connect(address)
    wait_until(lambda: got)
    dealer.close(0)
    wait_until(lambda: monitor.is_closed)
    assert _kinds(got) == [zmq.Event.CONNECTED, zmq.Event.MONITOR_STOPPED]


def test_names_never_collide(context: zmq.Context) -> None:
    """Closing and opening at once never meets EADDRINUSE, as names made of descriptors do."""
    for _ in range(300):
        with context.socket(zmq.DEALER) as sock:
            sock.connection_events()


# connection_events()


def test_iterating(context: zmq.Context, router: Any, address: str) -> None:
    """An iterator of events, that ends when the socket is closed; several may be open, each gets all from its start on."""
    dealer = context.socket(zmq.DEALER)
    first = dealer.connection_events()
    dealer.connect(address)
    assert [first.get(timeout=LONG).kind for _ in range(3)] == UP
    with dealer.connection_events() as second:
        router.close(0)
        assert [each.get(timeout=LONG).kind for each in (first, second)] == [GONE[0]] * 2
        assert "to take" in repr(second)
    assert list(second) == []
    assert first.get(timeout=LONG).kind == GONE[1]
    waiter = gevent.spawn(list, first)
    gevent.sleep(0)
    dealer.close(0)
    assert set(_kinds(waiter.get())) <= set(GONE) | set(UP)
    with pytest.raises(zmq.ZMQError) as caught:
        first.get()
    assert caught.value.errno == zmq.ENOTSOCK
    assert "closed" in repr(first)


def test_limits(context: zmq.Context, address: str) -> None:
    """get() honours its timeout and the deadline scope, and loses no event by either."""
    dealer = context.socket(zmq.DEALER)
    with dealer.connection_events() as events:
        with pytest.raises(OperationTimeout):
            events.get(timeout=1 * MS)
        with pytest.raises(zmq.DeadlineExceeded), deadline(1 * MS):
            events.get()
        with pytest.raises(OperationTimeout):
            events.get(timeout=0)
        with move_on(1 * MS):
            events.get()
        dealer.connect(address)
        assert [events.get(timeout=LONG).kind for _ in range(3)] == UP


def test_without_users_no_monitor(context: zmq.Context) -> None:
    """When the last user is gone the monitor is closed; one that was dropped does not count."""
    dealer = context.socket(zmq.DEALER)
    first, second = dealer.connection_events(), dealer.connection_events()
    monitor = dealer._sharing.monitor
    del first
    assert not monitor.is_closed
    second.close()
    assert monitor.is_closed


def test_the_program_takes_over(context: zmq.Context, router: Any, address: str, caplog: pytest.LogCaptureFixture) -> None:
    """pyzmq's own functions end ours, which is logged once; the program's monitor then works, and ours is refused."""
    req = context.socket(zmq.REQ)
    req.connect(address)
    events = req.connection_events()
    monitor = req.get_monitor_socket()
    list(events)
    assert len([record for record in caplog.records if "not monitored any more" in record.message]) == 1
    with pytest.raises(zmq.ZMQError) as caught:
        req.connection_events()
    assert caught.value.errno == errno.EBUSY
    router.close(0)
    assert monitor.recv_multipart(timeout=LONG)
    req.disable_monitor()
    monitor.close(0)
    with req.connection_events():
        pass


def test_a_monitor_does_not_keep_the_program_running(tmp_path: Path) -> None:
    """A script that ends without close() exits; one that waits for an event with nothing else to do gets it."""
    result = run_python(
        """
import greensafe as zmq, gevent
context = zmq.Context()
dealer = context.socket(zmq.DEALER)
events = dealer.connection_events()
dealer.connect("ipc:///nowhere/greensafe")
print(events.get().kind.name)
req = context.socket(zmq.REQ)
req.connect("ipc:///nowhere/greensafe")
gevent.wait()
""",
    )
    assert (result.code, result.out) == (0, "CLOSED\n"), result.err


@pytest.mark.parametrize("loop", ["libev", "libuv-cffi"])
def test_in_a_forked_child(loop: str) -> None:
    """The child leaves the parent's monitor alone: closing, collecting and exiting there change nothing for the parent."""
    result = run_python(
        """
import gc, os, gevent, greensafe as zmq
context = zmq.Context()
router, req = context.socket(zmq.ROUTER), context.socket(zmq.REQ)
router.bind("tcp://127.0.0.1:*")
events = req.connection_events()
req.connect(router.last_endpoint.decode())
kinds = [events.get().kind for _ in range(3)]
child = os.fork()
if not child:
    gevent.reinit()
    gevent.sleep(0.01)
    events.close()
    req.close(0)
    del req, events
    gc.collect()
    gevent.sleep(0.01)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
router.close(0)
print(events.get(timeout=300).kind.name)
context.destroy(0)
""",
        env={"GEVENT_LOOP": loop} if loop != "libev" else None,
    )
    assert (result.code, result.out) == (0, "0\nDISCONNECTED\n"), result.err


def test_threads_that_come_and_go(context: zmq.Context, address: str) -> None:
    """Sockets made and dropped in threads with hubs of their own leave no descriptor: the fixture counts them."""

    def work() -> None:
        with context.socket(zmq.REQ) as req:
            req.connect(address)
            with req.connection_events() as events:
                assert events.get(timeout=LONG).kind == UP[0]
        gevent.get_hub().destroy(destroy_loop=True)

    threads = [get_original("threading", "Thread")(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: not any(thread.is_alive() for thread in threads))
    assert threading.active_count() >= 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_killed_greenlet_takes_its_events_along() -> None:
    """A greenlet that waits for events holds them and their socket no longer than it lives."""
    with zmq.Context() as own:

        def act(track: Any) -> None:
            sock = track(own.socket(zmq.DEALER))
            sock.linger = 0
            list(track(sock.connection_events()))

        check_freed_by_a_kill(act)


def test_a_drain_does_not_wait_for_peers_that_connect_faster_than_it_reads(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, dealer: plain.Socket[bytes]
) -> None:
    """It delivers so many events and says that there are more; these come in the turns that follow."""
    monkeypatch.setattr("greensafe.transport.monitor.MOST", 2)
    got: list[ConnectionEvent] = []
    monitor = Monitor(dealer, got.append, zmq.EVENT_LISTENING)
    for _ in range(5):
        dealer.bind("tcp://127.0.0.1:*")
    assert not monitor.drain()
    assert len(got) == 2
    wait_until(lambda: len(got) == 5)
    assert monitor.drain()
    monitor.close()
