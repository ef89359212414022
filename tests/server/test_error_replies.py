"""Tests of greensafe.server.error_replies: what is told to a client, and what is for the log and for hooks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Cancelled, Client, JournalError, OperationTimeout, RemoteError, Request, Server, supervise, supervised
from greensafe.hooks import RequestFailed
from greensafe.journal import SqliteJournal
from greensafe.server.error_replies import replaced

pytestmark = pytest.mark.usefixtures("limit")

ENDPOINT = "inproc://s"
SECRET = "postgresql://admin:hunter2@db/motors"


def _handler(request: Request) -> Any:
    match request.body:
        case b"bug":
            raise ValueError(SECRET)
        case b"mine":
            raise RemoteError("NOT_FOUND", "no such motor", "Motor")
        case b"said":
            request.error("NOT_FOUND", "no such motor")
        case b"json":
            request.json()
        case b"cancelled":
            raise Cancelled(SECRET)
        case b"behind":
            error = RemoteError.from_reply(RemoteError("ABORTED", SECRET, SECRET).to_reply())
            assert error is not None
            raise error
        case b"journal":
            raise JournalError(SECRET)
        case b"hang":
            gevent.sleep(LONG)
    return None


class Asker:
    """Asks one server as a plain client and as a greensafe one."""

    def __init__(self, context: zmq.Context, endpoint: str = ENDPOINT) -> None:
        self.context, self.endpoint = context, endpoint

    def plain(self, body: bytes) -> list[bytes]:
        req = self.context.socket(plain.REQ)
        req.connect(self.endpoint)
        req.send(body)
        reply: list[bytes] = req.recv_multipart(timeout=LONG)
        req.close(0)
        return reply

    def error(self, body: bytes, is_plain: bool) -> RemoteError:
        if is_plain:
            found = RemoteError.from_reply(self.plain(body)[0])
            assert found is not None
            return found
        with Client(self.endpoint, context=self.context) as client, pytest.raises(RemoteError) as caught:
            client.request(body, timeout=LONG)
        return caught.value


@pytest.fixture
def asker(context: zmq.Context) -> Asker:
    return Asker(context)


both = pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "greensafe"])


@both
@pytest.mark.parametrize("body", [b"bug", b"cancelled", b"behind"])
def test_errors_that_are_not_told(
    context: zmq.Context, asker: Asker, caplog: pytest.LogCaptureFixture, is_plain: bool, body: bytes
) -> None:
    """With tell_errors=False a client gets the class's name and the request's id; the log has all of it under that id."""
    records: list[Any] = []
    with Server(ENDPOINT, _handler, deadline=LONG, tell_errors=False, hooks=records.append, context=context):
        told = asker.error(body, is_plain)
    (failed,) = [record for record in records if isinstance(record, RequestFailed)]
    assert SECRET in failed.message
    assert SECRET not in str(told)
    assert failed.request_id in told.message
    expected = {
        b"bug": ("INTERNAL", "ValueError"),
        b"cancelled": ("CANCELLED", "Cancelled"),
        b"behind": ("ABORTED", "RemoteError"),
    }
    assert (told.code, told.type) == expected[body]
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert line.request_id == failed.request_id
    assert SECRET in logging.Formatter().format(line)


@both
@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("body", [b"mine", b"said"])
def test_what_is_meant_for_the_client(context: zmq.Context, asker: Asker, is_plain: bool, tells: bool, body: bytes) -> None:
    """A RemoteError that the handler raises, and request.error, are told as they are in both modes."""
    with Server(ENDPOINT, _handler, deadline=LONG, tell_errors=tells, context=context):
        told = asker.error(body, is_plain)
    assert (told.code, told.message) == ("NOT_FOUND", "no such motor")


@both
def test_what_greensafe_says_itself(context: zmq.Context, asker: Asker, is_plain: bool) -> None:
    """A deadline, bad JSON and a missing answer hold nothing of the program's, so they are told with tell_errors=False."""
    with Server(ENDPOINT, _handler, deadline=20 * MS, tell_errors=False, context=context):
        assert "in time" in asker.error(b"hang", is_plain).message
        assert "not JSON" in asker.error(b"json", is_plain).message
        assert "returned nothing" in asker.error(b"x", is_plain).message


