"""The faults of zmq.green that programs met in ten years, and what a review of our own sockets found, a test for each."""

from __future__ import annotations

import contextlib
import gc
import random
import textwrap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, run_python, wait_until
from zmq.utils.monitor import recv_monitor_message

import greensafe as zmq
from greensafe.hub.turns import FAIR_SHARE, TURN

pytestmark = pytest.mark.usefixtures("limit")

Pair = Callable[..., tuple[Any, Any]]


def _run(program: str, **environment: str) -> None:
    """Run a program of its own, every warning an error; it says nothing and fails if it has something to say."""
    result = run_python(textwrap.dedent(program), env={"PYTHONWARNINGS": "error", **environment})
    assert (result.code, result.err) == (0, "")


# A message is whole.


def _send_by_frame(sock: Any, name: bytes, count: int) -> list[list[bytes]]:
    """Send messages of three frames that belong together, each frame by a send of its own."""
    messages = [[b"%s%d" % (name, number), b"", b"%s%d" % (name, number)] for number in range(count)]
    for head, middle, tail in messages:
        sock.send(head, zmq.SNDMORE)
        sock.send(middle, zmq.SNDMORE)
        sock.send(tail)
    return messages


@pytest.mark.parametrize("is_read", [True, False])
def test_two_greenlets_send_frame_by_frame(pair: Pair, is_read: bool) -> None:
    """Their messages do not mix, whether another greenlet waits in recv on the socket or the loop gets its turn in between."""
    a, b = pair(zmq.DEALER, zmq.DEALER)
    reader = gevent.spawn(a.recv) if is_read else None
    gevent.sleep(0)
    senders = [gevent.spawn(_send_by_frame, a, name, FAIR_SHARE) for name in (b"x", b"y")]
    got = [b.recv_multipart() for _ in range(2 * FAIR_SHARE)]
    assert sorted(got) == sorted(message for sender in senders for message in sender.get())
    if reader is not None:
        reader.kill()


def test_two_greenlets_receive_frame_by_frame(pair: Pair) -> None:
    """Each gets whole messages, although the other one waits in the queue before it asks for its second frame."""
    a, b = pair(zmq.DEALER, zmq.DEALER)
    got: list[list[bytes]] = []

    def receive() -> None:
        while True:
            message = [a.recv()]
            while a.rcvmore:
                message.append(a.recv())
            got.append(message)

    receivers = [gevent.spawn(receive) for _ in range(2)]
    gevent.sleep(0)
    sent = _send_by_frame(b, b"z", FAIR_SHARE)
    wait_until(lambda: len(got) == len(sent))
    assert got == sent
    gevent.killall(receivers)


def test_a_frame_that_cannot_be_tracked(context: zmq.Context) -> None:
    """It is found before the frames in front of it have left; they were taken for the beginning of the next message."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://untracked")
    b.connect("inproc://untracked")
    for copy in (True, False):
        with pytest.raises(ValueError, match="frame 1 "):
            b.send_multipart([b"a", zmq.Frame(b"untracked"), b"c"], copy=copy, track=True)
    b.send(b"next")
    assert a.recv_multipart() == [b"next"]


def test_zero_copy_messages_do_not_mix_under_patch_all() -> None:
    """pyzmq's garbage collector is a greenlet then, and switched between the frames of a message that it was to keep."""
    _run("""
        from gevent import monkey; monkey.patch_all()
        import gevent
        import greensafe as zmq

        def send(number):
            text = b"%d" % number
            sent.append(b.send_multipart([text, text * 100_000, text], copy=False, track=True))

        sent = []
        with gevent.Timeout(300), zmq.Context() as context:
            a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
            a.bind("inproc://a"), b.connect("inproc://a")
            senders = [gevent.spawn(send, number) for number in range(10)]
            for _ in senders:
                head, body, tail = a.recv_multipart()
                assert head == tail and body == head * 100_000, (head, tail)
            del body
            [tracker.wait(300) for tracker in sent]
            a.close(), b.close()
        """)


# Everybody gets a turn.


def _polled(poll: Callable[[zmq.Socket], object]) -> Callable[[zmq.Socket], object]:
    return lambda sock: (poll(sock), sock.recv(zmq.NOBLOCK))


