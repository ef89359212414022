"""Tests of greensafe.green._listening: the paths of ipc endpoints, and whose they are."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
import zmq as plain
from helpers import LONG, run_python, wait_until

import greensafe as zmq
from greensafe.transport import listening as _listening

pytestmark = pytest.mark.usefixtures("limit")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a socket is to be."""
    return tmp_path / "s"


Bind = Callable[..., Any]


@pytest.fixture
def bind(context: zmq.Context, path: Path) -> Bind:
    """Makes a REP that is bound to the path."""

    def make(**options: Any) -> Any:
        sock = context.socket(zmq.REP)
        sock.bind(f"ipc://{path}", **options)
        return sock

    return make


def _answers(context: zmq.Context, path: Path, *servers: Any) -> Any:
    """Which of the servers a new client reaches."""
    req = context.socket(zmq.REQ)
    req.connect(f"ipc://{path}")
    req.send(b"")
    found = wait_until(lambda: [each for each in servers if not each.closed and each.poll(0)])
    found[0].recv()
    found[0].send(b"")
    req.recv()
    req.close()
    return found[0]


def _stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def _make_file(path: Path) -> None:
    path.write_text("precious")


def _make_link(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("takeover", [False, True])
@pytest.mark.parametrize("make", [_make_file, Path.mkdir, _make_link])
def test_what_is_no_socket(path: Path, bind: Bind, make: Callable[[Path], None], takeover: bool) -> None:
    """What is at the path and no socket is left alone: EADDRINUSE, and a note that says so."""
    make(path)
    before = path.lstat()
    with pytest.raises(zmq.ZMQError) as caught:
        bind(takeover=takeover)
    assert caught.value.errno == errno.EADDRINUSE
    assert len(caught.value.__notes__) == 1
    assert f"ipc://{path}" in caught.value.__notes__[0]
    assert "no socket" in caught.value.__notes__[0]
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)


def test_socket_that_answers(context: zmq.Context, path: Path, bind: Bind) -> None:
    """A path at which a server listens is EADDRINUSE, with a note, and the server stays reachable."""
    first = bind()
    with pytest.raises(zmq.ZMQError) as caught:
        bind()
    assert caught.value.errno == errno.EADDRINUSE
    assert "takeover=True" in caught.value.__notes__[0]
    assert _answers(context, path, first) is first


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_somebody_elses_socket(path: Path, bind: Bind, kind: int) -> None:
    """That holds for sockets that are not libzmq's, and for those whose queue is full, too."""
    with socket.socket(socket.AF_UNIX, kind) as other, socket.socket(socket.AF_UNIX, kind) as client:
        other.bind(str(path))
        if kind == socket.SOCK_STREAM:
            other.listen(0)
            client.connect(str(path))
        with pytest.raises(zmq.ZMQError) as caught:
            bind()
        assert caught.value.errno == errno.EADDRINUSE


def test_stale_socket(context: zmq.Context, path: Path, bind: Bind) -> None:
    """A socket that nobody listens at any more is not in the way, and nothing else is left in the folder."""
    _stale(path)
    server = bind()
    assert _answers(context, path, server) is server
    assert os.listdir(path.parent) == ["s"]


def test_takeover(context: zmq.Context, path: Path, bind: Bind) -> None:
    """With takeover=True new clients come to the new server; the old one keeps its own, and its end leaves the path alone."""
    old = bind()
    req = context.socket(zmq.REQ)
    req.connect(f"ipc://{path}")
    req.send(b"before")
    assert old.recv() == b"before"
    new = bind(takeover=True)
    assert _answers(context, path, old, new) is new
    old.send(b"after")
    assert req.recv() == b"after"
    req.close()
    old.close()
    assert _answers(context, path, new) is new
    assert os.listdir(path.parent) == ["s"]


def test_takeover_that_fails(path: Path, bind: Bind, monkeypatch: pytest.MonkeyPatch, context: zmq.Context) -> None:
    """A takeover that fails (no room on the disk) leaves the old server reachable."""
    old = bind()

    class Full(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_listening, "_make", Full)
    with pytest.raises(zmq.ZMQError) as caught:
        bind(takeover=True)
    assert caught.value.errno == errno.ENOSPC
    assert _answers(context, path, old) is old
    assert os.listdir(path.parent) == ["s"]


def test_bind_that_fails_in_libzmq(path: Path) -> None:
    """A bind that fails in libzmq leaves no path behind."""
    with zmq.Context(io_threads=0) as context, context.socket(zmq.REP) as sock:
        with pytest.raises(zmq.ZMQError) as caught:
            sock.bind(f"ipc://{path}")
        assert caught.value.errno == zmq.EMTHREAD
    assert not path.exists()