@both
def test_by_default_errors_are_told(context: zmq.Context, asker: Asker, is_plain: bool) -> None:
    """The class's name and the text; no traceback goes out in any mode."""
    with Server(ENDPOINT, _handler, deadline=LONG, context=context):
        told = asker.error(b"bug", is_plain)
    assert (told.code, told.type, told.message, told.traceback) == ("INTERNAL", "ValueError", SECRET, None)
    assert b"raceback" not in RemoteError("INTERNAL", "no", traceback="Traceback ...").to_reply()


@both
@pytest.mark.parametrize("tells", [True, False])
def test_a_journal_that_fails_is_not_described(
    context: zmq.Context, asker: Asker, caplog: pytest.LogCaptureFixture, is_plain: bool, tells: bool
) -> None:
    """Its path and what is wrong with it are for the log."""
    with Server(ENDPOINT, _handler, deadline=LONG, tell_errors=tells, context=context):
        told = asker.error(b"journal", is_plain)
    assert (told.code, told.type) == ("UNAVAILABLE", "JournalError")
    assert SECRET not in told.message
    assert SECRET in caplog.text


@pytest.mark.parametrize("what", ["request", "answer"])
def test_what_cannot_be_stored(
    context: zmq.Context, asker: Asker, caplog: pytest.LogCaptureFixture, tmp_path: Path, what: str
) -> None:
    """Where the journal does not take a request or an answer the client is told that; the log says why, with its id."""

    class Failing(SqliteJournal):
        def commit(self, writes: Any) -> Any:
            if any(type(write).__name__ == ("Begin" if what == "request" else "Finish") for write in writes):
                raise JournalError(f"{tmp_path}: {SECRET}")
            return super().commit(writes)

    journal = Failing(tmp_path / "journal")
    with Server(ENDPOINT, lambda request: b"y", deadline=LONG, journal=journal, context=context):
        told = asker.error(b"x", False)
    assert told.type == "JournalError"
    assert SECRET not in told.message
    assert str(tmp_path) not in told.message
    (line,) = [record for record in caplog.records if record.name == "greensafe.watchdog"]
    assert SECRET in line.getMessage()
    assert (line.levelno, len(line.request_id)) == (logging.WARNING, 32)


@both
def test_on_error_chooses_an_error_for_both(context: zmq.Context, asker: Asker, is_plain: bool) -> None:
    """A RemoteError that it returns is told in place of the other, which it, the hooks and the counts have as it was."""
    seen: list[RemoteError] = []
    records: list[Any] = []

    def on_error(request: Request, error: RemoteError) -> RemoteError:
        seen.append(error)
        return RemoteError("FAILED_PRECONDITION", "ask the operator", "Chosen")

    options: dict[str, Any] = {"on_error": on_error, "hooks": records.append, "tell_errors": False, "context": context}
    with Server(ENDPOINT, _handler, deadline=LONG, **options) as server:
        told = asker.error(b"bug", is_plain)
        assert server.stats.failures == {"INTERNAL": 1}
    assert (told.code, told.message, told.type) == ("FAILED_PRECONDITION", "ask the operator", "Chosen")
    assert [error.message for error in seen] == [SECRET]
    assert [record.message for record in records if isinstance(record, RequestFailed)] == [SECRET]


@pytest.mark.parametrize("tells", [True, False])
def test_frames_of_on_error_are_for_plain_clients(context: zmq.Context, asker: Asker, tells: bool) -> None:
    """They would be data, or nonsense, to a greensafe client: it is told the error."""
    with Server(ENDPOINT, _handler, deadline=LONG, on_error=lambda *_: [b"a", b"b"], tell_errors=tells, context=context):
        assert asker.plain(b"bug") == [b"a", b"b"]
        told = asker.error(b"bug", False)
    assert (told.code, told.type) == ("INTERNAL", "ValueError")
    assert (SECRET in told.message) is tells


