"""Tests of greensafe.green._paths, and of what a server and a green socket do with their ipc paths."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import pytest
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Client, Request, Server
from greensafe.transport import binding as _binding
from greensafe.transport.ipc_paths import BoundPath

pytestmark = pytest.mark.usefixtures("limit")


def _echo(request: Request) -> bytes:
    return request.body


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_binding, "LOOK", 2 * MS)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "greensafe.green._paths"]


def test_path_that_is_removed(context: zmq.Context, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A path that is removed is noticed and logged, once, and not healthy; so is its coming back."""
    path = tmp_path / "s"
    with Server(f"ipc://{path}", _echo, deadline=LONG, context=context) as server, Client(str(server.endpoint)) as client:
        assert client.request(b"x") == b"x"
        assert server.healthy
        path.rename(tmp_path / "away")
        wait_until(lambda: not server.healthy)
        assert not server.stats.is_healthy
        assert client.request(b"y") == b"y"
        (tmp_path / "away").rename(path)
        wait_until(lambda: server.healthy)
    removed, again = _said(caplog)
    assert f"{path} was removed" in removed
    assert str(server.endpoint) in removed
    assert "again" in again
    assert [record.levelno for record in caplog.records if record.name == "greensafe.green._paths"] == [logging.WARNING] * 2
    assert not path.exists()


def test_path_that_is_taken_over(context: zmq.Context, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server from which another one takes the path is not healthy; it serves its clients, and its end leaves the path."""
    path = tmp_path / "s"
    first = Server(f"ipc://{path}", lambda request: b"first", deadline=LONG, context=context)
    second = Server(f"ipc://{path}", lambda request: b"second", deadline=LONG, context=context, takeover=True)
    first.start()
    with Client(f"ipc://{path}", context=context) as old:
        assert old.request(b"") == b"first"
        second.start()
        with Client(f"ipc://{path}", context=context) as new:
            assert new.request(b"") == b"second"
        wait_until(lambda: not first.healthy)
        assert f"{path} was taken by somebody else" in _said(caplog)[0]
        assert second.healthy
        assert old.request(b"") == b"first"
        first.stop()
        assert old.request(b"") == b"second"
        assert path.is_socket()
        second.stop()
    assert not path.exists()
    assert len(_said(caplog)) == 1


def test_taken_without_takeover(context: zmq.Context, tmp_path: Path) -> None:
    """A second server on the path of one that lives is told that it is in use, and the first one stays reachable."""
    with Server(f"ipc://{tmp_path}/s", lambda request: b"first", deadline=LONG, context=context) as first:
        with pytest.raises(zmq.ZMQError, match="in use") as caught:
            Server(f"ipc://{tmp_path}/s", _echo, deadline=LONG, context=context).start()
        assert "takeover=True" in caught.value.__notes__[0]
        with Client(str(first.endpoint), context=context) as client:
            assert client.request(b"") == b"first"
        assert first.healthy


def test_path_of_a_green_socket(context: zmq.Context, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What becomes of a green socket's path is logged as well, of each of its paths."""
    sock = context.socket(zmq.REP)
    for name in ("a", "b"):
        sock.bind(f"ipc://{tmp_path}/{name}")
    (tmp_path / "b").unlink()
    wait_until(lambda: bool(_said(caplog)))
    assert f"ipc://{tmp_path}/b cannot be reached" in _said(caplog)[0]
    sock.unbind(f"ipc://{tmp_path}/b")
    assert not sock._binding.trouble
    (tmp_path / "a").unlink()
    wait_until(lambda: len(_said(caplog)) == 2)
    assert f"{tmp_path}/a was removed" in sock._binding.trouble
    sock.close()
    assert not sock._binding.trouble
    assert sock._binding._look_out is None


def test_nothing_to_watch(context: zmq.Context) -> None:
    """No path, no timer."""
    sock = context.socket(zmq.REP)
    for endpoint in ("tcp://127.0.0.1:*", "inproc://s"):
        sock.bind(endpoint)
    assert sock._binding._look_out is None


@pytest.mark.filterwarnings("ignore:Unclosed socket:ResourceWarning")
def test_a_socket_that_is_dropped(tmp_path: Path) -> None:
    """The look-out does not keep a socket alive that nobody holds, and ends after it."""
    context = zmq.Context()
    gc.disable()
    try:
        sock = context.socket(zmq.REP)
        sock.bind(f"ipc://{tmp_path}/s")
        look_out, dropped = sock._binding._look_out, weakref.ref(sock)
        assert look_out is not None
        del sock
        assert dropped() is None
        wait_until(lambda: look_out._timer is None)
    finally:
        gc.enable()
        context.term()


def test_repr(tmp_path: Path) -> None:
    """It shows whether the path is in order."""
    path = BoundPath("ipc:///s", f"{tmp_path}/s", None)
    assert repr(path) == f"<BoundPath {tmp_path}/s in order>"