@pytest.mark.parametrize("way", ["close", "unbind", "collected"])
def test_own_path_is_removed(path: Path, bind: Bind, context: zmq.Context, way: str) -> None:
    """Whoever closes or unbinds removes the path."""
    if way == "collected":
        sock = zmq.Socket(context, zmq.REP)
        sock.bind(f"ipc://{path}")
        with pytest.warns(ResourceWarning):
            del sock
    else:
        sock = bind()
        assert path.is_socket()
        sock.close() if way == "close" else sock.unbind(sock.last_endpoint)
    assert not path.exists()


@pytest.mark.parametrize("make", [_make_file, _stale, lambda path: None])
def test_somebody_elses_path_stays(path: Path, bind: Bind, make: Callable[[Path], None]) -> None:
    """What somebody else has put there instead stays, and nothing is no error."""
    sock = bind()
    path.unlink()
    make(path)
    before = os.listdir(path.parent)
    sock.close()
    assert os.listdir(path.parent) == before


def test_path_after_chdir(tmp_path: Path, context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is that of the folder in which it was bound."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "s").write_text("another")
    sock = context.socket(zmq.REP)
    sock.bind("ipc://s")
    assert sock.last_endpoint.rstrip(b"\0") == b"ipc://s"
    os.chdir("other")
    sock.close()
    assert sorted(os.listdir(tmp_path)) == ["other"]
    assert os.listdir() == ["s"]


def test_longest_path(tmp_path: Path, context: zmq.Context) -> None:
    """The longest path that the system knows works; of a longer one bind says so, and deletes nothing."""
    longest = str(tmp_path / "x")
    if len(longest) > plain.IPC_PATH_MAX_LEN:
        pytest.skip("the folder's own path is too long")
    longest = longest.ljust(plain.IPC_PATH_MAX_LEN, "x")
    sock = context.socket(zmq.REP)
    sock.bind(f"ipc://{longest}")
    assert sock.last_endpoint.rstrip(b"\0").decode() == f"ipc://{longest}"
    Path(longest + "x").write_text("precious")
    with pytest.raises(zmq.ZMQError, match="longer than") as caught:
        sock.bind(f"ipc://{longest}x")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert Path(longest + "x").read_text() == "precious"


def test_wildcard(context: zmq.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ipc://*` is libzmq's business: it makes a folder, and removes it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sock = context.socket(zmq.REP)
    sock.bind("ipc://*")
    found = Path(sock.last_endpoint.rstrip(b"\0").decode().removeprefix("ipc://"))
    assert found.is_socket()
    sock.close()
    wait_until(lambda: not found.parent.exists())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock that another server has while it binds there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def test_another_one_binds_there(path: Path, bind: Bind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds another server binding in the folder waits cooperatively: of two that start at once one gets the path."""
    monkeypatch.setattr(_listening, "LOCK_LIMIT", LONG)
    _stale(path)
    with socket.socket(socket.AF_UNIX) as other:
        with _locked(path.parent):
            waiting = gevent.spawn(bind)
            gevent.sleep(3 * _listening.PAUSE)  # enough to find the path stale, but for the lock
            assert not waiting.ready()
            path.unlink()
            other.bind(str(path))
            other.listen()
        waiting.join()
        with pytest.raises(zmq.ZMQError, match="in use"):
            waiting.get()


def test_a_lock_that_is_never_free(path: Path, bind: Bind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that somebody keeps locked for long is done without the lock; at the end a path may stay then, and is stale."""
    monkeypatch.setattr(_listening, "LOCK_LIMIT", 0.0)
    with _locked(path.parent):
        bind().close()
        bind().close()
        assert path.is_socket()
    bind().close()
    assert not path.exists()


CHILD = """
import os
import greensafe as zmq
sock = zmq.Context.instance().socket(zmq.REP)
sock.bind("ipc://FOLDER/s")
child = os.fork()
if not child:
    sock.close()
    os._exit(0 if os.path.exists("FOLDER/s") else 1)
_, status = os.waitpid(child, 0)
assert status == 0 and os.path.exists("FOLDER/s")
sock.close()
assert not os.path.exists("FOLDER/s")
print("fine")
"""


def test_forked_child(tmp_path: Path) -> None:
    """A forked child that closes what it has inherited leaves its parent's path alone."""
    result = run_python(CHILD.replace("FOLDER", str(tmp_path)))
    assert (result.code, result.out) == (0, "fine\n"), result.err


def test_stale_socket_that_goes_meanwhile(path: Path, bind: Bind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that its server removes while somebody looks at it is not in the way."""
    answers = _listening._answers

    def remove_meanwhile(found: str) -> bool:
        is_answering = answers(found)
        os.unlink(found)
        return is_answering

    _stale(path)
    monkeypatch.setattr(_listening, "_answers", remove_meanwhile)
    bind()
    assert path.is_socket()
