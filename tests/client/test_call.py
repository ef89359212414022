"""Tests of greensafe.client.call."""

from __future__ import annotations

import pickle
from typing import Any, cast

import pytest

from greensafe.client.call import data_in, error_in
from greensafe.errors import RemoteError, RemoteProtocolError
from greensafe.sansio.envelope import CALLER_LIMIT, Kind
from greensafe.sansio.requester import Asked, Resolution


def _error(*body: bytes, kind: Kind = Kind.ERROR) -> Any:
    return error_in(Resolution(_asked(), list(body), kind, b""))


def _asked(may_have_run: bool = False) -> Asked:
    asked = Asked(bytes(16), [b"body"], None, None, b"", None)
    asked.may_have_run = may_have_run
    return asked


def test_error_in_an_answer() -> None:
    """What a server has marked as an error is its RemoteError, or a RemoteProtocolError if none can be read."""
    error = RemoteError("INTERNAL", "it broke", "ValueError")
    found = _error(error.to_reply())
    assert (found.code, found.message, found.type) == ("INTERNAL", "it broke", "ValueError")
    assert isinstance(_error(error.to_reply().replace(b'"greensafe": 1, ', b"")), RemoteError)  # as a journal may hold it
    for body in ([b"data"], [error.to_reply(), b""]):
        assert isinstance(_error(*body), RemoteProtocolError)


@pytest.mark.parametrize("kind", ["", CALLER_LIMIT])
def test_an_error_in_a_plain_answer(kind: str) -> None:
    """It is raised, whatever its type: a plain peer does not know its caller's limit. Beside other frames it is data."""
    frame = RemoteError("INTERNAL", "it broke", kind).to_reply()
    with pytest.raises(RemoteError, match="it broke"):
        data_in(_plain(frame))
    for body in ([frame, b""], [frame + b"x"]):
        assert data_in(_plain(*body)) == body


def _plain(*body: bytes) -> Resolution:
    return Resolution(cast(Asked, None), list(body), Kind.REQUEST, b"")


def test_whether_it_may_have_run() -> None:
    """Only what the server has sent back has not; the error says so after pickling, too."""
    body = RemoteError("UNAVAILABLE", "not now").to_reply()
    errors = [_error(body, kind=kind) for kind in (Kind.REJECTED, Kind.INTERRUPTED, Kind.ERROR)]
    assert [pickle.loads(pickle.dumps(error)).maybe_executed for error in errors] == [False, True, True]
    assert RemoteError("INTERNAL", "").maybe_executed


def test_an_earlier_try_may_have_run() -> None:
    """What the server sends back says nothing of the tries before, which were lost, or interrupted: another server's, say."""
    error = error_in(Resolution(_asked(may_have_run=True), [RemoteError("UNAVAILABLE", "").to_reply()], Kind.REJECTED, b""))
    assert isinstance(error, RemoteError)
    assert error.maybe_executed
