"""Anybody may send anything to a server or a client, and nobody else notices.

Each round throws what `garbage` makes at a live Server, or lets a fake server answer a live Client with it. A seed repeats
what is sent: GREENSAFE_FUZZ_SEED=n; GREENSAFE_FUZZ_ROUNDS=n is for the long run (`make slow`), one seed after another.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from garbage import Garbage, frame, greeting, ready
from gevent import socket
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import LATER, Client, GreensafeError, RemoteError, Request, Server
from greensafe.sansio.envelope import CALLER_LIMIT, Header, Kind, ServerHeader, decode

# Requests that a handler promised to answer are dropped on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

limited = pytest.mark.usefixtures("limit")

SEED = int(os.environ.get("GREENSAFE_FUZZ_SEED", "4"))
ROUNDS = int(os.environ.get("GREENSAFE_FUZZ_ROUNDS", "30"))

#: The largest frame that either side takes.
LARGEST = 100_000

#: What an attack may be: methods of _Attack.
ATTACKS = ["dealer", "dealer", "router", "req", "stream", "stream", "types", "large", "cut"]


class _Swallowed(logging.Handler):
    """Keeps what greensafe has logged of errors of its own; what it says of handlers and of malformed messages is expected."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.msg.startswith("handler of"):
            self.found.append(self.format(record))


@pytest.fixture(autouse=True)
def nothing_goes_wrong_inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test in which a callback of the hub has raised, or the watchdog could not answer: nobody else would notice."""
    log, swallowed = logging.getLogger("greensafe"), _Swallowed()
    hub = gevent.get_hub()
    handle_error = hub.handle_error

    def note(context: object, *error: Any) -> None:
        if not isinstance(context, gevent.Greenlet):
            swallowed.found.append(f"{context!r}: {error[1]!r}")
        handle_error(context, *error)

    monkeypatch.setattr(hub, "handle_error", note)
    monkeypatch.setattr(log, "propagate", False)
    log.addHandler(swallowed)
    yield
    log.removeHandler(swallowed)
    assert swallowed.found == []


@pytest.fixture
def small(context: zmq.Context) -> zmq.Context:
    """A context that takes no frames beyond LARGEST."""
    context.setsockopt(zmq.MAXMSGSIZE, LARGEST)
    return context


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


def _address(endpoint: str | None) -> tuple[str, int]:
    host, _, port = str(endpoint).removeprefix("tcp://").rpartition(":")
    return host, int(port)


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


# A server among madmen.


def _handler(request: Request) -> Any:
    way = request.body.rpartition(b":")[2]
    if way == b"hang":
        gevent.sleep(LONG)
    elif way == b"raise":
        raise ValueError("on purpose")
    elif way == b"later":
        return LATER
    elif way == b"none":
        return None
    return request.frames


class _Attack:
    """One peer, which behaves as badly as it can, and checks that what it gets was meant for it."""

    def __init__(self, context: zmq.Context, endpoint: str, seed: int) -> None:
        self.context = context
        self.endpoint = endpoint
        self.garbage = Garbage(seed)
        self.token = b"attack %d:" % seed

    def run(self) -> None:
        getattr(self, self.garbage.random.choice(ATTACKS))()

    @contextlib.contextmanager
    def socket(self, kind: int, name: bytes = b"") -> Iterator[zmq.Socket]:
        with self.context.socket(kind, default_timeout=2 * MS) as sock:
            sock.linger = 0
            if name:
                sock.setsockopt(zmq.CONNECT_ROUTING_ID, name)
            sock.connect(self.endpoint)
            yield sock

    def check(self, frames: list[bytes]) -> None:
        for each in frames:
            assert b"attack " not in each or self.token in each, f"{self.token!r} got {each!r}"

    def listen(self, sock: zmq.Socket) -> None:
        with contextlib.suppress(zmq.ZMQError):
            while True:
                self.check(sock.recv_multipart())

    def dealer(self) -> None:
        with self.socket(zmq.DEALER) as sock:
            for _ in range(30):
                sock.send_multipart(self.garbage.message(self.token))
            self.listen(sock)

    def router(self) -> None:
        with self.socket(zmq.ROUTER, b"server") as sock:
            for _ in range(30):
                sock.send_multipart(
                    [b"server", *self.garbage.message(self.token, is_server=self.garbage.random.random() < 0.3)]
                )
            self.listen(sock)

    def req(self) -> None:
        with self.socket(zmq.REQ) as sock:
            for _ in range(5):
                sock.send_multipart([self.token, *(self.garbage.bytes() for _ in range(3))])
                assert sock.recv_multipart(timeout=LONG)[0] == self.token
            sock.send_multipart(self.garbage.message(self.token))
            self.listen(sock)

    def types(self) -> None:
        for kind in (zmq.PUB, zmq.SUB, zmq.PUSH, zmq.PULL, zmq.PAIR, zmq.REP):
            with self.socket(kind) as sock, contextlib.suppress(zmq.ZMQError, zmq.TimedOut):
                if kind in (zmq.PUB, zmq.PUSH, zmq.PAIR):
                    sock.send_multipart(self.garbage.message(self.token))
                else:
                    sock.recv()

    def large(self) -> None:
        with self.socket(zmq.DEALER) as sock:
            for size in (LARGEST, LARGEST + 1, 3 * LARGEST):
                with contextlib.suppress(zmq.Again):
                    sock.send_multipart([b"", self.token + bytes(size - len(self.token))])
            self.listen(sock)

    def stream(self) -> None:
        for _ in range(10):
            self.talk(self.garbage.stream())

    def cut(self) -> None:
        whole = greeting() + ready(b"DEALER") + frame(b"", 1) + frame(self.token)
        for length in range(self.garbage.random.randrange(8), len(whole), 8):
            self.talk(whole[:length])

    def talk(self, data: bytes) -> None:
        """Say this to the server's port, hear what it says for a moment, and go, politely or not."""
        with contextlib.closing(socket.create_connection(_address(self.endpoint))) as sock:
            sock.settimeout(self.garbage.random.choice([0.0, MS, 3 * MS]))
            with contextlib.suppress(OSError):
                for start in range(0, len(data), step := self.garbage.random.choice([1, 64, 10**6])):
                    sock.sendall(data[start : start + step])
                    if step == 1 and start > 100:
                        break
                self.check([sock.recv(10**6)])


