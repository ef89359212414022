"""Tests of greensafe.client.channel, through a Client whose endpoints hold names, or cannot be connected to at all."""

from __future__ import annotations

import gc
import logging
import socket as net
import warnings
import weakref
from contextlib import closing
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until
from naming import NO_NAME, NOT_NOW, NameService

import greensafe as zmq
from greensafe import Client, OperationTimeout, Request, Server, Unreachable
from greensafe.transport import byname as _byname, names
from greensafe.transport.monitor import ConnectionEvent

pytestmark = pytest.mark.usefixtures("limit")


@pytest.fixture
def server(context: zmq.Context) -> Any:
    with Server("tcp://127.0.0.1:0", _echo, deadline=LONG, context=context) as made:
        yield made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a name service that does not answer is short."""
    monkeypatch.setattr(_byname, "LIMIT", 20 * MS)


def _echo(request: Request) -> bytes:
    return request.body


def _named(server: Server, name: str = "server") -> str:
    return server.endpoint.replace("127.0.0.1", name)


def _nobody(host: str) -> str:
    """An endpoint where nobody is, and nobody was a moment ago: a server that has just closed may still accept."""
    with closing(net.create_server(("127.0.0.1", 0))) as taken:
        return f"tcp://{host}:{taken.getsockname()[1]}"


def _unreachable(client: Client, text: str) -> None:
    with pytest.raises(Unreachable, match=text) as caught:
        client.request(b"x")
    assert not caught.value.maybe_executed


def _note_of_a_timeout(client: Client) -> str:
    with pytest.raises(OperationTimeout) as caught:
        client.request(b"x", timeout=50 * MS)
    return "".join(caught.value.__notes__)


# Names.


def test_libzmq_is_given_a_number(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """A name is resolved before the connection; a number is not asked for."""
    resolver.table["server"] = ["127.0.0.1"]
    with Client(_named(server), context=context) as client, Client(server.endpoint, context=context) as other:
        assert client.request(b"x") == b"x"
        assert other.request(b"x") == b"x"
        assert client._channels[0]._pump.sock.last_endpoint.decode() == server.endpoint  # type: ignore[union-attr]
    assert resolver.asked == ["server"]


def test_a_name_that_is_not_known(context: zmq.Context, resolver: NameService, caplog: pytest.LogCaptureFixture) -> None:
    """wait=False: Unreachable with what the resolver says, each time; it counts, and is logged once."""
    with Client("tcp://server:5555", context=context, wait=False) as client:
        for _ in range(2):
            _unreachable(client, "name server cannot be resolved.*not known")
        assert client.stats.endpoints[0].failed_attempts >= 1
        assert "not known" in client.stats.endpoints[0].trouble
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "tcp://server:5555: the name server cannot be resolved" in warnings[0]


def test_a_name_that_is_not_known_yet(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """wait=True: the request waits; its limit tells why, and it is sent as soon as the name is known."""
    with Client(_named(server), context=context) as client:
        assert "cannot be resolved" in _note_of_a_timeout(client)
        asked = gevent.spawn(client.request, b"x")
        resolver.table["server"] = ["127.0.0.1"]
        assert asked.get() == b"x"
        assert client.stats.endpoints[0].trouble == ""


@pytest.mark.usefixtures("quick")
def test_a_name_service_that_does_not_answer(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """Whoever asks by the name is told; other clients, and the server in the process, notice nothing. A late answer is used."""
    resolver.table["server"] = ["127.0.0.1"]
    resolver.hang("server")
    with (
        Client(_named(server), context=context, wait=False) as impatient,
        Client(_named(server), context=context) as patient,
        Client(server.endpoint, context=context) as other,
    ):
        for _ in range(2):
            _unreachable(impatient, "name service does not answer")
        assert "does not answer" in _note_of_a_timeout(patient)
        asked = gevent.spawn(patient.request, b"x")
        for _ in range(20):
            assert other.request(b"x") == b"x"
        assert resolver.under_way == 1
        assert not asked.ready()
        resolver.answer("server")
        assert asked.get() == b"x"
        wait_until(lambda: _is_answered(impatient))


def _is_answered(client: Client) -> bool:
    try:
        return client.request(b"x") == b"x"
    except Unreachable:
        return False


def test_a_limit_that_comes_while_a_name_is_resolved(context: zmq.Context, resolver: NameService) -> None:
    """The error tells that."""
    resolver.hang("server")
    with Client("tcp://server:5555", context=context) as client:
        assert "being resolved" in _note_of_a_timeout(client)


def test_a_server_that_moves(context: zmq.Context, resolver: NameService) -> None:
    """A server that is back at another address under its name is found, wherever it is."""
    resolver.table["server"] = ["127.0.0.1"]
    server = Server("tcp://127.0.0.1:0", lambda request: b"127.0.0.1", deadline=LONG, context=context)
    server.start()
    named = _named(server)
    with Client(named, context=context, retries=1000) as client:
        assert client.request(b"x") == b"127.0.0.1"
        for address in ("127.0.0.2", "127.0.0.1"):
            server.stop(0)
            waiting = gevent.spawn(client.request, b"x", idempotent=True)  # it may meet the one that closes
            wait_until(lambda: client.stats.endpoints[0].trouble)
            server = Server(named.replace("server", address), lambda request, at=address: at.encode(), deadline=LONG)
            wait_until(lambda: _is_started(server))  # noqa: B023 - waited for here
            resolver.table["server"] = [address]
            assert waiting.get() == address.encode()
    server.stop(0)


def _is_started(server: Server) -> bool:
    try:
        server.start()
    except zmq.ZMQError as error:
        assert error.errno == plain.EADDRINUSE
    return server.started


def test_of_several_addresses_the_one_that_answers(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """An address where nobody is costs no error: the next one is tried at once."""
    resolver.table["server"] = ["127.0.0.3", "127.0.0.2", "127.0.0.1"]
    with Client(_named(server), context=context, wait=False) as client:
        assert client.request(b"x") == b"x"
        assert client.stats.endpoints[0].failed_attempts == 2
    with Client(_nobody("server"), context=context, wait=False) as client:
        _unreachable(client, "nobody")
        assert client.stats.endpoints[0].failed_attempts >= 3


def test_a_name_service_that_is_gone(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """While it says that it cannot tell now, the last known address is connected to."""
    resolver.table["server"] = ["127.0.0.1"]
    with Client(_named(server), context=context, retries=1000) as client:
        assert client.request(b"x") == b"x"
        resolver.table["server"] = NOT_NOW
        server.stop(0)
        again = Server(server.endpoint, _echo, deadline=LONG, context=context)
        wait_until(lambda: _is_started(again))
        assert client.request(b"x", timeout=LONG, idempotent=True) == b"x"
        again.stop(0)


def test_an_idle_client_asks_no_name_service(context: zmq.Context, resolver: NameService) -> None:
    """Names are resolved again and again only while somebody waits; then the first request asks anew."""
    with Client("tcp://server:5555", context=context, wait=False) as client:
        _unreachable(client, "not known")
        by_name = client._channels[0]._by_name
        assert "rests" in repr(by_name)
        known = len(resolver.asked)

        def asks() -> bool:
            with pytest.raises(Unreachable):
                client.request(b"x")
            return len(resolver.asked) > known

        wait_until(asks)


def test_an_idle_client_is_not_told_what_was_wrong_long_ago(
    context: zmq.Context, server: Server, resolver: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wait=False: the first request after a while waits for the name service's answer."""
    monkeypatch.setattr(names, "FRESH", 0.0)
    with Client(_named(server), context=context, wait=False) as client:
        _unreachable(client, "not known")
        resolver.table["server"] = ["127.0.0.1"]
        monkeypatch.setattr(_byname, "delay", lambda tries, chance: 0.0)
        assert client.request(b"x") == b"x"


