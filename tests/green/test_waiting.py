"""Tests of greensafe.green._waiting: limits, interruptions and turns, with real sockets over tcp, ipc and inproc."""

from __future__ import annotations

import datetime
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import DeadlineExceeded, OperationTimeout, deadline

pytestmark = pytest.mark.usefixtures("limit")

Pair = Callable[..., tuple[Any, Any]]


def test_recv_times_out(pair: Pair) -> None:
    """recv(timeout=) raises OperationTimeout, which is zmq.Again, TimeoutError and gevent.Timeout, not before its time."""
    a, _ = pair(zmq.REP, zmq.REQ)
    start = time.monotonic()
    with pytest.raises(OperationTimeout) as caught:
        a.recv(timeout=20 * MS)
    assert time.monotonic() - start >= 20 * MS
    assert isinstance(caught.value, (zmq.Again, TimeoutError, gevent.Timeout))
    assert caught.value.errno == zmq.EAGAIN
    assert caught.value.op == "recv"
    assert caught.value.seconds == 20 * MS


@pytest.mark.parametrize(
    "name", ["recv", "recv_multipart", "recv_string", "recv_json", "recv_pyobj", "recv_serialized", "recv_into"]
)
def test_every_receiver_takes_a_timeout(pair: Pair, name: str) -> None:
    """Every recv* takes timeout= and names itself in the error."""
    a, _ = pair(zmq.PAIR, zmq.PAIR)
    args: list[Any] = {"recv_serialized": [list], "recv_into": [bytearray(4)]}.get(name, [])
    with pytest.raises(OperationTimeout) as caught:
        getattr(a, name)(*args, timeout=0)
    assert caught.value.op == name


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("send", b"x"),
        ("send_multipart", [b"x", b"y"]),
        ("send_string", "x"),
        ("send_json", {}),
        ("send_pyobj", None),
    ],
)
def test_every_sender_takes_a_timeout(context: zmq.Context, name: str, payload: Any) -> None:
    """Every send* takes timeout=; a socket without peer cannot send."""
    sock = context.socket(zmq.PUSH)
    with pytest.raises(OperationTimeout):
        getattr(sock, name)(payload, timeout=5 * MS)
    with pytest.raises(OperationTimeout):
        sock.send_serialized(payload, lambda _: [b"x"], timeout=0)