class _Neighbour:
    """A client of the same server that does nothing wrong."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answers = 0
        self._running = gevent.spawn(self._ask)

    def _ask(self) -> None:
        while True:
            body = b"neighbour %d" % self.answers
            assert self.client.request(body, timeout=LONG) == body
            self.answers += 1
            gevent.sleep(0)

    def check(self) -> None:
        """It has had answers, and goes on getting them."""
        assert not self._running.ready(), self._running.exception
        wait_until(lambda before=self.answers: self.answers > before or self._running.ready())
        assert not self._running.ready(), self._running.exception

    def stop(self) -> None:
        self._running.kill()


def _check_nothing_is_left(server: Server) -> None:
    watchdog = server._watchdog
    assert watchdog is not None
    responder = watchdog.responder
    # A promise that was dropped is broken at the next collection, one that was not is overdue at its deadline.
    wait_until(lambda: not watchdog._owed)
    assert (responder.inflight, responder.running, responder.zombies) == (0, 0, 0)
    assert (watchdog._greenlets, len(watchdog._kept), watchdog._kept.size) == ({}, 0, 0)
    assert not any(caller.open for caller in responder._callers)


def _attack_a_server(context: zmq.Context, seed: int, rounds: int) -> None:
    options: Any = {"deadline": 100 * MS, "grace": 50 * MS, "max_inflight": 50, "cancel_vanished": bool(seed % 2)}
    with (
        Server("tcp://127.0.0.1:0", _handler, context=context, **options) as server,
        Client(str(server.endpoint), context=context) as client,
    ):
        neighbour = _Neighbour(client)
        wait_until(lambda: neighbour.answers)
        before = _descriptors()
        with _strangers() as strangers:
            for number in range(rounds):
                first = (seed * rounds + number) * 100
                attacks = [_Attack(strangers, str(server.endpoint), first + each) for each in range(8)]
                gevent.joinall([gevent.spawn(attack.run) for attack in attacks], raise_error=True)
                neighbour.check()
        neighbour.stop()
        _check_nothing_is_left(server)
        wait_until(lambda: _descriptors() <= before)
        assert client.request(b"last", timeout=LONG) == b"last"


@contextlib.contextmanager
def _strangers() -> Iterator[zmq.Context]:
    """A context of their own: their frames may have any size."""
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


@limited
def test_a_server_among_madmen(small: zmq.Context) -> None:
    """Whatever is sent to its port: nobody gets another's answer, nothing is left, and its other client notices nothing."""
    _attack_a_server(small, SEED, 20)


