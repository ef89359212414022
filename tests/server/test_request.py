"""Tests of greensafe.server.request: what a handler sees, and what a client is told of an exception."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gevent
import pytest

from greensafe import LATER, Cancelled, RemoteError, Request, deadline
from greensafe.sansio.envelope import Header, Kind, split
from greensafe.sansio.exchange import Event, Exchange
from greensafe.server.request import InvalidBodyError, as_frames, check_frames, error_for

ID = bytes(range(16))


class Answers:
    """A gate that opens as the watchdog's does, and keeps what went through."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.hub = gevent.get_hub()
        self.thread = self.hub.thread_ident

    def answer(self, exchange: Exchange, body: Sequence[bytes]) -> None:
        exchange.move(Event.ANSWER)
        self.given.append(list(body))

    def fail(self, exchange: Exchange, error: RemoteError) -> None:
        exchange.move(Event.ANSWER)
        self.given.append(error)


def _request(*body: bytes, header: bool = True, metadata: bytes = b"") -> tuple[Request, Answers]:
    head = [Header(Kind.REQUEST, ID, metadata=metadata).encode()] if header else []
    gate = Answers()
    return Request(gate, Exchange(7, split([b"rid", *head, b"", *body]), 0.0), deadline(None)), gate


def test_what_a_handler_sees() -> None:
    """The body, the client's id and metadata; a plain client has neither, and gets a number of the server's."""
    request, _ = _request(b"1", b"", b"3", metadata=b"trace")
    assert (request.body, request.frames) == (b"1", [b"1", b"", b"3"])
    assert (request.id, request.client, request.metadata, request.attempt) == (ID.hex(), b"rid", b"trace", 1)
    assert not request.replied
    assert repr(request) == f"<Request {ID.hex()} from rid running 3 frames>"
    request, _ = _request(b"1", header=False)
    assert (request.id, request.client, request.metadata) == ("7", b"rid", b"")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json(body: bytes) -> None:
    """json() raises what answers INVALID_ARGUMENT, whatever is wrong, and is a ValueError for who catches it."""
    request, _ = _request(body)
    with pytest.raises(ValueError, match="not JSON") as caught:
        request.json()
    assert isinstance(caught.value, InvalidBodyError)
    assert error_for(caught.value).code == "INVALID_ARGUMENT"


def test_the_gate_opens_once() -> None:
    """The first of reply, reply_json and error is the answer; what cannot be encoded leaves the gate shut."""
    request, gate = _request(b"x")
    with pytest.raises(TypeError, match="JSON"):
        request.reply_json(object())
    with pytest.raises(TypeError, match="frame 1"):
        request.reply(b"x", "y")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="WRONG"):
        request.error("WRONG", "x")
    assert not request.replied
    request.reply_json({"a": [1]})
    assert request.replied
    assert json.loads(gate.given[0][0]) == {"a": [1]}
    for again in (lambda: request.reply(b"y"), lambda: request.error("INTERNAL", "z")):
        with pytest.raises(Exception, match="answer"):
            again()
    assert len(gate.given) == 1


class Unprintable(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise SystemExit("no")


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (ValueError("it"), "INTERNAL", "ValueError"),
        (RemoteError("NOT_FOUND", "it", "Mine"), "NOT_FOUND", "Mine"),
        (Cancelled("it"), "CANCELLED", "Cancelled"),
        (gevent.GreenletExit("it"), "ABORTED", "GreenletExit"),
        (MemoryError("it"), "RESOURCE_EXHAUSTED", "MemoryError"),
        (SystemExit("it"), "INTERNAL", "SystemExit"),
    ],
)
def test_what_a_client_is_told(error: BaseException, code: str, kind: str) -> None:
    """A code, the exception's name and its text."""
    told = error_for(error)
    assert (told.code, told.type) == (code, kind)
    assert RemoteError.from_reply(told.to_reply()) is not None


def test_an_exception_that_cannot_be_shown() -> None:
    """Whatever its __str__ does, an answer comes out."""
    assert error_for(Unprintable()).code == "INTERNAL"


@pytest.mark.parametrize("result", [b"x", bytearray(b"x"), memoryview(b"x"), [b"x"], (bytearray(b"x"),)])
def test_results_that_are_answers(result: object) -> None:
    """Anything that is bytes, and lists of it."""
    assert as_frames(result) == [b"x"]


@pytest.mark.parametrize("result", ["x", 1, {}, object(), LATER, [], ["x"], [b"x", None], iter([b"x"])])
def test_results_that_are_no_answers(result: object) -> None:
    """Anything else is a TypeError that says what it was."""
    with pytest.raises(TypeError, match=r"not |at least one"):
        as_frames(result)


def test_frames_are_copies() -> None:
    """What a handler changes after its answer does not change the answer."""
    buffer = bytearray(b"x")
    frames = check_frames([buffer])
    buffer[0] = 0
    assert frames == [b"x"]


def test_later_names_itself() -> None:
    """So that it is understood in a log."""
    assert repr(LATER) == "greensafe.LATER"