def _poller_poll(sock: zmq.Socket) -> object:
    poller = zmq.Poller()
    poller.register(sock, zmq.POLLIN)
    return poller.poll(LONG * 1000)


BUSY: dict[str, Callable[[Any], object]] = {
    "recv": lambda sock: sock.recv(),
    "recv_multipart": lambda sock: sock.recv_multipart(),
    "recv_into": lambda sock: sock.recv_into(bytearray(1)),
    "recv_string": lambda sock: sock.recv_string(),
    "recv_serialized": lambda sock: sock.recv_serialized(list),
    "poll": _polled(lambda sock: sock.poll()),
    "poll with a limit": _polled(lambda sock: sock.poll(LONG * 1000)),
    "Poller": _polled(_poller_poll),
    "select": _polled(lambda sock: zmq.select([sock], [], [])),
    "zmq_poll": _polled(lambda sock: zmq.zmq_poll([(sock, zmq.POLLIN)])),
}


@pytest.mark.parametrize("how", BUSY)
def test_a_loop_that_finds_everything_ready_starves_nobody(context: zmq.Context, how: str) -> None:
    """Neither receiving in any way nor polling before it; nor sending."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.rcvhwm = b.sndhwm = 0
    a.bind("inproc://busy")
    b.connect("inproc://busy")
    turns = [0]

    def count() -> None:
        while True:
            turns[0] += 1
            gevent.sleep(0)

    counter = gevent.spawn(count)
    for operation in (lambda: b.send(b"x"), lambda: BUSY[how](a)):
        turns[0] = 0
        for _ in range(5 * FAIR_SHARE):
            operation()
        assert turns[0] >= 4
    counter.kill()


def test_a_send_does_not_queue_behind_a_receiver(context: zmq.Context) -> None:
    """Who only waits for messages is not in the way of a send: it switches to nobody and works in the hub's callbacks, too."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://send")
    b.connect("inproc://send")
    reader = gevent.spawn(a.recv)
    gevent.sleep(0)
    switched = gevent.spawn(list)
    a.send(b"greenlet")
    assert not switched.ready()
    gevent.get_hub().loop.run_callback(lambda: [a.send(b"hub") for _ in range(FAIR_SHARE)])
    assert [b.recv() for _ in range(FAIR_SHARE + 1)] == [b"greenlet"] + FAIR_SHARE * [b"hub"]
    reader.kill()


# Wake-ups.

EATERS: dict[str, Callable[[Any], object]] = {
    "Poller": lambda sock: _poll_once(sock),
    "select": lambda sock: zmq.select([sock], [], [], LONG),
    "zmq_poll": lambda sock: zmq.zmq_poll([(sock, zmq.POLLIN)], LONG * 1000),
    "set": lambda sock: sock.set(zmq.LINGER, 0),
    "a property": lambda sock: sock.events,
    "disconnect": lambda sock: (sock.connect("inproc://nobody"), sock.disconnect("inproc://nobody")),
    "a monitor": lambda sock: (sock.get_monitor_socket(), sock.disable_monitor()),
    "a shadow": lambda sock: zmq.Socket(sock).getsockopt(zmq.EVENTS),
    "a shadow's poll": lambda sock: zmq.Socket.shadow(sock).poll(LONG * 1000),
    "a blocking send": lambda sock: sock.send(b"y"),
    "a set that fails": lambda sock: _refused(sock.set, zmq.SUBSCRIBE, b""),
    "a connect that fails": lambda sock: _refused(sock.connect, "no://such"),
    "a bind that fails": lambda sock: _refused(sock.bind, "no://such"),
    "a disconnect that fails": lambda sock: _refused(sock.disconnect, "tcp://127.0.0.1:9"),
    "an unbind that fails": lambda sock: _refused(sock.unbind, "tcp://127.0.0.1:9"),
}


def _poll_once(sock: zmq.Socket) -> None:
    poller = zmq.Poller()
    poller.register(sock, zmq.POLLIN)
    assert poller.poll(LONG * 1000)  # a poll(0) lets the hub look first


def _refused(call: Callable[..., object], *args: object) -> None:
    with pytest.raises(zmq.ZMQError):
        call(*args)


