"""What becomes of requests when a signal's handler raises, at whatever place of the library's own code."""

from __future__ import annotations

from time import monotonic

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, ROOT, run_python, wait_until

import greensafe as zmq
from greensafe import Client

pytestmark = pytest.mark.usefixtures("limit")

#: Both in a process of its own, whose hub begins inside an Interrupter.
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import logging, gevent, zmq as plain, greensafe as zmq
from greensafe.transport import pump as _pump
from interrupting import Interrupter, Interruption

logging.disable(logging.CRITICAL)
_pump.LOOK_AFTER = 0.01
CLIENTS = ("client/", "loops/restarts", "sansio/requester", "sansio/due", "green/_", "transport/", "hub/")

def turns(count):
    for _ in range(count):
        try:
            gevent.sleep(0)
        except Interruption:
            pass

def serve(number):
    context = zmq.Context()
    server = zmq.Server("inproc://s", handler, deadline=30, context=context)
    server.start()
    peer = plain.Socket(context, zmq.DEALER)
    peer.connect("inproc://s")
    for body in (b"0", b"1"):
        peer.send_multipart([body, b"", body])
    with Interrupter(number) as interrupter:
        gevent.get_hub().handle_error = lambda *args: None
        turns(8)
    answers = []
    for _ in range(1000):
        turns(1)
        while peer.poll(0):
            answers.append(peer.recv_multipart())
        if len(answers) > 1 and not server.stats.running:
            break
        gevent.sleep(0.001)
    assert sorted(answer[0] for answer in answers) == [b"0", b"1"], (interrupter.where, answers)
    for name, empty, body in answers:
        assert empty == b"" and (body == name or b"error" in body), (interrupter.where, answers)
    left = server.stats.inflight, server.stats.running, server._watchdog.load
    assert left == (0, 0, 0), (interrupter.where, left)
    server.stop(0)
    peer.close(0)
    context.term()
    return interrupter.has_raised

def handler(request):
    return request.reply(request.body) if request.body == b"1" else request.body

def ask(number):
    context = zmq.Context()
    server = zmq.Server("inproc://s", lambda request: request.body, deadline=30, context=context)
    server.start()
    client = zmq.Client("inproc://s", context=context, heartbeat=None)
    client.request(b"first")
    with Interrupter(number, *CLIENTS) as interrupter:
        calls = [gevent.spawn(client.request, body) for body in (b"0", b"1")]
        turns(10)
    gevent.joinall(calls, timeout=30)
    for call, body in zip(calls, (b"0", b"1")):
        assert call.value == body or isinstance(call.exception, Interruption), (interrupter.where, call)
    assert client.request(b"next", timeout=30) == b"next", interrupter.where
    client.close()
    server.stop(0)
    context.term()
    return interrupter.has_raised

number = 0
while {act}(number):
    number += 1
print(number)
"""


@pytest.mark.parametrize("act", ["serve", "ask"])
def test_requests_that_are_interrupted_anywhere(act: str) -> None:
    """A server answers each once, and nothing is left. A client's end: with the answer, or the exception if it is theirs."""
    result = run_python(PROGRAM.format(tests=str(ROOT / "tests"), act=act))
    assert result.code == 0, result.err
    assert int(result.out) > 50


def test_a_limit_comes_though_the_server_floods_its_client(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends faster than it is read neither stops the hub nor holds a limit up."""
    monkeypatch.setattr("greensafe.transport.pump.DRAIN", 0.0)
    flooder = plain.Socket(context, zmq.ROUTER)
    flooder.set_hwm(0)
    flooder.bind("tcp://127.0.0.1:0")
    endpoint = flooder.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    with Client(endpoint, context=context, heartbeat=None) as client:
        call = gevent.spawn(client.request, b"x", timeout=50 * MS)
        wait_until(lambda: flooder.poll(0))
        name = flooder.recv_multipart()[0]
        end = monotonic() + LONG
        while not call.ready() and monotonic() < end:
            for _ in range(200):
                flooder.send_multipart([name, b"no header", b"", b""])
            gevent.sleep(0)
        assert isinstance(call.exception, zmq.OperationTimeout)
    flooder.close(0)


def test_a_reply_behind_a_flood_is_not_lost_when_the_connection_is(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one drain reads little, all that had arrived is read before a request is called lost."""
    monkeypatch.setattr("greensafe.transport.pump.DRAIN", 0.0)
    monkeypatch.setattr("greensafe.transport.inbox.BATCH", 8)
    flooder = plain.Socket(context, zmq.ROUTER)
    flooder.bind("tcp://127.0.0.1:0")
    endpoint = flooder.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    with Client(endpoint, context=context, heartbeat=None) as client:
        call = gevent.spawn(client.request, b"x")
        wait_until(lambda: flooder.poll(0))
        name, *envelope, _ = flooder.recv_multipart()
        client._channels[0]._pump.stop()  # nothing is read before the connection is lost
        for _ in range(900):
            flooder.send_multipart([name, b"no header", b"", b""])
        flooder.send_multipart([name, *envelope, b"the answer"])
        flooder.close(1000)
        assert call.get() == b"the answer"
