"""Tests of greensafe.errors."""

from __future__ import annotations

import copy
import errno
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


@given(st.one_of(st.binary(), st.binary().map(lambda tail: b'{"error"' + tail)))
def test_from_reply_takes_anything(body: bytes) -> None:
    """Bytes that are no error frame are data, and nothing raises."""
    found = RemoteError.from_reply(body)
    assert found is None or found.code in CODES


@pytest.mark.parametrize(
    "body", [b'{"error": 1}', b'{"error": {"code": "X", "message": ""}}', b'{"error": []}', b'{"error"' * 5000]
)
def test_from_reply_refuses_what_only_looks_like_an_error(body: bytes) -> None:
    """A frame of the wrong shape or with an unknown code is data."""
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