def test_ready_message_beats_timeout_zero(pair: Pair) -> None:
    """A message that is there is delivered at timeout 0."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    b.send(b"x")
    assert a.poll(LONG * 1000)
    assert a.recv(timeout=0) == b"x"
    with pytest.raises(OperationTimeout):
        a.recv(timeout=0)


@pytest.mark.parametrize("bad", [True, "5", b"5", float("nan"), object()])
def test_bad_timeouts_are_refused(context: zmq.Context, bad: Any) -> None:
    """A timeout that is not a number of seconds is an error before anything is received."""
    sock = context.socket(zmq.PULL)
    with pytest.raises((TypeError, ValueError), match="limit"):
        sock.recv(timeout=bad)
    with pytest.raises((TypeError, ValueError), match="limit"):
        sock.default_timeout = bad


def test_timeout_can_be_a_timedelta(context: zmq.Context) -> None:
    """timeout= may be a timedelta, and a negative one has passed."""
    sock = context.socket(zmq.PULL)
    with pytest.raises(OperationTimeout):
        sock.recv(timeout=datetime.timedelta(milliseconds=1))
    with pytest.raises(OperationTimeout):
        sock.recv(timeout=-1)


def test_default_timeout_from_everywhere(context: zmq.Context) -> None:
    """default_timeout comes from the constructor, from Context.socket, from the Context or from the attribute."""
    with zmq.Socket(context, zmq.REQ, 5.0) as sock:
        assert sock.default_timeout == 5.0
    assert context.socket(zmq.REQ, default_timeout=2).default_timeout == 2.0
    context.default_timeout = 3
    sock = context.socket(zmq.PULL)
    assert sock.default_timeout == 3.0
    assert context.socket(zmq.PULL, default_timeout=None).default_timeout is None
    sock.default_timeout = 1 * MS
    with pytest.raises(OperationTimeout):
        sock.recv()
    sock.default_timeout = None
    with pytest.raises(gevent.Timeout) as caught, gevent.Timeout(10 * MS):
        sock.recv()
    assert not isinstance(caught.value, OperationTimeout)


@pytest.mark.parametrize("how", ["attribute", "set", "setsockopt", "context"])
def test_rcvtimeo_is_honoured(context: zmq.Context, how: str) -> None:
    """RCVTIMEO and SNDTIMEO are honoured however they are set, and timeout=None lifts them."""
    if how == "context":
        context.setsockopt(zmq.RCVTIMEO, 5)
        context.setsockopt(zmq.SNDTIMEO, 5)
    sock = context.socket(zmq.DEALER)
    if how == "attribute":
        sock.rcvtimeo = sock.sndtimeo = 5
    elif how in ("set", "setsockopt"):
        getattr(sock, how)(zmq.RCVTIMEO, 5)
        getattr(sock, how)(zmq.SNDTIMEO, 5)
    with pytest.raises(zmq.Again):
        sock.recv()
    with pytest.raises(zmq.Again):
        sock.send(b"x")
    with pytest.raises(gevent.Timeout) as caught, gevent.Timeout(20 * MS):
        sock.recv(timeout=None)
    assert not isinstance(caught.value, OperationTimeout)


def test_on_timeout_decides() -> None:
    """on_timeout is called once per outermost call, and what it returns is what the call returns."""
    calls = []

    class Quiet(zmq.Socket):
        def on_timeout(self) -> Any:
            calls.append(1)
            return None

    with zmq.Context() as context, Quiet(context, zmq.DEALER) as sock:
        assert sock.recv_json(timeout=0) is None
        assert sock.recv_multipart(timeout=0) is None
        assert sock.send(b"x", timeout=0) is None
        assert len(calls) == 3
        with pytest.raises(zmq.Again):
            sock.recv(zmq.NOBLOCK)
        assert len(calls) == 3


def test_no_false_timeout_after_the_hub_was_blocked(pair: Pair) -> None:
    """A message that arrived while the hub was blocked past the limit is delivered, under all three kinds of limit."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    b.send(b"warm")
    assert a.recv() == b"warm"

    descriptor = a.FD  # read now: asking a green socket for anything looks at EVENTS

    def block_and_send() -> None:
        started.append(1)
        b.send(b"x")
        select.select([descriptor], [], [], LONG)  # natively: the hub stands still until the message has arrived, and then some
        time.sleep(30 * MS)

    for wait in (
        lambda: a.recv(timeout=20 * MS),
        lambda: _under(deadline(20 * MS), a.recv),
        lambda: _under(gevent.Timeout(20 * MS), a.recv),
    ):
        started: list[int] = []
        while not started:
            blocker = gevent.spawn(block_and_send)
            try:
                assert wait() == b"x"
            except gevent.Timeout:
                assert not started  # the machine took longer than the limit to get there: once more
                blocker.kill()
            blocker.join()


def _under(scope: Any, call: Callable[[], Any]) -> Any:
    with scope:
        return call()


# Deadlines, foreign timeouts and kills.


def test_deadline_ends_a_recv(pair: Pair) -> None:
    """`with deadline: recv()` raises DeadlineExceeded, and the next message is received as ever."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    with pytest.raises(DeadlineExceeded), deadline(10 * MS):
        a.recv()
    b.send(b"x")
    assert a.recv() == b"x"


def test_own_timeout_inside_a_deadline(pair: Pair) -> None:
    """Whichever limit is earlier is reported, never one for the other."""
    a, _ = pair(zmq.PAIR, zmq.PAIR)
    with deadline(LONG), pytest.raises(OperationTimeout):
        a.recv(timeout=5 * MS)
    with pytest.raises(DeadlineExceeded), deadline(5 * MS):
        a.recv(timeout=LONG)


def test_expired_deadline_still_takes_what_is_ready(pair: Pair) -> None:
    """Completion wins: in a scope of 0 seconds a message that is there is received, and then the scope ends the next wait."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    b.send(b"x")
    assert a.poll(LONG * 1000)
    with pytest.raises(DeadlineExceeded), deadline(0):
        assert a.recv() == b"x"
        a.recv()


def test_swallowed_deadline_cannot_hang_the_cleanup(pair: Pair) -> None:
    """After a swallowed signal an operation without a limit of its own gets one try and then the signal again."""
    a, _ = pair(zmq.PAIR, zmq.PAIR)
    with pytest.raises(DeadlineExceeded), deadline(5 * MS):
        try:
            a.recv()
        except BaseException:
            with pytest.raises(OperationTimeout):
                a.recv(timeout=5 * MS)
            a.recv()