@both
def test_on_error_that_fails_betrays_nothing(context: zmq.Context, asker: Asker, is_plain: bool) -> None:
    """The standard error is sent then, which with tell_errors=False has no text either."""

    def on_error(request: Request, error: RemoteError) -> Any:
        raise RuntimeError(SECRET)

    with Server(ENDPOINT, _handler, deadline=LONG, on_error=on_error, tell_errors=False, context=context):
        told = asker.error(b"bug", is_plain)
    assert (told.code, told.type) == ("INTERNAL", "ValueError")
    assert SECRET not in told.message


@both
def test_on_error_may_answer_by_an_error(context: zmq.Context, asker: Asker, is_plain: bool) -> None:
    """What it says by request.error is said: it is not asked about that again."""
    asked: list[str] = []

    def on_error(request: Request, error: RemoteError) -> None:
        asked.append(error.code)
        request.error("ABORTED", "its own")

    with Server(ENDPOINT, _handler, deadline=LONG, on_error=on_error, context=context):
        told = asker.error(b"bug", is_plain)
    assert (told.code, told.message, asked) == ("ABORTED", "its own", ["INTERNAL"])


def test_errors_that_a_client_acts_on_are_told_as_they_are(context: zmq.Context) -> None:
    """A caller's limit stays the caller's own exception, and a request that was not run is asked elsewhere."""
    asked: list[RemoteError] = []

    def on_error(request: Request, error: RemoteError) -> RemoteError:
        asked.append(error)
        return RemoteError("INTERNAL", "chosen")

    options: dict[str, Any] = {"on_error": on_error, "max_inflight": 1, "overload": "reject", "context": context}
    with (
        Server(ENDPOINT, _handler, deadline=LONG, **options) as server,
        Server("inproc://other", lambda request: b"other", deadline=LONG, context=context),
        Client(ENDPOINT, context=context) as client,
    ):
        hanging = gevent.spawn(client.request, b"hang", timeout=50 * MS)
        wait_until(lambda: server.stats.running)
        with Client(ENDPOINT, "inproc://other", context=context) as second:
            wait_until(lambda: second.request(b"x") == b"other" and server.stats.failures)
        with pytest.raises(OperationTimeout):
            hanging.get()
        wait_until(lambda: not server.stats.running)
    assert asked == []


def test_on_error_of_a_plain_client_is_asked_about_everything(context: zmq.Context, asker: Asker) -> None:
    """As ever: also about what was not run."""
    server = Server(ENDPOINT, _handler, deadline=LONG, on_error=lambda request, error: error.type.encode(), context=context)
    with server:
        replies = [gevent.spawn(asker.plain, b"hang")]
        wait_until(lambda: server.stats.running)
        server.close()
        assert replies[0].get() == [b"ServerStopped"]


@pytest.mark.parametrize("result", ["text", 5, {}, [], ["text"]])
@pytest.mark.parametrize("is_plain", [True, False])
def test_what_on_error_cannot_return(result: Any, is_plain: bool) -> None:
    """A TypeError names what it was, whoever the client is."""
    with pytest.raises(TypeError, match=r"on_error returns a RemoteError"):
        replaced(result, is_plain)


@pytest.fixture
def rep(context: zmq.Context) -> Iterator[Any]:
    sock = context.socket(zmq.REP)
    sock.bind(ENDPOINT)
    yield sock
    sock.close(0)


@pytest.mark.parametrize("how", [supervise, supervised])
def test_supervised_sockets_tell_as_little(context: zmq.Context, asker: Asker, rep: Any, how: Any) -> None:
    """tell_errors=False is for supervise and supervised, too."""

    def serve() -> None:
        if how is supervise:
            supervise(rep, _handler, deadline=LONG, tell_errors=False)
        with suppress(zmq.ZMQError):
            while how is supervised:
                with supervised(rep, deadline=LONG, tell_errors=False) as request:
                    _handler(request)

    serving = gevent.spawn(serve)
    told = json.loads(asker.plain(b"bug")[0])["error"]
    assert (told["code"], told["type"]) == ("INTERNAL", "ValueError")
    assert "under the id 1" in told["message"]
    assert json.loads(asker.plain(b"mine")[0])["error"]["message"] == "no such motor"
    rep.close(0)
    serving.join()
