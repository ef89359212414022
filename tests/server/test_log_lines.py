"""Tests of greensafe.server.log_lines: what a server logs about requests that go wrong, and how often."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from gevent.event import Event
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import LATER, Client, RemoteError, Request, Server, supervised
from greensafe.deadlines import check
from greensafe.errors import JournalUnavailable
from greensafe.hooks import RequestFailed
from greensafe.hub import log_limiter as seldom
from greensafe.journal import SqliteJournal
from greensafe.sansio.envelope import Header, Kind
from greensafe.server.log_lines import EACH_PLACE

pytestmark = pytest.mark.usefixtures("limit")

ENDPOINT = "inproc://s"
COUNT = re.compile(r" \(the last of (\d+) more within \d+\.\d s\)$")


@pytest.fixture(autouse=True)
def _settings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "greensafe")
    monkeypatch.setattr(seldom, "PERIOD", LONG)  # counts are written when the server is closed: so their number is known


def _lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "greensafe.watchdog"]


def _total(records: list[logging.LogRecord]) -> int:
    found = [COUNT.search(record.getMessage()) for record in records]
    return sum(1 if each is None else int(each[1]) for each in found)


def _third() -> None:
    int("no")


def _wait_here(limit: float) -> None:
    gevent.sleep(limit)


def _handler(request: Request) -> Any:
    match request.body:
        case b"json":
            return str(request.json()).encode()
        case b"mine":
            raise RemoteError("NOT_FOUND", "no such\nthing") from KeyError("key")
        case b"bug":
            raise ValueError("no\n2026-01-01 CRITICAL root: forged")
        case b"other bug":
            int("no")
        case b"third bug":
            _third()
        case b"twice":
            request.reply(b"1")
            return b"2"
        case b"later":
            held.append(request)
            return LATER
        case b"hang":
            _wait_here(LONG)
        case b"own":
            request.deadline.cancel(ValueError("enough"))
            gevent.sleep(LONG)
    return b"answer"


held: list[Request] = []


@pytest.fixture(autouse=True)
def _nothing_held() -> Iterator[None]:
    yield
    held.clear()


def _ask_all(context: zmq.Context, bodies: list[bytes], **options: Any) -> Server:
    """A plain DEALER asks everything at once; returns the server, closed, when all is answered."""
    server = Server(ENDPOINT, _handler, **{"deadline": LONG, **options}, context=context)
    with server:
        peer = context.socket(plain.DEALER)
        peer.connect(ENDPOINT)
        for body in bodies:
            peer.send_multipart([b"", body])
        for _ in bodies:
            peer.recv_multipart(timeout=LONG)
        peer.close(0)
    return server


def test_malformed_messages_are_one_line_and_a_count(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """A flood of them is one line at once and one with the rest, in the log as in the stats."""
    with Server(ENDPOINT, _handler, deadline=LONG, context=context) as server:
        peer = context.socket(plain.DEALER)
        peer.connect(ENDPOINT)
        for _ in range(500):
            peer.send(b"abc")
        wait_until(lambda: server.stats.drops["malformed"] == 500)
        assert len(_lines(caplog)) == 1
    lines = _lines(caplog)
    assert (len(lines), _total(lines)) == (2, 500)
    assert {(line.levelno, line.endpoint) for line in lines} == {(logging.WARNING, ENDPOINT)}
    assert all(line.getMessage().startswith("malformed request dropped: ") for line in lines)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"json", "the request's body is not JSON"),
        (b"mine", r"its handler has raised NOT_FOUND: no such\nthing, because of KeyError: 'key'"),
    ],
)
def test_what_is_meant_for_the_client_has_no_traceback(
    context: zmq.Context, caplog: pytest.LogCaptureFixture, body: bytes, text: str
) -> None:
    """Bad JSON and a RemoteError of the handler's own: a line at INFO with the request's id, and then a count."""
    _ask_all(context, [body] * 50)
    first, count = _lines(caplog)
    assert text in first.getMessage()
    assert (first.levelno, first.exc_info, first.endpoint, first.request_id) == (logging.INFO, None, ENDPOINT, "1")
    assert _total([first, count]) == 50


def test_an_error_of_a_server_behind_is_a_failure(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """It was not raised on purpose: it has its traceback."""
    with (
        Server("inproc://behind", _handler, deadline=LONG, context=context),
        Client("inproc://behind", context=context) as behind,
    ):
        with Server(ENDPOINT, lambda request: behind.request(request.body), deadline=LONG, context=context):
            with Client(ENDPOINT, context=context) as client, pytest.raises(RemoteError, match="NOT_FOUND"):
                client.request(b"mine")
    failed = [line for line in _lines(caplog) if line.levelno == logging.ERROR]
    assert len(failed) == 1
    assert failed[0].exc_info is not None


def test_a_flood_of_one_failure_hides_no_other(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """Failures have their tracebacks, ten a second from one place in the code; another one has its own."""
    records: list[Any] = []
    _ask_all(context, [b"other bug"] * 100 + [b"third bug"], hooks=records.append)
    lines = _lines(caplog)
    assert _total(lines) == 101
    assert len(lines) == EACH_PLACE + 2
    assert {line.levelno for line in lines} == {logging.ERROR}
    assert [line.exc_info is not None for line in lines[:EACH_PLACE]] == [True] * EACH_PLACE
    assert len([line for line in lines if line.exc_info is not None and line.request_id == "101"]) == 1
    assert sum(isinstance(record, RequestFailed) for record in records) == 101


def test_a_traceback_forges_no_line(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """An exception's text with a line end in it stands behind a bar."""
    _ask_all(context, [b"bug"])
    text = logging.Formatter("%(levelname)s %(message)s").format(_lines(caplog)[0])
    assert not [line for line in text.splitlines() if line.startswith("2026")]
    assert "  | 2026-01-01 CRITICAL root: forged" in text


