"""Tests of greensafe.server.watchdog on its own: what is sent, when, and what is forgotten; no socket is needed for that."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, wait_until

from greensafe import LATER, Cancelled, LocalProtocolError, RemoteError, Request
from greensafe.server.options import Handler
from greensafe.server.request import error_for
from greensafe.server.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("limit")


def _watchdog(handler: Handler, sent: list[list[bytes]], limit: float | None = LONG, **options: Any) -> Watchdog:
    return Watchdog(handler, sent.append, limit=limit, grace=options.pop("grace", 5 * MS), **options)


def _ask(watchdog: Watchdog, body: bytes = b"x", client: bytes = b"peer") -> None:
    """Hand a message over as a pump does: in the hub."""
    gevent.get_hub().loop.run_callback(watchdog.accept, [client, b"", body])
    gevent.sleep(0)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (ValueError("no"), "INTERNAL", "ValueError"),
        (RemoteError("NOT_FOUND", "no"), "NOT_FOUND", None),
        (gevent.GreenletExit(), "ABORTED", "GreenletExit"),
        (Cancelled("enough"), "CANCELLED", "Cancelled"),
        (MemoryError(), "RESOURCE_EXHAUSTED", "MemoryError"),
        (SystemExit(3), "INTERNAL", "SystemExit"),
    ],
)
def test_what_a_client_is_told(error: BaseException, code: str, kind: str | None) -> None:
    """The code tells what to do about it, the type what it was."""
    told = error_for(error)
    assert told.code == code
    if kind is not None:
        assert json.loads(told.to_reply())["error"]["type"] == kind


def test_one_timer_for_all_requests() -> None:
    """However many wait, the watchdog has one timer, set for the earliest; none when nothing is owed."""
    sent: list[list[bytes]] = []
    held: list[Request] = []

    def handler(request: Request) -> Any:
        held.append(request)
        return LATER

    watchdog = _watchdog(handler, sent, limit=5 * MS)
    for _ in range(10):
        _ask(watchdog)
    timer = watchdog._timer
    assert timer is not None
    assert watchdog.load == 10
    wait_until(lambda: len(sent) == 10)
    assert {json.loads(frames[-1])["error"]["code"] for frames in sent} == {"DEADLINE_EXCEEDED"}
    wait_until(lambda: watchdog._timer is None)
    assert (watchdog.load, watchdog._owed, watchdog._greenlets) == (0, {}, {})
    with pytest.raises(LocalProtocolError):
        held[0].reply(b"late")
    assert len(sent) == 10


@pytest.mark.parametrize("is_late", [False, True])
def test_nothing_of_a_body_stays(is_late: bool) -> None:
    """What was asked goes with the request's end, however long it could have taken."""
    sent: list[list[bytes]] = []
    held: list[Request] = []

    def handler(request: Request) -> Any:
        if not is_late:
            return request.body
        held.append(request)
        return LATER

    watchdog = _watchdog(handler, sent)
    body = os.urandom(100)
    before = sys.getrefcount(body)
    _ask(watchdog, body)
    while held:
        held.pop().reply(b"late")
    wait_until(lambda: sent)
    sent.clear()
    wait_until(lambda: sys.getrefcount(body) == before)


def test_room_is_told_once_for_each_request() -> None:
    """Also when the answer comes before the handler's end, or long after it."""
    sent: list[list[bytes]] = []
    told: list[int] = []
    held: list[Request] = []

    def handler(request: Request) -> Any:
        if request.body == b"now":
            request.reply(b"now")
            gevent.sleep(2 * MS)
            return None
        held.append(request)
        return LATER

    watchdog = _watchdog(handler, sent, on_room=lambda: told.append(len(sent)))
    _ask(watchdog, b"now")
    assert told == []
    wait_until(lambda: told)
    _ask(watchdog, b"later")
    held.pop().reply(b"later")
    assert told == [1, 2]
    watchdog.close()


def test_a_broken_promise_is_found_when_the_request_is_dropped() -> None:
    """Not only by reference counting: a cycle is found by the collector."""
    sent: list[list[bytes]] = []

    def handler(request: Request) -> Any:
        cycle: list[Any] = [request]
        cycle.append(cycle)
        return LATER

    watchdog = _watchdog(handler, sent)
    _ask(watchdog)
    gc.collect()
    wait_until(lambda: sent)
    assert json.loads(sent[0][-1])["error"]["type"] == "BrokenPromise"
    watchdog.close()


