"""Tests of greensafe.errors."""

from __future__ import annotations

import copy
import errno
import json
import pickle

import gevent
import pytest
import zmq
from hypothesis import given, strategies as st

from greensafe import errors
from greensafe.errors import (
    CODES,
    Cancelled,
    DeadlineExceeded,
    Disconnected,
    GreensafeError,
    JournalError,
    JournalUnavailable,
    LocalProtocolError,
    OperationTimeout,
    PeerError,
    PeerSilent,
    ProtocolError,
    Refused,
    RemoteError,
    RemoteProtocolError,
    TimedOut,
    Unreachable,
    Unstorable,
)

EXAMPLES: list[GreensafeError] = [
    TimedOut(),
    OperationTimeout(1.5, "recv", "tcp://127.0.0.1:1"),
    OperationTimeout(),
    DeadlineExceeded(5),
    Unreachable("nobody is there", endpoint="tcp://127.0.0.1:1"),
    Disconnected("gone", endpoint="ipc://x", maybe_executed=False),
    PeerSilent("silent"),
    Refused("refused"),
    RemoteError("INTERNAL", "it broke", "ValueError", "Traceback ..."),
    Cancelled("why"),
    ProtocolError("what"),
    LocalProtocolError("what"),
    RemoteProtocolError("what"),
    JournalError("what"),
    JournalUnavailable("what"),
    Unstorable("what"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "how", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deep"]
)
def test_errors_survive_copying(error: GreensafeError, how: object) -> None:
    """Every error pickles and copies with its text, its repr, its errno and its data."""
    again = how(error)  # type: ignore[operator]
    assert type(again) is type(error)
    assert (str(again), repr(again)) == (str(error), repr(error))
    assert getattr(again, "errno", None) == getattr(error, "errno", None)
    assert again.__dict__ == error.__dict__
    assert str(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errno_is_none_that_wsgi_takes_for_a_disconnect(error: GreensafeError) -> None:
    """No error looks like the loss of a WSGI server's own client."""
    assert getattr(error, "errno", None) not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


def test_the_tree() -> None:
    """Each error is also what existing code catches."""
    for kind in (TimedOut, OperationTimeout, DeadlineExceeded):
        assert issubclass(kind, (TimeoutError,))
        assert issubclass(kind, gevent.Timeout)
        assert issubclass(kind, Exception)
    assert issubclass(OperationTimeout, zmq.Again)
    assert not issubclass(DeadlineExceeded, zmq.Again)
    for peer in (Unreachable, Disconnected, PeerSilent, Refused):
        assert issubclass(peer, PeerError)
        assert issubclass(peer, zmq.ZMQError)
        assert issubclass(peer, ConnectionError)
    for name in errors.__all__:
        thing = getattr(errors, name)
        assert thing is CODES or issubclass(thing, GreensafeError)


def test_timeouts_make_no_timer() -> None:
    """A TimedOut is a report: it has no timer, is not pending, and cannot be started."""
    error = OperationTimeout(1, "recv")
    assert error.timer is None
    assert not error.pending
    error.cancel()
    error.close()
    with pytest.raises(RuntimeError, match="deadline"):
        error.start()
    assert error.errno == zmq.EAGAIN


def test_maybe_executed() -> None:
    """Only Unreachable says by itself that nothing was delivered."""
    assert not Unreachable("x").maybe_executed
    assert Disconnected("x").maybe_executed


def test_remote_error_travels() -> None:
    """to_reply and from_reply are each other's inverse, and an unknown code is refused."""
    error = RemoteError("NOT_FOUND", "no ä", "KeyError")
    again = RemoteError.from_reply(error.to_reply())
    assert again is not None
    assert (again.code, again.message, again.type) == ("NOT_FOUND", "no ä", "KeyError")
    with pytest.raises(ValueError, match="NOPE"):
        RemoteError("NOPE", "x")


@pytest.mark.parametrize("type", [None, 5, ValueError])
def test_a_type_is_text(type: object) -> None:
    """Anything else could not travel: its frame would be data to a client."""
    with pytest.raises(TypeError, match="type is a str"):
        RemoteError("INTERNAL", "x", type)  # type: ignore[arg-type]


HEAD = RemoteError.FRAME_HEAD


@given(st.one_of(st.binary(), *(st.binary().map(head.__add__) for head in (b'{"error"', HEAD, HEAD + b'INTERNAL", "type": "'))))
def test_from_reply_takes_anything(body: bytes) -> None:
    """Bytes that are no error frame are data, and nothing raises."""
    for is_error in (False, True):
        found = RemoteError.from_reply(body, is_error=is_error)
        assert found is None or found.code in CODES


@given(code=st.sampled_from(sorted(CODES)), message=st.text(st.characters(categories=["L", "Cs", "Cc"])), type=st.text())
def test_any_error_travels(code: str, message: str, type: str) -> None:
    """Whatever its texts hold, its frame begins with the mark, is JSON for everybody, and gives the same error."""
    frame = RemoteError(code, message, type).to_reply()
    assert frame.startswith(HEAD)
    assert json.loads(frame) == {"greensafe": 1, "error": {"code": code, "type": type, "message": message}}
    again = RemoteError.from_reply(frame)
    assert again is not None
    assert (again.code, again.message, again.type) == (code, message, type)


#: Data, however much it looks like an error.
DATA = [
    b'{"error": 1}',
    b'{"error": {"code": "X", "message": ""}}',
    b'{"error": []}',
    b'{"error"' * 5000,
    b'{"error": {"code": "INTERNAL", "type": "", "message": ""}}',
    b'{"greensafe": 1, "error": {"code": "NONE", "type": "", "message": ""}}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "message": ""}}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "message": "", "type": ""}}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": null}}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": "", "more": 1}}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": ""}, "more": 1}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": ""}, "error": 1}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "code": "ABORTED", "type": "", "message": ""}}',
    b'{"greensafe": 2, "error": {"code": "INTERNAL", "type": "", "message": ""}}',
    b'{"greensafe":1,"error":{"code":"INTERNAL","type":"","message":""}}',
    b' {"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": ""}}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": "\xff"}}',
    b'{"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": ""}} more',
    b'{"quoted": {"greensafe": 1, "error": {"code": "INTERNAL", "type": "", "message": ""}}}',
    HEAD + b'INTERNAL", "type": "", "message": "' + b"x" * RemoteError.MAX_FRAME + b'"}}',
    HEAD + b'INTERNAL", "type": ' + b"[" * 60_000,
    HEAD,
]


@pytest.mark.parametrize("body", DATA, ids=range(len(DATA)))
def test_from_reply_refuses_what_only_looks_like_an_error(body: bytes) -> None:
    """A frame without the mark, of another shape, with an unknown code, or too long is data."""
    assert RemoteError.from_reply(body) is None


def test_a_peers_text_stays_in_one_line() -> None:
    """What a server has put into an error cannot forge a line where it is logged, nor move a cursor; it is there as it came."""
    forged = "no\n2026-01-01 CRITICAL root: forged \x1b[2J"
    error = RemoteError.from_reply(RemoteError("INTERNAL", forged, forged).to_reply())
    assert error is not None
    assert str(error).isprintable()
    assert repr(error).isprintable()
    assert str(error).startswith(r"INTERNAL: no\n2026-01-01 CRITICAL root: forged \x1b[2J (no\n")
    assert (error.message, error.type) == (forged, forged)
    assert len(str(RemoteError("INTERNAL", "x" * 10**6))) < 11_000


def test_an_error_that_its_header_marks() -> None:
    """Where the header says so the frame needs no mark, as in an old journal, and may hold more, as of a later version."""
    old = b'{"error": {"code": "NOT_FOUND", "type": "KeyError", "message": "no"}}'
    found = RemoteError.from_reply(old, is_error=True)
    assert found is not None
    assert (found.code, found.type, found.message) == ("NOT_FOUND", "KeyError", "no")
    for frame in (found.to_reply(), found.to_reply().replace(b'"}}', b'", "more": 1}, "more": 2}')):
        again = RemoteError.from_reply(frame, is_error=True)
        assert again is not None
        assert again.code == "NOT_FOUND"


@pytest.mark.parametrize("character", ["x", "\U0001f600", "\0", "\ud800"])
def test_a_long_text_is_cut(character: str) -> None:
    """An error's frame is never longer than is taken for one, and says how much is left out; the error itself keeps all."""
    error = RemoteError("INTERNAL", 70_000 * character, 70_000 * character)
    frame = error.to_reply()
    assert len(frame) <= RemoteError.MAX_FRAME
    again = RemoteError.from_reply(frame)
    assert again is not None
    assert again.message == 5000 * character + " ... (65000 more characters)"
    assert again.type == 200 * character
    assert len(error.message) == 70_000


def test_a_text_that_just_fits_is_not_cut() -> None:
    """Up to the limit all of it travels."""
    room = RemoteError.MAX_FRAME - len(RemoteError("INTERNAL", "").to_reply())
    error = RemoteError("INTERNAL", room * "x")
    again = RemoteError.from_reply(error.to_reply())
    assert again is not None
    assert again.message == error.message
