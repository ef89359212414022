"""Tests of greensafe.green._objects: text, JSON, pickles and what a program makes of frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import pytest
from gevent.event import Event
from helpers import LONG, MS

import greensafe as zmq

pytestmark = pytest.mark.usefixtures("limit")

Pair = Callable[..., tuple[Any, Any]]

BAD = [
    ("recv_json", ValueError),
    ("recv_string", UnicodeDecodeError),
    ("recv_pyobj", Exception),
    ("recv_serialized", KeyError),
]


def _receive(sock: Any, name: str, **options: Any) -> Any:
    def deserialize(frames: list[bytes]) -> Any:
        raise KeyError("no")

    return getattr(sock, name)(*([deserialize] if name == "recv_serialized" else []), **options)


def test_there_and_back(pair: Pair) -> None:
    """What one side sends as an object the other receives as one."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    b.send_json({"x": 1}, indent=1)
    assert a.recv_json() == {"x": 1}
    b.send_json([1.5])
    assert a.recv_json(parse_float=str) == ["1.5"]
    b.send_string("é")
    assert a.recv_string() == "é"
    b.send_unicode("é", encoding="latin-1")
    assert a.recv_unicode(encoding="latin-1") == "é"
    b.send_pyobj([1, None])
    assert a.recv_pyobj() == [1, None]
    b.send_serialized(["x", "y"], lambda parts: [part.encode() for part in parts])
    assert a.recv_serialized(lambda frames: frames) == [b"x", b"y"]
    with pytest.raises(TypeError):
        b.send_string(b"bytes")
    with pytest.raises(TypeError):
        b.send_json(object())
    b.send(b"next")
    assert a.recv() == b"next"


@pytest.mark.parametrize(("name", "error"), BAD)
def test_a_message_that_cannot_be_decoded_is_read_whole(pair: Pair, name: str, error: type[Exception]) -> None:
    """Its other frames are not taken for the next message, and the error says that it is gone."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    b.send_multipart([b"\xff{", b"second frame", b"third frame"])
    b.send(b"next")
    with pytest.raises(error) as caught:
        _receive(a, name)
    assert "read whole" in caught.value.__notes__[0]
    assert a.recv_multipart() == [b"next"]


@pytest.mark.parametrize(("name", "error"), BAD)
def test_a_rep_owes_its_answer_after_a_bad_request(pair: Pair, name: str, error: type[Exception]) -> None:
    """And can give it: the requester is not left waiting. A REQ may ask again after a bad reply."""
    rep, req = pair(zmq.REP, zmq.REQ)
    req.send_multipart([b"\xff{", b"more"])
    with pytest.raises(error):
        _receive(rep, name)
    rep.send_multipart([b"\xff{", b"more"])
    with pytest.raises(error):
        _receive(req, name)
    req.send(b"again")
    assert rep.recv() == b"again"


@pytest.mark.parametrize("name", ["recv_json", "recv_string", "recv_pyobj", "recv_serialized"])
def test_receivers_of_objects_take_limits(pair: Pair, name: str) -> None:
    """timeout= and the names in the error are their own."""
    a, _ = pair(zmq.PAIR, zmq.PAIR)
    with pytest.raises(zmq.OperationTimeout, match=name):
        _receive(a, name, timeout=2 * MS)


@pytest.mark.parametrize("how", ["kill", "gevent.Timeout", "deadline"])
def test_an_interrupted_decoder_leaves_no_frames_behind(pair: Pair, how: str) -> None:
    """A hook that waits and is interrupted is a message that cannot be decoded: the next one begins with its own head."""
    a, b = pair(zmq.PAIR, zmq.PAIR)
    b.send_multipart([b'{"x": 1}', b"second frame"])
    b.send(b"next")

    decoding = Event()

    def receive() -> None:
        with (
            gevent.Timeout(2 * MS if how == "gevent.Timeout" else None, False),
            zmq.move_on(2 * MS if how == "deadline" else None),
        ):
            a.recv_json(object_hook=lambda found: (decoding.set(), gevent.sleep(LONG)))

    assert a.poll(LONG * 1000)
    receiver = gevent.spawn(receive)
    if how == "kill":
        decoding.wait()
        receiver.kill()
    receiver.join()
    assert a.recv_multipart() == [b"next"]
