"""Tests of greensafe.client.channel, through a Client: one endpoint, and all that can be wrong with it."""

from __future__ import annotations

import errno
import logging
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, run_python, running, wait_until
from zmtp import Listener

import greensafe as zmq
from greensafe import Client, Disconnected, OperationTimeout, PeerError, PeerSilent, Refused, Request, Server, Unreachable
from greensafe.auth import Authenticator
from greensafe.client.channel import SETTLE, SHY
from greensafe.client.problems import LOST, Loss
from greensafe.hub import log_limiter as seldom
from greensafe.sansio.requester import Connection
from greensafe.testing import FaultyLink

pytestmark = pytest.mark.usefixtures("limit")

needs_curve = pytest.mark.skipif(not zmq.has("curve"), reason="this libzmq was built without CURVE")

#: A heartbeat limit for tests in which its end is waited for, and nobody is slow.
SHORT = 300 * MS

ANY_PORT = "tcp://127.0.0.1:0"


@pytest.fixture(params=["tcp", "ipc"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with Listener(ANY_PORT if request.param == "tcp" else f"ipc://{tmp_path}/s") as made:
        yield made


def _echo(request: Request) -> bytes:
    return request.body


def _error_of(client: Client, kind: type[PeerError], endpoint: str, maybe_executed: bool) -> PeerError:
    """What a request ends with, checked for all that an error of this kind tells."""
    with pytest.raises(kind) as caught:
        client.request(b"x")
    error = caught.value
    assert type(error) is kind
    assert error.endpoint == endpoint
    assert error.request_id is not None
    assert len(bytes.fromhex(error.request_id)) == 16
    assert error.maybe_executed is maybe_executed
    assert endpoint in str(error)
    return error


def _bound_again(endpoint: str, handle: Any, context: zmq.Context) -> Server:
    """A server where another socket was a moment ago: libzmq gives the place back some time after the close."""
    server = Server(endpoint, handle, deadline=LONG, context=context)

    def start() -> bool:
        try:
            server.start()
        except zmq.ZMQError as error:
            assert error.errno == zmq.EADDRINUSE
        return server.started

    wait_until(start)
    return server


def _ask_until_answered(client: Client, *errors: type[PeerError]) -> bytes:
    """Ask again after each error that says that nobody was there, as a program would."""

    def ask() -> bytes | None:
        try:
            return client.request(b"x")
        except errors as error:
            assert not error.maybe_executed
            return None

    answer: bytes = wait_until(ask)
    return answer


# Refused.


@needs_curve
def test_credentials_that_are_refused(context: zmq.Context) -> None:
    """A client whose key is not known is Refused at once; when the key is known it is served without being made anew."""
    server_public, server_secret = plain.curve_keypair()
    known: list[bytes] = []

    class Keys:
        def callback(self, domain: str, key: bytes) -> bool:
            return key in known

    with Authenticator(context) as auth, zmq.Context() as own:
        auth.configure_curve_callback(credentials_provider=Keys())
        router = context.socket(plain.ROUTER)
        router.curve_server, router.curve_secretkey = True, server_secret
        router.bind("tcp://127.0.0.1:*")
        own.curve_publickey, own.curve_secretkey = plain.curve_keypair()
        own.curve_serverkey = server_public
        endpoint = router.last_endpoint.decode()
        with Client(endpoint, context=own) as client:
            assert "400" in str(_error_of(client, Refused, endpoint, False))
            _error_of(client, Refused, endpoint, False)
            known.append(plain.curve_public(own.curve_secretkey))
            answering = gevent.spawn(lambda: router.send_multipart(router.recv_multipart()))
            assert _ask_until_answered(client, Refused) == b"x"
            answering.get()


@needs_curve
def test_mechanisms_that_differ(context: zmq.Context) -> None:
    """A plain client at a CURVE server is Refused at once."""
    router = context.socket(plain.ROUTER)
    router.curve_server, router.curve_secretkey = True, plain.curve_keypair()[1]
    router.bind("tcp://127.0.0.1:*")
    endpoint = router.last_endpoint.decode()
    with Client(endpoint, context=context) as client:
        for _ in range(2):
            assert "mechanism" in str(_error_of(client, Refused, endpoint, False))


@needs_curve
def test_a_wrong_key_of_the_server(context: zmq.Context) -> None:
    """A client that has another server's key cannot tell it from a server that dies: Unreachable, Refused in the end."""
    router = context.socket(plain.ROUTER)
    router.curve_server, router.curve_secretkey = True, plain.curve_keypair()[1]
    router.bind("tcp://127.0.0.1:*")
    endpoint = router.last_endpoint.decode()
    with zmq.Context() as own:
        own.curve_publickey, own.curve_secretkey = plain.curve_keypair()
        own.curve_serverkey = plain.curve_keypair()[0]
        with Client(endpoint, context=own, wait=False) as client:
            assert "CURVE" in str(_error_of(client, Unreachable, endpoint, False))
        with Client(endpoint, context=own, heartbeat=SHORT) as client:
            assert "CURVE" in str(_error_of(client, Refused, endpoint, False))


@pytest.mark.parametrize(("transport", "kind"), [("tcp", "PUB"), ("tcp", "PULL"), ("tcp", "REQ"), ("ipc", "PUB")])
def test_a_socket_of_the_wrong_type(context: zmq.Context, tmp_path: Path, transport: str, kind: str) -> None:
    """Who is no REP, ROUTER or DEALER does not answer: Refused at once, until somebody who does has taken the place."""
    wrong = context.socket(getattr(plain, kind))
    wrong.bind("tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/s")
    endpoint = wrong.last_endpoint.decode()
    with Client(endpoint, context=context) as client:
        for _ in range(2):
            assert "type" in str(_error_of(client, Refused, endpoint, False))
        wrong.close(0)
        with _bound_again(endpoint, _echo, context):
            assert _ask_until_answered(client, Refused) == b"x"


def test_an_http_server(context: zmq.Context, listener: Listener) -> None:
    """Somebody who speaks another protocol is Unreachable, and Refused when it goes on for as long as the limit."""

    def serve() -> None:
        while True:
            with listener.accept_raw() as sock:
                sock.recv(100)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    serving = gevent.spawn(serve)
    with Client(listener.endpoint, context=context, wait=False) as client:
        _error_of(client, Unreachable, listener.endpoint, False)
    with Client(listener.endpoint, context=context, heartbeat=SHORT) as client:
        assert "ZeroMQ" in str(_error_of(client, Refused, listener.endpoint, False))
    serving.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts nothing here")
def test_one_of_many_tries_is_no_peer_of_zmtp_2(context: zmq.Context) -> None:
    """What a connection has received tells only after it has stood for a while, however long its socket has tried others."""
    with Listener(ANY_PORT) as listener, Client(listener.endpoint, context=context, heartbeat=LONG) as client:
        asking = gevent.spawn(client.request, b"x")
        channel = client._channels[0]
        for _ in range(2):
            with listener.accept_raw() as sock:
                channel._opened_at -= 10 * SHY
                wait_until(lambda: channel._connected_at < math.inf)
                sock.sendall(b"\xff")  # the first byte of any greeting, and of many that is none
                wait_until(lambda: channel._sample().received)
                channel.look(channel._connected_at + SHY / 2)
                assert not channel.is_up
            wait_until(lambda: channel._connected_at == math.inf)
        with listener.accept_raw() as sock:
            wait_until(lambda: channel._connected_at < math.inf)
            sock.sendall(b"\xff")
            wait_until(lambda: channel._sample().received)
            channel.look(channel._connected_at + 2 * SHY)
            assert channel.is_up
        asking.kill()


def test_a_server_that_dies_as_it_starts_more_than_once(context: zmq.Context, tmp_path: Path) -> None:
    """Handshakes that fail count as hopeless only if nothing else was there between: a server may fail as often as it likes."""

    def hang_up(listener: Listener) -> None:
        while True:
            listener.accept_raw().close()

    path = tmp_path / "s"
    with Client(f"ipc://{path}", context=context, heartbeat=SHORT, wait=False) as client:
        for _ in range(3):
            with Listener(f"ipc://{path}") as listener:
                hanging_up = gevent.spawn(hang_up, listener)
                wait_until(lambda: "handshake" in str(_error_of(client, Unreachable, f"ipc://{path}", False)))
                hanging_up.kill()
            path.unlink()
            wait_until(lambda: "nobody" in str(_error_of(client, Unreachable, f"ipc://{path}", False)))
            gevent.sleep(SHORT)


def test_somebody_who_only_listens(context: zmq.Context, listener: Listener) -> None:
    """Who accepts and says nothing is PeerSilent; nothing was delivered."""
    with Client(listener.endpoint, context=context, heartbeat=SHORT) as client:
        error = _error_of(client, PeerSilent, listener.endpoint, False)
        assert isinstance(error, PeerSilent)
        assert error.silent == "process"


def test_a_handshake_whose_limit_was_slept_away(context: zmq.Context, listener: Listener) -> None:
    """This process did not turn meanwhile, so it cannot tell: the request waits for the next handshake, which tells."""
    with Client(listener.endpoint, context=context, heartbeat=SHORT) as client:
        (channel,) = client._channels
        asked = gevent.spawn(client.request, b"x")
        wait_until(lambda: channel._connected_at < math.inf)
        time.sleep(1.5 * SHORT)
        wait_until(lambda: client.stats.endpoints[0].failed_attempts)
        assert not asked.dead
        with pytest.raises(PeerSilent, match="nobody answers the handshake"):
            asked.get()


def test_a_connection_that_ends_while_this_process_is_stopped(context: zmq.Context, listener: Listener) -> None:
    """What libzmq had read may only be on its way when the time for that is over: it gets it once more."""
    with Client(listener.endpoint, context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        listener.accept().receive()
        (channel,) = client._channels
        channel._on_settled(time.monotonic() - 2 * SETTLE)
        assert not client.stats.endpoints[0].losses
        with pytest.raises(Disconnected):
            asked.get()


# Unreachable.


def test_nobody_then_somebody(context: zmq.Context, tmp_path: Path) -> None:
    """wait=False: Unreachable while nobody is there, answered as soon as a server is."""
    endpoint = f"ipc://{tmp_path}/s"
    with Client(endpoint, context=context, wait=False) as client:
        for _ in range(2):
            _error_of(client, Unreachable, endpoint, False)
        with Server(endpoint, _echo, deadline=LONG, context=context):
            assert _ask_until_answered(client, Unreachable) == b"x"


def test_who_hangs_up_after_each_handshake_is_not_hammered(context: zmq.Context, listener: Listener) -> None:
    """A connection that is lost as soon as it was made is made again after a pause that grows."""
    accepted = 0

    def serve() -> None:
        nonlocal accepted
        while True:
            connection = listener.accept()
            accepted += 1
            connection.close()

    serving = gevent.spawn(serve)
    with Client(listener.endpoint, context=context, retries=1000) as client:
        with pytest.raises((OperationTimeout, Disconnected)):
            client.request(b"x", timeout=500 * MS, idempotent=True)
    serving.kill()
    assert accepted < 20


# What arrived before the end.


@pytest.mark.parametrize(("how", "size"), [("FIN", 1), ("FIN", 200_000), ("RST", 1), ("garbage", 1), ("garbage", 200_000)])
def test_a_reply_with_the_end_right_behind_it(context: zmq.Context, listener: Listener, how: str, size: int) -> None:
    """A reply that arrived is delivered, though the connection's end was known at the same moment."""

    def serve() -> None:
        while True:
            connection = listener.accept()
            header, empty, _ = connection.receive()
            connection.send([header, empty, bytes(size)], b"\xff" * 20 if how == "garbage" else b"")
            if how == "RST":
                gevent.sleep(5 * MS)  # a RST throws away what the client's kernel has not handed over
            connection.close(is_reset=how == "RST")

    serving = gevent.spawn(serve)
    for _ in range(20):  # a client each: one that is hung up on again and again makes pauses
        with Client(listener.endpoint, context=context) as client:
            assert len(client.request(b"x")) == size
    serving.kill()


def test_nothing_is_sent_on_a_connection_that_is_known_to_be_lost(context: zmq.Context, listener: Listener) -> None:
    """A request that comes while what had arrived is still read goes to the next connection, without an error."""
    with Client(listener.endpoint, context=context) as client:
        asked = gevent.spawn(client.request, b"lost")
        connection = listener.accept()
        connection.receive()
        connection.sock.sendall(b"\xff" * 50)  # which libzmq does not follow by another event
        channel = client._channels[0]
        while not channel._is_dying:
            gevent.sleep(0)
        late = gevent.spawn(client.request, b"late")
        again = listener.accept()
        frames = again.receive()
        assert frames[-1] == b"late"
        again.send(frames)
        assert late.get() == b"late"
        with pytest.raises(Disconnected):
            asked.get()


@pytest.mark.parametrize("transport", ["tcp", "ipc", "inproc"])
def test_a_server_that_is_gone_after_its_reply(context: zmq.Context, tmp_path: Path, transport: str) -> None:
    """Of two requests the one that was answered gets its reply, the other Disconnected, each time."""
    endpoint = {"tcp": ANY_PORT, "ipc": f"ipc://{tmp_path}/s", "inproc": "inproc://s"}[transport]
    for _ in range(20):
        router = context.socket(plain.ROUTER)
        router.bind(endpoint.replace(":0", ":*"))
        with Client(router.last_endpoint.decode(), context=context) as client:
            asked = [gevent.spawn(client.request, b"%d" % number) for number in range(2)]
            messages = [router.recv_multipart() for _ in asked]
            answered = messages[0][-1]
            router.send_multipart(messages[0])
            router.close(1000)
            gevent.joinall(asked)
            for number, greenlet in enumerate(asked):
                if answered == b"%d" % number:
                    assert greenlet.value == answered
                else:
                    assert type(greenlet.exception) is Disconnected
                    assert greenlet.exception.maybe_executed


def test_a_lost_request_is_not_delivered_to_the_next_server(context: zmq.Context, tmp_path: Path) -> None:
    """Requests that were handed over when the server died never reach its successor, on inproc either."""
    for endpoint in (f"ipc://{tmp_path}/s", "inproc://s"):
        first = context.socket(plain.ROUTER)
        first.bind(endpoint)
        with Client(endpoint, context=context) as client:
            asked = [gevent.spawn(client.request, b"old %d" % number) for number in range(50)]
            first.recv_multipart()
            (channel,) = client._channels
            wait_until(lambda: channel.load == 50 and channel._pump is not None and not len(channel._pump.outbox))  # noqa: B023
            first.close(0)
            gevent.joinall(asked)
            assert {type(each.exception) for each in asked} == {Disconnected}
            seen: list[bytes] = []

            def handle(request: Request) -> bytes:
                seen.append(request.body)  # noqa: B023 - used up within this turn
                return request.body

            with _bound_again(endpoint, handle, context):
                assert client.request(b"new") == b"new"
            assert seen == [b"new"]


# What cannot be seen.


def test_a_peer_of_zmtp_2(context: zmq.Context, listener: Listener) -> None:
    """A peer that is too old to announce its handshake is used, though a little later, and not judged by heartbeats."""

    def serve() -> None:
        connection = listener.accept(is_old=True)
        for _ in range(2):
            frames = connection.receive()
            gevent.sleep(2 * SHORT)
            connection.send(frames)
        connection.close()

    serving = gevent.spawn(serve)
    with Client(listener.endpoint, context=context, heartbeat=SHORT) as client:
        for body in (b"1", b"2"):
            assert client.request(body) == body
    serving.get()


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_peer_of_zmtp_2_that_is_gone(context: zmq.Context, listener: Listener, is_reset: bool) -> None:
    """It is Disconnected like any other, though libzmq says that the handshake has failed."""
    with Client(listener.endpoint, context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        connection = listener.accept(is_old=True)
        connection.receive()
        connection.close(is_reset)
        asked.join()
        assert type(asked.exception) is Disconnected
        assert asked.exception.maybe_executed


def test_who_reads_and_never_answers_the_handshake(context: zmq.Context, tmp_path: Path) -> None:
    """It may look like a peer of ZMTP 2 for a moment; when it is known for none, nothing was delivered to it."""
    with Listener(f"ipc://{tmp_path}/s") as listener:

        def read() -> None:
            while True:
                reading.append(gevent.spawn(lambda sock: [sock.recv(100) for _ in range(10)], listener.accept_raw()))

        reading: list[gevent.Greenlet] = []
        reading.append(gevent.spawn(read))
        with Client(listener.endpoint, context=context, heartbeat=SHORT) as client:
            asked = gevent.spawn(client.request, b"x")
            wait_until(lambda: client._channels[0].is_up)  # taken for one
            asked.join()
            assert isinstance(asked.exception, PeerSilent)
            assert not asked.exception.maybe_executed
        gevent.killall(reading)


def test_no_descriptor_for_a_monitor(caplog: pytest.LogCaptureFixture) -> None:
    """Without a monitor requests are answered all the same; one warning says what will not be noticed."""
    with zmq.Context() as servers, plain.Context() as scarce:
        scarce.set(plain.MAX_SOCKETS, 1)
        with Server(ANY_PORT, _echo, deadline=LONG, context=servers) as server:
            assert server.endpoint is not None
            with caplog.at_level(logging.WARNING), Client(server.endpoint, context=scarce) as client:
                assert client.request(b"x") == b"x"
    assert [record.message for record in caplog.records if "monitor" in record.message]


def test_an_endpoint_that_cannot_be_connected_to_leaves_nothing_behind(context: zmq.Context) -> None:
    """Also the second of two: the first one's socket is closed."""
    for _ in range(20):
        with pytest.raises(zmq.ZMQError) as caught:
            Client(ANY_PORT.replace(":0", ":1"), "tcp://no such host:1", context=context)
        assert caught.value.errno == errno.EINVAL


def test_two_clients_of_one_dead_server(context: zmq.Context, listener: Listener) -> None:
    """Each client learns of it by itself."""
    clients = [Client(listener.endpoint, context=context) for _ in range(2)]
    asked = [gevent.spawn(client.request, b"x") for client in clients]
    connections = [listener.accept() for _ in clients]
    for connection in connections:
        connection.receive()
    for connection in connections:
        connection.close()
    gevent.joinall(asked)
    assert [type(each.exception) for each in asked] == [Disconnected, Disconnected]
    for client in clients:
        client.close()


def test_a_slow_handshake_is_not_one_of_zmtp_2(context: zmq.Context) -> None:
    """A peer that took long to shake hands is judged like any other: when the link is cut, it is PeerSilent."""
    router = context.socket(plain.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    with FaultyLink(router.last_endpoint.decode()) as link:
        link.delay(150 * MS)
        with Client(link.endpoint, context=context, heartbeat=1000 * MS) as client:
            asked = gevent.spawn(client.request, b"x")
            router.recv_multipart()
            link.heal()
            link.cut()
            with pytest.raises(PeerSilent):
                asked.get()


SERVER = """
import os, sys
from greensafe import Server

server = Server(sys.argv[1], lambda request: os._exit(1) if request.body == b"die" else request.body, deadline=None)
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""


def test_a_server_that_was_restarted_while_the_hub_did_not_turn(context: zmq.Context, port: int) -> None:
    """The next request does not go to the connection that is gone."""
    command = [sys.executable, "-c", SERVER]
    with ExitStack() as stack:
        process, endpoint = stack.enter_context(running([*command, f"tcp://127.0.0.1:{port}"]))
        client = stack.enter_context(Client(endpoint, context=context))
        assert client.request(b"x") == b"x"
        process.kill()
        process.wait()
        stack.enter_context(running([*command, endpoint]))
        time.sleep(500 * MS)  # not gevent's: the hub does not turn while libzmq connects again
        assert client.request(b"x") == b"x"


NO_DESCRIPTOR = """
import os, resource, subprocess, sys, threading, time
import greensafe

SERVER = sys.argv[1]

def start(endpoint):
    process = subprocess.Popen([sys.executable, "-c", SERVER, endpoint], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()

process, endpoint = start(sys.argv[2])
client = greensafe.Client(endpoint)
client.request(b"x")
try:
    client.request(b"die")
except greensafe.Disconnected:
    pass
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, hard))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass

def restart():
    time.sleep(0.3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    started.append(start(endpoint)[0])

started = []
threading.Thread(target=restart).start()
try:
    print(client.request(b"x"))
finally:
    [each.kill() for each in started]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_no_descriptor_to_connect_again(port: int) -> None:
    """A request waits until there is one, although nothing else keeps the loop running."""
    result = run_python(NO_DESCRIPTOR, SERVER, f"tcp://127.0.0.1:{port}")
    assert result.out == "b'x'\n", result.err


def test_what_a_server_can_cause_is_one_line_and_a_count(
    context: zmq.Context, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that sends nonsense, or ends connections, fills no client's log; the counts are exact there and in the stats."""
    monkeypatch.setattr(seldom, "PERIOD", LONG)  # the counts are written when the client is closed
    caplog.set_level(logging.INFO, "greensafe.channel")
    router = context.socket(plain.ROUTER)
    router.bind("inproc://s")
    with Client("inproc://s", context=context) as client:
        asking = gevent.spawn(client.request, b"x")
        peer, *request = router.recv_multipart(timeout=LONG)
        for _ in range(100):
            router.send_multipart([peer, b"nonsense"])
        router.send_multipart([peer, *request])
        assert asking.get() == b"x"
        assert client.stats.drops["malformed"] == 100
        for _ in range(50):
            client._channels[0]._tell_lost(Loss(LOST, [], [], Connection()))
        assert client.stats.endpoints[0].losses == 50
        assert len(caplog.records) == 2
    first, lost, *counts = caplog.records
    assert (first.getMessage(), first.levelno) == ("inproc://s: malformed message dropped: it is no answer", logging.WARNING)
    assert lost.levelno == logging.INFO
    assert [f"(the last of {number} more" in count.getMessage() for number, count in zip((99, 49), counts, strict=True)] == [
        True
    ] * 2
    assert {record.endpoint for record in caplog.records} == {"inproc://s"}
