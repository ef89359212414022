"""Tests of greensafe.endpoints."""

from __future__ import annotations

from typing import Any

import pytest
import zmq

from greensafe.endpoints import check_endpoint, explain


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://127.0.0.1:5555", "tcp://*:0", "tcp://[::1]:*", "ipc:///tmp/x", "ipc://@abstract", "inproc://name", "ws://x:1"],
)
def test_usable(endpoint: str) -> None:
    """What may be usable is returned as it is."""
    assert check_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    ("endpoint", "kind", "text"),
    [
        (None, TypeError, "str such as"),
        (b"tcp://127.0.0.1:1", TypeError, "str such as"),
        ("", ValueError, "looks like tcp://"),
        ("127.0.0.1:5555", ValueError, "looks like tcp://"),
        ("tcp://", ValueError, "looks like tcp://"),
        ("tcp://127.0.0.1", ValueError, "port"),
        ("tcp://127.0.0.1:99999", ValueError, "65535"),
        ("tcp://127.0.0.1:-1", ValueError, "65535"),
        ("tcp://127.0.0.1:http", ValueError, "65535"),
        ("inproc://a\0b", ValueError, "NUL"),
    ],
)
def test_unusable(endpoint: Any, kind: type[Exception], text: str) -> None:
    """The text names what is wrong and what an endpoint looks like."""
    with pytest.raises(kind, match=text):
        check_endpoint(endpoint)


def test_errors_of_libzmq_are_explained() -> None:
    """The same error, with a note that says what to try; an unknown one names the endpoint at least."""
    error = zmq.ZMQError(zmq.EADDRINUSE)
    assert explain(error, "tcp://127.0.0.1:80") is error
    assert "another port" in error.__notes__[0]
    other = explain(zmq.ZMQError(zmq.EFSM), "inproc://x")
    assert other.__notes__ == ["inproc://x"]