@pytest.mark.parametrize("eater", EATERS)
@pytest.mark.parametrize("how", ["recv", "poll"])
def test_no_wake_up_is_lost(context: zmq.Context, eater: str, how: str) -> None:
    """Whatever call processes the message's arrival before the hub looks, who waits for it wakes (zmq.green: up to 11.6 s)."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://eaten")
    b.connect("inproc://eaten")
    for _ in range(3):
        waiter = gevent.spawn(a.recv if how == "recv" else a.poll)
        gevent.sleep(0)
        b.send(b"x")  # over inproc it is there at once
        EATERS[eater](a)
        assert waiter.get(timeout=LONG / 4) == (b"x" if how == "recv" else zmq.POLLIN)
        if how == "poll":
            assert a.recv() == b"x"


# Other threads.


def _in_thread(call: Callable[[], object]) -> object:
    """What a call returns in a native thread, or the exception that it raises there; the hub turns meanwhile."""

    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except (RuntimeError, zmq.ZMQError) as error:
            results.append(error)
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: not thread.is_alive())
    return results[0]


def test_a_socket_is_used_in_a_thread_that_did_not_make_it(context: zmq.Context) -> None:
    """It wakes by that thread's own hub, and afterwards by the maker's again (zmq.green: after 11.6 s)."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://threads")
    b.connect("inproc://threads")
    poller = zmq.Poller()
    poller.register(a, zmq.POLLIN)
    for call in (a.recv, lambda: a.poll() and a.recv(), lambda: poller.poll() and a.recv()):
        sending = gevent.spawn_later(2 * MS, b.send, b"x")
        assert _in_thread(call) == b"x"
        sending.join()
        sending = gevent.spawn_later(2 * MS, b.send, b"y")
        assert call() == b"y"
        sending.join()


CALLS: dict[str, Callable[[Any], object]] = {
    "recv": lambda sock: sock.recv(),
    "recv, NOBLOCK": lambda sock: sock.recv(zmq.NOBLOCK),
    "recv_multipart": lambda sock: sock.recv_multipart(timeout=0),
    "send": lambda sock: sock.send(b"x"),
    "send, NOBLOCK": lambda sock: sock.send_multipart([b"x", b"y"], zmq.NOBLOCK),
    "poll": lambda sock: sock.poll(),
    "poll(0)": lambda sock: sock.poll(0),
    "select": lambda sock: zmq.select([sock], [], [], 0),
}


@pytest.mark.parametrize("how", CALLS)
def test_two_threads_at_once_are_told(context: zmq.Context, how: str) -> None:
    """While a greenlet of one thread waits on a socket, operations of another thread raise RuntimeError and do nothing."""
    a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    a.bind("inproc://threads")
    b.connect("inproc://threads")
    waiter = gevent.spawn(a.recv)
    gevent.sleep(0)
    error = _in_thread(lambda: CALLS[how](a))
    assert isinstance(error, RuntimeError)
    assert "another thread" in str(error)
    b.send(b"x")
    assert waiter.get() == b"x"
    assert not b.poll(0)


def test_closed_by_another_thread(context: zmq.Context) -> None:
    """Who waits meets ENOTSOCK at once, though nothing else turns his hub; it was his limit, or never."""
    _run("""
        import threading, time
        import greensafe as zmq
        context = zmq.Context()
        sock = context.socket(zmq.PULL)

        def close():
            while not sock._waits.queue:
                time.sleep(0.001)
            time.sleep(0.01)  # the hub sleeps, without a timer
            sock.close()

        thread = threading.Thread(target=close)
        thread.start()
        try:
            sock.recv()
        except zmq.ZMQError as error:
            assert error.errno == zmq.ENOTSOCK
        thread.join()
        context.term()
    """)


# Monitors.