def test_abort_all_answers_and_kills() -> None:
    """Nothing is owed afterwards, and no handler runs."""
    sent: list[list[bytes]] = []
    ended: list[bytes] = []

    def handler(request: Request) -> None:
        try:
            gevent.sleep(LONG)
        finally:
            ended.append(request.body)

    watchdog = _watchdog(handler, sent)
    for body in (b"1", b"2"):
        _ask(watchdog, body)
    watchdog.abort_all(RemoteError("UNAVAILABLE", "no"))
    assert {json.loads(frames[-1])["error"]["code"] for frames in sent} == {"UNAVAILABLE"}
    wait_until(lambda: len(ended) == 2)
    wait_until(lambda: not watchdog._owed)
    assert len(sent) == 2
    watchdog.close()


def test_the_handlers_of_an_end_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """That they are killed is no fault of theirs; what they raise instead is, and so is a kill that comes from elsewhere."""

    def handler(request: Request) -> None:
        try:
            gevent.sleep(LONG)
        except gevent.GreenletExit:
            if request.body == b"raises":
                raise ValueError("while it ended") from None
            raise

    watchdog = _watchdog(handler, [])
    for body in (b"1", b"2", b"raises", b"killed"):
        _ask(watchdog, body)
    list(watchdog._greenlets.values())[-1].kill()
    (killed,) = caplog.records
    assert killed.exc_info is not None
    assert killed.exc_info[0] is gevent.GreenletExit
    watchdog.abort_all(RemoteError("UNAVAILABLE", "no"))
    wait_until(lambda: not watchdog._owed)
    _, line, raised = caplog.records
    assert line.getMessage() == "3 handlers still run at the end, and are killed"
    assert "ValueError: while it ended" in caplog.text
    assert raised.exc_info is not None
    assert caplog.text.count("Traceback") == 2
    watchdog.close()


def test_malformed_messages_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """No handler is started, nobody is answered, the log names what was wrong."""
    sent: list[list[bytes]] = []
    watchdog = _watchdog(lambda request: b"x", sent)
    with caplog.at_level(logging.WARNING):
        watchdog.accept([b"peer"])
    assert (sent, watchdog.load, watchdog.responder.malformed) == ([], 0, 1)
    assert "malformed" in caplog.text
    watchdog.close()


def test_a_promise_broken_in_another_thread() -> None:
    """Whichever thread drops the request last, the client is answered at once although the loop had nothing to do."""
    sent: list[list[bytes]] = []
    held: list[Request] = []

    def handler(request: Request) -> Any:
        held.append(request)
        return LATER

    watchdog = _watchdog(handler, sent, limit=None)
    _ask(watchdog)
    gevent.get_hub().threadpool.apply(held.clear)
    wait_until(lambda: sent)
    assert json.loads(sent[0][-1])["error"]["type"] == "BrokenPromise"
    watchdog.close()


@pytest.mark.parametrize("how", ["raises", "exits", "times out", "answers itself", "returns nonsense"])
def test_on_error_that_goes_wrong_costs_nobody_an_answer(how: str) -> None:
    """Neither the client that it was called for nor those whose requests are overdue in the same moment."""
    sent: list[list[bytes]] = []

    def on_error(request: Request, error: RemoteError) -> Any:
        if how == "raises":
            raise ValueError("on_error")
        if how == "exits":
            raise SystemExit(3)
        if how == "times out":
            raise gevent.Timeout(1)
        if how == "answers itself":
            request.reply(b"mine")
            return None
        return 42

    watchdog = _watchdog(lambda request: LATER, sent, limit=None, on_error=on_error)
    held = []
    watchdog._handler = lambda request: (held.append(request), LATER)[1]
    for _ in range(4):
        _ask(watchdog)
    for request in held:
        watchdog._guarded(watchdog.fail, request._exchange, RemoteError("INTERNAL", "no"))
    assert len(sent) == 4
    assert watchdog.load == 0
    watchdog._limit = 5 * MS
    for _ in range(4):
        _ask(watchdog)
    wait_until(lambda: len(sent) == 8)
    wait_until(lambda: watchdog.load == 0)
    watchdog._handler = lambda request: None
    _ask(watchdog)
    assert len(sent) == 9
    assert {frames[-1] == b"mine" for frames in sent} == {how == "answers itself"}
    watchdog.close()
