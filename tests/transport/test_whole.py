"""Tests of greensafe.green._whole and greensafe.interruptions: what a signal's handler raises tears no message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import wait_until
from interrupting import Interrupter, Interruption

import greensafe as zmq
from greensafe.hub import interruptions
from greensafe.hub.interruptions import has_called, is_interruption, is_of_zmq
from greensafe.transport import inlet as _inlet, outbox as _outbox, whole as _whole
from greensafe.transport.pump import Pump

pytestmark = [
    pytest.mark.usefixtures("limit"),
    # In a finalizer Python drops what is raised, and says so.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BODIES = [b"0", b"1", b"2"]


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What goes to the hub's error handler."""
    errors: list[BaseException] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda who, kind, error, trace: errors.append(error))
    return errors


def _numbers(*inside: str) -> Iterator[Interrupter]:
    """An Interrupter for each place that the loop's body comes by."""
    number = 0
    while True:
        interrupter = Interrupter(number, *inside)
        yield interrupter
        if not interrupter.has_raised:
            assert number > 20
            return
        number += 1


def _turn() -> None:
    try:
        gevent.sleep(0)
    except Interruption:
        pass


def test_a_pump_that_is_interrupted_anywhere(context: zmq.Context, reported: list[BaseException]) -> None:
    """Whatever place the exception comes at: each message is handed over once, and each answer leaves once, whole."""
    for interrupter in _numbers("green/", "transport/", "hub/"):
        got: list[list[bytes]] = []

        def once(frames: list[bytes], got: list[list[bytes]] = got) -> None:
            if not any(each is frames for each in got):
                got.append(frames)

        sock: plain.Socket[bytes] = plain.Socket(context, zmq.ROUTER)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.bind(f"inproc://pump-{interrupter.number}")
        pump = Pump(sock, got.append, lambda: None, on_interrupted=once)
        peer = plain.Socket(context, zmq.DEALER)
        peer.connect(f"inproc://pump-{interrupter.number}")
        with interrupter:
            _twice(pump.start)
            for body in BODIES:
                peer.send_multipart([body, b"", b"more"])
            for number in range(len(BODIES)):
                while len(got) <= number:
                    _turn()
                frames, send = got[number], (pump.send, pump.send_soon)[number % 2]
                try:
                    send(frames)
                except Interruption:
                    if not pump.outbox.has_taken(frames):
                        send(frames)
        answers: list[list[bytes]] = []
        wait_until(lambda peer=peer, answers=answers: _read(peer, answers) >= len(BODIES))
        gevent.sleep(0)
        _read(peer, answers)
        assert answers == [[body, b"", b"more"] for body in BODIES], interrupter.where
        pump.close(0)
        peer.close(0)


def _twice(act: Callable[[], object]) -> None:
    try:
        act()
    except Interruption:
        act()


def _read(peer: Any, answers: list[list[bytes]]) -> int:
    while peer.poll(0):
        answers.append(peer.recv_multipart())
    return len(answers)


def test_a_green_socket_that_is_interrupted_anywhere(context: zmq.Context, reported: list[BaseException]) -> None:
    """What was sent before and after arrives; what recv_multipart had read of a message is there for the next one."""
    for interrupter in _numbers("green/", "transport/", "hub/"):
        push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        pull.bind("inproc://green")
        push.connect("inproc://green")
        arrived, unsure = [], []
        with interrupter:
            for body in BODIES:
                try:
                    push.send_multipart([body, b"", b"more"])
                except Interruption:
                    unsure.append(body)
            _twice(lambda push=push: push.send_multipart([b"end", b""]))
            while not arrived or arrived[-1][0] != b"end":
                try:
                    arrived.append(pull.recv_multipart())
                except Interruption:
                    pass
        assert len(unsure) <= 1
        missing = [body for body in BODIES if [body, b"", b"more"] not in arrived]
        assert arrived[:-1] == [[body, b"", b"more"] for body in BODIES if body not in missing], interrupter.where
        assert set(missing) <= set(unsure), interrupter.where
        push.close()
        pull.close()


def test_a_req_and_a_rep_that_are_interrupted_anywhere(context: zmq.Context, reported: list[BaseException]) -> None:
    """Both can go on: the next request has its own answer."""
    for interrupter in _numbers("green/", "transport/", "hub/"):
        rep, req = context.socket(zmq.REP), context.socket(zmq.REQ)
        rep.linger = req.linger = 0
        rep.bind("inproc://lockstep")
        req.connect("inproc://lockstep")
        asked = False
        with interrupter:
            try:
                req.send_multipart([b"request", b"1"])
                asked = True
                frames = rep.recv_multipart()
                rep.send_multipart([b"answer", *frames])
                assert req.recv_multipart() == [b"answer", b"request", b"1"]
            except Interruption:
                pass
        if asked and interrupter.has_raised:
            rep.reset()
        while rep.poll(0):
            rep.recv_multipart()
            rep.send(b"old")
        req.reset()
        req.send(b"next")
        assert rep.recv() == b"next", interrupter.where
        rep.send(b"its answer")
        assert req.recv() == b"its answer", interrupter.where
        rep.close()
        req.close()


# Within pyzmq's own calls.