@limited
@pytest.mark.parametrize("length", range(0, 64, 7))
def test_a_handshake_that_stops(context: zmq.Context, length: int) -> None:
    """A peer that stops anywhere in its greeting, and stays, is in nobody's way."""
    with (
        Server("tcp://127.0.0.1:0", _handler, deadline=LONG, context=context) as server,
        contextlib.closing(socket.create_connection(_address(server.endpoint))) as half,
        Client(str(server.endpoint), context=context) as client,
    ):
        half.sendall(greeting()[:length])
        assert client.request(b"x", timeout=LONG) == b"x"


# A client among liars.


class _Liar:
    """A server that answers with garbage; what is valid in it holds, for an id that was asked, that request's own body."""

    def __init__(self, context: zmq.Context, seed: int) -> None:
        self.garbage = Garbage(seed)
        self.sock = context.socket(zmq.ROUTER)
        self.port = self.sock.bind_to_random_port("tcp://127.0.0.1")
        self.asked: dict[bytes, bytes] = {}
        self._running = gevent.spawn(self._run)

    def close(self) -> None:
        self._running.kill()
        self.sock.close()

    def _run(self) -> None:
        while True:
            rid, head, *body = self.sock.recv_multipart()
            header = decode(head)
            if isinstance(header, Header) and header.kind == Kind.REQUEST:
                self.asked[header.request_id] = body[-1]
                answer = [ServerHeader(Kind.REPLY, header.request_id, bytes(16)).encode(), b"", body[-1]]
                for lie in self._lies(header.request_id):
                    self._send([rid, *lie])
                if self.garbage.random.random() < 0.5:
                    self._send([rid, *answer])

    def _send(self, frames: list[bytes]) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self.sock.send_multipart(frames, zmq.NOBLOCK)

    def _lies(self, request_id: bytes) -> Iterator[list[bytes]]:
        pick = self.garbage.random
        for _ in range(pick.randrange(4)):
            some_id = pick.choice([request_id, *self.asked, self.garbage.ids()])
            head = self.garbage.header(some_id, is_server=True)
            if pick.random() < 0.4:
                head = self._mutated(head)
            header = decode(head)
            body = self.garbage.bytes() if header is None else self.asked.get(header.request_id, b"nobody's")
            if header is not None and header.kind in (Kind.WORKING, Kind.ERROR, Kind.REJECTED):
                body = self._body(header.kind, body)
            yield pick.choice(
                [[head, b"", body], [head, b"", body], self.garbage.message(b"lie:", is_server=True), [head], [b""]]
            )

    def _mutated(self, head: bytes) -> bytes:
        """Not so that it becomes an id which the client may have sent, and which is under way to us: that would be no lie."""
        mutated = self.garbage.mutated(head)
        header = decode(mutated)
        is_guess = header is not None and header.request_id not in self.asked
        if header is not None and is_guess and any(header.request_id[:8] == known[:8] for known in self.asked):
            return head
        return mutated

    def _body(self, kind: int, body: bytes) -> bytes:
        if kind == Kind.WORKING:
            return b"".join(self.asked)[: self.garbage.random.randrange(100)]
        code = self.garbage.random.choice(["INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED"])
        error = RemoteError(code, "lie", self.garbage.random.choice(["", CALLER_LIMIT, "ServerStopped"]))
        return self.garbage.random.choice([error.to_reply(), error.to_reply(), self.garbage.bytes(), body])


def _ask_liars(client: Client, number: int) -> bool:
    """One request; True if it was answered. It ends in any case, with its own answer or an error of the documented ones."""
    body = b"request %d" % number
    try:
        frames = client.request_multipart([body], timeout=50 * MS, idempotent=number % 2 == 0)
    except GreensafeError:
        return False
    assert frames == [body]
    return True


def _lie_to_a_client(context: zmq.Context, seed: int, rounds: int) -> None:
    answered = 0
    for number in range(rounds):
        liars = [_Liar(context, (seed * rounds + number) * 2 + each) for each in range(2)]
        endpoints = [f"tcp://127.0.0.1:{liar.port}" for liar in liars]
        with Client(*endpoints, context=context, heartbeat=500 * MS, retries=number % 3) as client:
            asking = [gevent.spawn(_ask_liars, client, each) for each in range(40)]
            gevent.joinall(asking, raise_error=True)
            answered += sum(each.value for each in asking)
            assert len(client._requester) == 0
            assert not client._failover.waiting
            assert not any(channel.connection.sent for channel in client._channels)
            for liar in liars:
                liar.close()
            _ask_somebody_honest(context, client, endpoints[0])
    assert answered