@pytest.mark.parametrize(
    "end",
    [
        lambda monitor, sock: (sock.disable_monitor(), sock.close()),
        lambda monitor, sock: sock.close(),
        lambda monitor, sock: (monitor().close(), sock.disable_monitor(), sock.close()),
        lambda monitor, sock: (sock.close(), monitor() and monitor().close()),
    ],
    ids=["disable first", "close the socket", "close the monitor", "close the socket, then the monitor"],
)
@pytest.mark.filterwarnings("ignore:Unclosed socket:ResourceWarning")
def test_a_monitor_stops_nothing(end: Callable[[Any, Any], object]) -> None:
    """In whichever order they end neither the hub nor libzmq stops, and the context can be terminated at once."""
    context = zmq.Context()
    rep, req = context.socket(zmq.REP), context.socket(zmq.REQ)
    monitor = weakref.ref(req.get_monitor_socket())
    assert req.get_monitor_socket() is monitor()
    req.connect(f"tcp://127.0.0.1:{rep.bind_to_random_port('tcp://127.0.0.1')}")
    req.send(b"x")
    assert rep.recv() == b"x"
    assert recv_monitor_message(req.get_monitor_socket())["event"]
    end(monitor, req)
    rep.close()
    context.term()


def test_a_monitor_that_nobody_reads(context: zmq.Context) -> None:
    """Its context goes on, whatever the number of events; libzmq stops it after 2000."""
    rep, req = context.socket(zmq.REP), context.socket(zmq.REQ)
    monitor = req.get_monitor_socket()
    assert monitor.rcvhwm == 0
    assert monitor.poll(0) == 0
    for _ in range(1100):
        req.bind("tcp://127.0.0.1:*")
        req.unbind(req.last_endpoint)
    req.connect(f"tcp://127.0.0.1:{rep.bind_to_random_port('tcp://127.0.0.1')}")
    req.send(b"x")
    assert rep.recv() == b"x"
    req.close()
    events = 0
    while recv_monitor_message(monitor)["event"] != zmq.EVENT_MONITOR_STOPPED:
        events += 1
    assert events > 2000
    monitor.close()


# Constructors that fail.


def test_constructors_that_fail_say_nothing_else() -> None:
    """The error reaches the caller, nothing is printed from a finaliser, and the context can be terminated."""
    _run("""
        import gc, resource
        import greensafe as zmq

        class Failing(zmq.Socket):
            def __init__(self, *args, **options):
                raise KeyError("own")

        class FailingContext(zmq.Context):
            def __init__(self, *args):
                raise KeyError("own")

        class Empty(zmq.Socket):
            def __init__(self):
                pass

        def use_up_the_descriptors():
            while True:
                made.append(context.socket(zmq.PULL))

        made = []
        context, ended, full = zmq.Context(), zmq.Context(), zmq.Context()
        ended.term()
        full.max_sockets = 1
        first = [full.socket(zmq.PULL) for _ in range(3)]  # as many as one that is monitored takes
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        for make, error in (
            (lambda: context.socket(999), zmq.ZMQError),
            (lambda: zmq.Socket(context, 999), zmq.ZMQError),
            (lambda: zmq.Socket(), TypeError),
            (lambda: zmq.Socket(None, zmq.REQ), TypeError),
            (lambda: context.socket(zmq.REQ, default_timeout="soon"), TypeError),
            (lambda: context.socket(zmq.REQ, default_timeout=float("nan")), ValueError),
            (lambda: context.socket(zmq.REQ, unknown=1), TypeError),
            (lambda: ended.socket(zmq.REQ), zmq.ZMQError),
            (lambda: zmq.Socket(ended, zmq.REQ), zmq.ZMQError),
            (lambda: full.socket(zmq.PULL), zmq.ZMQError),
            (lambda: Failing(context, zmq.REQ), KeyError),
            (lambda: Empty().recv(), AttributeError),
            (use_up_the_descriptors, zmq.ZMQError),
            (lambda: zmq.Context("many"), TypeError),
            (lambda: zmq.Context(-1), zmq.ZMQError),
            (FailingContext, KeyError),
        ):
            try:
                make()
            except error:
                pass
            else:
                raise AssertionError(make)
            gc.collect()
        context.destroy()
        for each in first:
            each.close()
        full.term()
    """)


# What pyzmq's options and arguments are there for.


