"""Tests of greensafe.server.tally, and of stats_of, which shows it."""

from __future__ import annotations

import random
from typing import Any

import gevent
import gevent.event
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import LATER, Request, stats_of, supervise, supervised
from greensafe.server import descriptors, tally
from greensafe.stats import ServerStats

pytestmark = pytest.mark.usefixtures("limit")

ENDPOINT = "inproc://counted"


def _bound(context: zmq.Context, kind: int) -> tuple[Any, Any]:
    sock, peer = context.socket(kind), context.socket(zmq.DEALER)
    sock.bind(ENDPOINT)
    peer.connect(ENDPOINT)
    return sock, peer


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_the_stats_of_supervise(context: zmq.Context, kind: int) -> None:
    """They have a Server's names and meanings, and count on through several runs."""
    sock, peer = _bound(context, kind)
    assert stats_of(sock).state == "closed"
    assert stats_of(sock).received == 0
    kept: list[Request] = []

    def handler(request: Request) -> Any:
        if request.body == b"fail":
            raise KeyError("no")
        kept.append(request)
        return LATER

    for run in (1, 2):
        serving = gevent.spawn(supervise, sock, handler, deadline=LONG)
        peer.send_multipart([b"", b"fail"])
        peer.recv_multipart()
        if kind == zmq.ROUTER:
            peer.send_multipart([b"malformed"])
        peer.send_multipart([b"", b"x"])
        wait_until(lambda: kept)
        now = stats_of(sock)
        assert (now.endpoint, now.state, now.is_healthy, now.is_accepting) == (ENDPOINT, "started", True, True)
        assert (now.received, now.answered, now.inflight, now.running) == (2 * run, 2 * run - 1, 1, 1)
        assert now.failures == {"INTERNAL": run}
        assert now.oldest_seconds is not None
        assert 0 <= now.oldest_seconds < LONG
        request = kept.pop()
        assert request.id == str(2 * run)
        request.reply(b"late")
        with pytest.raises(zmq.LocalProtocolError):
            request.reply(b"twice")
        assert peer.recv_multipart() == [b"", b"late"]
        serving.kill()
    end = stats_of(sock)
    assert (end.state, end.received, end.answered, end.inflight, end.running, end.oldest_seconds) == (
        "closed",
        4,
        4,
        0,
        0,
        None,
    )
    assert end.drops["malformed"] == (2 if kind == zmq.ROUTER else 0)
    assert end.drops["duplicates"] == 2
    sock.close(0)
    assert stats_of(sock) == end


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_the_stats_of_a_loop_of_ones_own(context: zmq.Context, kind: int) -> None:
    """All blocks count together, also one that is made anew for each request; while a block waits it is started."""
    sock, peer = _bound(context, kind)
    ids = []

    def loop() -> None:
        while True:
            with supervised(sock, deadline=LONG) as request:
                ids.append(request.id)
                if request.body == b"fail":
                    raise KeyError("no")
                assert stats_of(sock).inflight == stats_of(sock).running == 1
                request.reply(request.body)

    looping = gevent.spawn(loop)
    for body in (b"1", b"fail", b"3"):
        peer.send_multipart([b"", body])
        peer.recv_multipart()
    now = stats_of(sock)
    assert (now.state, now.received, now.answered, now.failures) == ("started", 3, 3, {"INTERNAL": 1})
    looping.kill()
    assert stats_of(sock).state == "closed"
    assert ids == ["1", "2", "3"]


def test_blocks_side_by_side(context: zmq.Context) -> None:
    """Several greenlets that share a ROUTER count together, and no two requests have one number."""
    sock, peer = _bound(context, zmq.ROUTER)
    ids = []
    may_end = gevent.event.Event()

    def work() -> None:
        for _ in range(5):
            with supervised(sock, deadline=LONG) as request:
                ids.append(request.id)
                may_end.wait()
                request.reply(b"")

    workers = [gevent.spawn(work) for _ in range(3)]
    gevent.sleep(0)  # all three have entered before anything is there
    for _ in range(15):
        peer.send_multipart([b"", b"x"])
    wait_until(lambda: len(ids) == 3)
    assert stats_of(sock).inflight == 3
    may_end.set()
    gevent.joinall(workers, raise_error=True)
    assert sorted(map(int, ids)) == list(range(1, 16))
    assert stats_of(sock).received == stats_of(sock).answered == 15