@pytest.mark.parametrize("how", ["deadline", "Timeout", "kill", "timeout"])
def test_no_message_is_lost_by_an_interrupted_wait(pair: Pair, how: str) -> None:
    """Messages sent while waits are interrupted in every way all arrive, in order and whole."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    got: list[list[bytes]] = []
    count = 200

    def receive() -> None:
        with gevent.Timeout(1 * MS, False) if how == "Timeout" else zmq.move_on(1 * MS if how == "deadline" else None):
            while True:
                got.append(a.recv_multipart(timeout=1 * MS if how == "timeout" else None))

    def send() -> None:
        for number in range(count):
            b.send_multipart([b"%d" % number, b"", b"end"])
            if number % 3 == 0:
                gevent.sleep(MS)

    sender = gevent.spawn(send)
    while len(got) < count:
        receiver = gevent.spawn(receive)
        if how == "kill":
            gevent.sleep(1 * MS)
            receiver.kill()
        elif how == "timeout":
            with pytest.raises(OperationTimeout):
                receiver.get()
        receiver.join()
    sender.get()
    assert got == [[b"%d" % number, b"", b"end"] for number in range(count)]


# Waiters.


def test_several_waiters_are_served_in_turn(pair: Pair) -> None:
    """Several greenlets wait on one socket; first come, first served."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    waiters = []
    for _ in range(10):
        waiters.append(gevent.spawn(a.recv))
        gevent.sleep(0)
    for number in range(10):
        b.send(b"%d" % number)
    gevent.joinall(waiters, raise_error=True)
    assert [waiter.value for waiter in waiters] == [b"%d" % number for number in range(10)]


def test_newcomer_waits_its_turn(pair: Pair) -> None:
    """Who calls recv while others wait does not overtake them."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    first = gevent.spawn(a.recv)
    gevent.sleep(0)
    b.send(b"1")
    b.send(b"2")
    time.sleep(5 * MS)  # both arrive, and the hub has not looked yet
    assert a.recv() == b"2"
    assert first.get() == b"1"


def test_killed_waiter_passes_its_turn_on(pair: Pair) -> None:
    """A waiter killed as its message arrives leaves it to the next one."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    first, second = gevent.spawn(a.recv), gevent.spawn(a.recv)
    gevent.sleep(0)
    b.send(b"x")
    first.kill(block=False)
    assert second.get() == b"x"
    first.join()


@pytest.mark.parametrize("eater", ["EVENTS", "poll", "NOBLOCK send", "NOBLOCK recv", "recv_into", "get", "unbind"])
def test_no_lost_wake_up(context: zmq.Context, eater: str) -> None:
    """Whatever libzmq call consumes the edge of ZMQ_FD, the waiter is woken."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("tcp://127.0.0.1:*")
    b.connect(a.last_endpoint)
    b.send(b"warm")
    assert a.recv() == b"warm"
    fd = a.FD
    for _ in range(20):
        waiter = gevent.spawn(a.recv)
        gevent.sleep(0)
        b.send(b"x")
        assert select.select([fd], [], [], LONG)[0]  # it arrives, and the hub has not looked yet
        if eater == "EVENTS":
            assert a.getsockopt(zmq.EVENTS) & zmq.POLLIN
        elif eater == "poll":
            assert a.poll(LONG * 1000)  # a poll(0) lets the hub look first
        elif eater == "NOBLOCK send":
            a.send(b"y", zmq.NOBLOCK)
            assert b.recv() == b"y"
        elif eater == "get":
            assert a.get(zmq.EVENTS)
        elif eater == "unbind":
            a.bind("inproc://other")
            a.unbind("inproc://other")
        elif eater == "NOBLOCK recv":
            assert a.recv(zmq.NOBLOCK) == b"x"
            b.send(b"x")
        else:
            assert a.recv_into(bytearray(1), flags=zmq.NOBLOCK) == 1
            b.send(b"x")
        with gevent.Timeout(LONG / 4):
            assert waiter.get() == b"x"


def test_writer_is_woken(pair: Pair) -> None:
    """A send that waits for room goes on when there is some, while another greenlet receives on the same socket."""
    a, b = pair(zmq.DEALER, zmq.DEALER)
    a.set_hwm(5)
    got = []

    def echo() -> None:
        for _ in range(500):
            got.append(b.recv())

    def send() -> None:
        for number in range(500):
            a.send(b"%d" % number)

    def read_nothing() -> None:
        with zmq.move_on(LONG):
            a.recv()

    reader = gevent.spawn(read_nothing)
    gevent.joinall([gevent.spawn(send), gevent.spawn(echo)], raise_error=True)
    assert got == [b"%d" % number for number in range(500)]
    reader.kill()


def test_busy_loop_lets_others_run(context: zmq.Context) -> None:
    """A loop that always finds messages yields now and then."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://busy")
    b.connect("inproc://busy")
    turns = []

    def other() -> None:
        while True:
            turns.append(1)
            gevent.sleep(0)

    ticker = gevent.spawn(other)
    for _ in range(5000):
        b.send(b"x")
        a.recv()
    assert len(turns) >= 5
    ticker.kill()


