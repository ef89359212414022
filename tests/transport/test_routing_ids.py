"""Tests of greensafe.green._ids: the routing ids that libzmq gives to connections."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG

import greensafe as zmq
from greensafe import Client, Server
from greensafe.auth import Authenticator
from greensafe.green.context import plain_socket
from greensafe.transport import routing_ids as _ids

pytestmark = [
    pytest.mark.usefixtures("limit"),
    pytest.mark.skipif(_ids._srand is None, reason="libc's srand cannot be had here"),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were set."""
    seeds: list[int] = []
    monkeypatch.setattr(_ids, "_srand", seeds.append)
    return seeds


def _begin_as_every_process() -> None:
    ctypes.CDLL(None).srand(1)


def _first_id(router: Any) -> bytes:
    """The routing id of the first peer that announces none."""
    router.bind("inproc://first")
    with plain.Socket(router.context, plain.REQ) as peer:
        peer.linger = 0
        peer.connect("inproc://first")
        peer.send(b"x")
        found: bytes = router.recv_multipart()[0]
    return found


def _id_in_every_process() -> bytes:
    """The id with which libzmq's first socket begins, if nobody has done anything about it."""
    _begin_as_every_process()
    with plain.Context() as context, plain.Socket(context, plain.ROUTER) as router:
        return _first_id(router)


def test_where_ids_begin(context: zmq.Context) -> None:
    """Not where they begin in every process, and elsewhere for each socket: neither of a green ROUTER, nor of a Server."""
    known = int.from_bytes(_id_in_every_process())
    assert int.from_bytes(_id_in_every_process()) == known  # this is what is to be mended
    begin = []
    for _ in range(2):
        _begin_as_every_process()
        with context.socket(zmq.ROUTER) as router:
            begin.append(int.from_bytes(_first_id(router)))
        _begin_as_every_process()
        with Server("inproc://server", lambda request: request.client, deadline=LONG, context=context):
            with Client("inproc://server", context=context) as client:
                begin.append(int.from_bytes(client.request(b"who am I")))
    assert len(set(begin)) == 4
    assert not any(known <= each < known + 100 for each in begin)


@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.REP, zmq.STREAM, zmq.REQ])
def test_types_that_draw(context: zmq.Context, drawn: list[int], kind: int) -> None:
    """Each socket whose peers, or requests, are numbered by libzmq draws anew, green or plain."""
    context.socket(kind).close()
    zmq.Socket(context, kind).close()
    plain_socket(context, kind).close()
    assert len(drawn) == len(set(drawn)) == 3


def test_types_that_do_not(context: zmq.Context, drawn: list[int]) -> None:
    """A socket that numbers nobody, or that is there already, leaves libc's numbers alone."""
    context.socket(zmq.DEALER).close()
    context.socket(zmq.PUB).close()
    with plain.Context() as other, plain.Socket(other, plain.ROUTER) as known:
        zmq.Socket(shadow=known.underlying)
        zmq.Socket(known)
    assert drawn == []


def test_what_else_binds(context: zmq.Context, drawn: list[int]) -> None:
    """A Server draws at each start, and so does an Authenticator."""
    server = Server("inproc://server", lambda request: b"", deadline=LONG, context=context)
    for count in (1, 2):
        server.start()
        assert len(drawn) == count
        server.stop()
    authenticator = Authenticator(context)
    authenticator.start()
    gevent.sleep(0)
    authenticator.stop()
    assert len(drawn) == 3


def test_threads_and_children(drawn: list[int]) -> None:
    """Nothing is kept from one socket to the next, so a forked child has nothing of its parent's to go on with."""
    for _ in range(3):
        _ids.draw_ids(zmq.ROUTER)
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize("what", ["no ctypes", "no srand", "Windows"])
def test_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Then nothing is seeded, and nothing fails."""
    acts: dict[str, Callable[[], None]] = {
        "no ctypes": lambda: monkeypatch.setitem(sys.modules, "ctypes", None),
        "no srand": lambda: monkeypatch.setattr(ctypes, "PyDLL", lambda name: object()),
        "Windows": lambda: monkeypatch.setattr(os, "name", "nt"),
    }
    acts[what]()
    found = _ids._find()
    monkeypatch.undo()
    assert found is None
    monkeypatch.setattr(_ids, "_srand", None)
    _ids.draw_ids(zmq.ROUTER)