def test_a_zombie_is_named(context: zmq.Context) -> None:
    """A handler that survives its kill is one of its socket's stats until it ends."""
    sock, peer = _bound(context, zmq.ROUTER)
    may_end = False

    def handler(request: Request) -> None:
        while not may_end:
            try:
                gevent.sleep(LONG)
            except BaseException:
                continue

    serving = gevent.spawn(supervise, sock, handler, deadline=10 * MS, grace=10 * MS)
    peer.send_multipart([b"", b"x"])
    wait_until(lambda: stats_of(sock).zombie_count)
    (zombie,) = stats_of(sock).zombies
    assert zombie.request_id == "1"
    assert stats_of(sock).running == 0
    may_end = True
    wait_until(lambda: not stats_of(sock).zombies)
    serving.kill()


def test_no_descriptor_is_left(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a supervised socket accepts nobody and is not healthy, as a Server."""
    monkeypatch.setattr(descriptors, "PERIOD", 5 * MS)
    is_empty = True
    monkeypatch.setattr(descriptors, "_problem", lambda reserve: "none" if is_empty else None)
    told: list[Any] = []
    sock, _ = _bound(context, zmq.REP)
    serving = gevent.spawn(supervise, sock, lambda request: b"", deadline=LONG, hooks=told.append)
    wait_until(lambda: not stats_of(sock).is_accepting)
    assert not stats_of(sock).is_healthy
    is_empty = False
    wait_until(lambda: stats_of(sock).is_healthy)
    assert [type(record).__name__ for record in told] == ["ServerStarted", "DescriptorsExhausted", "DescriptorsExhausted"]
    serving.kill()


def test_a_forked_child_counts_anew(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parent has counted is not the child's, and a block that was entered in the parent may end there."""
    sock, peer = _bound(context, zmq.ROUTER)
    peer.send_multipart([b"", b"x"])
    with supervised(sock, deadline=LONG) as request:
        request.reply(b"")
        monkeypatch.setattr(tally, "generation", lambda: -1)
        assert stats_of(sock).received == 0
    assert stats_of(sock).received == 0


def test_stats_of_what_cannot_be_supervised(context: zmq.Context) -> None:
    """It is refused, by its kind."""
    with pytest.raises(TypeError, match="REP or ROUTER"):
        stats_of(context.socket(zmq.DEALER))
    with plain.Context() as other, other.socket(zmq.REP) as foreign, pytest.raises(TypeError, match="greensafe socket"):
        stats_of(foreign)  # type: ignore[arg-type]


def test_its_fields_are_those_of_a_server() -> None:
    """A socket that nobody has supervised has nothing to tell."""
    assert tally.Tally().stats() == ServerStats("", "closed", drops=tally.Tally().stats().drops)
    assert set(tally.Tally().stats().drops.values()) == {0}
    assert repr(tally.Tally()) == "<Tally of 0 watchdogs received=0 answered=0>"


@pytest.mark.parametrize("seed", range(5))
def test_what_waits(seed: int) -> None:
    """What is kept and released in any order adds up, by peer and in all, and is bounded but for one message each."""
    chance, counts = random.Random(seed), tally.Tally()
    kept: list[tuple[bytes, int]] = []
    for _ in range(300):
        if chance.random() < 0.6:
            peer, size = b"%d" % chance.randrange(5), chance.choice((1, 50, 500))
            was = sum(each for name, each in kept if name == peer), sum(each for _, each in kept)
            is_kept = counts.keep(peer, size, 200, 1500)
            assert is_kept == (was[1] < 1500 and (was[0] == 0 or was[0] + size <= 200))
            kept += [(peer, size)] * is_kept
        elif kept:
            counts.release(*kept.pop(chance.randrange(len(kept))))
        assert counts.waiting == {name: sum(each for peer, each in kept if peer == name) for name in dict(kept)}
        assert sum(counts.waiting.values()) == counts._waiting_size