def test_routing_id_and_group_are_passed_on(context: zmq.Context) -> None:
    """In a send that may wait as well; zmq.green drops them silently. (Without the draft sockets libzmq refuses them.)"""
    if zmq.has("draft"):
        server, client = context.socket(zmq.SERVER), context.socket(zmq.CLIENT)
        server.bind("inproc://draft")
        client.connect("inproc://draft")
        client.send(b"x")
        request = server.recv(copy=False)
        server.send(b"y", routing_id=request.routing_id)
        assert client.recv() == b"y"
        radio, dish = context.socket(zmq.RADIO), context.socket(zmq.DISH)
        dish.bind("inproc://group")
        dish.join("g")
        radio.connect("inproc://group")
        radio.send(b"z", group="g")
        assert dish.recv(copy=False).group == "g"
        return
    sock = context.socket(zmq.DEALER)
    sock.bind("inproc://draft")
    peer = context.socket(zmq.DEALER)
    peer.connect("inproc://draft")
    for options in ({"routing_id": 5}, {"group": "g"}):
        for send in (sock.send, sock.send_string, sock.send_multipart):
            with pytest.raises((RuntimeError, zmq.ZMQError, zmq.ZMQVersionError, AttributeError)):
                send({sock.send: b"x", sock.send_string: "x"}.get(send, [b"x"]), **options)
    assert peer.poll(0) == 0


@pytest.mark.skipif(not zmq.has("curve"), reason="this libzmq was built without CURVE")
def test_curve_options_are_passed_on(context: zmq.Context) -> None:
    """By attribute, by set and by setsockopt, as bytes; a client with the right key is answered."""
    public, secret = zmq.curve_keypair()
    assert zmq.curve_public(secret) == public
    rep, req = context.socket(zmq.REP), context.socket(zmq.REQ)
    rep.curve_server = True
    rep.set(zmq.CURVE_SECRETKEY, secret)
    own = zmq.curve_keypair()
    req.setsockopt(zmq.CURVE_SERVERKEY, public)
    req.curve_publickey, req.curve_secretkey = own
    req.connect(f"tcp://127.0.0.1:{rep.bind_to_random_port('tcp://127.0.0.1')}")
    req.send(b"sealed")
    assert rep.recv() == b"sealed"
    rep.send(b"too")
    assert req.recv() == b"too"


# What must not stop the hub, or stay.

ENDS: dict[str, Callable[[Any, Any], object]] = {
    "term": lambda context, sock: (gevent.spawn_later(20 * MS, sock.close), context.term()),
    "destroy": lambda context, sock: context.destroy(),
    "with": lambda context, sock: _leave(context, sock),
    "dropped socket": lambda context, sock: context.term(),
}


def _leave(context: zmq.Context, sock: zmq.Socket) -> None:
    with context, sock:
        pass


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("pending", ["nothing", "a message for nobody", "a waiter"])
@pytest.mark.filterwarnings("ignore:Unclosed socket:ResourceWarning")
def test_the_end_of_a_context_does_not_stop_the_hub(how: str, pending: str) -> None:
    """Whatever is open, pending or dropped: others run meanwhile, waiters are woken, and it ends."""
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 30
    waiter = None
    if pending == "a message for nobody":
        sock.connect("tcp://127.0.0.1:9")
        sock.send(b"x")
    elif pending == "a waiter":
        waiter = gevent.spawn(sock.recv)
        gevent.sleep(0)
    turns = [0]

    def count() -> None:
        while True:
            turns[0] += 1
            gevent.sleep(0)

    counter = gevent.spawn(count)
    if how == "dropped socket":
        if waiter is not None:
            waiter.kill()
            waiter = None
            gevent.sleep(0)
        end, sock = ENDS[how], None
        end(context, sock)
    else:
        ENDS[how](context, sock)
    assert turns[0]
    assert context.closed
    if waiter is not None:
        waiter.join()
        assert isinstance(waiter.exception, zmq.ZMQError)
        assert waiter.exception.errno in (zmq.ETERM, zmq.ENOTSOCK)
    counter.kill()


USES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda sock: None,
    "an idle watcher": lambda sock: sock.poll(2 * MS * 1000),
    "a Poller": lambda sock: _poll_briefly(sock),
    "a killed waiter": lambda sock: _kill(sock.recv),
    "a killed poll": lambda sock: _kill(sock.poll),
    "killed as it gives way": lambda sock: _kill(lambda: sock.poll(0)),
    "killed as it gives the loop a turn": lambda sock: _kill(lambda: _poll_late(sock)),
    "a killed Poller": lambda sock: _kill(lambda: _poller_poll(sock)),
    "a limit that ran out": lambda sock: _expire(sock),
    "a monitor": lambda sock: sock.get_monitor_socket(),
    "a shadow": lambda sock: zmq.Socket(sock).poll(0),
}


