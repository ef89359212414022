"""Tests of greensafe.server.reports: one request, in records and log lines."""

from __future__ import annotations

from functools import partial

import gevent
from helpers import LONG

from greensafe import RemoteError
from greensafe.hooks import RequestAnswered, RequestFailed, RequestStarted
from greensafe.sansio.envelope import Kind, pack
from greensafe.sansio.exchange import Exchange
from greensafe.sansio.responder import Responder
from greensafe.server.reports import answered, extra, started, zombie

ID = bytes(range(16))


def _request(now: float) -> Exchange:
    header = pack(Kind.REQUEST, ID, None, 0, 0, b"trace")
    exchange = Responder(grace=1.0).receive([b"peer", header, b"", b"x"], now)
    assert isinstance(exchange, Exchange)
    return exchange


def test_the_records_of_a_request() -> None:
    """They name the server, the request and its client, and count from its arrival."""
    request = _request(float("-inf"))
    forever = float("inf")
    assert started("here", request) == RequestStarted("here", ID.hex(), b"peer", b"trace", forever)
    assert answered("here", request, None) == RequestAnswered("here", ID.hex(), b"peer", forever)
    error = RemoteError("NOT_FOUND", "no", "KeyError")
    assert answered("here", request, error) == RequestFailed("here", ID.hex(), b"peer", forever, "NOT_FOUND", "KeyError", "no")
    assert extra("here", request) == {"endpoint": "here", "request_id": ID.hex(), "client": "peer"}


def test_a_handler_without_a_name() -> None:
    """One that is no function is called by its class."""
    sleeping = gevent.spawn(gevent.sleep, LONG)
    gevent.sleep(0)
    found = zombie(_request(1.0), partial(print), sleeping, 3.5)
    assert (found.handler, found.greenlet, found.age_seconds) == ("partial", sleeping.name, 2.5)
    sleeping.kill()