def test_close_wakes_all_waiters(pair: Pair) -> None:
    """close() ends waits in recv, send and poll with ENOTSOCK."""
    a, _ = pair(zmq.PAIR, zmq.PAIR)
    poller = zmq.Poller()
    poller.register(a, zmq.POLLIN)
    waits = [gevent.spawn(call) for call in (a.recv, a.recv_multipart, a.poll, poller.poll)]
    gevent.sleep(0)
    a.close()
    gevent.joinall(waits)
    for wait in waits:
        assert isinstance(wait.exception, zmq.ZMQError)
        assert wait.exception.errno in (zmq.ENOTSOCK, zmq.ENOTSUP)


def test_socket_moves_to_the_thread_that_waits(context: zmq.Context) -> None:
    """From another thread a socket works on that thread's hub; while somebody waits elsewhere it is a RuntimeError."""
    sock = context.socket(zmq.PULL)
    waiter = gevent.spawn(sock.recv)
    gevent.sleep(0)

    seen: list[Exception] = []

    def elsewhere() -> None:
        try:
            sock.recv(timeout=1 * MS)
        except Exception as error:
            seen.append(error)
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    for expected in (RuntimeError, OperationTimeout):
        thread = threading.Thread(target=elsewhere, daemon=True)
        thread.start()
        wait_until(lambda thread=thread: not thread.is_alive())
        assert isinstance(seen.pop(), expected)
        waiter.kill()


def test_dropped_socket_is_collected() -> None:
    """A socket that is dropped without close() is closed at once, also after it was waited on."""
    context = zmq.Context()
    sock = context.socket(zmq.PULL)
    with pytest.raises(OperationTimeout):
        sock.recv(timeout=1 * MS)
    with pytest.warns(ResourceWarning):
        del sock
    assert not list(context._sockets)
    context.term()


# What a receive that looks before it tries must not forget.


def test_error_after_a_wait(pair: Pair) -> None:
    """A REQ or REP that had to wait for its last message still meets EFSM when it is not its turn to receive."""
    rep, req = pair(zmq.REP, zmq.REQ)
    for _ in range(3):
        serving = gevent.spawn(rep.recv)
        gevent.sleep(0)
        req.send(b"request")
        assert serving.get() == b"request"
        with pytest.raises(zmq.ZMQError) as caught:
            rep.recv()
        assert caught.value.errno == zmq.EFSM
        waiting = gevent.spawn(req.recv)
        gevent.sleep(0)
        rep.send(b"reply")
        assert waiting.get() == b"reply"
        with pytest.raises(zmq.ZMQError) as caught:
            req.recv()
        assert caught.value.errno == zmq.EFSM


def test_socket_that_cannot_receive(context: zmq.Context) -> None:
    """recv on a PUSH raises at once, also after greenlets have waited on it."""
    push = context.socket(zmq.PUSH)
    with pytest.raises(OperationTimeout):
        push.send(b"nobody is there", timeout=5 * MS)
    assert push.poll(1, zmq.POLLIN) == 0
    for _ in range(2):
        with pytest.raises(zmq.ZMQError) as caught:
            push.recv()
        assert caught.value.errno == zmq.ENOTSUP


def test_option_changed_between_waits(pair: Pair) -> None:
    """RCVTIMEO holds from the next recv on, however it is set and as often as it is changed."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    a.RCVTIMEO = 1
    for change in (
        lambda: a.set(zmq.RCVTIMEO, -1),
        lambda: a.setsockopt(zmq.RCVTIMEO, 60_000),
        lambda: setattr(a, "rcvtimeo", -1),
    ):
        with pytest.raises(OperationTimeout):
            a.recv()
        change()
        gevent.spawn_later(5 * MS, b.send, b"x")
        assert a.recv() == b"x"
        a.RCVTIMEO = 1