def _ask_somebody_honest(context: zmq.Context, client: Client, endpoint: str) -> None:
    """Whatever the client has been told before; that the liar is gone may be what it is told next."""
    honest = Server(endpoint, lambda request: request.body, deadline=LONG, context=context)
    wait_until(lambda: _starts(honest))
    with honest:
        for _ in range(2):  # liars
            with contextlib.suppress(zmq.PeerError):
                client.request(b"to whom", timeout=LONG)
        assert client.request(b"in the end", timeout=LONG) == b"in the end"
        honest.close()


def _starts(server: Server) -> bool:
    try:
        server.start()
    except zmq.ZMQError:
        return False
    return True


@limited
def test_a_client_among_liars(context: zmq.Context) -> None:
    """Whatever its servers answer, each request ends, with its own answer or an error; then the same client is served."""
    _lie_to_a_client(context, SEED, 8)


def _speak_to_a_client(context: zmq.Context, seed: int, rounds: int) -> None:
    """A port behind which there is no ZeroMQ, or one that goes wrong at some point."""
    garbage = Garbage(seed)
    listener = _listener()
    endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    def talk() -> None:
        while True:
            sock, _ = listener.accept()
            sock.settimeout(5 * MS)
            with contextlib.closing(sock), contextlib.suppress(OSError):
                sock.sendall(garbage.stream())
                while sock.recv(10**6):
                    sock.sendall(garbage.bytes())

    talking = gevent.spawn(talk)
    try:
        for number in range(rounds * 5):
            with Client(endpoint, context=context, heartbeat=100 * MS, wait=number % 2 == 0) as client:
                for _ in range(3):
                    with pytest.raises(GreensafeError):
                        client.request(b"x", timeout=garbage.random.choice([MS, 5 * MS, 20 * MS]), idempotent=True)
                assert len(client._requester) == 0
    finally:
        talking.kill()
        listener.close()


@limited
def test_a_client_of_something_else(small: zmq.Context) -> None:
    """HTTP, TLS, noise, half a handshake, the wrong socket type or frames without end: an error within the caller's limit."""
    _speak_to_a_client(small, SEED, 6)


@limited
@pytest.mark.parametrize("size", [LARGEST - 1, LARGEST, LARGEST + 1])
def test_a_reply_that_is_too_large(small: zmq.Context, size: int) -> None:
    """Up to MAXMSGSIZE it is delivered; beyond it libzmq ends the connection, and the caller is told."""
    with _strangers() as other, Server("tcp://127.0.0.1:0", lambda _: bytes(size), deadline=LONG, context=other) as server:
        with Client(str(server.endpoint), context=small, timeout=LONG) as client:
            if size <= LARGEST:
                assert client.request(b"x") == bytes(size)
            else:
                with pytest.raises(zmq.PeerError):
                    client.request(b"x")


@limited
def test_a_reply_without_end(context: zmq.Context) -> None:
    """Frame after frame and never the last: the caller's limit ends the wait, and the connection can be given up."""
    listener = _listener()

    def talk() -> None:
        sock, _ = listener.accept()
        with contextlib.closing(sock), contextlib.suppress(OSError):
            sock.sendall(greeting() + ready(b"ROUTER"))
            heard = b""
            while b"READY" not in heard:  # before that a message breaks the protocol
                heard += sock.recv(1000)
            while True:
                sock.sendall(frame(bytes(100), 1))
                gevent.sleep(MS)

    talking = gevent.spawn(talk)
    with Client(f"tcp://127.0.0.1:{listener.getsockname()[1]}", context=context, heartbeat=100 * MS) as client:
        with pytest.raises(zmq.OperationTimeout):
            client.request(b"x", timeout=300 * MS)
    talking.kill()
    listener.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("attack", [_attack_a_server, _lie_to_a_client, _speak_to_a_client])
def test_for_long(small: zmq.Context, attack: Any) -> None:
    """The same with one seed after another."""
    for seed in range(SEED + 1, SEED + 1 + ROUNDS):
        with gevent.Timeout(3 * LONG, AssertionError(f"with seed {seed} a wait did not end")):
            attack(small, seed, 6)
