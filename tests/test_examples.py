"""Every example is run as a user would run it: as a process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from typing import Any

import gevent
import pytest
from helpers import HANG, LONG, MS, ROOT, run_python, running

import greensafe as zmq
from greensafe import Client, Server

EXAMPLES = ROOT / "examples"

pytestmark = [pytest.mark.check, pytest.mark.usefixtures("limit")]


def _running(name: str, *args: str) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    return running([sys.executable, EXAMPLES / name, *args])


def test_hello() -> None:
    """The hello client gets its answer, is told of the failing handler, and is answered again; SIGTERM ends the server."""
    with _running("hello_server.py", "tcp://127.0.0.1:0") as (server, endpoint):
        result = run_python(EXAMPLES / "hello_client.py", endpoint)
        assert result.out.splitlines() == [
            "Received reply: this is the answer to Hello",
            "The server failed: INTERNAL: Unfortunately this failed (Exception)",
            "Received reply: this is the answer to Hello again",
        ], result.err
        server.send_signal(signal.SIGTERM)
        assert server.wait(LONG) == 0


def test_timeout_socket() -> None:
    """The seed's Socket returns None when nobody answers."""
    result = run_python(EXAMPLES / "timeout_socket.py", "tcp://127.0.0.1:9")
    assert result.out == "no reply within 0.2 s\n", result.err


def test_watchdog_loop() -> None:
    """The loop answers for a hanging, a failing and an undecodable request, and serves the next."""
    with _running("watchdog_loop.py", "tcp://127.0.0.1:0") as (server, endpoint), zmq.Context() as context:
        with context.socket(zmq.REQ) as req:
            req.connect(endpoint)
            answers = []
            for body in (b"4", b"0", b"{", b"hang", b"2", b"stop"):
                req.send(body)
                answers.append(req.recv(timeout=LONG))
        errors = [zmq.RemoteError.from_reply(answer) for answer in answers]
        assert [error and error.code for error in errors] == [
            None,
            "INTERNAL",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            None,
            None,
        ]
        assert (answers[0], answers[4], answers[5]) == (b"0.25", b"0.5", b"bye")
        assert server.wait(LONG) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="needs SIGUSR2")
def test_spinning_handler_is_interrupted() -> None:
    """With preempt=True the handler alone is ended at its deadline; the log names it, and the next request is served."""
    result = run_python(EXAMPLES / "spinning_handler.py", "preempt")
    assert result.out.splitlines() == [
        "this is the answer to Hello",
        "DEADLINE_EXCEEDED: the handler did not answer in time (DeadlineExceeded)",
        "this is the answer to Hello again",
    ], result.err
    assert result.code == 0
    assert "in count_for_ever" in result.err


def test_spinning_handler_ends_its_process() -> None:
    """With exit_when_blocked the process ends with code 70, and the log says why and in whose code."""
    result = run_python(EXAMPLES / "spinning_handler.py", "exit")
    assert result.out == "this is the answer to Hello\n", result.err
    assert result.code == 70
    assert "ends itself with code 70" in result.err
    assert "in count_for_ever" in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
def test_rolling_restart() -> None:
    """Six restarts of two servers' processes, each of which exits with 0, and none of the client's requests fails."""
    result = run_python(EXAMPLES / "rolling_restart.py", limit=3 * HANG)
    assert result.code == 0, result.out + result.err
    assert result.err == ""
    assert result.out.count("gets SIGTERM") == result.out.count("has exited with code 0;") == 6
    *_, of_a, of_b, last = result.out.splitlines()
    answered = [int(number) for line in (of_a, of_b) for number in re.findall(r"\d+(?= \+| requests)", line)]
    assert len(answered) == 8, result.out
    assert min(answered) >= 100  # so every process has had its share
    assert re.match(rf"{sum(answered)} requests, 0 failed; ", last), result.out


def test_overload_waits() -> None:
    """A thousand requests of one client are all answered, and another one's are while most of them still wait."""
    lines = _overload("wait")
    assert "polite, one after the other: 10 answered" in lines[1]
    backlog = re.search(r"received=1010 .* backlog=(\d+) failures={}", lines[2])
    assert backlog is not None and int(backlog[1]) > 0
    assert "greedy: 1000 answered" in lines[3]
    assert "received=1010 answered=1010 running=0 backlog=0 failures={}" in lines[4]


def test_overload_rejects() -> None:
    """What there is no place for is rejected; a second endpoint takes it without an error, retries wait until there is one."""
    lines = _overload("reject")
    assert "received=1000 answered=996 running=4 backlog=0 failures={'RESOURCE_EXHAUSTED': 996}" in lines[0]
    assert "polite: 1 RESOURCE_EXHAUSTED" in lines[1]
    assert "with a second endpoint: 10 answered" in lines[2]
    assert "retries=0" in lines[3]
    assert "with retries: 1 answered" in lines[4]
    retried = re.search(r"rejections=(\d+) retries=(\d+)", lines[5])
    assert retried is not None and int(retried[1]) == int(retried[2]) >= 3
    assert "greedy: 996 RESOURCE_EXHAUSTED" in lines[6]
    assert "greedy: 4 answered" in lines[7]