def _poll_briefly(sock: zmq.Socket) -> None:
    poller = zmq.Poller()
    poller.register(sock, zmq.POLLIN)
    assert poller.poll(2 * MS * 1000) == []


def _poll_late(sock: zmq.Socket) -> None:
    end = monotonic() + 2 * TURN
    while monotonic() < end:
        pass
    sock.poll(0)


def _kill(wait: Callable[[], object]) -> None:
    waiter = gevent.spawn(wait)
    gevent.sleep(0)
    waiter.kill()


def _expire(sock: zmq.Socket) -> None:
    with pytest.raises(zmq.OperationTimeout):
        sock.recv(timeout=MS)
    with zmq.move_on(MS):
        sock.recv()
    with gevent.Timeout(MS, False):
        sock.poll()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counts free anything."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore:Unclosed socket:ResourceWarning")
def test_a_socket_that_is_dropped_is_collected(no_collector: None, use: str) -> None:
    """Without close() it is closed as soon as nobody has it, whatever was done with it; its context can be terminated."""
    context = zmq.Context()
    for _ in range(20):
        sock = context.socket(zmq.PULL)
        USES[use](sock)
        dropped = weakref.ref(sock)
        del sock
        wait_until(lambda dropped=dropped: dropped() is None)  # the loop forgets a callback when it turns
    context.term()


# Kills at random moments.


INTERRUPTIONS = ["kill", "gevent.Timeout", "deadline", "timeout"]


@contextlib.contextmanager
def _interrupted(how: str, seconds: float) -> Iterator[None]:
    if how == "gevent.Timeout":
        with gevent.Timeout(seconds, False):
            yield
    elif how == "deadline":
        with zmq.move_on(seconds):
            yield
    else:
        yield


@pytest.mark.parametrize("how", INTERRUPTIONS)
@pytest.mark.parametrize("kinds", [(zmq.PULL, zmq.PUSH), (zmq.ROUTER, zmq.DEALER), (zmq.PAIR, zmq.PAIR)], ids=str)
def test_messages_stay_whole_when_everybody_is_interrupted_at_random(
    context: zmq.Context, pair: Pair, kinds: tuple[int, int], how: str
) -> None:
    """Two senders and two receivers on one pair of sockets, interrupted over and over: no half message, none lost or twice."""
    chance = random.Random(f"{how} {kinds}")
    context.setsockopt(zmq.RCVHWM, 2)
    context.setsockopt(zmq.SNDHWM, 2)
    a, b = pair(*kinds)
    total = dict.fromkeys((b"x", b"y"), 150)
    queued: list[list[bytes]] = []
    rounds: list[object] = []
    got: list[list[bytes]] = []
    waiting = {name: deque(_message(name, number) for number in range(total[name])) for name in total}

    def send(name: bytes) -> None:
        while waiting[name]:
            b.send_multipart(waiting[name][0], copy=chance.random() < 0.5, timeout=pause() if how == "timeout" else None)
            queued.append(waiting[name].popleft())
            if not waiting[name] and len(rounds) <= 4 and total[name] < 30_000:
                # However fast all this goes: on until somebody was interrupted.
                waiting[name].extend(_message(name, number) for number in range(total[name], total[name] + 150))
                total[name] += 150

    def receive() -> None:
        while len(got) < sum(total.values()):
            message = a.recv_multipart(timeout=pause() if how == "timeout" else None)
            got.append(message[1:] if a.type == zmq.ROUTER else message)

    def pause() -> float:
        return chance.choice([0, 1, 2]) * MS

    def persist(work: Callable[[], None], is_over: Callable[[], bool]) -> None:
        while not is_over():
            rounds.append(work)
            greenlet = gevent.spawn(_until, how, pause(), work)
            if how == "kill":
                gevent.sleep(pause())
                greenlet.kill()
            greenlet.join()

    workers = [gevent.spawn(persist, lambda name=name: send(name), lambda name=name: not waiting[name]) for name in waiting]
    workers += [gevent.spawn(persist, receive, lambda: len(got) == sum(total.values())) for _ in range(2)]
    gevent.joinall(workers, raise_error=True)
    for name in waiting:
        assert [each for each in got if each[0].startswith(name)] == [_message(name, number) for number in range(total[name])]
    assert len(got) == len(queued) == sum(total.values())
    assert len(rounds) > len(workers)