#: Code that stands where pyzmq's does: it calls `act`, and then raises, or before, as a handler that pyzmq has called.
_SOURCE = """
def {name}(act, raise_):
{padding}    return (act(), raise_())
def {name}_before(act, raise_):
    return (raise_(), act())
"""


def _handler(*_: object) -> None:
    raise TimeoutError("by a handler")


def _in_zmq(name: str, act: Callable[[], object], is_before: bool) -> object:
    """Call `act` as pyzmq's function of this name does, and have a handler raise behind it, or before."""
    padding = "" if is_before else "\n" * (interruptions._lines()[name] + 1)
    source = _SOURCE.format(name=name, padding=padding)
    found: dict[str, Any] = {}
    exec(compile(source, f"/somewhere/{interruptions._FILE}", "exec"), found)
    code = found[f"{name}_before" if is_before else name]
    code.__code__ = code.__code__.replace(co_name=f"zmq.backend.cython._zmq.{name}")
    return code(act, _handler)


def test_pyzmqs_source_is_read() -> None:
    """Where libzmq is called in it is known for each function that sends or receives: has pyzmq changed?"""
    assert set(interruptions._lines()) == set(interruptions._CALLS)


def test_where_an_exception_came_from(monkeypatch: pytest.MonkeyPatch, context: zmq.Context) -> None:
    """A handler's is told from pyzmq's own and from a mistake, and whether libzmq was called before is known."""
    monkeypatch.setattr(interruptions, "_handlers", lambda: {_handler.__code__})
    for name in ("_send_copy", "_recv_frame"):
        for is_before in (False, True):
            with pytest.raises(TimeoutError) as caught:
                _in_zmq(name, lambda: None, is_before)
            assert (is_interruption(caught.value), is_of_zmq(caught.value)) == (True, False)
            assert has_called(caught.value) is not is_before
    sock = plain.Socket(context, zmq.PULL)
    with pytest.raises(plain.Again) as again:
        sock.recv(zmq.NOBLOCK)
    sock.close(0)
    assert (is_interruption(again.value), is_of_zmq(again.value)) == (False, True)
    assert not is_interruption(ValueError("a mistake"))
    assert is_interruption(KeyboardInterrupt())


@pytest.mark.parametrize("is_before", [False, True])
@pytest.mark.parametrize("index", [1, 2, 3])
def test_a_send_that_pyzmq_interrupts(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, reported: list[BaseException], index: int, is_before: bool
) -> None:
    """The message goes out once and whole, whichever of its frames the handler has come at."""
    monkeypatch.setattr(interruptions, "_handlers", lambda: {_handler.__code__})
    sock: plain.Socket[bytes] = plain.Socket(context, zmq.DEALER)
    peer = plain.Socket(context, zmq.DEALER)
    peer.bind("inproc://peer")
    sock.connect("inproc://peer")
    pump, calls, real = Pump(sock, lambda frames: None, lambda: None), [0], _outbox._send

    def send(*args: Any) -> Any:
        calls[0] += 1
        return _in_zmq("_send_copy", lambda: real(*args), is_before) if calls[0] == index else real(*args)

    monkeypatch.setattr(_outbox, "_send", send)
    frames = [b"1", b"2", b"3"]
    with pytest.raises(TimeoutError):
        pump.send(frames)
    if not pump.outbox.has_taken(frames):
        assert (index, is_before) == (1, True)
        pump.send(frames)
    pump.send([b"next"])
    assert [peer.recv_multipart(zmq.NOBLOCK) for _ in range(2)] == [frames, [b"next"]]
    pump.close(0)
    peer.close(0)


@pytest.mark.parametrize(("index", "first", "why"), [(1, [b"2", b"3"], "LOST_FIRST"), (2, [b"1"], "INTERRUPTED")])
def test_a_frame_that_pyzmq_loses(
    context: zmq.Context,
    monkeypatch: pytest.MonkeyPatch,
    reported: list[BaseException],
    index: int,
    first: list[bytes],
    why: str,
) -> None:
    """The message is not handed over with a gap: it is told what is left of it, and the next one is whole."""
    monkeypatch.setattr(interruptions, "_handlers", lambda: {_handler.__code__})
    calls, real = [0], _whole._recv

    def recv(*args: Any) -> Any:
        calls[0] += 1
        return _in_zmq("_recv_frame", lambda: real(*args), False) if calls[0] == index else real(*args)

    monkeypatch.setattr(_whole, "_recv", recv)
    got: list[list[bytes]] = []
    torn: list[tuple[list[bytes], str]] = []
    sock: plain.Socket[bytes] = plain.Socket(context, zmq.DEALER)
    sock.bind("inproc://loses")
    peer = plain.Socket(context, zmq.DEALER)
    peer.connect("inproc://loses")
    peer.send_multipart([b"1", b"2", b"3"])
    peer.send_multipart([b"next", b"whole"])
    pump = Pump(sock, got.append, lambda: None, on_torn=lambda *args: torn.append(args))
    pump.start()
    wait_until(lambda: got)
    assert got == [[b"next", b"whole"]]
    assert torn == [(first, getattr(_inlet, why))]
    assert [type(error) for error in reported] == [TimeoutError]
    pump.close(0)
    peer.close(0)
