"""Tests of greensafe.call."""

from __future__ import annotations

from typing import Any, cast

from greensafe.call import error_in
from greensafe.errors import RemoteError, RemoteProtocolError
from greensafe.sansio.envelope import Kind
from greensafe.sansio.requester import Asked, Resolution


def _error(*body: bytes) -> Any:
    return error_in(Resolution(cast(Asked, None), list(body), Kind.ERROR, b""))


def test_error_in_an_answer() -> None:
    """What a server has marked as an error is its RemoteError, or a RemoteProtocolError if none can be read."""
    error = RemoteError("INTERNAL", "it broke", "ValueError")
    found = _error(error.to_reply())
    assert (found.code, found.message, found.type) == ("INTERNAL", "it broke", "ValueError")
    for body in ([b"data"], [error.to_reply(), b""]):
        assert isinstance(_error(*body), RemoteProtocolError)
