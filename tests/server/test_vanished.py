"""Tests of greensafe.server.vanished."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq as plain
from helpers import wait_until

import greensafe as zmq
from greensafe.server.vanished import Vanished

pytestmark = pytest.mark.usefixtures("limit")


class Watched:
    """A ROUTER whose vanished clients are listed in `gone`; messages are read by hand."""

    def __init__(self, context: zmq.Context, endpoint: str) -> None:
        self.gone: list[bytes] = []
        self.sock = context.socket(plain.ROUTER)
        self.sock.setsockopt(plain.ROUTER_HANDOVER, 1)
        self.vanished = Vanished(self.sock, self.gone.append)
        self.sock.bind(endpoint)
        self.endpoint = self.sock.last_endpoint.decode()

    def note(self) -> bytes:
        """Read a message, as the server does; returns its routing id."""
        frames = self.sock.recv_multipart(copy=False)
        name: bytes = frames[0].bytes
        try:
            descriptor = frames[0].get(plain.SRCFD)
        except plain.ZMQError:
            descriptor = -1
        self.vanished.note(name, descriptor)
        return name


@pytest.fixture(params=["tcp", "ipc"])
def watched(request: pytest.FixtureRequest, context: zmq.Context, tmp_path: Path) -> Iterator[Watched]:
    made = Watched(context, "tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{tmp_path}/s")
    yield made
    made.vanished.close()


def _client(context: zmq.Context, endpoint: str, name: bytes = b"") -> Any:
    sock = context.socket(plain.DEALER)
    if name:
        sock.routing_id = name
    sock.connect(endpoint)
    sock.send(b"x")
    return sock


def test_who_is_gone(context: zmq.Context, watched: Watched) -> None:
    """A client whose connection is gone is named once; the others are not."""
    clients = {}
    for _ in range(5):
        sock = _client(context, watched.endpoint)
        clients[watched.note()] = sock
    for name in list(clients)[1::2]:
        clients[name].close(0)
        wait_until(lambda: watched.gone)
        assert watched.gone == [name]
        watched.gone.clear()
    clients[next(iter(clients))].send(b"y")
    assert watched.note() == next(iter(clients))
    assert not watched.gone


def test_a_descriptor_that_is_used_again(context: zmq.Context, watched: Watched) -> None:
    """Clients come and go one after the other, on the same descriptors: each is named when it goes, none before."""
    for number in range(50):
        name = b"client %d" % number
        sock = _client(context, watched.endpoint, name)
        assert watched.note() == name
        assert name not in watched.gone
        sock.close(0)
        if number % 2:
            wait_until(lambda: name in watched.gone)  # noqa: B023 - used at once
    wait_until(lambda: len(watched.gone) == 50)
    assert set(watched.gone) == {b"client %d" % number for number in range(50)}


def test_a_client_that_comes_again_by_another_way(context: zmq.Context, watched: Watched) -> None:
    """The end of its old connection is not its end, if its new one has been heard of."""
    old = _client(context, watched.endpoint, b"same")
    watched.note()
    new = _client(context, watched.endpoint, b"same")
    watched.note()
    old.close(0)
    other = _client(context, watched.endpoint, b"other")
    watched.note()
    other.close(0)
    wait_until(lambda: b"other" in watched.gone)
    assert b"same" not in watched.gone
    new.close(0)
    wait_until(lambda: b"same" in watched.gone)


def test_nobody_to_watch(context: zmq.Context) -> None:
    """On inproc there are no descriptors, and nobody is ever named."""
    watched = Watched(context, "inproc://s")
    sock = _client(context, "inproc://s")
    watched.note()
    sock.close(0)
    sock = _client(context, "inproc://s")
    watched.note()
    assert not watched.gone
    watched.vanished.close()