def test_a_second_answer(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """Is logged and counted like all the others, and exactly."""
    server = _ask_all(context, [b"twice"] * 20)
    assert _total(_lines(caplog)) == 20
    assert server.stats.drops["duplicates"] == 20


def test_a_missed_deadline(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """One line at WARNING says which request of which client, and where its handler was, with the calls that led there."""
    _ask_all(context, [b"hang"], deadline=20 * MS)
    missed = [line for line in _lines(caplog) if "has missed the deadline" in line.getMessage()]
    (line,) = missed
    assert (line.levelno, line.endpoint, line.request_id) == (logging.WARNING, ENDPOINT, "1")
    text = line.getMessage()
    assert re.match(
        r"request 1 of client b['\"].+['\"] has missed the deadline, 0\.\d+ s after it arrived; its handler was at ", text
    )
    assert re.search(r"test_log_lines\.py:\d+ _wait_here, called at .*test_log_lines\.py:\d+ _handler", text)
    assert "watchdog.py" not in text


def test_a_promise_that_nobody_keeps(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that has returned LATER is nowhere; that is said."""
    _ask_all(context, [b"later"], deadline=20 * MS)
    assert "its handler has returned LATER, and nobody has answered" in _lines(caplog)[0].getMessage()


def test_a_deadline_that_the_handler_meets_itself(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """The signal has come out of the handler before the timer: the place is in its traceback."""

    def handler(request: Request) -> None:
        while True:  # the hub does not turn meanwhile
            check(False)

    with Server(ENDPOINT, handler, deadline=20 * MS, context=context):
        with Client(ENDPOINT, context=context) as client, pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
            client.request(b"x")
    (line,) = [line for line in _lines(caplog) if "has missed the deadline" in line.getMessage()]
    assert re.search(r"its handler was at \S+test_log_lines\.py:\d+ \S+handler$", line.getMessage())


def _ask_with_limit(peer: Any, number: int, limit_ms: int) -> None:
    """As a client that never cancels."""
    peer.send_multipart([Header(Kind.REQUEST, number.to_bytes(16, "big"), limit_ms).encode(), b"", b"hang"])


def test_a_limit_of_the_clients_own(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """Is the client's business: INFO, one line for hundreds of them and their count; not one for each, and no WARNING."""
    with Server(ENDPOINT, _handler, deadline=LONG, context=context) as server:
        peer = context.socket(plain.DEALER)
        peer.connect(ENDPOINT)
        for number in range(200):
            _ask_with_limit(peer, number, 5)
        for _ in range(200):
            peer.recv_multipart(timeout=LONG)
        assert server.stats.failures == {"DEADLINE_EXCEEDED": 200}
    lines = _lines(caplog)
    assert {line.levelno for line in lines} == {logging.INFO}
    assert (len(lines), _total(lines)) == (2, 200)
    assert all("the client's own limit has come" in line.getMessage() for line in lines)
    assert lines[0].request_id in {number.to_bytes(16, "big").hex() for number in range(200)}


def test_a_request_that_was_not_run(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """A client's limit that comes before the request's turn has no handler to tell of."""
    with Server(ENDPOINT, _handler, deadline=LONG, max_inflight=1, context=context) as server:
        peer = context.socket(plain.DEALER)
        peer.connect(ENDPOINT)
        peer.send_multipart([b"", b"hang"])
        wait_until(lambda: server.stats.running)
        _ask_with_limit(peer, 1, 10)
        peer.recv_multipart(timeout=LONG)
        server.close()
    assert "; it was not run" in _lines(caplog)[0].getMessage()


def test_a_scope_that_the_program_cancels(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """Why is in the log."""
    _ask_all(context, [b"own"])
    assert "its deadline scope was cancelled: ValueError: enough" in _lines(caplog)[0].getMessage()


class _Broken(logging.Handler):
    def __init__(self, act: Any) -> None:
        super().__init__(logging.WARNING)
        self.act = act

    def emit(self, record: logging.LogRecord) -> None:
        self.act()


@contextmanager
def _logging_that(act: Any) -> Iterator[None]:
    handler = _Broken(act)
    log = logging.getLogger("greensafe")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize("act", [lambda: 1 / 0, lambda: gevent.sleep(MS)], ids=["raises", "waits"])
def test_logging_that_fails_costs_no_answer(context: zmq.Context, caplog: pytest.LogCaptureFixture, act: Any) -> None:
    """A missed deadline, say, is logged in the hub: whatever the program's logging does there, the client is answered."""
    with _logging_that(act):
        server = _ask_all(context, [b"hang", b"bug", b"twice", b"own", b"later"], deadline=20 * MS)
    assert (server.stats.answered, server.stats.restarts) == (5, {})
    assert server.stats.failures == {"DEADLINE_EXCEEDED": 2, "INTERNAL": 2}


def test_logging_that_waits_delays_no_answer(context: zmq.Context) -> None:
    """A failure is answered before it is logged: logging may wait, until the deadline, and longer."""
    go_on = Event()
    with _logging_that(go_on.wait), Server(ENDPOINT, _handler, deadline=LONG, context=context) as server:
        with Client(ENDPOINT, context=context) as client, pytest.raises(RemoteError, match="INTERNAL"):
            client.request(b"bug")
        assert server.stats.running == 1
        go_on.set()
        wait_until(lambda: not server.stats.running)


def test_a_deadline_that_comes_while_it_is_logged(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """The handler has met it by itself, and logging waits: the timer answers, and nobody answers a second time."""

    def handler(request: Request) -> None:
        while True:  # the hub does not turn meanwhile
            check(False)

    server = Server(ENDPOINT, handler, deadline=20 * MS, context=context)
    with _logging_that(lambda: gevent.sleep(50 * MS)), server:
        with Client(ENDPOINT, context=context) as client, pytest.raises(RemoteError, match="DEADLINE_EXCEEDED"):
            client.request(b"x")
        wait_until(lambda: not server.stats.running)
    assert (server.stats.answered, server.stats.drops["duplicates"]) == (1, 0)
    assert not [line for line in _lines(caplog) if "has been answered already" in line.getMessage()]


def test_blocks_of_one_socket_count_together(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """What is malformed between the requests of a `supervised` loop does not begin a new count with each of them."""
    sock = context.socket(zmq.ROUTER)
    sock.bind(ENDPOINT)
    peer = context.socket(zmq.DEALER)
    peer.connect(ENDPOINT)
    for _ in range(20):
        peer.send(b"abc")
        peer.send_multipart([b"", b"x"])
    for _ in range(20):
        with supervised(sock, deadline=LONG) as request:
            request.reply(b"y")
    assert len(_lines(caplog)) == 1
    sock._lines.flush()
    assert (len(_lines(caplog)), _total(_lines(caplog))) == (2, 20)


def test_logging_that_fails_costs_no_journal_its_answers(context: zmq.Context, tmp_path: Path) -> None:
    """That the journal cannot be written, and can be again, is logged before those who wait for it are told."""

    class Failing(SqliteJournal):
        def commit(self, writes: Any) -> Any:
            if fails:
                raise JournalUnavailable("its disk is full")
            return super().commit(writes)

    fails = [True]
    journal = Failing(tmp_path / "journal")
    with (
        _logging_that(lambda: 1 / 0),
        Server(ENDPOINT, lambda request: b"y", deadline=LONG, journal=journal, context=context) as server,
        Client(ENDPOINT, context=context) as client,
    ):
        asking = gevent.spawn(client.request, b"x")
        wait_until(lambda: server.stats.journal and server.stats.journal.error)
        fails.clear()
        assert asking.get() == b"y"
        wait_until(lambda: server.stats.journal and not server.stats.journal.error)
