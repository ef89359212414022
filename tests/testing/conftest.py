"""What the tests of the link share: a server and clients on its two sides, as sockets that show every byte and every end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from helpers import LONG, MS

from greensafe.testing import FaultyLink


class Wire:
    """A link, the listening socket that it leads to, and whoever connects through it."""

    def __init__(self, transport: str, folder: Path) -> None:
        self.is_tcp = transport == "tcp"
        self.open: list[Any] = []
        self.server = self.keep(socket.socket(socket.AF_INET if self.is_tcp else socket.AF_UNIX))
        self.server.bind(("127.0.0.1", 0) if self.is_tcp else f"{folder}/server")
        self.server.listen()
        target = f"tcp://127.0.0.1:{self.server.getsockname()[1]}" if self.is_tcp else f"ipc://{folder}/server"
        self.link = FaultyLink(target, "tcp://127.0.0.1:0" if self.is_tcp else f"ipc://{folder}/link")

    def keep(self, sock: Any) -> Any:
        sock.settimeout(LONG)
        self.open.append(sock)
        return sock

    def dial(self) -> Any:
        """A client's socket, connected to the link."""
        address = self.link.endpoint.partition("://")[2]
        sock = self.keep(socket.socket(socket.AF_INET if self.is_tcp else socket.AF_UNIX))
        sock.connect(("127.0.0.1", int(address.rpartition(":")[2])) if self.is_tcp else address)
        return sock

    def accept(self) -> Any:
        return self.keep(self.server.accept()[0])

    def connect(self) -> tuple[Any, Any]:
        """A client's socket, and the one that the server has accepted for it."""
        client = self.dial()
        return client, self.accept()

    def close(self) -> None:
        self.link.close()
        for sock in self.open:
            sock.close()


@pytest.fixture(params=["tcp", "ipc"])
def wire(request: pytest.FixtureRequest, tmp_path: Path, limit: None) -> Iterator[Wire]:
    """Over each transport."""
    made = Wire(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture
def receive() -> Callable[[Any, int], bytes]:
    """Receives exactly so many bytes."""

    def receive(sock: Any, size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            data = sock.recv(size - len(got))
            assert data, f"ended after {len(got)} of {size} bytes"
            got += data
        return bytes(got)

    return receive


@pytest.fixture
def end() -> Callable[[Any], str]:
    """Waits for the end of what a socket receives and tells which: "FIN" or "RST"; anything else is wrong."""

    def end(sock: Any) -> str:
        try:
            data = sock.recv(1)
        except ConnectionResetError:
            return "RST"
        assert data == b""
        return "FIN"

    return end


@pytest.fixture
def is_silent() -> Callable[[Any], bool]:
    """Tells whether a socket hears nothing at all, no end either."""

    def is_silent(sock: Any) -> bool:
        sock.settimeout(20 * MS)
        try:
            sock.recv(1)
        except TimeoutError:
            return True
        finally:
            sock.settimeout(LONG)
        return False

    return is_silent


@pytest.fixture
def in_greenlet() -> Iterator[Callable[..., Any]]:
    """Runs something beside the test, which has to have ended well by its end."""
    started: list[Any] = []

    def run(function: Callable[..., object], *args: Any) -> Any:
        started.append(gevent.spawn(function, *args))
        return started[-1]

    yield run
    gevent.joinall(started, timeout=LONG, raise_error=True)
