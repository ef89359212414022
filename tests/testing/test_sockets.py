"""Tests of greensafe.testing.link.sockets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket

from greensafe.testing.link.sockets import Entrance, check_target, close, dial, reset


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1", "ipc:///tmp/x", "ipc://@x"])
def test_targets(endpoint: str) -> None:
    """What may be a target is returned as it is."""
    assert check_target(endpoint) == endpoint


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        ("inproc://x", "only tcp"),
        ("tcp://127.0.0.1:0", "host and a port"),
        ("tcp://*:5555", "host and a port"),
        ("tcp://127.0.0.1:*", "host and a port"),
        ("tcp://127.0.0.1", "port"),
        ("ipc://*", "path"),
        ("127.0.0.1:5555", "looks like"),
    ],
)
def test_no_targets(endpoint: str, text: str) -> None:
    """The text says what is missing."""
    with pytest.raises(ValueError, match=text):
        check_target(endpoint)


def _is_served(entrance: Entrance) -> bool:
    try:
        dial(entrance.endpoint).close()
    except OSError:
        return False
    entrance.listener.accept()[0].close()
    return True


@pytest.mark.parametrize("form", ["tcp://127.0.0.1:0", "tcp://localhost:*", "tcp://*:0", "ipc://{}/s", "ipc://@{}/s"])
def test_an_address_that_is_closed_and_opened(form: str, tmp_path: Path) -> None:
    """It can be dialled, not while it refuses, and again afterwards, under the same name; then nothing is left of it."""
    entrance = Entrance(form.format(tmp_path))
    endpoint = entrance.endpoint
    try:
        assert not endpoint.endswith((":0", ":*"))
        assert _is_served(entrance)
        entrance.refuse()
        assert not _is_served(entrance)
        entrance.open()
        entrance.open()
        assert _is_served(entrance)
        assert entrance.endpoint == endpoint
    finally:
        entrance.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("end", [close, reset])
def test_closed_while_somebody_waits_for_its_descriptor(end: Callable[[Any], None], limit: None) -> None:
    """The other side learns of it, though nothing else turns the loop."""
    ours, theirs = socket.socketpair()
    waiting = gevent.spawn(socket.wait_read, ours.fileno())
    gevent.sleep(0)
    end(ours)
    assert theirs.recv(1) == b""
    waiting.join()
    theirs.close()


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="the port cannot be held here")
def test_a_refusing_port_is_nobody_elses() -> None:
    """While an address refuses, nobody else can take it."""
    entrance = Entrance("tcp://127.0.0.1:0")
    entrance.refuse()
    with pytest.raises(OSError, match="in use"):
        Entrance(entrance.endpoint)
    entrance.close()
    Entrance(entrance.endpoint).close()


def test_an_address_in_use(tmp_path: Path) -> None:
    """It is an error that names the address, and what was there is left alone."""
    (tmp_path / "s").write_text("mine")
    for endpoint in (Entrance("tcp://127.0.0.1:0"), f"ipc://{tmp_path}/s"):
        taken: Any = endpoint if isinstance(endpoint, str) else endpoint.endpoint
        with pytest.raises(OSError, match="in use") as caught:
            Entrance(taken)
        assert caught.value.__notes__ == [taken]
        if isinstance(endpoint, Entrance):
            endpoint.close()
    assert (tmp_path / "s").read_text() == "mine"


def test_dialling_nobody(tmp_path: Path) -> None:
    """Nobody there is an OSError, and no descriptor is left."""
    with pytest.raises(OSError, match="No such file"):
        dial(f"ipc://{tmp_path}/nobody")