def test_what_happens_at_an_address_that_was_left(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """It is no failed attempt: the name has another address now."""
    resolver.table["server"] = ["127.0.0.2", "127.0.0.1"]
    with Client(_named(server), context=context) as client:
        assert client.request(b"x") == b"x"
        known = client.stats.endpoints[0].failed_attempts
        left = server.endpoint.replace("127.0.0.1", "127.0.0.2")
        client._channels[0]._on_event(ConnectionEvent(plain.Event.CLOSED, 0, left))
        assert client.stats.endpoints[0].failed_attempts == known


def test_an_address_that_answers_as_it_is_left(context: zmq.Context, resolver: NameService) -> None:
    """Whoever comes there while the hub is blocked is not taken for the peer at the next address: nothing is handed over."""
    resolver.table["server"] = ["127.0.0.2", "127.0.0.1"]
    named = _nobody("server")
    with Client(named, context=context) as client:
        channel = client._channels[0]
        wait_until(lambda: client.stats.endpoints[0].failed_attempts)
        assert channel._by_name is not None
        wait_until(lambda: channel._by_name.number != named.replace("server", "127.0.0.2"))  # type: ignore[union-attr]
        for kind in (plain.Event.CONNECTED, plain.Event.HANDSHAKE_SUCCEEDED):
            channel._on_event(ConnectionEvent(kind, 0, named.replace("server", "127.0.0.2")))
        assert not channel.is_up


def test_names_keep_nobody_alive(context: zmq.Context, resolver: NameService) -> None:
    """A client that is dropped while its name is resolved is gone at once, and its socket closed."""
    resolver.hang("server")
    client = Client("tcp://server:5555", context=context)
    wait_until(lambda: resolver.under_way)
    sock = weakref.ref(client._channels[0]._pump.sock)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del client
        gc.collect()
    assert sock() is None


def test_a_closed_client_and_a_late_answer(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """The answer comes to nothing."""
    resolver.table["server"] = ["127.0.0.1"]
    resolver.hang("server")
    with Client(_named(server), context=context) as client:
        wait_until(lambda: resolver.under_way)
    by_name = client._channels[0]._by_name
    assert "rests" in repr(by_name)
    resolver.answer("server")
    wait_until(lambda: not resolver.under_way)
    assert by_name is not None
    assert by_name.number is None


def test_a_name_among_several_endpoints(context: zmq.Context, server: Server, resolver: NameService) -> None:
    """An endpoint whose name is not known keeps no request from the others, and is found while those do the work."""
    with Client(_named(server), server.endpoint, context=context, heartbeat=1000 * MS) as client:
        assert client.request(b"x") == b"x"
        resolver.table["server"] = ["127.0.0.1"]

        def both_are_up() -> bool:
            client.request(b"x")
            return all(each.is_up for each in client.stats.endpoints)

        wait_until(both_are_up)


@pytest.mark.parametrize("error", [NO_NAME, NOT_NOW])
def test_an_address_that_refuses_while_the_name_is_gone(context: zmq.Context, resolver: NameService, error: Exception) -> None:
    """What is connected to stays so: the next server there is found, whatever the name service says meanwhile."""
    resolver.table["server"] = ["127.0.0.1"]
    named = _nobody("server")
    with Client(named, context=context) as client:
        asked = gevent.spawn(client.request, b"x")
        wait_until(lambda: "nobody" in client.stats.endpoints[0].trouble)
        resolver.table["server"] = error
        again = Server(named.replace("server", "127.0.0.1"), _echo, deadline=LONG, context=context)
        wait_until(lambda: _is_started(again))
        assert asked.get() == b"x"
        again.stop(0)


# What libzmq cannot begin to connect to.

NOT_BEGUN = [("tcp://[::1]:5555", "IPV6"), ("tcp://nosuch0:0;127.0.0.1:5555", "source, nosuch0,")]


@pytest.mark.parametrize(("endpoint", "advice"), NOT_BEGUN)
def test_what_libzmq_cannot_begin_to_connect_to(
    context: zmq.Context, caplog: pytest.LogCaptureFixture, endpoint: str, advice: str
) -> None:
    """wait=False: Unreachable at once, with advice; it counts, and is logged once."""
    with Client(endpoint, context=context, wait=False) as client:
        _unreachable(client, advice)
        assert client.stats.endpoints[0].failed_attempts >= 1
        wait_until(lambda: client.stats.endpoints[0].failed_attempts > 1 or _is_refused(client))
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def _is_refused(client: Client) -> bool:
    with pytest.raises(Unreachable):
        client.request(b"x")
    return False


@pytest.mark.parametrize(("endpoint", "advice"), NOT_BEGUN)
def test_waiting_for_what_libzmq_cannot_begin_to_connect_to(context: zmq.Context, endpoint: str, advice: str) -> None:
    """wait=True: the caller's limit tells."""
    with Client(endpoint, context=context) as client:
        assert advice in _note_of_a_timeout(client)


def test_what_libzmq_begins_is_not_taken_for_that(context: zmq.Context, tmp_path: Any) -> None:
    """Refused connections are nobody's mistake, on tcp and ipc."""
    with Client(_nobody("127.0.0.1"), f"ipc://{tmp_path}/s", context=context) as client:
        asked = gevent.spawn(client.request, b"x", timeout=LONG)
        wait_until(lambda: all(each.failed_attempts > 2 for each in client.stats.endpoints))
        assert {each.trouble for each in client.stats.endpoints} == {"nobody can be reached there"}
        with Server(f"ipc://{tmp_path}/s", _echo, deadline=LONG, context=context):
            assert asked.get() == b"x"
