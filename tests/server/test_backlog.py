"""Tests of greensafe.server.backlog."""

from __future__ import annotations

import sys

import pytest

from greensafe.sansio.envelope import MAX_METADATA, MAX_ROUTE_BYTES, Header, Kind, split
from greensafe.sansio.exchange import Exchange
from greensafe.server import backlog
from greensafe.server.backlog import Backlog

METADATA = bytes(MAX_METADATA)
ROUTE = [bytes(MAX_ROUTE_BYTES - 100)]


def _exchange(key: int, ids: list[bytes], metadata: bytes, body: list[bytes]) -> Exchange:
    header = Header(Kind.REQUEST, key.to_bytes(16, "big"), metadata=metadata).encode()
    return Exchange(key, split([b"peer%d" % key, *ids, header, b"", *body]), 0.0)


def _taken(exchange: Exchange) -> int:
    """What sys.getsizeof says of everything that a request of a peer brings with it; what it shares is counted twice."""
    envelope = exchange.envelope
    header = envelope.header
    assert isinstance(header, Header)
    lists = [envelope.route, envelope.body]
    objects = [exchange, envelope, header, header.metadata, header.request_id, *lists]
    return sum(map(sys.getsizeof, objects)) + sum(sys.getsizeof(frame) for each in lists for frame in each)


@pytest.mark.parametrize(
    ("ids", "metadata", "body"),
    [
        ([], METADATA, [b""]),
        (ROUTE, b"", [b""]),
        ([], b"", [b""] * 4000),
        ([], b"", [b"%d" % number for number in range(4000)]),
        ([], b"", [bytes(60_000)]),
    ],
    ids=["metadata", "route", "empty frames", "short frames", "body"],
)
def test_whole_requests_are_weighed(
    monkeypatch: pytest.MonkeyPatch, ids: list[bytes], metadata: bytes, body: list[bytes]
) -> None:
    """It is full before what is kept takes the limit and one request more, whatever the requests are made of."""
    limit = 2_000_000
    monkeypatch.setattr(backlog, "BACKLOG_BYTES", limit)
    kept = Backlog()
    while not kept.is_full:
        assert len(kept) < 200
        kept.keep(_exchange(len(kept), ids, metadata, list(body)))
    requests = kept.requests()
    assert limit <= kept.size < limit + 200_000
    assert sum(map(_taken, requests)) <= kept.size
    while len(kept):
        kept.next()
    assert kept.size == 0


def test_small_requests_are_counted() -> None:
    """What weighs little is limited by its number."""
    kept = Backlog()
    while not kept.is_full:
        kept.keep(_exchange(len(kept), [b"own id"], b"", [b"body"]))
    assert len(kept) == backlog.BACKLOG
    assert kept.take(17) is not None
    assert not kept.is_full


def test_a_request_that_changes_while_it_waits_gives_back_what_it_took() -> None:
    """With a journal it may come again by another way meanwhile: its weight stays that with which it was kept."""
    kept = Backlog()
    request = _exchange(1, [], b"", [b"body"])
    kept.keep(request)
    request.envelope = _exchange(2, ROUTE, METADATA, [b"body"]).envelope
    assert kept.take(1) is request
    assert kept.size == 0