def _message(name: bytes, number: int) -> list[bytes]:
    head = b"%s%d" % (name, number)
    return [head, b"", *[head] * (number % 4), b"end of " + head]


def _until(how: str, seconds: float, work: Callable[[], None]) -> None:
    with contextlib.suppress(zmq.OperationTimeout), _interrupted(how, seconds):
        work()


# Where each fault of zmq.green is tested.

FAULTS = {
    "lost wake-ups": "test_faults.py::test_no_wake_up_is_lost",
    "lost wake-ups of NOBLOCK calls, recv_into and unbind": "test_waiting.py::test_no_lost_wake_up",
    "a writer that is not woken while another greenlet reads": "test_waiting.py::test_writer_is_woken",
    "the stall of 11.6 s": "test_faults.py::test_no_wake_up_is_lost",
    "AssertionError for a second waiter": "test_waiting.py::test_several_waiters_are_served_in_turn",
    "RCVTIMEO and SNDTIMEO ignored, however they are set": "test_waiting.py::test_rcvtimeo_is_honoured",
    "routing_id= and group= dropped": "test_faults.py::test_routing_id_and_group_are_passed_on",
    "term, destroy and `with` stop the hub": "test_faults.py::test_the_end_of_a_context_does_not_stop_the_hub",
    "a dropped socket is never collected": "test_faults.py::test_a_socket_that_is_dropped_is_collected",
    "a failing constructor prints an AttributeError": "test_faults.py::test_constructors_that_fail_say_nothing_else",
    "a closed socket in a Poller is standard input": "test_poll.py::test_closed_socket",
    "a socket that is closed while it is polled": "test_waiting.py::test_close_wakes_all_waiters",
    "ValueError for descriptors from 1024 on": "test_poll.py::test_descriptors_above_1024",
    "a Poller wakes a second late": "test_poll.py::test_another_greenlet_works_on_the_polled_socket",
    "poll(0) never yields": "test_poll.py::test_poll_of_zero_yields",
    "select blocks": "test_poll.py::test_select",
    "zmq_poll blocks": "test_poll.py::test_zmq_poll",
    "proxy blocks": "test_device.py::test_a_proxy_carries_requests_and_the_hub_turns",
    "proxy_steerable blocks": "test_device.py::test_a_steerable_proxy_obeys",
    "a device stalls in both directions": "test_device.py::test_no_message_is_lost_when_a_proxy_is_killed",
    "ThreadDevice under patch_all stops the hub": "../test_monkey.py::test_thread_device",
    "decorators make blocking sockets": "../test_monkey.py::test_decorators_make_green_contexts_and_sockets",
    "a ready loop starves others": "test_faults.py::test_a_loop_that_finds_everything_ready_starves_nobody",
    "a socket in another thread than its maker's": "test_faults.py::test_a_socket_is_used_in_a_thread_that_did_not_make_it",
    "fork": "test_forks.py::test_used_in_a_forked_child",
    "zero-copy sends under patch_all": "test_faults.py::test_zero_copy_messages_do_not_mix_under_patch_all",
    "CURVE options": "test_faults.py::test_curve_options_are_passed_on",
    "a user's gevent.Timeout swallowed": "test_faults.py::test_messages_stay_whole_when_everybody_is_interrupted_at_random",
    "a monitor whose PAIR is closed stops libzmq": "test_faults.py::test_a_monitor_stops_nothing",
    "recv on a REQ after its server's death, EFSM": "test_socket.py::test_req_survives_a_dead_server",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_test(fault: str) -> None:
    """The table above is true."""
    name, test = FAULTS[fault].split("::")
    assert f"\ndef {test}(" in (Path(__file__).parent / name).read_text()
