"""Tests of greensafe.endpoints."""

from __future__ import annotations

from typing import Any

import pytest
import zmq

from greensafe.transport.endpoints import check_endpoint, explained, not_begun


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


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://*:5555", "tcp://:5555", "tcp://h:000"])
def test_nobody_can_connect_to_what_leaves_something_open(endpoint: str) -> None:
    """libzmq would wait for it for ever; what names a host and a port may be connected to."""
    with pytest.raises(ValueError, match="not connected to"):
        check_endpoint(endpoint, to_connect=True)
    for usable in ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:0;[::1]:5555", "ipc:///tmp/x", "inproc://name"):
        assert check_endpoint(usable, to_connect=True) == usable


@pytest.mark.parametrize(("number", "advice"), [(zmq.EADDRINUSE, "another port"), (zmq.EFSM, "inproc://x")])
def test_errors_of_libzmq_are_explained(number: int, advice: str) -> None:
    """The same error, with a note that names the endpoint and, if it is known, what to try."""
    error = zmq.ZMQError(number)
    with pytest.raises(zmq.ZMQError) as caught, explained("inproc://x"):
        raise error
    assert caught.value is error
    assert error.__notes__[0].startswith("inproc://x")
    assert advice in error.__notes__[0]


@pytest.mark.parametrize(
    ("endpoint", "ipv6", "advice"),
    [
        ("tcp://[::1]:5555", False, "IPV6"),
        ("tcp://[::1]:5555", True, "descriptor"),
        ("tcp://eth9:0;127.0.0.1:5555", False, "the source, eth9,"),
        ("tcp://127.0.0.1:5555", False, "descriptor"),
        ("ipc:///tmp/s", False, "descriptor"),
    ],
)
def test_what_cannot_be_begun(endpoint: str, ipv6: bool, advice: str) -> None:
    """libzmq does not say why; what is probable is said instead."""
    assert advice in not_begun(endpoint, ipv6)
