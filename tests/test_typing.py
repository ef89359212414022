"""What a type checker sees of greensafe in a user's program."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PROGRAM = """
from typing import Any, assert_type

import zmq as plain

import greensafe as zmq
import greensafe.monkey
from greensafe import Client, Request, Server, deadline, green, move_on
from greensafe.auth import Authenticator


def knows_plain_sockets(sock: plain.Socket[bytes]) -> bytes:
    return sock.recv()


class Mine(zmq.Socket):
    def on_timeout(self) -> Any:
        return None


class MyContext(zmq.Context):
    _socket_class = Mine


def use() -> None:
    context = zmq.Context()
    sock = context.socket(zmq.REQ)
    assert_type(sock, zmq.Socket)
    assert_type(sock.recv(), bytes)
    assert_type(sock.recv(timeout=1.5), bytes)
    assert_type(sock.recv(zmq.NOBLOCK, timeout=None), bytes)
    assert_type(sock.recv(copy=False), plain.Frame)
    assert_type(sock.recv_multipart(), list[bytes])
    assert_type(sock.recv_multipart(copy=False, timeout=1), list[plain.Frame])
    assert_type(sock.recv_string(timeout=1), str)
    assert_type(sock.recv_into(bytearray(10)), int)
    sock.send(b"x", zmq.SNDMORE, timeout=1)
    assert_type(sock.send(b"x", copy=False), plain.MessageTracker)
    assert_type(sock.poll(10), int)
    assert_type(sock.recv(0, False), plain.Frame)
    assert_type(sock.recv_multipart(zmq.NOBLOCK, False), list[plain.Frame])
    assert_type(sock.recv_json(), Any)
    assert_type(sock.recv_serialized(len), int)
    assert_type(sock.send(b"x"), None)
    assert_type(sock.send_multipart([b"x"], routing_id=1), plain.MessageTracker | None)
    assert_type(sock.get_monitor_socket().recv(), bytes)
    assert_type(sock.context, zmq.Context)
    assert_type(zmq.Context.instance(), zmq.Context)
    assert_type(green.Context(), zmq.Context)
    assert_type(zmq.select([sock], [], [], 1.0), tuple[list[Any], list[Any], list[Any]])
    assert_type(Mine(context, zmq.REQ, 5.0).recv(), bytes)
    with sock.bind("inproc://s"), zmq.Context() as other, other.socket(zmq.PUB) as pub:
        assert_type(pub, zmq.Socket)
    knows_plain_sockets(sock)
    zmq.proxy(sock, sock)
    with Authenticator(context) as auth:
        auth.configure_plain(passwords={"name": "word"})
    greensafe.monkey.patch_zmq()
    poller = zmq.Poller()
    poller.register(sock, zmq.POLLIN)
    for ready, mask in poller.poll(10):
        assert_type(mask, int)
    with deadline(5) as scope:
        assert_type(scope.remaining(), float)
    with move_on(1) as scope:
        pass
    assert_type(scope.expired, bool)


def handler(request: Request) -> bytes:
    return request.body


@deadline(1)
def limited(number: int) -> str:
    return str(number)


assert_type(limited(1), str)
with Server("inproc://s", handler, deadline=1), Client("inproc://s") as client:
    assert_type(client.request(b"x", timeout=1), bytes)
    assert_type(client.request_multipart([b"x"]), list[bytes])
"""

WRONG = """
import greensafe as zmq

sock = zmq.Context().socket(zmq.REQ)
text: str = sock.recv()
sock.recv(timeout="soon")
"""


@pytest.mark.check
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (extra: dev)")
@pytest.mark.parametrize(("program", "errors"), [(PROGRAM, 0), (WRONG, 2)])
def test_a_users_program_under_mypy_strict(tmp_path: Path, program: str, errors: int) -> None:
    """`sock.recv()` is bytes, a Frame with copy=False; a wrong use is found."""
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}/cache", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if ": error:" in line and line.startswith("program.py")]
    assert len(found) == errors, done.stdout + done.stderr
