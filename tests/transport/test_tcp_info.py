"""Tests of greensafe.counts."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from helpers import wait_until

from greensafe.transport.tcp_info import is_counted, listener, peer, sample, unread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nobody counts elsewhere")


def test_who_is_counted() -> None:
    """Connections by tcp."""
    assert is_counted("tcp://a:1")
    assert not is_counted("ipc://a")


def test_sample() -> None:
    """What has arrived, and what the peer's kernel has acknowledged, is counted; asking leaves the descriptor open."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        peer, _ = listener.accept()
        with peer:
            before = sample(sock.fileno(), 7)
            assert before is not None
            assert before.taken == 7
            peer.sendall(b"x" * 100)
            sock.sendall(b"x" * 10)

            def count() -> bool:
                after = sample(sock.fileno(), 7)
                assert after is not None
                return (after.received - before.received, after.acked - before.acked) == (100, 10)

            wait_until(count)
            assert sock.recv(100) == b"x" * 100


def test_others_descriptors() -> None:
    """A descriptor that is closed, or no connection by TCP, has no counts."""
    reading, writing = os.pipe()
    os.close(writing)
    assert sample(reading, 0) is None
    os.close(reading)
    assert sample(reading, 0) is None
    assert unread(reading) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_peer(host: str) -> None:
    """Where a connection leads, as in an endpoint; asking leaves the descriptor open."""
    try:
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener, socket.create_connection(listener.getsockname()[:2]) as sock:
        port = listener.getsockname()[1]
        assert [peer(sock.fileno()) for _ in range(2)] == [f"{f'[{host}]' if ':' in host else host}:{port}"] * 2
    one, other = socket.socketpair()
    with one, other:
        assert peer(one.fileno()) is None
    assert peer(-1) is None


def test_unread() -> None:
    """What a peer by ipc has not read is counted until it has."""
    one, other = socket.socketpair()
    with one, other:
        assert unread(one.fileno()) == 0
        one.sendall(b"x")
        assert unread(one.fileno()) > 0
        other.recv(1)
        assert unread(one.fileno()) == 0


def test_who_listens(tmp_path: Path) -> None:
    """The process that has begun to listen at a path; nobody at a descriptor that is closed, or no socket."""
    path = str(tmp_path / "path")
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as sock:
        listening.bind(path)
        listening.listen()
        sock.connect(path)
        assert listener(sock.fileno()) == os.getpid()
        assert listener(sock.fileno()) == os.getpid()
    assert listener(-1) is None
    with open(os.devnull) as file:
        assert listener(file.fileno()) is None
