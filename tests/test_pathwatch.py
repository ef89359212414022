"""Tests of greensafe.pathwatch, and of what a server does with its ipc path."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers import LONG, MS, wait_until

import greensafe as zmq
from greensafe import Client, Request, Server, pathwatch

pytestmark = pytest.mark.usefixtures("limit")


def _echo(request: Request) -> bytes:
    return request.body


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathwatch, "LOOK", 2 * MS)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "greensafe.pathwatch"]


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
    assert [record.levelno for record in caplog.records if record.name == "greensafe.pathwatch"] == [logging.WARNING] * 2
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


def test_nothing_to_watch(context: zmq.Context) -> None:
    """Who has no path watches none."""
    for endpoint in ("tcp://127.0.0.1:0", "inproc://s"):
        with Server(endpoint, _echo, deadline=LONG, context=context) as server:
            assert server._path_watch is None


def test_repr() -> None:
    """It shows whether the path is in order."""
    watch = pathwatch.PathWatch("ipc:///s", lambda: "", lambda loop, act: act())
    assert repr(watch) == "<PathWatch of ipc:///s in order>"
    watch.close()
