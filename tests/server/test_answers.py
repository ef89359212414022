"""Tests of greensafe.server.answers: what becomes of an answer that cannot leave."""

from __future__ import annotations

import logging
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import LATER, LocalProtocolError, Request, stats_of, supervise, supervised
from greensafe.server import answers
from greensafe.server.log_lines import Lines

pytestmark = pytest.mark.usefixtures("limit")


def _said(caplog: pytest.LogCaptureFixture) -> tuple[str, dict[str, str]]:
    """The one line of supervision's logger, and what it carries."""
    (record,) = (each for each in caplog.records if each.name == "greensafe.supervision")
    return record.getMessage(), {name: record.__dict__[name] for name in ("endpoint", "request_id", "client")}


def test_a_client_that_is_gone(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """Its answer is counted, and logged with the request and the client."""
    caplog.set_level(logging.INFO, "greensafe")
    sock = context.socket(zmq.ROUTER)
    sock.router_mandatory = True
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    kept: list[Request] = []
    serving = gevent.spawn(supervise, sock, lambda request: kept.append(request) or LATER, deadline=LONG)
    peer = context.socket(zmq.DEALER)
    peer.routing_id = b"peer"
    peer.connect(f"tcp://127.0.0.1:{port}")
    for _ in range(500):
        peer.send_multipart([b"", b"x"])
    wait_until(lambda: len(kept) == 500)
    peer.close(0)
    # libzmq drops the first ones by itself, as long as it has not heard of the end.
    wait_until(lambda: kept.pop().reply(b"for nobody") or stats_of(sock).drops["unreachable"])
    text, told = _said(caplog)
    number = str(len(kept) + 1)
    assert text.startswith(f"answer to <Request {number} from peer ")
    assert text.endswith("dropped: its client is gone")
    assert told == {"endpoint": f"tcp://127.0.0.1:{port}", "request_id": number, "client": "peer"}
    assert stats_of(sock).drops["unreachable"] == 1
    serving.kill()


@pytest.mark.parametrize("kind", [zmq.REP, zmq.ROUTER])
def test_a_socket_that_was_closed(context: zmq.Context, caplog: pytest.LogCaptureFixture, kind: int) -> None:
    """A block that closes its socket without an answer is told of in the log, and counted; one that has answered is not."""
    for has_answered in (True, False):
        sock, peer = context.socket(kind), context.socket(zmq.DEALER)
        sock.bind("inproc://s")
        peer.connect("inproc://s")
        peer.send_multipart([b"", b"x"])
        with supervised(sock, deadline=LONG) as request:
            if has_answered and kind == zmq.REP:
                sock.send(b"own")
            elif has_answered:
                request.reply(b"own")
            sock.close()
        now = stats_of(sock)
        assert now.drops["unreachable"] == (0 if has_answered else 1)
        assert now.failures == ({} if has_answered else {"INTERNAL": 1})
        peer.close(0)
    assert _said(caplog)[0].endswith("dropped: the socket was closed before it")


def _flood(context: zmq.Context) -> tuple[Any, Any, Any]:
    """A ROUTER whose one client has asked twice and reads nothing, and has room for one answer."""
    sock, peer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    sock.router_mandatory = True
    sock.sndhwm = peer.rcvhwm = 1
    sock.bind("inproc://s")
    peer.connect("inproc://s")
    for _ in range(4):
        peer.send_multipart([b"", b"x"])
    return sock, peer, gevent.spawn(supervise, sock, lambda request: b"y", deadline=LONG)


def test_a_client_that_reads_late(context: zmq.Context) -> None:
    """What its pipe has no room for waits, is counted meanwhile, and arrives when it reads."""
    sock, peer, serving = _flood(context)
    wait_until(lambda: stats_of(sock).answered == 4 and stats_of(sock).unsent == 2)
    for _ in range(4):
        assert peer.recv_multipart() == [b"", b"y"]
    wait_until(lambda: stats_of(sock).unsent == 0)
    assert not any(stats_of(sock).drops.values())
    serving.kill()


def test_a_client_that_does_not_read(
    context: zmq.Context, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for too long is dropped: it is counted, and logged with its request."""
    monkeypatch.setattr(answers, "FULL_PEER", 5 * MS)
    sock, _, serving = _flood(context)
    wait_until(lambda: stats_of(sock).drops["full_outbox"] == 2)
    assert stats_of(sock).unsent == 0
    serving.kill()  # the second line is counted, and written now at the latest
    said = [record for record in caplog.records if record.name == "greensafe.supervision"]
    assert [record.levelname for record in said] == ["WARNING", "WARNING"]
    assert sorted(record.__dict__["request_id"] for record in said) == ["3", "4"]


def test_an_answer_that_is_larger_than_all_that_may_wait(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message waits for a client however long it is; what comes behind it is dropped, and counted."""
    monkeypatch.setattr(answers, "OUTBOX", 100)
    sock, peer, serving = _flood(context)
    wait_until(lambda: stats_of(sock).answered == 4)
    assert (stats_of(sock).unsent, stats_of(sock).drops["full_outbox"]) == (1, 1)
    for _ in range(3):
        assert peer.recv_multipart() == [b"", b"y"]
    wait_until(lambda: stats_of(sock).unsent == 0)
    serving.kill()


def test_what_is_nobodys_answer_is_not_logged_as_one(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """A WORKING for a client that is gone is counted only."""
    caplog.set_level(logging.INFO, "greensafe.supervision")
    sock = context.socket(zmq.ROUTER)
    sock.router_mandatory = True
    sender = answers.Sender(sock, tally := answers.Tally(), Lines("s"))
    sender([b"nobody", b"header", b"", b"ids"])
    assert tally.unreachable == 1
    assert caplog.records == []


def test_what_comes_behind_the_programs_own_send(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """The handler's answer is a second one then, logged and counted; one by request.reply is refused; no deadline is missed."""
    sock, peer = context.socket(zmq.REP), context.socket(zmq.REQ)
    sock.bind("inproc://s")
    peer.connect("inproc://s")
    refused: list[Exception] = []

    def handler(request: Request) -> Any:
        sock.send(b"own")
        if request.body == b"returned":
            return b"second"
        if request.body == b"replied":
            with pytest.raises(LocalProtocolError) as caught:
                request.reply(b"second")
            refused.append(caught.value)
        if request.body == b"late":
            gevent.sleep(LONG)
        return None

    serving = gevent.spawn(supervise, sock, handler, deadline=20 * MS)
    for body, duplicates in ((b"returned", 1), (b"replied", 2), (b"late", 2)):
        peer.send(body)
        assert peer.recv() == b"own"
        wait_until(lambda: not stats_of(sock).running)
        assert stats_of(sock).drops["duplicates"] == duplicates
    assert len(refused) == 1
    assert stats_of(sock).failures == {}
    assert stats_of(sock).answered == 3
    lines = [record.getMessage() for record in caplog.records if record.name == "greensafe.watchdog"]
    assert [line.partition(" 1 frames> ")[2] for line in lines] == ["returned an answer though it is answered: dropped"]
    serving.kill()