def _overload(mode: str) -> list[str]:
    result = run_python(EXAMPLES / "overload.py", mode, limit=2 * HANG)
    assert result.code == 0, result.out + result.err
    assert result.err == ""
    return result.out.splitlines()


def test_wsgi_app(context: zmq.Context) -> None:
    """The web application answers 200, 502 when the handler fails and 504 when it does not answer in time."""

    def handler(request: Any) -> bytes:
        if request.body == b"/fail":
            raise ValueError("no")
        if request.body == b"/hang":
            gevent.sleep(LONG)
        return b"you asked for " + bytes(request.body)

    with Server("tcp://127.0.0.1:0", handler, deadline=2 * LONG, context=context) as server:
        assert server.endpoint is not None
        with _running("wsgi_app.py", server.endpoint, "0") as (_, port):
            pool = gevent.get_hub().threadpool
            for path, status in (("/x", 200), ("/fail", 502), ("/hang", 504), ("/x", 200)):
                assert pool.apply(_fetch, (f"http://127.0.0.1:{port}{path}",))[0] == status
        server.stop(0)


def _fetch(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=LONG) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_demo() -> None:
    """`make demo` shows every case and finds greensafe's side as promised."""
    result = run_python(EXAMPLES / "demo.py", limit=9 * HANG)
    assert result.code == 0, result.out + result.err
    assert result.out.count("stuck, given up on") == 8
    assert "As promised" in result.out


# Programs as zmq.green's own examples, with the import changed.


def test_like_zmq_green_reqrep() -> None:
    """REQ and REP in two greenlets."""
    with zmq.Context() as context:

        def server() -> None:
            with context.socket(zmq.REP) as rep:
                rep.bind("inproc://polltest")
                for _ in range(10):
                    rep.send(rep.recv())

        def client() -> list[bytes]:
            with context.socket(zmq.REQ) as req:
                req.connect("inproc://polltest")
                answers = []
                for number in range(10):
                    req.send(b"%d" % number)
                    answers.append(req.recv())
                return answers

        served, asked = gevent.spawn(server), gevent.spawn(client)
        gevent.joinall([served, asked], raise_error=True)
        assert asked.value == [b"%d" % number for number in range(10)]


def test_like_zmq_green_poll() -> None:
    """One greenlet polls two sockets while others send."""
    with (
        zmq.Context() as context,
        context.socket(zmq.PULL) as one,
        context.socket(zmq.PULL) as two,
        context.socket(zmq.PUSH) as to_one,
        context.socket(zmq.PUSH) as to_two,
    ):
        one.bind("inproc://one")
        two.bind("inproc://two")
        to_one.connect("inproc://one")
        to_two.connect("inproc://two")
        poller = zmq.Poller()
        poller.register(one, zmq.POLLIN)
        poller.register(two, zmq.POLLIN)
        gevent.spawn_later(2 * MS, to_one.send, b"1")
        gevent.spawn_later(4 * MS, to_two.send, b"2")
        got = []
        while len(got) < 2:
            got += [sock.recv() for sock, _ in poller.poll(LONG * 1000)]
        assert got == [b"1", b"2"]
        assert poller.poll(1) == []


def test_like_zmq_green_pubsub() -> None:
    """PUB and SUB with a topic, in two greenlets."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as pub, context.socket(zmq.SUB) as sub:
        pub.bind("inproc://news")
        sub.connect("inproc://news")
        sub.subscribe("a")
        assert pub.recv() == b"\x01a"
        reader = gevent.spawn(sub.recv_multipart)
        pub.send_multipart([b"b", b"no"])
        pub.send_multipart([b"a", b"yes"])
        assert reader.get() == [b"a", b"yes"]


def test_like_zmq_green_device() -> None:
    """A device between a REQ and a REP."""
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as front,
        context.socket(zmq.DEALER) as back,
        context.socket(zmq.REQ) as req,
        context.socket(zmq.REP) as rep,
    ):
        front.bind("inproc://front")
        back.bind("inproc://back")
        req.connect("inproc://front")
        rep.connect("inproc://back")
        device = gevent.spawn(zmq.device, zmq.QUEUE, front, back)
        req.send(b"x")
        assert rep.recv() == b"x"
        rep.send(b"y")
        assert req.recv() == b"y"
        device.kill()


def test_client_of_a_device(context: zmq.Context) -> None:
    """greensafe's Client and Server talk through two devices."""
    with Server("inproc://server", lambda request: request.body, deadline=LONG, context=context):
        devices = []
        for name, target in (("inner", "server"), ("outer", "inner")):
            front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
            front.bind(f"inproc://{name}")
            back.connect(f"inproc://{target}")
            devices.append(gevent.spawn(zmq.device, zmq.QUEUE, front, back))
        with Client("inproc://outer", context=context) as client:
            assert [client.request(b"%d" % number) for number in range(20)] == [b"%d" % number for number in range(20)]
        gevent.killall(devices)
