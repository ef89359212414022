"""Tests of greensafe.client.balancing."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

import pytest

import greensafe as zmq
from greensafe import Client
from greensafe.client.balancing import choose, hopeless, keepers
from greensafe.client.call import Call
from greensafe.client.channel import Channel
from greensafe.client.problems import DRAINING, NO_ANSWER, NO_HANDSHAKE, NOBODY, SILENT, WRONG_TYPE
from greensafe.errors import PeerSilent, Refused, Unreachable
from greensafe.sansio.envelope import NO_JOURNAL
from greensafe.sansio.requester import Requester

J, OTHER = b"journal".ljust(16), b"other".ljust(16)


@pytest.fixture
def channels(context: zmq.Context) -> Iterator[list[Channel]]:
    """Two that can be used, as far as anybody can tell, and have nothing in flight."""
    with Client("inproc://a", "inproc://b", context=context) as client:
        yield list(client._channels)


def _call(journal: bytes = NO_JOURNAL) -> Call:
    """A request that waits; with a journal, for its server alone."""
    call, table = Call(None, False, 0.0), Requester()
    call.asked = table.open(bytes(range(16)), [b"x"], None, call)
    if journal is not NO_JOURNAL:
        table.bind(call.asked, journal)
    return call


def _load(channel: Channel, count: int) -> None:
    table = Requester()
    for number in range(count):
        table.send(table.open(number.to_bytes(16, "big"), [b"x"], None, None), channel.connection, monotonic())


def _know(channel: Channel, journal: bytes) -> None:
    """Have it know that a server with this journal answers there, with nobody in between."""
    connection = channel.connection
    connection.is_heard = connection.is_known = connection.is_direct = True
    connection.journal = journal


def test_the_fewest_in_flight(channels: list[Channel]) -> None:
    """The channel with the fewest is taken, the first of equals; one that nobody has answered by comes last."""
    first, second = channels
    assert choose(channels, _call(), 0) is first
    _load(first, 1)
    assert choose(channels, _call(), 0) is second
    first.connection.is_heard = True
    assert choose(channels, _call(), 0) is first


def test_what_cannot_be_used(channels: list[Channel]) -> None:
    """Neither one that is down, nor one whose server drains or has rejected the request; then there may be none."""
    first, second = channels
    first.is_up = False
    assert choose(channels, _call(), 0) is second
    call = _call()
    call.avoids = (second,)
    assert choose(channels, call, 0) is None
    second.connection.is_draining = True
    assert choose(channels, _call(), 0) is None


def test_one_that_was_not_heard_of_gets_a_single_request(channels: list[Channel]) -> None:
    """With retries; without, what would the others wait for?"""
    first, second = channels
    _load(first, 1)
    _load(second, 1)
    assert choose(channels, _call(), 1) is None
    assert choose(channels, _call(), 0) is first
    second.connection.is_heard = True
    assert choose(channels, _call(), 1) is second


def test_for_one_journal_alone(channels: list[Channel]) -> None:
    """A request that may have run goes to no other server than the one that knows of it."""
    first, second = channels
    _know(first, OTHER)
    _know(second, J)
    call = _call(J)
    assert choose(channels, call, 0) is second
    assert keepers(channels, call) == [second]
    assert keepers(channels, _call()) == channels
    _know(second, OTHER)
    assert choose(channels, call, 0) is None
    assert keepers(channels, call) == []


def test_hope(channels: list[Channel]) -> None:
    """There is hope while one may come up; with wait=True also where nobody is yet, but not where waiting cannot help."""
    first, second = channels
    assert hopeless(channels, False) is None
    for channel in channels:
        channel.is_up = False
        channel.trouble = NOBODY
    assert hopeless(channels, True) is None
    assert hopeless(channels, False) == (first, NOBODY)
    first.trouble, second.trouble = WRONG_TYPE, SILENT["process"]
    assert hopeless(channels, True) == (first, WRONG_TYPE)
    assert {WRONG_TYPE.kind, SILENT["process"].kind, NOBODY.kind} == {Refused, PeerSilent, Unreachable}
    second.trouble = None
    assert hopeless(channels, False) is None


def test_what_is_for_one_journal_alone_can_hope_for_longer(channels: list[Channel]) -> None:
    """Its server was there: only one that has refused takes the hope away, no door that does not answer as a server."""
    first, second = channels
    first.is_up = second.is_up = False
    for trouble in (NOBODY, NO_ANSWER, NO_HANDSHAKE._replace(kind=Refused)):
        first.trouble = second.trouble = trouble
        assert hopeless(channels, True, is_bound=True) is None
        assert hopeless(channels, False, is_bound=True) == (first, trouble)
    first.trouble = second.trouble = WRONG_TYPE
    assert hopeless(channels, True, is_bound=True) == (first, WRONG_TYPE)


def test_a_server_that_stops(channels: list[Channel]) -> None:
    """Its place is worth waiting for, unless the client does not wait."""
    for channel in channels:
        channel.connection.is_draining = True
    assert hopeless(channels, True) is None
    assert hopeless(channels, False) == (channels[0], DRAINING)
